"""What a layout costs, by arithmetic alone: no weights, no ranks, no GPU."""
