import pytest
import torch

from tests.integrations.layouts import frame_system


@pytest.fixture
def system():
    return frame_system()


@pytest.fixture
def bare(system, tmp_path):
    """Writes the teacher's encoder as a bare state dict, changed by a function."""

    def write(change=lambda state: None):
        state = system.teacher.encoder.state_dict()
        change(state)
        torch.save(state, tmp_path / "bare.pt")
        return tmp_path / "bare.pt"

    return write
