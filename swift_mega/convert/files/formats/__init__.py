"""One file per storage format of quantised weights. convert/files/quantised.py finds its `FORMAT` by `quant_method`."""
