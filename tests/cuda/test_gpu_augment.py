"""What only a GPU can show of the augmentation: streams, graphs, devices that must not be waited for, large tensors."""

import pytest
import torch

from atst_fast.ops.augment import MemoryBank, augment_views, draw_augment
from atst_fast.train.front_end import FrontEnd
from tests import tolerances as tol
from tests.conftest import needs_gpu

pytestmark = needs_gpu

TWO_AXES = {"canvas_scale": (1.0, 1.5), "time_scale": (0.6, 1.5)}


def near(a, b):
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=tol.AUGMENT)


def mels(clips, frames=101):
    return torch.rand(clips, 1, 64, frames, device="cuda") * 2.3 - 1.3


def filled_bank(device="cuda", capacity=7):
    bank = MemoryBank(capacity).to(device)
    generator = torch.Generator().manual_seed(0)
    for frames in (150, 70):
        bank.push(torch.rand(4, 1, 64, frames, generator=generator).to(device))
    return bank


def on_cpu(mel, drawn, bank):
    tensors = [x.cpu() for x in (mel, bank.mels, bank.lengths, *drawn[:4])]
    return torch.ops.atst_fast.augment(*tensors, list(drawn.canvas))


@pytest.mark.parametrize("scales", [{}, TWO_AXES], ids=["frame", "clip"])
def test_draws_of_a_cpu_generator_are_the_same_for_a_bank_on_a_gpu(scales):
    draws = [
        draw_augment((40, 1, 64, 101), filled_bank(device), torch.Generator().manual_seed(5), **scales)
        for device in ("cpu", "cuda")
    ]
    assert all(x.is_cuda for x in draws[1][:4])
    assert all(torch.equal(x, y.cpu()) for x, y in zip(draws[0][:4], draws[1][:4]))


def test_nothing_waits_for_the_gpu():
    bank, mel = filled_bank(), mels(5)
    generator = torch.Generator("cuda").manual_seed(1)
    augment_views(mel, [draw_augment(mel.shape, bank, generator)], [bank])  # everything is loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = draw_augment(mel.shape, bank, generator, **TWO_AXES)
        augment_views(mel, [drawn], [bank])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bank.count == 18


def test_on_a_stream_of_its_own():
    bank, mel = filled_bank(), torch.zeros(3, 1, 64, 1001, device="cuda")
    drawn = draw_augment(mel.shape, bank, torch.Generator("cuda").manual_seed(1), **TWO_AXES)
    values = mels(3, 1001)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        mel.copy_(values)
        view = augment_views(mel, [drawn], [bank])[0]
    stream.synchronize()
    near(view, on_cpu(values, drawn, filled_bank()))


def test_a_graph_of_draw_views_and_push():
    """Each replay draws anew, from the clips that the one before has pushed."""
    bank, mel = filled_bank(), mels(5)
    generator = torch.Generator("cuda").manual_seed(1)
    augment_views(mel, [draw_augment(mel.shape, bank, generator)], [bank])
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        drawn = draw_augment(mel.shape, bank, generator, **TWO_AXES)
        view = augment_views(mel, [drawn], [bank])[0]
    count, seen = bank.count, []
    for replay in range(4):
        mel.copy_(mels(5))
        before = MemoryBank(7)
        before.load_state_dict(bank.state_dict())
        graph.replay()
        near(view, on_cpu(mel, drawn, before))
        assert bank.count == count + 5 * (replay + 1)
        before.push(mel)
        for slot, n in enumerate(before.lengths.tolist()):
            assert torch.equal(bank.mels[slot, :, :n], before.mels[slot, :, :n])
        seen.append(drawn.alpha.tolist())
    assert len({tuple(alpha) for alpha in seen}) == 4


@pytest.mark.parametrize("name, value", [("partner", 99), ("partner", 6), ("start", 500), ("crop", 65)])
def test_a_draw_out_of_range_makes_the_view_of_its_clip_nan(name, value):
    bank, mel = MemoryBank(7), mels(3)
    bank.push(mels(5))
    drawn = draw_augment(mel.shape, bank, torch.Generator("cuda").manual_seed(1))
    drawn.partner[0] = 0
    getattr(drawn, name)[0] = value
    view = augment_views(mel, [drawn], [bank])[0]
    assert torch.isnan(view[0]).all()
    assert torch.isfinite(view[1:]).all()


def test_tensors_on_different_devices():
    mel, bank = mels(2), filled_bank("cpu")
    drawn = draw_augment(mel.shape, None, torch.Generator("cuda"))
    with pytest.raises(ValueError, match=r"augment_views: bank must be on cuda:0, as mel is, got .* on cpu"):
        augment_views(mel, [drawn], [bank])
    with pytest.raises(ValueError, match=r"MemoryBank: mel must be on cpu, as the bank is, got .* on cuda:0"):
        bank.push(mel)
    with pytest.raises(ValueError, match=r"augment_views: draws.partner must be on the CPU or on cpu, .* on cuda:0"):
        augment_views(mel.cpu(), [drawn])
    args = [mel, mel[:0, 0], drawn.start[:0], *drawn[:4], list(drawn.canvas)]
    for i in range(1, 7):
        with pytest.raises(RuntimeError, match=r"augment: .* must be on a CUDA device"):
            torch.ops.atst_fast.augment(*args[:i], args[i].cpu(), *args[i + 1 :])


def test_more_than_two_billion_values():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    clips = 2**31 // (64 * 1001) + 3
    mel = torch.zeros(clips, 1, 64, 1001, device="cuda")
    mel[-2:] = mels(2, 1001)
    drawn = draw_augment(mel.shape, None, torch.Generator("cuda").manual_seed(1))
    drawn.partner[-1], drawn.alpha[-1] = clips - 2, 0.3
    view = augment_views(mel, [drawn])[0]
    last = drawn._replace(**{name: getattr(drawn, name)[-2:] for name in ("start", "alpha", "crop")})
    last = last._replace(partner=torch.tensor([-1, 0], device="cuda"))
    assert torch.equal(view[-2:], augment_views(mel[-2:], [last])[0])


def waves(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(-9000, 9000, (3, 8000), generator=generator).to(torch.int16).cuda()


def test_the_front_end_goes_on_from_its_state():
    one, other = FrontEnd(bank_size=5, seed=7).cuda(), FrontEnd(bank_size=5, seed=1).cuda()
    other.load_state_dict(FrontEnd(bank_size=5, seed=3).cuda().state_dict())  # of one that has not drawn yet
    for n in range(3):
        assert all(x.is_cuda for x in one(waves(n)))
    other.load_state_dict(one.state_dict())
    for n in range(3, 6):
        assert all(torch.equal(x, y) for x, y in zip(one(waves(n)), other(waves(n))))


def test_a_state_of_another_kind_of_device_is_refused():
    for saved, target, names in [("cpu", "cuda", "on cpu .* on cuda:0"), ("cuda", "cpu", "on a GPU .* on cpu")]:
        with pytest.raises(ValueError, match=f"FrontEnd: the state was saved {names}: the random states of different"):
            FrontEnd().to(target).load_state_dict(FrontEnd().to(saved).state_dict())
