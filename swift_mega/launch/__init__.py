"""Starting ranks on this machine, or joining those that torchrun or Slurm started."""
