"""One operator per file: the fused form, where there is one, beside its torch reference. No model, no ranks."""
