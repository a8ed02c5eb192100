"""Measurements that are kept: run with ``python -m benchmarks.<name>``, results in ``benchmarks/results/``."""
