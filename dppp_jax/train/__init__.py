"""The engine of training: losses, optimiser rules, stages, the loop."""
