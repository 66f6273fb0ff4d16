"""The Triton backend: CUDA, and under ``TRITON_INTERPRET=1`` the interpreter on CPU tensors."""
