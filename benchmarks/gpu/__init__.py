"""Whole training steps and the configurations of kernels on a GPU; operators are in benchmarks/bench_ops.py."""
