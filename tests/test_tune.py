"""What would be timed on a GPU: every candidate of every Triton kernel, run here on small tensors and a fake clock."""

import importlib
from pathlib import Path

import pytest
import torch

from atst_fast.bench import machine
from benchmarks.gpu import tune
from tests.bench.fake import Clock

KERNELS = Path(tune.__file__).parents[2] / "kernels"
SMALL = tune.Size(dim=64, heads=2, clips=1, tokens=16, hidden=64, out=32, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", tune.CASES)
def test_a_case_runs(triton_ops, name):
    """As it is used, which the call without a configuration is, too."""
    case = tune.CASES[name](SMALL)
    assert case.used in case.candidates or SMALL.dtype == torch.float32
    results = [case.call(config) for config in (case.used, None)]
    for got, want in zip(*(r if isinstance(r, tuple) else (r,) for r in results)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_every_configuration_is_a_candidate(triton_ops):
    # heads as wide as those of a training step, but fewer: attention's backward needs a forward
    sizes = [tune.Size(dim, heads, clips=1, hidden=256, out=32, device="cpu") for dim, heads in ((768, 12), (64, 1))]
    offered = set()
    for name in tune.CASES:
        case = tune.CASES[name](sizes["attention" in name])
        assert case.used in case.candidates, name
        offered |= {(type(c).__module__, c) for c in case.candidates}
    for path in KERNELS.glob("[!_]*.py"):
        module = importlib.import_module(f"atst_fast.kernels.{path.stem}")
        for name, configs in vars(module).items():
            # those of float32 and of long sequences or wide heads are not a training step's
            if name in ("CONFIGS", "FORWARD_CONFIGS", "BACKWARD_CONFIGS") and "attention" not in path.stem:
                assert {(module.__name__, c) for c in configs} <= offered, f"{path.name}: {name}"


def test_a_candidate_that_cannot_run_costs_no_other(monkeypatch):
    clock = Clock()

    def call(config):
        if config == 3:
            raise RuntimeError("out of resource: shared memory\nand more")
        clock.now += config

    monkeypatch.setitem(tune.CASES, "made_up", lambda size: tune.Case(call, (2, 3, 1), 2))
    entries = tune.tune("made_up", "base", clock)
    assert [e.get("median_s") for e in entries] == [2, None, 1]
    assert tune.lines(entries) == [
        "made_up, base",
        "   1000000.0 us   0.500  1",
        "   2000000.0 us  in use  2",
        "          failed  3: RuntimeError: out of resource: shared memory",
    ]


def test_what_is_written(monkeypatch, tmp_path, capsys):
    says = {"device": {"name": "Some GPU", "isa": "sm_90"}, "commit": {"id": "abc", "dirty": False}}
    monkeypatch.setattr(tune, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "describe_gpu", lambda: says)
    monkeypatch.setattr(tune.timing, "Cuda", Clock)
    monkeypatch.setitem(tune.CASES, "made_up", lambda size: tune.Case(lambda c: None, (1,), 1))
    monkeypatch.setattr("sys.argv", ["tune", "made_up"])
    tune.main()
    (path,) = tmp_path.rglob("*.json")
    assert path.parent == tmp_path / "some-gpu" / "tune"
    assert f"written to {path}" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tune", "nonsense"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "there is no nonsense" in capsys.readouterr().err
