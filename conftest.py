"""What comes before the conftest of any folder, in whatever order pytest is given them, and holds for every test."""

import random
import zlib

import hypothesis
import numpy as np
import pytest
import torch

from tests.triton import interpreter

if not torch.cuda.is_available():
    # triton chooses between its interpreter and its compiler while it is imported, which a benchmark may do
    interpreter.enable()

# The same examples in every run: what changes with the day belongs to --hypothesis-profile=default.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What a test draws is its own, whichever tests ran before it in its process."""
    _seed(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """So is what a fixture of a module draws, whichever test is the first to ask for it; and it leaves no trace."""
    if fixturedef.scope == "function":
        return (yield)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    _seed(f"{fixturedef.baseid} {fixturedef.argname} {request.param_index}")
    try:
        return (yield)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def _seed(name):
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what stands in for the official transforms draws from it)
    torch.manual_seed(seed)
