"""Equality with transformers: logits, loss, gradients and hidden states of any layout, compared with one device."""
