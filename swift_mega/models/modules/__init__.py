"""Our own modules that replace modules in Megatron's layers."""
