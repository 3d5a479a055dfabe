"""Modules of our own that take a place in Megatron's layers."""
