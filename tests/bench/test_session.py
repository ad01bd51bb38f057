"""Running cases: parity before time, one definition for all providers, and what becomes of those that fail."""

import itertools
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from atst_fast.bench import parity
from atst_fast.bench.operator import OURS, Case, Missing, Operator, Provider, installed, thread_counts
from atst_fast.bench.session import LeftOut, Measured, Session, run
from tests.bench.fake import Clock


def operator(**providers):
    """Doubling a vector, in place."""
    made = {OURS: Provider(lambda x: lambda: x.mul_(2)), **providers}
    return Operator(
        "add_norm",  # one that build_info() knows
        sizes={"cpu": {"tiny": {"n": 3}}},
        make=lambda device, n: torch.rand(n, device=device) + 1,
        providers=made,
        truth=lambda x: [2 * x.double()],
        work=lambda x: {"bytes": 8 * len(x)},
    )


def measured(op, **session):
    return list(run(op.cases("cpu"), Session(seconds=0.01, **session)))


def test_parity_comes_from_the_first_call_and_every_provider_starts_anew():
    found = measured(operator(peer=Provider(lambda x: lambda: x.add_(x))))
    assert [type(m) for m in found] == [Measured, Measured]
    assert all(m.extra_info["parity"] == {"error": 0.0, "allowed": 2e-5} for m in found)
    assert [m.extra_info.get("runs") for m in found] == ["PyTorch", None]
    assert [m.params for m in found] == [{"size": "tiny", "provider": p} for p in (OURS, "peer")]


def test_the_definition_is_computed_once_per_comparison():
    calls = []
    op = operator(peer=Provider(lambda x: lambda: x.add_(x)))
    op = replace(op, truth=lambda x: calls.append(1) or [2 * x.double()])
    assert len(measured(op)) == 2
    assert len(calls) == 1


def test_each_comparison_has_its_own_definition():
    op = replace(operator(), sizes={"cpu": {"tiny": {"n": 3}, "small": {"n": 5}, "other": {"n": 3}}})
    offsets = itertools.count(1)
    op = replace(op, make=lambda device, n: torch.full((n,), float(next(offsets))))
    assert [type(m) for m in measured(op)] == [Measured] * 3


@pytest.mark.parametrize(
    "call, why",
    [
        (lambda x: lambda: 2.001 * x, "no parity: its error is 5.0e-04, allowed are 2e-05"),
        (lambda x: lambda: x * torch.nan, "no parity: its error is inf"),
        (lambda x: lambda: (x, x), "2 results, where the operator has 1"),
        (lambda x: lambda: x[:2], r"a result of shape [2], where the operator has [3]"),
        (lambda x: lambda: torch.cat([x, x]), r"a result of shape [6], where the operator has [3]"),
    ],
)
def test_wrong_results_have_no_time(call, why):
    _, wrong = measured(operator(peer=Provider(call)))
    assert isinstance(wrong, LeftOut)
    assert wrong.fault
    assert why in wrong.why


def test_whose_fault_it_is():
    def broken(x):
        raise RuntimeError("no kernel\nand more")

    _, peer = measured(operator(peer=Provider(broken)))
    assert (peer.why, peer.fault) == ("RuntimeError: no kernel", False)
    ours, peer = measured(operator(**{OURS: Provider(broken), "peer": Provider(lambda x: lambda: 2 * x)}))
    assert (ours.why, ours.fault) == ("RuntimeError: no kernel", True)
    assert isinstance(peer, Measured)


def test_a_peer_that_is_not_installed_is_named_with_its_cure():
    with pytest.raises(Missing, match=r"nonsense is not installed \(pip install nonsense\)"):
        installed("nonsense.part", "pip install nonsense")
    _, peer = measured(operator(peer=Provider(lambda x: installed("nonsense", "pip install nonsense"))))
    assert not peer.fault
    assert "nonsense is not installed" in peer.why


def test_a_bound_has_no_parity_but_a_note():
    _, bound = measured(operator(bare=Provider(lambda x: lambda: None, part="half of it")))
    assert bound.extra_info["note"] == "half of it"
    assert "parity" not in bound.extra_info


def test_a_case_runs_on_its_threads():
    before, seen = torch.get_num_threads(), []
    op = operator(peer=Provider(lambda x: lambda: (seen.append(torch.get_num_threads()), 2 * x)[1]))
    case = Case(op, "cpu", "tiny", {"threads": 1}, {}, "peer")
    Session(seconds=0.01).measure(case)
    assert {*seen} == {1}
    assert torch.get_num_threads() == before


def test_the_call_alone_is_timed():
    clock = Clock()

    def slow_to_prepare(x):
        clock.now += 1000
        return lambda: (setattr(clock, "now", clock.now + 3), 2 * x)[1]

    (ours,) = measured(operator(**{OURS: Provider(slow_to_prepare)}), stopwatch=clock)
    assert (ours.stats.median, ours.stats.rounds) == (3, 11)


def test_how_far_off_a_result_may_be():
    want = torch.tensor([-4.0, 0.5], dtype=torch.float64)
    assert parity.distance(torch.tensor([-4.0, 0.6]), want) == pytest.approx(0.1 / 4)
    assert parity.distance(torch.tensor([0.25]), torch.zeros(1, dtype=torch.float64)) == 0.25
    # a result in bfloat16 has the allowance of its dtype, whatever the inputs were
    assert parity.check(torch.tensor([-4.0, 0.6]).bfloat16(), [want], "float32", {}).allowed == 3e-2
    with pytest.raises(parity.ParityError):
        parity.check(torch.tensor([-4.0, 0.6]), [want], "float32", {})
    # what is too far off for its dtype is found beside what is further off and may be
    with pytest.raises(parity.ParityError, match=r"its error is 1\.0e-03, allowed are 2e-05"):
        parity.check([want.float() + 0.004, (want + 0.04).bfloat16()], [want, want], "float32", {})


def test_tf32_products_are_allowed_their_error(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    assert parity.dtype_of_products("float32", "cuda") == "tf32"
    assert parity.dtype_of_products("float32", "cpu") == "float32"
    assert parity.dtype_of_products("bfloat16", "cuda") == "bfloat16"


@pytest.mark.parametrize(
    "most, cores, counts", [(1, 8, (1,)), (4, 2, (1, 2, 4)), (6, 8, (1, 2, 4, 6)), (8, 8, (1, 2, 4, 8))]
)
def test_curves_over_threads(monkeypatch, most, cores, counts):
    monkeypatch.setattr(torch, "get_num_threads", lambda: most)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert thread_counts() == counts
