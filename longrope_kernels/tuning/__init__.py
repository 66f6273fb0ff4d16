"""`longrope tune`: search the tiles of the attention kernels on a GPU, and print their tables."""
