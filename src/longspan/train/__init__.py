"""Extend and pretrain models: data, loop, checkpoints, recipes."""
