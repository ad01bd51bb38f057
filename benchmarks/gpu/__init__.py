"""The operators on a GPU, beside what one would call otherwise there: ``pytest benchmarks/gpu --benchmark-enable``.

Collected only where there is a GPU and this build has kernels for it. A case is written as in benchmarks/conftest.py,
with the fixture ``measure`` in place of ``benchmark``: CUDA events time it, not the clock of the CPU.
"""
