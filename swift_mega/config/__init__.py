"""Settings: the tree (`schema`), and how a recipe, overrides and flags fill it (`load`)."""
