"""What a run hands back: Hugging Face directories and PEFT adapters. A training run's checkpoints are exports, so `train`
comes after."""
