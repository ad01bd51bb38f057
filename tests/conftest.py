import pytest
import torch

from atst_fast import _C

_ISAS = ["portable", "avx2", "avx512"]


def _runs_here(isa):
    try:
        _C.force_isa(isa)
    except ValueError:
        return False
    _C.force_isa("")
    return True


@pytest.fixture(params=[isa for isa in _ISAS if _runs_here(isa)])
def isa(request):
    """Run the test once with the kernels of every CPU instruction set of this machine."""
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa("")


@pytest.fixture
def threads():
    """Set the number of threads for one test: ``threads(2)``."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
