"""The kernels for NVIDIA GPUs, imported when first used."""
