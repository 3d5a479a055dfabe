"""From data files to microbatches of tokens.

sources reads files; formats brings every data row into one form; template finds the characters that the model is trained to write;
chat makes tokens and a loss mask; pack joins examples into packed rows; loader runs these in order; batches serves the steps.
"""
