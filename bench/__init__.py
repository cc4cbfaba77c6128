"""Benchmarks of multilora against plain PyTorch: `python -m bench`, or under pytest-benchmark."""
