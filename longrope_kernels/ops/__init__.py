"""The public functions, each beside the torch.library op that it calls."""
