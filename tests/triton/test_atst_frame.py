"""The step with shapes that depend on no value: the same numbers as where the CPU counts, and nothing that waits."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atst_fast.models import ATSTFrame
from tests.tolerances import NETWORK_RTOL

SIZES = {"hidden": 40, "out": 16, "mlp_ratio": 2.0, "drop_path_rate": 0.0, "max_frames": 41}
ARCH = {"dim": 32, "depth": 2, "num_heads": 2}


def device_of(where, request):
    """Where the operators are the CPU's ("plain"), or the Triton kernels in their place."""
    return "cpu" if where == "plain" else request.getfixturevalue("triton_ops").device


def make_system(**kwargs):
    system = ATSTFrame(ARCH, **SIZES | kwargs)
    with torch.no_grad():
        for p in system.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return system


def make_batch(ragged):
    mask = torch.rand(2, 10) < 0.5
    mask[:, :2] = True
    lengths = torch.tensor([41, 23]) if ragged else None
    return *torch.randn(2, 2, 1, 64, 41), lengths, mask


def step(system, batch, device="cpu", **kwargs):
    """Loss and spreads, gradients and buffers, on the CPU."""
    system.to(device)
    out = system(*(x if x is None else x.to(device) for x in batch), **kwargs)
    out.loss.backward()
    grads = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    found = {"loss": torch.stack([x.detach() for x in out])} | grads | dict(system.named_buffers())
    return {name: x.cpu() for name, x in found.items()}


@pytest.mark.parametrize(
    "where, symmetric, ragged",
    [("plain", True, False), ("plain", True, True), ("plain", False, True), ("triton", True, True)],
)
def test_the_same_step_by_lists_of_fixed_size(request, where, symmetric, ragged):
    device = device_of(where, request)
    system, batch = make_system(symmetric=symmetric), make_batch(ragged)
    want = step(copy.deepcopy(system), batch)
    got = step(system, batch, device, capacity=15)
    assert set(got) == set(want)
    for name, x in want.items():
        atol = 2 * NETWORK_RTOL * max(x.abs().max().item(), 1e-2)
        torch.testing.assert_close(got[name], x, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("where, empty", [("plain", False), ("plain", True), ("triton", False)])
def test_what_does_not_fit_gives_nan_and_moves_nothing(request, where, empty):
    """More masked tokens than there is room for, or none."""
    device = device_of(where, request)
    system, (view1, view2, _, mask) = make_system(), make_batch(False)
    before = {name: x.clone() for name, x in system.named_buffers() if "running" in name}
    after = step(system, (view1, view2, None, mask & False if empty else mask), device, capacity=3)
    assert after.pop("loss").isnan().all()
    for name, x in after.items():
        if name in before:
            assert torch.equal(x, before[name]), name
        elif "num_batches" not in name:
            assert not x.any(), name


class NothingWaits(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "repeat_interleave")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert name not in self.WAITS, name
        assert not any(i is not None and i.dtype == torch.bool for i in indices), name
        return func(*args, **(kwargs or {}))


def test_nothing_asks_the_device(monkeypatch):
    """On a CPU as on a GPU, but for the checks of values that are only made on a CPU, and not while compiling."""
    system, batch = make_system(drop_path_rate=0.5), make_batch(ragged=True)
    for network in (system.student, system.teacher):
        network.encoder.fixed_shapes = True
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for kwargs in ({"capacity": 15}, {}):
        with NothingWaits():
            out = system(*batch, **kwargs)
            out.loss.backward()
        assert all(x.isfinite() for x in out)
    with pytest.raises(AssertionError, match="index"), NothingWaits():
        torch.ones(3)[torch.ones(3, dtype=torch.bool)]
