"""The outputs of a run: Hugging Face directories and PEFT adapters. Checkpoints of a training run are exports, so `train` imports this."""
