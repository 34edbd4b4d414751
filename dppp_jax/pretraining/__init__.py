"""From a configuration of `configs/pretrain_*.py` to a folder with a network.

One module for each kind of network; each has `train(config, workdir)`.
"""
