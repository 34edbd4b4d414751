"""Networks: Flax Linen modules, and nothing else."""
