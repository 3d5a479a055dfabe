"""How ranks share a model and a batch: layouts, process groups, and arithmetic over a cut vocabulary."""
