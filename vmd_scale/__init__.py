"""Distributed pretraining of variational masked diffusion language models."""

__version__ = "0.1.0"
