"""The CUDA C++ backend (csrc/cuda), and under ``LONGROPE_CUDA_EMULATE=1`` its emulator."""
