"""``python -m longrope_kernels``: the command line of a checkout that is not installed."""

from .cli import main

main()
