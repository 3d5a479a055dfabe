"""Equality with transformers: logits, loss, gradients and hidden states of any layout beside those of one device."""
