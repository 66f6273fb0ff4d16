"""One module or folder a backend; they never import one another. `choose` picks one."""
