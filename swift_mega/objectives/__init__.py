"""Training objectives, one file each; files are scanned for `OBJECTIVE`."""
