"""The Triton kernels: block-sparse attention, dropout and attention maps on NVIDIA GPUs."""
