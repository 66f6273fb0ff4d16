"""What ``longrope demo`` runs: a model with and without the kernels, errors, times, a figure."""
