"""``python -m benchmarks.report``: tests, then benchmarks, then a page about this machine."""
