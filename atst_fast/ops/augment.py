"""The augmented views of a batch of clips, given the draws, and the memory bank that they are mixed with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atst_fast.ops import _checks
from atst_fast.ops._registry import register
from atst_fast.reference import augment as reference

_OP = "augment_views"
_AXES = "[B, 1, F, T] (clips, 1, mel bins, frames)"
_MOST_CANVAS = 1 << 20  # bins or frames


class AugmentDraws(NamedTuple):
    """What is random about one view of a batch; all on the CPU or on the device of the mel.

    ``partner`` int64 ``[B]``: whom a clip is mixed with: -1 nobody, 0 to C - 1 a slot of the bank of C slots, C + b
    clip b of the same batch. ``start`` int64 ``[B]``: where a shorter partner is laid over the clip, or a longer one is
    read from. ``alpha`` float32 ``[B]``: weight of the partner. ``crop`` int64 ``[B, 4]``: first bin, first frame,
    height and width on the canvas. ``canvas``: its bins and frames, at least those of the mel, which lies in its
    middle.
    """

    partner: Tensor
    start: Tensor
    alpha: Tensor
    crop: Tensor
    canvas: tuple[int, int]


class MemoryBank:
    """The last ``capacity`` clips, unmixed: a ring on the device of the mel, allocated when the first clips come.

    ``pushed`` clips (int64, no axes) have come so far; clip number n lies in slot ``n % capacity`` of ``mels``
    ``[capacity, F, T]``, with its ``lengths`` int64 ``[capacity]`` columns, 0 in an empty slot. All three lie on one
    device and `push` writes in place and never waits for it, so a CUDA graph can hold it, once the bank is as wide as
    its clips. ``count`` is ``pushed`` as an int, which on a GPU waits for the device.
    """

    def __init__(self, capacity: int = 2000):
        _checks.number("MemoryBank", "capacity", capacity, "at least 1 clip", 1, whole=True)
        self.capacity = capacity
        self.mels: Tensor | None = None
        self.lengths = torch.zeros(capacity, dtype=torch.int64)
        self.pushed = torch.zeros((), dtype=torch.int64)

    @property
    def count(self) -> int:
        return int(self.pushed)

    @property
    def device(self) -> torch.device:
        """Of the bank; an empty one goes to that of its first clips."""
        return self.lengths.device

    def to(self, device: torch.device | str) -> "MemoryBank":
        """Move the bank; it is itself returned."""
        self.mels = None if self.mels is None else self.mels.to(device)
        self.lengths, self.pushed = self.lengths.to(device), self.pushed.to(device)
        return self

    def push(self, mel: Tensor) -> None:
        """Append the clips of ``mel`` ``[B, 1, F, T]``; of more than ``capacity`` the last ones stay."""
        _checks.tensor("MemoryBank", "mel", mel, _AXES, dim=4)
        clips, _, bins, frames = mel.shape
        self._hold(bins, frames, mel)
        assert self.mels is not None
        kept = mel[-self.capacity :, 0]
        slots = self.slots(self.pushed + torch.arange(clips - len(kept), clips, device=mel.device))
        self.mels[:, :, :frames].index_copy_(0, slots, kept.to(self.mels.dtype))
        self.lengths.index_fill_(0, slots, frames)
        self.pushed.add_(clips)

    def slots(self, numbers: Tensor) -> Tensor:
        """Where clips of those numbers lie."""
        return numbers % self.capacity

    def _hold(self, bins: int, frames: int, like: Tensor) -> None:
        """Make room for clips of that size; a bank of narrower clips is copied into a wider one."""
        old = self.mels
        if old is None:
            self.to(like.device)
        else:
            _checks.same_device("MemoryBank", "the bank", old, mel=like)
            if old.shape[1] != bins:
                raise ValueError(f"MemoryBank: mel must have the {old.shape[1]} mel bins of the bank, got {bins}")
        if old is None or old.shape[2] < frames:
            self.mels = torch.empty(self.capacity, bins, frames, dtype=torch.float32, device=like.device)
            if old is not None:
                used = min(self.count, self.capacity)
                self.mels[:used, :, : old.shape[2]] = old[:used]

    def state_dict(self) -> dict:
        """Tensors and numbers of the filled part; zero past the clips' lengths, where the bank holds anything."""
        used = min(self.count, self.capacity)
        lengths, mels = self.lengths[:used].clone(), None
        if self.mels is not None:
            past = torch.arange(self.mels.shape[2], device=self.device) >= lengths[:, None]
            mels = self.mels[:used].masked_fill(past[:, None], 0.0)
        return {"count": self.count, "mels": mels, "lengths": lengths}

    def load_state_dict(self, state: dict) -> None:
        """Continue where a bank of the same capacity was, on the device of the state's mels."""
        mels, used = state["mels"], state["lengths"].shape[0]
        if used != min(state["count"], self.capacity):
            raise ValueError(f"MemoryBank: the state is of a bank of another capacity than {self.capacity}")
        if used and (mels is None or mels.dim() != 3 or len(mels) != used or state["lengths"].max() > mels.shape[2]):
            expected = f"[{used}, F, T] with T at least the longest of its lengths"
            _checks.fail("MemoryBank", "the state's mels", expected, mels)
        self.mels = None
        if mels is not None:
            self._hold(mels.shape[1], mels.shape[2], mels)
            assert self.mels is not None
            self.mels[:used] = mels
        self.pushed.fill_(state["count"])
        self.lengths.zero_()
        self.lengths[:used] = state["lengths"]


def draw_augment(
    shape: Sequence[int],
    bank: MemoryBank | None,
    generator: torch.Generator | None = None,
    *,
    mixup_ratio: float = 0.4,
    canvas_scale: tuple[float, float] = (1.0, 1.0),
    freq_scale: tuple[float, float] | None = (0.6, 1.5),
    time_scale: tuple[float, float] = (1.0, 1.0),
) -> AugmentDraws:
    """Draw one view of a batch of ``shape`` (B, 1, F, T) as the official transforms do, clip after clip.

    Each clip is mixed with one of the (at most ``bank.capacity``) clips before it, those of the same batch included,
    with weight ``mixup_ratio * U[0, 1)``; the very first one, or without a bank, with nobody. The crop has
    ``int(U(freq_scale) * F)`` bins and ``int(U(time_scale) * T)`` frames, at least 1 and at most those of the canvas of
    ``canvas_scale`` times the input, at a uniform place; ``freq_scale=None``: no crop.

    The draws come from the device of ``generator`` (the default one of the bank's device, without it) and are on the
    bank's device, or where they were drawn while it is empty. Seven uniform float64 a clip; the rest is the same on
    every device. Nothing waits for a GPU that holds generator and bank, and a CUDA graph can hold it.
    Source: audiossl/methods/atstframe/transform.py, audiossl/transforms/byol_a.py.
    """
    _check_options(bank, generator, mixup_ratio, canvas_scale, freq_scale, time_scale)
    if len(shape) != 4:
        _checks.fail("draw_augment", "shape", _AXES, shape)
    clips, _, bins, frames = shape
    filled = bank is not None and bank.mels is not None
    drawn_on = generator.device if generator is not None else bank.device if bank is not None else None
    u = torch.rand(clips, 7, dtype=torch.float64, generator=generator, device=drawn_on)
    u = u.to(bank.device, non_blocking=True) if bank is not None and filled else u
    u_alpha, u_partner, u_start, u_freq, u_time, u_bin, u_frame = u.unbind(1)
    if bank is None:
        partner = torch.full((clips,), -1, device=u.device)
        start = torch.zeros_like(partner)
    else:
        partner, start = _draw_partners(bank, u_partner, u_start, frames)
    canvas = (int(bins * canvas_scale[0]), int(frames * canvas_scale[1]))
    if freq_scale is None:
        zero = torch.zeros(clips, dtype=torch.int64, device=u.device)
        crop = [zero, zero, zero + canvas[0], zero + canvas[1]]
    else:
        h = (_between(freq_scale, u_freq) * bins).long().clamp(1, canvas[0])
        w = (_between(time_scale, u_time) * frames).long().clamp(1, canvas[1])
        crop = [(u_bin * (canvas[0] + 1 - h)).long(), (u_frame * (canvas[1] + 1 - w)).long(), h, w]
    return AugmentDraws(partner, start, (mixup_ratio * u_alpha).float(), torch.stack(crop, 1), canvas)


def _check_options(bank, generator, mixup_ratio, canvas_scale, freq_scale, time_scale) -> None:
    op = "draw_augment"
    for name, value, kind in (("bank", bank, MemoryBank), ("generator", generator, torch.Generator)):
        if value is not None and not isinstance(value, kind):
            _checks.fail(op, name, f"a {kind.__name__} or None", value, TypeError)
    _checks.number(op, "mixup_ratio", mixup_ratio, "a number")
    for name, pair in (("canvas_scale", canvas_scale), ("freq_scale", freq_scale), ("time_scale", time_scale)):
        if pair is None and name == "freq_scale":
            continue
        if not isinstance(pair, Sequence) or len(pair) != 2:
            _checks.fail(op, name, "two numbers", pair)
        for value in pair:
            _checks.number(op, name, value, "two numbers")


def _draw_partners(bank: MemoryBank, u_partner: Tensor, u_start: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Who is mixed with each clip, and where: one of the last clips before it, by its distance."""
    count, lengths = bank.pushed.to(u_partner.device), bank.lengths.to(u_partner.device)
    before = count + torch.arange(len(u_partner), device=u_partner.device)
    number = before - 1 - (u_partner * before.clamp(max=bank.capacity)).long()
    slot, in_batch = bank.slots(number), number >= count
    partner = torch.where(in_batch, bank.capacity + number - count, slot)
    slack = (lengths[slot] - frames).abs().masked_fill(in_batch | (before == 0), 0)
    return partner.masked_fill(before == 0, -1), (u_start * (slack + 1)).long()


def _between(bounds: tuple[float, float], u: Tensor) -> Tensor:
    return u * (bounds[1] - bounds[0]) + bounds[0]


def augment_views(
    mel: Tensor, draws: Sequence[AugmentDraws | None], banks: Sequence[MemoryBank | None] | None = None
) -> tuple[Tensor, ...]:
    """Views of a batch of clips, one per entry of ``draws``; None gives ``mel`` itself, without a copy.

    Args:
        mel: ``[B, 1, F, T]`` normalised log-mel, float32, bfloat16 or float16 (computed in float32).
        draws: what is random about each view, from `draw_augment` or recorded.
        banks: the bank of each view, or None where nothing is mixed. After the views are made the unmixed clips are
            pushed into each bank.

    Each view is read once, written once: log-mixup-exp with the partner, then a bicubic crop (A = -0.75, corners
    aligned, no antialias, no clamping). Not differentiable: ``mel`` must not require a gradient.
    Largest difference from upstream for values between -1.5 and 1.5: 2e-6. A NaN stays in its clip and those mixed with
    it. Matches audiossl/transforms/byol_a.py (Mixup, RandomResizeCrop) given the draws.

    Draws on a GPU are not looked at, which would wait for it: there, one that is out of range (or a slot of the bank
    that is still empty) makes the view of its clip NaN.

    Raises:
        TypeError: another type or dtype. ValueError: a shape or draw out of range, tensors on different devices, or a
        mel that requires a gradient.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    _checks.tensor(_OP, "mel", mel, _AXES, dim=4, dtypes=dtypes)
    _check_list("draws", draws, AugmentDraws)
    if mel.shape[1] != 1:
        _checks.fail(_OP, "mel", _AXES, mel)
    if mel.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: mel must not require a gradient: augmentation has none; detach it first")
    banks = [None] * len(draws) if banks is None else banks
    _check_list("banks", banks, MemoryBank)
    if len(banks) != len(draws):
        raise ValueError(f"{_OP}: banks must have an entry for each of the {len(draws)} draws, got {len(banks)}")
    full = mel.float().contiguous()
    views = tuple(mel if d is None else _view(full, d, bank).to(mel.dtype) for d, bank in zip(draws, banks))
    for d, bank in zip(draws, banks):
        if d is not None and bank is not None:
            bank.push(full)
    return views


def _check_list(name: str, values: object, kind: type) -> None:
    # draws of one view are a tuple themselves
    if isinstance(values, kind) or not isinstance(values, Sequence):
        _checks.fail(_OP, name, f"a list of {kind.__name__} or None, one per view", type(values), TypeError)
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, kind):
            _checks.fail(_OP, f"{name}[{i}]", f"{kind.__name__} or None", value, TypeError)


def _view(mel: Tensor, draws: AugmentDraws, bank: MemoryBank | None) -> Tensor:
    _check_draws(mel, draws, bank)
    slots = 0 if bank is None else bank.capacity
    if bank is None or bank.mels is None:
        mels, lengths = mel.new_empty(slots, mel.shape[2], 0), draws.start.new_zeros(slots)
    else:
        _checks.same_device(_OP, "mel", mel, bank=bank.mels)
        mels, lengths = bank.mels, bank.lengths

    def near(x: Tensor) -> Tensor:
        return x.contiguous().to(mel.device, non_blocking=True)

    per_clip = map(near, (lengths, draws.partner, draws.start, draws.alpha, draws.crop))
    return torch.ops.atst_fast.augment(mel, mels, *per_clip, list(draws.canvas))


def _check_draws(mel: Tensor, draws: AugmentDraws, bank: MemoryBank | None) -> None:
    clips, _, bins, frames = mel.shape
    names = {"partner": ([clips], torch.int64), "start": ([clips], torch.int64), "alpha": ([clips], torch.float32)}
    names["crop"] = ([clips, 4], torch.int64)
    for name, (shape, dtype) in names.items():
        value = getattr(draws, name)
        _checks.tensor(_OP, f"draws.{name}", value, str(shape), dtypes=(dtype,))
        if list(value.shape) != shape:
            _checks.fail(_OP, f"draws.{name}", f"{shape}, one entry per clip", value)
        if value.device not in (mel.device, torch.device("cpu")):
            _checks.fail(_OP, f"draws.{name}", f"on the CPU or on {mel.device}, as mel is", value)
    if not (bins <= draws.canvas[0] <= _MOST_CANVAS and frames <= draws.canvas[1] <= _MOST_CANVAS):
        expected = f"from ({bins}, {frames}), the size of mel, to {_MOST_CANVAS} either way"
        _checks.fail(_OP, "draws.canvas", expected, draws.canvas)
    where = [x.device.type for x in (draws.partner, draws.start, draws.crop)]
    if {*where, "cpu" if bank is None else bank.device.type} == {"cpu"}:
        _check_values(mel, draws, bank)


def _check_values(mel: Tensor, draws: AugmentDraws, bank: MemoryBank | None) -> None:
    clips, _, _, frames = mel.shape
    slots, lengths = (0, []) if bank is None else (bank.capacity, bank.lengths.tolist())
    used = 0 if bank is None else min(bank.count, slots)
    for b, (who, start, (i, j, h, w)) in enumerate(
        zip(draws.partner.tolist(), draws.start.tolist(), draws.crop.tolist())
    ):
        if not (who == -1 or 0 <= who < used or slots <= who < slots + clips):
            expected = f"-1, a filled slot of the bank (0 to {used - 1}) or {slots} + a clip of the batch"
            raise ValueError(f"{_OP}: draws.partner[{b}] must be {expected}, got {who}")
        slack = abs(lengths[who] - frames) if 0 <= who < used else 0
        if not 0 <= start <= slack:
            raise ValueError(f"{_OP}: draws.start[{b}] must be from 0 to {slack} frames, got {start}")
        if min(i, j) < 0 or min(h, w) < 1 or i + h > draws.canvas[0] or j + w > draws.canvas[1]:
            expected = f"(bin, frame, height, width) within the canvas {tuple(draws.canvas)}"
            raise ValueError(f"{_OP}: draws.crop[{b}] must be {expected}, got {(i, j, h, w)}")


register("augment", CUDA=reference.augment)


@torch.library.register_fake("atst_fast::augment")
def _(mel, bank, bank_lengths, partner, start, alpha, crop, canvas):
    return mel.new_empty(mel.shape)
