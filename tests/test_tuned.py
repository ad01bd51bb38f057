"""The tuned PyTorch step that the benchmarks compare with computes what ours does."""

import pytest
import torch
import torch.nn.functional as F

from atst_fast.models import ATSTFrame
from benchmarks import tuned, tuned_front_end
from benchmarks.official_front_end import FrontEnd as OfficialFrontEnd
from tests.tolerances import BF16_RTOL, FRONT_END, NETWORK_RTOL

TINY = {"dim": 24, "depth": 3, "num_heads": 3}
HEADS = {"hidden": 40, "out": 16}
RATES = {"lr": 1e-3, "weight_decay": 0.04, "momentum": 0.99}
CLIPS, FRAMES, CAPACITY = 4, 41, 30


def both(symmetric=True, drop_path=0.0):
    ours = ATSTFrame(TINY, symmetric=symmetric, max_frames=FRAMES, drop_path_rate=drop_path, **HEADS)
    plain = tuned.System(TINY, symmetric=symmetric, positions=10, drop_path_rate=drop_path, **HEADS)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def batch():
    mask = torch.rand(CLIPS, FRAMES // 4) < 0.5
    mask[:, :2] = True
    return *torch.randn(2, CLIPS, 1, 64, FRAMES), mask


def assert_same(got, want, what):
    # gradients that the batch statistics cancel (norm_frame.bias) are nothing but rounding of the others
    atol = NETWORK_RTOL * max(want.abs().max().item(), 1e-2)
    torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("capacity", [CAPACITY, 40])
def test_the_networks_are_ours(symmetric, capacity):
    ours, plain = both(symmetric)
    view1, view2, mask = batch()
    assert mask.sum() < CAPACITY
    want = ours(view1, view2, None, mask)
    got = plain(view1, view2, mask, capacity)
    assert_same(torch.stack(got), torch.stack(want), "loss and spreads")
    want[0].backward()
    got[0].backward()
    for name, p in ours.student.named_parameters():
        assert_same(plain.student.get_parameter(name).grad, p.grad, name)
    for name, buffer in ours.named_buffers():
        assert_same(plain.get_buffer(name), buffer, name)


def test_more_masked_rows_than_places_are_not_silent():
    _, plain = both()
    view1, view2, mask = batch()
    assert plain(view1, view2, mask, int(mask.sum()))[0].isfinite()
    assert plain(view1, view2, mask, int(mask.sum()) - 1)[0].isnan()


def test_dropped_paths():
    block = tuned.Block(24, 3, 2.0, 0.5)
    x, rows = torch.randn(64, 10, 24), tuned.Rows(torch.rand(32, 10) < 0.5, 320)
    y = block(x)
    same = (y == x).all(2).all(1).float().mean()
    assert 0 < same < 0.6  # both branches dropped: a quarter
    torch.manual_seed(1)
    full = block(x)
    torch.manual_seed(1)
    torch.testing.assert_close(block(x, rows), rows.take(full), rtol=0, atol=1e-5)
    factors = torch.cat([block.factors(x)[0] for _ in range(20)])
    assert factors.unique().tolist() == [0, 2]
    assert factors.mean().item() == pytest.approx(1, abs=0.15)


def test_bfloat16_follows():
    _, plain = both()
    arguments = *batch(), CAPACITY
    want = plain(*arguments)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = plain(*arguments)[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=BF16_RTOL, atol=0)


def test_everything_is_one_graph(monkeypatch):
    """Without the code generator, which takes minutes: no graph breaks, and the same numbers."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, mode, **kwargs: compile(m, backend=backend, **kwargs))
    torch._dynamo.reset()
    _, plain = both(drop_path=0.1)
    arguments = *batch(), CAPACITY
    torch.manual_seed(0)
    want = plain(*arguments)[0]
    torch.manual_seed(0)
    assert_same(tuned.compiled(plain, "max-autotune")(*arguments)[0], want, "loss")
    front_end = tuned_front_end.FrontEnd(CLIPS, (FRAMES - 1) * 160, 6)
    tuned.compiled(front_end, "max-autotune")(waves())
    assert len(graphs) == 2
    torch._dynamo.reset()


def waves():
    return (torch.randn(CLIPS, (FRAMES - 1) * 160) * 3000).to(torch.int16)


def test_a_step_moves_student_and_teacher():
    _, plain = both()
    front_end = tuned_front_end.FrontEnd(CLIPS, (FRAMES - 1) * 160, 6)
    step = tuned.Step(plain, front_end, CAPACITY, **RATES, tuned=False)
    before = {name: p.clone() for name, p in plain.state_dict().items()}
    losses = [step(waves()) for _ in range(3)]
    assert all(0 < loss < 4 for loss in losses)
    still = {name for name, p in plain.state_dict().items() if torch.equal(p, before[name])}
    assert not still
    assert len(step.teacher) == len(list(plain.teacher.parameters()))
    moved = [t.clone() for t in step.teacher]
    step(waves())
    for t, was, s in zip(step.teacher, moved, step.student):
        torch.testing.assert_close(t, 0.99 * was + 0.01 * s)


def test_the_front_end_is_the_official_one():
    front_end, official = tuned_front_end.FrontEnd(3, 16000, 4), OfficialFrontEnd()
    wave = (torch.randn(3, 16000) * 3000).to(torch.int16)
    mel = front_end.log_mel(wave)
    for clip, got in zip(wave, mel):
        torch.testing.assert_close(got, official.log_mel(clip[None].float() / 32768)[0], rtol=0, atol=FRONT_END)
    top, height = torch.tensor([0, 5, 20]), torch.tensor([64, 40, 44])
    for x, got, i, h in zip(mel, tuned_front_end.stretch(mel, top, height), top, height):
        want = F.interpolate(x[None, None, i : i + h], x.shape, mode="bicubic", align_corners=True)[0, 0]
        torch.testing.assert_close(got, want, rtol=0, atol=FRONT_END)


def test_clips_are_mixed_with_earlier_ones():
    """Constant clips of their own loudness: what each was mixed with can be read off."""
    front_end = tuned_front_end.FrontEnd(5, 16000, bank_size=4)
    pushed = 0
    for _ in range(6):
        levels = torch.arange(pushed, pushed + 5) / 100
        y = front_end.mix(levels[:, None, None].expand(5, 64, 101).contiguous())[:, 0, 0]
        for number, value in enumerate(y.tolist(), pushed):
            low, high = max(number - 4, 0) / 100, number / 100
            assert low - 1e-6 <= value <= high + 1e-6
            assert number == 0 or value < high
        pushed += 5
    assert int(front_end.pushed) == 30


def test_views_and_masks():
    view1, view2, mask = tuned_front_end.FrontEnd(40, 16000, 4)((torch.randn(40, 16000) * 3000).to(torch.int16))
    assert view1.shape == view2.shape == (40, 1, 64, 101)
    assert mask.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert not torch.equal(view1, view2)
    assert view2.isfinite().all()
