"""The families: one file is one family, a difference from the common decoder. models/family.py finds them."""
