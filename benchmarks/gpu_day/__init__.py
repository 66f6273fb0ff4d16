"""``python -m benchmarks.gpu_day``: what a GPU is asked first, in three calls of minutes."""
