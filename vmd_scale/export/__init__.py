"""Weights that leave the project: a Hugging Face style folder that loads without it."""
