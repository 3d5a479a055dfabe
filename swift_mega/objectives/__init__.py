"""One training objective per file. Scanned for `OBJECTIVE`."""
