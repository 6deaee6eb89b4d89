"""Corruption, objectives, likelihood bounds and samplers. Knows tensors and a model: no files, no DeepSpeed."""
