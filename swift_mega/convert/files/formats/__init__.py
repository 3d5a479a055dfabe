"""One file per way of storing quantised weights; `FORMAT` in it is the entry that convert/files/quantised.py finds by `quant_method`."""
