import pytest

from atst_fast.train.config import UserError
from atst_fast.train.device import pick_device


def test_a_device_that_is_not_there():
    assert pick_device("auto").type in ("cpu", "cuda")
    for device in ("cuda:97", "nonsense"):
        with pytest.raises(UserError, match=f"--device {device}"):
            pick_device(device)
    for device in ("meta", "mps"):
        with pytest.raises(UserError, match=f"--device must be auto, cpu, cuda or cuda:N, got {device}$"):
            pick_device(device)
