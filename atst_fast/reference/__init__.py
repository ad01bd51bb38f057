"""The definition of correct: each operator in plain PyTorch, any dtype and device, no cleverness.

Imported by tests, by benchmarks and by the fallback in ``atst_fast.ops`` only.
"""
