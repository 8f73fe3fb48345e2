"""Loci: memory for language models, in every place a model can hold it."""

__version__ = "0.1.0"
