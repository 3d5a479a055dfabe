"""One way to train per file: what is frozen, what is added, and how it is exported. Scanned for `TUNER`."""
