"""Sampling: step tables, conditioning, and the loop that denoises."""
