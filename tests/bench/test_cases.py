"""The benchmarks of the operators: what is there, and that each case computes the operator, those of a GPU on a CPU."""

import pytest
import torch

from atst_fast import ops
from atst_fast.bench import parity, timing
from atst_fast.bench.cases import OPERATORS, augment, frame_attention, log_mel, patch_embed
from atst_fast.bench.operator import OURS, Missing
from atst_fast.bench.session import Session
from tests import tolerances
from tests.bench.fake import PretendedGpu
from tests.cuda.test_augment import make_case

# what no peer of torch's does at all, or is a part of another operator's call
WITHOUT = {"AugmentDraws", "MemoryBank", "build_info", "draw_augment", "frame_attention_packed"}
# on a CPU: packages that only a GPU has, and kernels of torch
NEED_A_GPU = {"sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn", "apex", "torchaudio"}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # small cases do not wait for a second core


def test_every_public_operator_is_measured():
    assert {*OPERATORS} == ({*ops.__all__} - WITHOUT) | {"adamw_ema"}
    for name, operator in OPERATORS.items():
        assert operator.name == name
        for device in ("cpu", "cuda"):
            assert "tiny" in operator.sizes[device]
            assert len([p for p in operator.providers.values() if device in p.devices and not p.part]) >= 2, name


def test_cases_have_names_of_their_own():
    for device in ("cpu", "cuda"):
        cases = [c for o in OPERATORS.values() for c in (*o.cases(device), *o.curve_cases(device))]
        assert len({(c.group, c.name) for c in cases}) == len(cases)


def test_curves_go_over_what_the_inputs_have():
    axes = {name: {c.kind for c in operator.curve_cases("cpu")} for name, operator in OPERATORS.items()}
    assert axes["log_mel"] == {"over frames", "over batch", "over threads"}
    assert axes["frame_attention"] == {"over tokens", "over batch", "over threads"}
    assert all("over threads" in found for found in axes.values())
    only = [*OPERATORS["bias_gelu"].curve_cases("cpu", ["tokens"])]
    assert {c.kind for c in only} == {"over tokens"}
    assert {c.params["way"] for c in only} == {"forward", "backward"}
    gpu = [*OPERATORS["bias_gelu"].curve_cases("cuda")]
    assert {c.kind for c in gpu} == {"over tokens", "over batch"}


GPU_CASES = [
    c for o in OPERATORS.values() for c in o.cases(PretendedGpu()) if c.size == "tiny" and c.kind != "in a graph"
]


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case.operator.name}-{case.id}")
def test_a_case_of_a_gpu_computes_the_operator(case, monkeypatch):
    """In bfloat16, what is compiled as it is."""
    if case.provider in NEED_A_GPU or (case.provider, case.params.get("way")) == ("flex", "backward"):
        pytest.skip(f"{case.provider} needs a GPU")
    monkeypatch.setattr(timing, "compiled", lambda call: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    Session().check(case)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_what_a_gpu_alone_has_says_so_when_it_is_called(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for case in GPU_CASES:
        if case.provider in NEED_A_GPU and case.provider != "sdpa_flash":
            with pytest.raises((Missing, RuntimeError)):
                Session().check(case)


@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_results_have_no_parity(name):
    """Off by one per cent of what a call changes, in any of its results: found, in each direction."""
    operator = OPERATORS[name]
    assert {case.provider for case in operator.cases("cpu")} >= {OURS}
    for case in operator.cases("cpu"):
        if case.size != "tiny" or case.provider != OURS:
            continue
        right = operator.providers[OURS]
        inputs = case.make()
        truth = operator.truth(inputs)
        returned = operator.results(inputs, right.make(inputs)())
        results = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        parity.check(results, truth, "float32", operator.allowed)
        for i, result in enumerate(results):
            wrong = [*results[:i], result * 1.01, *results[i + 1 :]]
            with pytest.raises(parity.ParityError, match="no parity: its error is"):
                parity.check(wrong, truth, "float32", operator.allowed)


@pytest.mark.parametrize("name", ["ema_update_", "adamw_ema"])
def test_an_update_that_does_nothing_has_no_parity(name):
    operator = OPERATORS[name]
    case = next(c for c in operator.cases("cpu") if c.size == "tiny")
    inputs = case.make()
    truth = operator.truth(inputs)
    idle = inputs.teacher if name == "ema_update_" else inputs.changed()
    with pytest.raises(parity.ParityError):
        parity.check(idle, truth, "float32", operator.allowed)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bank_frames, canvas", [(50, None), (30, (20, 60)), (90, (16, 75))])
def test_the_peer_of_augment_takes_any_draws(seed, bank_frames, canvas):
    arguments = make_case(seed, 6, 16, 50, slots=3, bank_frames=bank_frames, canvas=canvas)
    plain = augment.batched(*arguments)
    torch.testing.assert_close(plain, torch.ops.atst_fast.augment(*arguments), rtol=0, atol=tolerances.AUGMENT)


def work_of(operator, device="cpu", size="tiny", **options):
    case = next(c for c in operator.cases(device) if c.size == size and options.items() <= c.options.items())
    return operator.work(case.make())


def test_what_a_case_counts():
    """By hand: what must be read and written once, and the operations of the products."""
    for dtype, size in (("int16", 2), ("float32", 4)):
        work = work_of(log_mel.OPERATOR, dtype=dtype)
        assert work["bytes"] == 16000 * size + 101 * 64 * 4
        assert work["items"] == (1, "s audio")
    for masked, live in ((True, 10), (False, 20)):
        work = work_of(patch_embed.OPERATOR, masked=masked, way="forward")
        assert work["bytes"] == 4 * (20 * 48 + live * 256 + 48 * 256)
        assert work["flops"] == 2 * live * 256 * 48
    assert work_of(augment.OPERATOR)["bytes"] == 5 * 2 * 64 * 101 * 4
    full, ragged = (work_of(frame_attention.OPERATOR, lengths=x, way="backward") for x in ("full", "ragged"))
    assert full["flops"] == 5 * 2 * 128 * (400 + 400)
    assert ragged["flops"] == 5 * 2 * 128 * (25 + 400)
    assert ragged["bytes"] == 4 * 128 * (5 * 25 + 3 * 40)


def test_the_definition_of_attention_is_made_in_pieces(monkeypatch):
    case = next(c for c in frame_attention.OPERATOR.cases("cpu") if c.params["lengths"] == "ragged")
    whole = frame_attention.truth(case.make())
    monkeypatch.setattr(frame_attention, "_CHUNK", 1)
    torch.testing.assert_close(frame_attention.truth(case.make()), whole)
