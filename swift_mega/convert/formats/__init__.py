"""One file per way of storing quantised weights; `FORMAT` in it is the entry that convert/quantised.py finds by `quant_method`."""
