import pytest
import torch
from hypothesis import settings


def pytest_addoption(parser):
    parser.addoption("--max-examples", type=int, help="examples per hypothesis test, whatever the test says")


def pytest_collection_modifyitems(config, items):
    most = config.getoption("max_examples", None)
    if most is None:
        return
    for item in items:
        test = getattr(item, "obj", None)
        if getattr(test, "is_hypothesis_test", False):
            own = test._hypothesis_internal_use_settings  # where hypothesis's own pytest plugin looks
            test._hypothesis_internal_use_settings = settings(own, max_examples=min(most, own.max_examples))


@pytest.fixture(autouse=True)
def _no_leftovers():
    """An error of an earlier kernel shows up in the test that launched it."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
