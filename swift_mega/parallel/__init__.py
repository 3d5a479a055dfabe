"""How ranks share a model and a batch: layouts, process groups, context parallelism, and the loss over a sharded vocabulary."""
