"""Nothing here needs NumPy. Where it is missing torch warns once, at its import or first tensor."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

    torch.tensor([0.0], device="cpu")
