"""Every configuration of the Triton kernels at the shapes of a step: ``python -m benchmarks.gpu.tune [OP ...]``.

Prints for each kernel and size what every candidate takes, the one in use marked, and writes
benchmarks/results/<GPU>/tune/<date>-<commit>.json. Nothing is chosen while a program trains: who changes which one is
used does so in kernels/<op>.py, by what this has printed.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from atst_fast.bench import machine, report, timing
from atst_fast.models import ARCHS
from atst_fast.nn.selection import FixedSelection
from atst_fast.train.masks import block_mask, capacity
from benchmarks.report import RESULTS


@dataclass(frozen=True)
class Size:
    """A step's tensors: both views of ``clips``, in ``dtype``, on ``device``."""

    dim: int
    heads: int
    clips: int
    tokens: int = 250
    hidden: int = 4096
    out: int = 256
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def rows(self) -> int:
        return 2 * self.clips * self.tokens

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def selection(self) -> FixedSelection:
        """The masked rows of both views."""
        mask = block_mask(self.clips, self.tokens).repeat(2, 1).to(self.device)
        return FixedSelection.build(mask, 2 * capacity(self.clips, self.tokens))


SIZES = {
    "base": Size(ARCHS["base"]["dim"], ARCHS["base"]["num_heads"], 144),
    "small": Size(ARCHS["small"]["dim"], ARCHS["small"]["num_heads"], 256),
}


class Case(NamedTuple):
    """A launch: ``call(config)``, what ``config`` can be, and what it is when nobody says."""

    call: Callable[[Any], object]
    candidates: Sequence[Any]
    used: Any


def select_rows(s: Size) -> Case:
    from atst_fast.kernels import rows as k

    x, chosen = s.random(s.rows, s.dim), s.selection()
    return Case(lambda c: k.select_rows(x, chosen.rows, chosen.inverse, config=c), k.CONFIGS, k.choose(s.dim))


def frame_attention(s: Size) -> Case:
    from atst_fast.kernels import frame_attention as k

    qkv = s.random(2 * s.clips, s.tokens, 3 * s.dim)
    fits = k.candidates(s.dim // s.heads, s.dtype, s.tokens, arch(s))
    return Case(lambda c: k.frame_attention(qkv, None, s.heads, scale(s), False, config=c), fits, fits[0])


def frame_attention_packed(s: Size) -> Case:
    from atst_fast.kernels import frame_attention as k

    chosen = s.selection()
    q, kv = s.random(len(chosen.rows), s.dim), s.random(s.rows, 2 * s.dim)
    arguments = q, kv, chosen.cu_seqlens_q, chosen.cu_seqlens_k, s.tokens, s.tokens, s.heads, scale(s)
    fits = k.candidates(s.dim // s.heads, s.dtype, s.tokens, arch(s))
    return Case(lambda c: k.frame_attention_packed(*arguments, config=c), fits, fits[0])


def frame_attention_backward(s: Size) -> Case:
    from atst_fast.kernels import frame_attention as forward
    from atst_fast.kernels import frame_attention_backward as k

    qkv = s.random(2 * s.clips, s.tokens, 3 * s.dim)
    out, lse = forward.frame_attention(qkv, None, s.heads, scale(s), False)
    arguments = torch.randn_like(out), qkv, out, lse, None, s.heads, scale(s), False
    fits = k.candidates(s.dim // s.heads, s.dtype, s.tokens, arch(s))
    return Case(lambda c: k.frame_attention_backward(*arguments, config=c), fits, fits[0])


def frame_attention_packed_backward(s: Size) -> Case:
    from atst_fast.kernels import frame_attention as forward
    from atst_fast.kernels import frame_attention_backward as k

    chosen = s.selection()
    q, kv = s.random(len(chosen.rows), s.dim), s.random(s.rows, 2 * s.dim)
    rest = chosen.cu_seqlens_q, chosen.cu_seqlens_k, s.tokens, s.tokens, s.heads, scale(s)
    out, lse = forward.frame_attention_packed(q, kv, *rest)
    arguments = torch.randn_like(out), q, kv, out, lse, *rest
    fits = k.candidates(s.dim // s.heads, s.dtype, s.tokens, arch(s))
    return Case(lambda c: k.frame_attention_packed_backward(*arguments, config=c), fits, fits[0])


def patch_embed(s: Size) -> Case:
    from atst_fast.kernels import patch_embed as k

    mel, weight, row, pos, mask = _patches(s)
    arguments = mel, weight, row, mask, row, pos, [64, 4], [64, 4]
    return Case(lambda c: k.patch_embed(*arguments, config=c), k.CONFIGS, k.choose(weight))


def patch_embed_backward(s: Size) -> Case:
    from atst_fast.kernels import patch_embed_backward as k

    mel, weight, _, pos, mask = _patches(s)
    grad = s.random(2 * s.clips, s.tokens, s.dim)
    arguments = grad, mel, weight, mask, len(pos), False, [64, 4], [64, 4]
    return Case(lambda c: k.patch_embed_backward(*arguments, config=c), k.CONFIGS, k.choose(weight))


def _patches(s: Size) -> tuple[torch.Tensor, ...]:
    mel = s.random(2 * s.clips, 1, 64, 4 * s.tokens + 1, dtype=torch.float32)
    mask = block_mask(s.clips, s.tokens).repeat(2, 1).to(s.device)
    return mel, s.random(s.dim, 256), s.random(s.dim), s.random(s.tokens, s.dim), mask


def add_norm(s: Size) -> Case:
    from atst_fast.kernels import add_norm as k

    x, row, factors = s.random(2 * s.clips, s.tokens, s.dim), s.random(s.dim), _factors(s)
    call = lambda c: k.add_norm(x, x, row, factors, row, row, 1e-6, config=c)  # noqa: E731
    return Case(call, k.FORWARD_CONFIGS, k.forward_config(s.dim))


def add_norm_backward(s: Size) -> Case:
    from atst_fast.kernels import add_norm as k

    x, row = s.random(2 * s.clips, s.tokens, s.dim), s.random(s.dim)
    moment = s.random(s.rows, dtype=torch.float32)
    arguments = x, x, x, moment, moment, _factors(s), row, True, True
    return Case(lambda c: k.add_norm_backward(*arguments, config=c), k.BACKWARD_CONFIGS, k.backward_config(s.dim))


def _factors(s: Size) -> torch.Tensor:
    """Of stochastic depth: one clip in twenty drops the branch."""
    return (torch.rand(2 * s.clips, device=s.device) > 0.05) / 0.95


def bias_gelu(s: Size) -> Case:
    from atst_fast.kernels import epilogue as k

    h, row = s.random(s.rows, 4 * s.dim), s.random(4 * s.dim)
    return Case(lambda c: k.bias_gelu(h, row, config=c), k.FORWARD_CONFIGS, k.FORWARD)


def bias_gelu_backward(s: Size) -> Case:
    from atst_fast.kernels import epilogue as k

    h, row = s.random(s.rows, 4 * s.dim), s.random(4 * s.dim)
    return Case(lambda c: k.bias_gelu_backward(h, h, row, config=c), k.BACKWARD_CONFIGS, k.BACKWARD)


def linear_gelu(s: Size) -> Case:
    """With h, as a training step keeps it."""
    from atst_fast.kernels import linear_gelu as k

    x, weight, row = s.random(s.rows, s.dim), s.random(4 * s.dim, s.dim), s.random(4 * s.dim)
    return Case(lambda c: k.linear_gelu(x, weight, row, True, config=c), k.CONFIGS, k.choose(x, 4 * s.dim))


def linear_gelu_backward(s: Size) -> Case:
    from atst_fast.kernels import linear_gelu as k

    grad, weight2, row = s.random(s.rows, s.dim), s.random(s.dim, 4 * s.dim), s.random(4 * s.dim)
    h = s.random(s.rows, 4 * s.dim)
    call = lambda c: k.linear_gelu_backward(grad, weight2, h, row, config=c)  # noqa: E731
    return Case(call, k.CONFIGS, k.choose(grad, 4 * s.dim))


def batch_norm_relu(s: Size) -> Case:
    """Moments, then the values."""
    from atst_fast.kernels import batch_norm_relu as k

    x, row, count = _hidden(s)

    def call(config):
        moments = k.column_moments(x, count, config=config)
        return k.batch_norm_relu_apply(x, moments, row, row, count, 1e-5, config=config)

    return Case(call, k.CONFIGS, k.choose(x))


def batch_norm_relu_backward(s: Size) -> Case:
    """Sums, then the gradient of the input."""
    from atst_fast.kernels import batch_norm_relu as k

    x, row, count = _hidden(s)
    moments = k.column_moments(x, count)

    def call(config):
        sums = k.batch_norm_relu_sums(x, x, moments, row, row, count, 1e-5, config=config)
        return k.batch_norm_relu_input_grad(x, x, moments, sums, row, row, count, 1e-5, config=config)

    return Case(call, k.CONFIGS, k.choose(x))


def _hidden(s: Size) -> tuple[torch.Tensor, ...]:
    chosen = s.selection()
    return s.random(len(chosen.rows), s.hidden), s.random(s.hidden), chosen.count


def frame_loss(s: Size) -> Case:
    from atst_fast.kernels import frame_loss as k

    chosen = s.selection()
    outputs = [s.random(len(chosen.rows), s.out) for _ in range(2)]
    return Case(lambda c: k.frame_loss(*outputs, chosen.count, True, config=c), k.CONFIGS, k.choose(outputs[0]))


def frame_loss_backward(s: Size) -> Case:
    from atst_fast.kernels import frame_loss as k

    chosen = s.selection()
    outputs, grad = [s.random(len(chosen.rows), s.out) for _ in range(2)], torch.ones((), device=s.device)
    call = lambda c: k.frame_loss_backward(grad, *outputs, chosen.count, True, config=c)  # noqa: E731
    return Case(call, k.CONFIGS, k.choose(outputs[0]))


def scale(s: Size) -> float:
    return (s.dim // s.heads) ** -0.5


def arch(s: Size) -> int:
    """Of the GPU, as 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability() if s.device == "cuda" else (9, 0)
    return 10 * major + minor


CASES: dict[str, Callable[[Size], Case]] = {
    case.__name__: case
    for case in (
        select_rows,
        frame_attention,
        frame_attention_packed,
        frame_attention_backward,
        frame_attention_packed_backward,
        patch_embed,
        patch_embed_backward,
        add_norm,
        add_norm_backward,
        bias_gelu,
        bias_gelu_backward,
        linear_gelu,
        linear_gelu_backward,
        batch_norm_relu,
        batch_norm_relu_backward,
        frame_loss,
        frame_loss_backward,
    )
}


def tune(name: str, size: str, gpu: Any) -> list[dict[str, Any]]:
    """One entry per candidate: its median in seconds, or the error that kept it from running."""
    torch.manual_seed(0)
    case = CASES[name](SIZES[size])
    entries = []
    for config in case.candidates:
        entry: dict[str, Any] = {"op": name, "size": size, "config": str(config), "used": config == case.used}
        try:
            entry["median_s"] = timing.launched(lambda config=config: case.call(config), gpu, budget=0.2).median
        except Exception as error:  # one candidate that this GPU cannot run costs no other
            entry["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        entries.append(entry)
    return entries


def lines(entries: list[dict[str, Any]]) -> list[str]:
    """The candidates of one case, the best first, each with its ratio to the one in use."""
    in_use = [e.get("median_s", math.inf) for e in entries if e["used"]] or [math.nan]
    shown = [f"{entries[0]['op']}, {entries[0]['size']}"]
    for e in sorted(entries, key=lambda e: e.get("median_s", math.inf)):
        if "error" in e:
            shown.append(f"          failed  {e['config']}: {e['error']}")
            continue
        mark = "in use" if e["used"] else f"{e['median_s'] / in_use[0]:6.3f}"
        shown.append(f"  {e['median_s'] * 1e6:10.1f} us  {mark}  {e['config']}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--commit", default="", help="what is measured, in a copy of the tree without git")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(CASES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose of {', '.join(CASES)}")
    machine.name_commit(arguments.commit)
    result = {"date": report.now(), **machine.describe_gpu(), "configurations": []}
    gpu, path = timing.Cuda(), RESULTS / report.file_name(result)
    path = path.parent / "tune" / path.name
    for name in arguments.ops or CASES:
        for size in SIZES:
            entries = tune(name, size, gpu)
            result["configurations"] += entries
            print("\n".join(lines(entries)), flush=True)
            report.write(result, path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
