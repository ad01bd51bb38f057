"""What the two encoders share: patches, positions, blocks and a last LayerNorm."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atst_fast.models.pretrained import Pretrained
from atst_fast.nn import Block, FixedRows, PatchEmbed, Selection
from atst_fast.nn.plain import is_plain
from atst_fast.nn.stream import Stream, are_shapes_fixed, attended, drop_path_factors
from atst_fast.ops import _checks

# "small", "base" and "large" are the published sizes; "tiny" is for demonstrations on a CPU.
ARCHS: dict[str, dict[str, int]] = {
    "tiny": {"dim": 128, "depth": 4, "num_heads": 2},
    "small": {"dim": 384, "depth": 12, "num_heads": 6},
    "base": {"dim": 768, "depth": 12, "num_heads": 12},
    "large": {"dim": 1024, "depth": 24, "num_heads": 16},
}
_Encoder = TypeVar("_Encoder", bound="Encoder")


class Encoder(Pretrained):
    """The base of ``FrameEncoder`` and ``ClipEncoder``, which say what enters the blocks and what is read from them.

    Args:
        arch: a name in ``ARCHS`` or a mapping with ``dim``, ``depth`` and ``num_heads``.
        drop_path_rate: of the last block; it grows linearly from 0 at the first one.
        n_mels: mel bins of the input. patch: (mel bins, frames) of a token. max_frames: what ``pos_embed`` is made for,
            ``(n_mels // patch[0]) * (max_frames // patch[1])`` rows and one more, row 0, that of a class token.
        pos_type: ``"cut"`` takes the first L positions, ``"interpolate"`` resizes all of them to the input (bicubic).
        patch_embed: ``"Linear"`` or ``"CNN"``, the two key layouts of ``nn.PatchEmbed``.
        mlp_ratio, qkv_bias: of the blocks.

    ``config`` holds all that it takes to build the encoder again: ``type(encoder)(**encoder.config)``.

    Throughout, ``mel`` is float ``[B, 1, n_mels, T]`` (B clips, T frames of 10 ms), ``lengths`` int64 ``[B]`` its valid
    frames, ``mask`` bool ``[B, L]`` with L = tokens of T frames. A wrong argument is named by ``ValueError`` or
    ``TypeError``. On a CPU ``lengths`` and ``mask`` are counted.

    On a GPU, or with ``fixed_shapes`` set to True, no shape depends on their values nor on the draws of stochastic
    depth, which that device makes: nothing is counted or waited for, and a CUDA graph can hold any call whose arguments
    lie on it. So it is while `torch.compile` or `torch.export` traces, on a CPU too. There a length out of range is not
    refused by name: on a GPU it gives NaN, on a CPU the kernel refuses it.
    """

    fixed_shapes: bool | None = None  # None: where the host cannot look at values
    tokens_learned: tuple[str, ...] = ("mask_embed",)  # parameters [1, 1, D]
    norm_key = "norm"  # of the last LayerNorm
    mask_embed: nn.Parameter

    def __init__(
        self,
        arch: str | Mapping[str, int] = "small",
        *,
        drop_path_rate: float = 0.1,
        n_mels: int = 64,
        patch: tuple[int, int] = (64, 4),
        max_frames: int = 1001,
        pos_type: str = "cut",
        patch_embed: str = "Linear",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
    ):
        super().__init__()
        size = self._size(arch)
        if pos_type not in ("cut", "interpolate"):
            raise ValueError(f"{self._name}: pos_type must be 'cut' or 'interpolate', got {pos_type!r}")
        if len(patch) != 2 or min(patch) < 1:
            _checks.fail(self._name, "patch", "two positive numbers, mel bins and frames", tuple(patch))
        self.grid = (n_mels // patch[0], max_frames // patch[1])
        if min(self.grid) < 1:
            _checks.fail(self._name, "patch", f"at most ({n_mels}, {max_frames}), (n_mels, max_frames)", tuple(patch))
        dim, depth = size["dim"], size["depth"]
        self.dim, self.n_mels, self.max_frames, self.pos_type = dim, n_mels, max_frames, pos_type
        self.config: dict[str, Any] = {
            "arch": arch if isinstance(arch, str) else size,
            "drop_path_rate": drop_path_rate,
            "n_mels": n_mels,
            "patch": tuple(patch),
            "max_frames": max_frames,
            "pos_type": pos_type,
            "patch_embed": patch_embed,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
        }
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        for name in self.tokens_learned:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, dim)))
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1] + 1, dim))
        self.patch_embed = PatchEmbed(*patch, dim, kind=patch_embed)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                size["num_heads"],
                mlp_ratio,
                qkv_bias,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                norm_layer=norm_layer,
            )
            for i in range(depth)
        )
        self.add_module(self.norm_key, norm_layer(dim))
        self.reset_parameters()

    def to_config(self) -> dict[str, Any]:
        """``{"model": config}``."""
        return {"model": self.config}

    @classmethod
    def from_config(cls: type[_Encoder], config: dict[str, Any]) -> _Encoder:
        """An encoder of a `to_config`, or of what JSON made of one, on the meta device."""
        model = config["model"]
        with torch.device("meta"):
            return cls(**{**model, "patch": tuple(model["patch"])})

    @property
    def last_norm(self) -> nn.LayerNorm:
        return getattr(self, self.norm_key)

    def reset_parameters(self) -> None:
        """Normal weights of std 0.02 (cut at +-2) for every Linear, the positions and learned tokens; biases 0."""
        for name in ("pos_embed", *self.tokens_learned):
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()

    def prepare_tokens(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """What enters the first block."""
        raise NotImplementedError

    def tokens(self, frames: Tensor | int):
        """Number of tokens of that many mel frames (an int or a tensor of them), without a class token."""
        return self.patch_embed.tokens(frames, self.n_mels)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _size(self, arch: str | Mapping[str, int]) -> dict[str, int]:
        if isinstance(arch, str):
            if arch not in ARCHS:
                raise ValueError(f"{self._name}: arch must be one of {', '.join(ARCHS)}, got {arch!r}")
            return dict(ARCHS[arch])
        expected = "a name or a mapping with dim, depth and num_heads, each at least 1"
        if not isinstance(arch, Mapping):
            _checks.fail(self._name, "arch", expected, arch, TypeError)
        if set(arch) != {"dim", "depth", "num_heads"} or min(arch.values()) < 1:
            _checks.fail(self._name, "arch", expected, dict(arch))
        return dict(arch)

    def _patches(self, mel: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Embedded patches ``[B, L, D]``: masked ones replaced by the mask token, then positions added."""
        if mask is not None:
            self._check_mask(mask, mel.shape[0], self.tokens(mel.shape[3]))
            mask = mask.to(mel.device, non_blocking=True)
        # Out of the graph where nothing is masked: DistributedDataParallel would make a gradient of zeros for it, and
        # an optimizer decays what has a gradient.
        mask_embed = None if mask is None else self.mask_embed
        return self.patch_embed(mel, mask=mask, mask_embed=mask_embed, pos_embed=positions)

    def _check_mel(self, mel: Tensor) -> None:
        expected = f"[B, 1, {self.n_mels}, T] (clips, 1, mel bins, frames)"
        _checks.tensor(self._name, "mel", mel, expected, dim=4)
        if mel.shape[1] != 1 or mel.shape[2] != self.n_mels:
            _checks.fail(self._name, "mel", expected, mel)

    def _check_mask(self, mask: Tensor, clips: int, tokens: int) -> None:
        expected = _checks.Later("[{}, {}] (clips, tokens)", clips, tokens)
        _checks.tensor(self._name, "mask", mask, expected, dim=2, dtypes=(torch.bool,))
        if mask.shape != (clips, tokens):
            _checks.fail(self._name, "mask", expected, mask)

    def _check_positions(self, tokens: int, rows: int, frames: int) -> None:
        if tokens > rows:
            expected = f"at most {self.max_frames} frames long (cut it, or use pos_type='interpolate')"
            raise ValueError(f"{self._name}: mel must be {expected}, got {frames} frames")

    def resized_positions(self, frames: int) -> Tensor:
        """All positions but row 0, resized to the input: ``[1, L, D]``."""
        if frames < self.patch_embed.patch_width:  # torch does not resize to nothing
            return self.pos_embed[:, :0]
        # Resized by a scale factor, not to a size: the 0.1 (which guards the factor against rounding) shifts the
        # sampling points a little.
        rows, columns = self.grid
        scale = ((rows + 0.1) / rows, (frames // self.patch_embed.patch_width + 0.1) / columns)
        grid = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)
        return F.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)

    def _valid(self, lengths: Tensor | None, mel: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Valid tokens per clip on the device of mel, and where the lengths came; None: all are valid."""
        if lengths is None:
            return None, None
        frames = mel.shape[3]
        expected = _checks.Later("[{}] (valid frames of each clip, 0 to {})", mel.shape[0], frames)
        _checks.tensor(self._name, "lengths", lengths, expected, dim=1, dtypes=(torch.int64,))
        if lengths.shape[0] != mel.shape[0]:
            _checks.fail(self._name, "lengths", expected, lengths)
        host = self.tokens(lengths)
        if _checks.readable(lengths):
            if lengths.shape[0] and not 0 <= int(lengths.min()) <= int(lengths.max()) <= frames:
                _checks.fail(self._name, "lengths", expected, lengths.tolist())
            if (host >= self.tokens(frames)).all():
                return None, None
        return host.to(mel.device, non_blocking=True), host

    def _blocks(self) -> Iterator[Block]:
        return cast(Iterator[Block], iter(self.blocks))

    def _is_fixed(self, x: Tensor) -> bool:
        return are_shapes_fixed(x, self.fixed_shapes)

    def _all_rows(self, x: Tensor, length: Tensor | None) -> Tensor:
        """All rows of the last block after the last norm; those past ``length`` attend to the valid ones."""
        if self._is_fixed(x):
            return self._normed(self._streams(x, length, "attend"))
        for block in self.blocks:
            x = block(x, length, fixed_shapes=False)
        return self.last_norm(x)

    def _selected_rows(self, x: Tensor, length: Tensor | None, select: Selection | FixedRows) -> Tensor:
        """Rows of the last block after the last norm. That block computes no others: all rows are keys and values
        there, and nothing else of them is read."""
        if isinstance(select, FixedRows):
            return self._normed(self._streams(x, length, "zero", select))
        for block in self.blocks[:-1]:
            x = block(x, length, padded_queries="zero", fixed_shapes=False)
        return self.last_norm(self.blocks[-1](x, select=select))

    def _last_blocks(self, x: Tensor, length: Tensor | None, n_blocks: int) -> list[Tensor]:
        """All rows of the last ``n_blocks`` blocks, each after the last norm, in ascending order."""
        if not 1 <= n_blocks <= len(self.blocks):
            _checks.fail(self._name, "n_blocks", f"from 1 to {len(self.blocks)}, the depth", n_blocks)
        if self._is_fixed(x):
            streams = list(self._streams(x, length, "attend"))[-n_blocks:]
            return [stream.norm(self.last_norm)[1] for stream in streams]
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x, length, fixed_shapes=False)
            if i >= len(self.blocks) - n_blocks:
                outputs.append(self.last_norm(x))
        return outputs

    def _streams(
        self,
        x: Tensor,
        length: Tensor | None,
        padded_queries: Literal["zero", "attend"],
        select: FixedRows | None = None,
    ) -> Iterator[Stream]:
        """What comes out of each block, none of whose shapes depends on a value; the last one's are rows of select."""
        factors, lengths = self._drop_paths(x, length)
        stream = Stream(x)
        for i, block in enumerate(self._blocks()):
            rows = select if i == len(self.blocks) - 1 else None
            if is_plain(block, Block):
                stream = block.advance(stream, lengths[i], factors[i], padded_queries=padded_queries, select=rows)
            else:
                x = block(stream.sum(), length, padded_queries=padded_queries, select=rows, fixed_shapes=True)
                stream = Stream(x)
            yield stream

    def _normed(self, streams: Iterator[Stream]) -> Tensor:
        """The last one after the last norm."""
        last = next(streams)
        for last in streams:  # noqa: B007 (the others are let go as the next one comes)
            pass
        return last.norm(self.last_norm)[1]

    def _drop_paths(self, x: Tensor, length: Tensor | None) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """For each block the factors of its branches, None where it drops nothing, and the tokens that attend."""
        probabilities = [float(block.drop_path) if block.training else 0.0 for block in self._blocks()]
        if not any(probabilities):
            return [None] * len(self.blocks), [length] * len(self.blocks)
        draws = torch.rand(len(self.blocks), 2, x.shape[0], device=x.device)
        factors = drop_path_factors(probabilities, draws)
        lengths = attended(length, factors, x.shape[1])
        each = [(f, n) if p else (None, length) for p, f, n in zip(probabilities, factors.unbind(), lengths.unbind())]
        return [f for f, _ in each], [n for _, n in each]
