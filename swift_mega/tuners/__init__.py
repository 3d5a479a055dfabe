"""Tuners, one per file: what is frozen, what is added, and how it is exported. A file is found by its `TUNER`."""
