"""The families: one file is one family, as a difference from the common decoder. models/family.py finds them."""
