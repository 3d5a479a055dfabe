"""Starts ranks on this machine, or joins ranks that torchrun or Slurm started."""
