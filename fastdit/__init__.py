"""Sparse attention for video diffusion transformers in Hugging Face diffusers."""

__version__ = "0.1.0"
