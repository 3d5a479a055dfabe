"""Model families as data, and the one decoder that builds them in Megatron-core for any layout."""
