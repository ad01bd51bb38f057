"""Embeddings of audio of any length: of the whole, and every 40 ms."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from atst_fast.integrations.spans import Span, covering, official_clip, official_frame
from atst_fast.models import ClipEncoder, FrameEncoder
from atst_fast.models.features import CLIP_CHUNK
from atst_fast.models.pretrained import Pretrained
from atst_fast.nn import LogMelSpectrogram
from atst_fast.ops import _checks

_NAME = "Embedder"
_AXES = "[B, N] or [B, 1, N] (clips, samples)"
_BLOCKS = 12  # the official code takes as many of the last blocks


class Embedder(Pretrained):
    """An encoder with its front end, for audio of any length.

    Longer audio goes through the encoder in chunks of the length that it was trained on. A token stands for
    ``hop_ms`` (40 ms) and the i-th one starts at exactly ``i * hop_ms``, after an hour too; every sample is covered,
    ``ceil(N / 640)`` tokens at 16 kHz, so that the last one may be made of a part of its frames (the last of which is
    repeated). In the embedding of the whole every token counts for the samples that it stands for.

    Args:
        encoder: a ``FrameEncoder`` or a ``ClipEncoder``. Put it in eval mode: this module does not.
        front_end: a ``LogMelSpectrogram``, the keyword arguments of one, or None for the official values.
        n_blocks: how many of the last blocks are read, each after the last norm, side by side in ascending order;
            default: 12, as in the official code, or all where there are fewer.
        chunk_frames: mel frames of a chunk; default: what the encoder has positions for, and 600 (6 s) for a
            ``ClipEncoder``, which has learned no others.
        official: do as audiossl's code does: chunks of 1001 frames (``ClipEncoder``: 601) of which the last frame is
            lost, so that times drift by 10 ms per chunk; nothing but whole patches; all chunks count the same
            (``ClipEncoder``: see ``spans.official_clip``).
        batch_size: chunks that go through the encoder together, sorted by length.

    Attributes: ``sample_rate`` (Hz), ``hop_ms``, ``scene_embedding_size``, ``timestamp_embedding_size``.
    Differentiable in the encoder's parameters and, through the front end's reference, in float waveforms.
    Matches audiossl/methods/atstframe/embedding.py where ``official``.
    """

    encoder: FrameEncoder | ClipEncoder
    front_end: LogMelSpectrogram

    def __init__(
        self,
        encoder: FrameEncoder | ClipEncoder,
        front_end: LogMelSpectrogram | Mapping[str, Any] | None = None,
        *,
        n_blocks: int | None = None,
        chunk_frames: int | None = None,
        official: bool = False,
        batch_size: int = 8,
    ):
        super().__init__()
        if not isinstance(encoder, FrameEncoder | ClipEncoder):
            kind = type(encoder).__name__  # and not all that it holds
            raise TypeError(f"{_NAME}: encoder must be a FrameEncoder or a ClipEncoder, got a {kind}")
        if not isinstance(front_end, LogMelSpectrogram):
            front_end = LogMelSpectrogram(**{"n_mels": encoder.n_mels, **(front_end or {})})
        bands = front_end.mel_scale.get_buffer("fb").shape[1]
        if bands != encoder.n_mels:
            raise ValueError(f"{_NAME}: front_end must make {encoder.n_mels} mel bands, as encoder takes; got {bands}")
        depth = len(encoder.blocks)
        n_blocks = min(_BLOCKS, depth) if n_blocks is None else n_blocks
        if not 1 <= n_blocks <= depth:
            _checks.fail(_NAME, "n_blocks", f"from 1 to {depth}, the encoder's depth", n_blocks)
        if batch_size < 1:
            _checks.fail(_NAME, "batch_size", "at least 1", batch_size)
        self.encoder, self.front_end = encoder, front_end
        self.is_clip = isinstance(encoder, ClipEncoder)
        self.n_blocks, self.official, self.batch_size = n_blocks, official, batch_size
        self.rows, self.patch = encoder.n_mels // encoder.patch_embed.patch_height, encoder.patch_embed.patch_width
        self.chunk_frames = self._chunk(chunk_frames)
        self.sample_rate = front_end.sample_rate
        self.hop_ms = 1000 * self.patch * front_end.hop_length / front_end.sample_rate
        self.timestamp_embedding_size = n_blocks * encoder.dim
        self.scene_embedding_size = self.timestamp_embedding_size * (2 if self._has_cls else 1)

    def to_config(self) -> dict[str, Any]:
        """What `save_pretrained` keeps beside the weights, which include the front end's tables."""
        own = {"n_blocks": self.n_blocks, "chunk_frames": self.chunk_frames, "official": self.official}
        return {
            "encoder": type(self.encoder).__name__,
            "model": self.encoder.config,
            "front_end": self.front_end.config,
            "embedder": {**own, "batch_size": self.batch_size},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Embedder":
        """An embedder of a `to_config`, its encoder on the meta device."""
        kinds: dict[str, type[FrameEncoder | ClipEncoder]] = {k.__name__: k for k in (FrameEncoder, ClipEncoder)}
        encoder = kinds[config["encoder"]].from_config(config)
        return cls(encoder, LogMelSpectrogram(**config["front_end"]), **config["embedder"])

    def scene(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """One embedding per clip, ``[B, scene_embedding_size]`` float32: the mean of its tokens, weighted as above.

        Args:
            waveform: ``[B, N]`` or ``[B, 1, N]`` at ``sample_rate``, float in [-1, 1] or int16 (read as x / 32768).
            lengths: int64 ``[B]``, valid samples of each clip, 1 to N; None: all. Clips shorter than n_fft // 2 + 1
                samples are zero-padded to that. Each clip comes out as it would alone, up to rounding.

        The blocks lie side by side in ascending order. Of a ``ClipEncoder`` with a class token: first the class
        tokens of all blocks (the mean over chunks, by their length), then the means of the tokens.

        Raises:
            TypeError: waveform or lengths of another dtype. ValueError: a shape or a length out of range.
        """
        mel, samples = self._mel(waveform, lengths)
        scenes = mel.new_zeros(len(mel), self.scene_embedding_size)
        for owners, parts, spans in self._batches(mel, samples, "scene"):
            index = torch.tensor([owner for owner, _ in owners], device=mel.device)
            scenes = scenes.index_add(0, index, self.pool(*self.encode(parts, spans), spans))
        return scenes

    def timestamps(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """An embedding every ``hop_ms``: ``[B, T, timestamp_embedding_size]``, and when each starts, ms ``[B, T]``.

        Arguments and errors are those of `scene`; both are float32. T is ``tokens(N)``, or that of the longest clip;
        rows past a clip's own ``tokens`` are zeros.
        """
        mel, samples = self._mel(waveform, lengths)
        pieces: list[dict[int, Tensor]] = [{} for _ in samples]
        for owners, parts, spans in self._batches(mel, samples, "timestamps"):
            for (owner, order), tokens, span in zip(owners, self.encode(parts, spans)[1], spans):
                pieces[owner][order] = tokens[: span.tokens]
        none = mel.new_zeros(0, self.timestamp_embedding_size)  # of what the official code has no whole patch of
        clips = [torch.cat([none, *(of[order] for order in sorted(of))]) for of in pieces]
        embeddings = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        return embeddings, self.times(embeddings.shape[1], mel.device).expand(len(clips), -1)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`scene`."""
        return self.scene(waveform, lengths)

    def tokens(self, samples: int) -> int:
        """How many embeddings `timestamps` makes of so many samples."""
        return sum(span.tokens for span in self.spans(samples, "timestamps"))

    def times(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """When each of the first ``tokens`` tokens starts, ms: float32 ``[tokens]``, the nearest to the exact value."""
        return (torch.arange(tokens, dtype=torch.float64, device="cpu") * self.hop_ms).float().to(device)

    def spans(self, samples: int, kind: Literal["scene", "timestamps"]) -> list[Span]:
        """The parts of so many samples that go through the encoder, in order."""
        samples = max(samples, self.shortest)
        hop = self.front_end.hop_length
        if not self.official:
            return covering(samples, hop, self.patch, self.chunk_frames)
        if self.is_clip and kind == "scene":
            return official_clip(samples // hop + 1, self.patch, self.chunk_frames)
        return official_frame(samples // hop + 1, self.patch, self.chunk_frames)

    @property
    def _has_cls(self) -> bool:
        return isinstance(self.encoder, ClipEncoder) and self.encoder.use_cls

    @property
    def shortest(self) -> int:
        """The samples that the front end needs at least; what is shorter is zero-padded."""
        return self.front_end.n_fft // 2 + 1

    def encode(self, parts: Sequence[Tensor], spans: Sequence[Span]) -> tuple[Tensor | None, Tensor]:
        """Class tokens ``[C, n * D]`` (of a ``ClipEncoder``) and tokens ``[C, L, n * D]``, float32, of C parts.

        ``parts``: the log-mel ``[n_mels, frames]`` of each span. L is the largest number of tokens; rows past a span's
        own are not to be read.
        """
        longest = max(span.tokens for span in spans) * self.patch
        mel = torch.stack([_fit(part, span.tokens * self.patch, longest) for part, span in zip(parts, spans)])
        lengths = torch.tensor([span.tokens * self.patch for span in spans])
        cls = None
        if isinstance(self.encoder, ClipEncoder):
            cls, tokens = self.encoder.intermediate(mel[:, None], lengths, self.n_blocks)
        else:
            tokens = self.encoder.intermediate(mel[:, None], lengths, self.n_blocks)
        if self.rows > 1:  # patches above one another, of the same time
            tokens = tokens.unflatten(1, (-1, self.rows)).mean(dim=2)
        return None if cls is None else cls.float(), tokens.float()

    def pool(self, cls: Tensor | None, tokens: Tensor, spans: Sequence[Span]) -> Tensor:
        """What each span adds to the scene embedding of its clip, ``[C, scene_embedding_size]``."""
        weights = torch.zeros(len(spans), tokens.shape[1])
        for row, span in zip(weights, spans):
            row[: span.tokens] = 1
            row[span.tokens - 1] = span.last
            row *= span.share / span.divisor
        with torch.autocast(tokens.device.type, enabled=False):  # a mean in half precision would be rounded
            pooled = torch.bmm(weights.to(tokens.device)[:, None], tokens)[:, 0]
        if cls is None or not self._has_cls:
            return pooled
        shares = torch.tensor([span.share for span in spans]).to(tokens.device)
        return torch.cat([cls * shares[:, None], pooled], dim=1)

    def _chunk(self, frames: int | None) -> int:
        most = self.encoder.max_frames
        if frames is None:
            frames = most
            if self.is_clip:
                frames = min(most, CLIP_CHUNK)
            return frames if self.official else frames // self.patch * self.patch
        if frames < self.patch:
            _checks.fail(_NAME, "chunk_frames", f"at least {self.patch}, the frames of a token", frames)
        if frames > most and self.encoder.pos_type == "cut":
            _checks.fail(_NAME, "chunk_frames", f"at most {most}, for which the encoder has positions", frames)
        return frames

    def _mel(self, waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, list[int]]:
        """Log-mel ``[B, n_mels, T]`` and the samples of each clip."""
        _checks.tensor(_NAME, "waveform", waveform, _AXES)
        if waveform.dim() == 3 and waveform.shape[1] == 1:
            waveform = waveform[:, 0]
        if waveform.dim() != 2 or 0 in waveform.shape:
            _checks.fail(_NAME, "waveform", f"{_AXES}, none of them 0", waveform)
        if waveform.is_floating_point():
            waveform = waveform.float()
        elif waveform.dtype != torch.int16:
            _checks.fail(_NAME, "waveform", f"{_AXES}, float or int16", waveform, TypeError)
        clips, n = waveform.shape
        samples = [n] * clips
        if lengths is not None:
            expected = f"[{clips}] (valid samples of each clip, 1 to {n})"
            _checks.tensor(_NAME, "lengths", lengths, expected, dim=1, dtypes=(torch.int64,))
            samples = lengths.tolist()
            if len(samples) != clips or not 1 <= min(samples) <= max(samples) <= n:
                _checks.fail(_NAME, "lengths", expected, samples)
        if min(samples) < self.shortest:
            waveform, samples = _pad_short(waveform, samples, self.shortest)
        if min(samples) == waveform.shape[1]:
            return self.front_end(waveform[:, None])[:, 0], samples
        return self.front_end(waveform, torch.tensor(samples)), samples

    def _batches(
        self, mel: Tensor, samples: Sequence[int], kind: Literal["scene", "timestamps"]
    ) -> Iterator[tuple[list[tuple[int, int]], list[Tensor], list[Span]]]:
        """(clip, place of the span in it) of every part of the batch, the parts and the spans; the longest first."""
        todo = [(owner, i, s) for owner, n in enumerate(samples) for i, s in enumerate(self.spans(n, kind))]
        todo.sort(key=lambda item: -item[2].tokens)
        for at in range(0, len(todo), self.batch_size):
            some = todo[at : at + self.batch_size]
            parts = [mel[owner, :, span.start : span.start + span.frames] for owner, _, span in some]
            yield [(owner, i) for owner, i, _ in some], parts, [span for _, _, span in some]


def _fit(part: Tensor, frames: int, longest: int) -> Tensor:
    """``[n_mels, frames]`` by repeating the last frame, then zeros up to ``longest``."""
    missing = frames - part.shape[1]
    if missing:
        part = torch.cat([part, part[:, -1:].expand(-1, missing)], dim=1)
    return torch.nn.functional.pad(part, (0, longest - frames))


def _pad_short(waveform: Tensor, samples: Sequence[int], shortest: int) -> tuple[Tensor, list[int]]:
    """Clips that are too short for the front end get zeros at their end."""
    waveform = torch.nn.functional.pad(waveform, (0, max(0, shortest - waveform.shape[1])))
    limits = torch.tensor([n if n < shortest else waveform.shape[1] for n in samples], device=waveform.device)
    inside = torch.arange(waveform.shape[1], device=waveform.device) < limits[:, None]
    return waveform.where(inside, torch.zeros((), dtype=waveform.dtype, device=waveform.device)), [
        max(n, shortest) for n in samples
    ]
