"""Files of rows in, microbatches of tokens out.

sources reads files, formats gives every row one shape, template finds the characters that a model would have written,
chat makes them tokens and a mask, pack joins examples into rows, loader does the walk and batches serves the steps.
"""
