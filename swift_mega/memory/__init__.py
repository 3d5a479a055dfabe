"""Memory estimates: the bytes that a run needs in a layout, by formula. No weights, ranks or GPU are needed."""
