"""Every operator of atst_fast.bench, which defines sizes, inputs and providers: one item per case, named by its id.

Where there is a GPU that this build has kernels for, its cases are items too, marked ``gpu``.
"""

import pytest
import torch

import atst_fast
from atst_fast.bench.cases import OPERATORS
from atst_fast.bench.operator import OURS, Missing

DEVICES = ["cpu"]
if torch.cuda.is_available() and not atst_fast.build_info()["cuda"].startswith("none"):
    DEVICES.append("cuda")


def items(cases):
    """A test of each case."""
    marked = [pytest.param(c, id=c.id, marks=[pytest.mark.gpu] * (c.device == "cuda")) for c in cases]

    @pytest.mark.parametrize("case", marked)
    def test(measure, case):
        try:
            measure(case)
        except Missing as error:
            pytest.skip(f"{case.provider}: {error}")
        except (RuntimeError, NotImplementedError) as error:
            if case.provider.startswith(OURS):
                raise
            pytest.skip(f"{case.provider} does not run here: {error}")

    return test


for _name, _operator in OPERATORS.items():
    globals()[f"test_{_name}"] = items([case for device in DEVICES for case in _operator.cases(device)])
    globals()[f"test_curves_of_{_name}"] = items([c for device in DEVICES for c in _operator.curve_cases(device)])
