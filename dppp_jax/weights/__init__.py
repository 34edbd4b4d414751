"""Tensors in and out: folders, files and hub ids; strict conversion."""
