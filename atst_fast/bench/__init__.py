"""Microbenchmarks: every operator beside what one would call otherwise, its results checked in the same run.

``atst-fast bench`` runs them (atst_fast/train/bench.py), and so does ``pytest benchmarks`` in the source tree. From the
bottom up: ``operator`` says what a benchmark is made of, ``cases/`` has one of each operator, ``parity`` whether a
provider computes it, ``timing`` how long a call takes, ``session`` runs cases, ``machine`` what this machine can do at
most, ``report``, ``compare`` and ``plot`` what is shown of it all.
"""
