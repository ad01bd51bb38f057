"""What a training step must move and multiply on an H200, and what the Triton kernels save of it, by counting alone.

``python -m benchmarks.gpu_budget --write`` puts these tables into docs/gpu_budget.md. Three structures are counted:
plain PyTorch under autocast, operator by operator; the same compiled, where everything between two matrix products that
has no sum over rows is taken to be one pass, and each such sum one more; ours. All with bfloat16 products. A pass over
memory takes its bytes / 4.3 TB/s, a product the longer of its bytes and its flops / 989 TFLOP/s, and nothing overlaps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from atst_fast.models import ARCHS
from atst_fast.train.masks import moments

BANDWIDTH, PEAK = 4.3e12, 989e12
STRUCTURES = "eager", "compiled", "ours"


@dataclass(frozen=True)
class Step:
    """Sizes of a step: both views of ``clips``; ``rows`` tokens, of which ``read`` are masked."""

    name: str
    clips: int
    tokens: int = 250
    frames: int = 1001
    hidden: int = 4096
    out: int = 256

    @property
    def dim(self) -> int:
        return ARCHS[self.name]["dim"]

    @property
    def heads(self) -> int:
        return ARCHS[self.name]["num_heads"]

    @property
    def depth(self) -> int:
        return ARCHS[self.name]["depth"]

    @property
    def rows(self) -> int:
        return 2 * self.clips * self.tokens

    @property
    def read(self) -> float:
        return 2 * self.clips * _masked(self.tokens)

    @property
    def parameters(self) -> float:
        """Of the student; the teacher lacks the predictor."""
        encoder = self.depth * (12 * self.dim**2 + 10 * self.dim) + (256 + self.tokens + 5) * self.dim
        return encoder + self.hidden * (self.dim + 3 * self.out + 4)


@cache
def _masked(tokens: int) -> float:
    """Of a clip, on average."""
    return moments(tokens, 0.65, 5, 2)[0]


BASE, SMALL = Step("base", 144), Step("small", 256)


@dataclass(frozen=True)
class Pass:
    """Between the products of a block: bytes per token and unit of width that each structure reads and writes."""

    what: str
    eager: float
    compiled: float
    ours: float


# eager: the residual stream is float32, and what autocast feeds to a product is cast; compiled and ours keep bfloat16.
FORWARD = (
    Pass("residual, DropPath, LayerNorm, cast: after the attention", 8 + 10 + 8 + 6, 8, 8),
    Pass("the same after the MLP", 8 + 10 + 8 + 6, 8, 8),
    Pass("bias and GELU, 4 D wide", 16, 16, 16),
)
BACKWARD = (
    Pass("residual, DropPath, LayerNorm, cast: of the attention's input", 6 + 8 + 6 + 12 + 12, 10, 10),
    Pass("the same of the MLP's input", 6 + 8 + 6 + 12 + 12, 10, 10),
    Pass("gradients of weight and bias of both norms", 16, 8, 0),
    Pass("gradients of the biases of projection, fc1 and fc2", 12, 12, 0),
    Pass("GELU, 4 D wide", 24, 24, 24),
    Pass("dq, dk, dv into one tensor", 12, 12, 0),
)
# forward: q, k, v and the output. Backward: also the gradient; flash has a pass for delta and adds dq up in float32.
ATTENTION = Pass("attention, forward", 8, 8, 8), Pass("attention, backward", 34, 34, 16)


@dataclass(frozen=True)
class Kernel:
    """A launch: bytes that it must move, flops of its products, how often a step has it, its case of the benchmarks."""

    name: str
    bytes: float
    flops: float
    launches: int
    measured: tuple[str, str, dict] | None = None

    @property
    def memory(self) -> float:
        return self.bytes / BANDWIDTH

    @property
    def floor(self) -> float:
        return max(self.memory, self.flops / PEAK)


def kernels(s: Step) -> list[Kernel]:
    """The Triton kernels of a step in bfloat16."""
    n, m, d, depth = s.rows, s.read, s.dim, s.depth
    wide, per_key = s.hidden, s.tokens * d
    mel = 4 * 64 * s.frames * 2 * s.clips

    def case(name: str) -> tuple[str, str, dict]:
        op = name if name.startswith("select") else name.removesuffix("_backward")
        more = {"frame_attention": {"lengths": "full"}, "patch_embed": {"masked": False}}.get(op, {})
        size = "step" if op in ("batch_norm_relu", "frame_loss") else s.name
        more |= {"way": "backward" if op != name else "forward"} if op[:6] != "select" else {}
        return op, f"test_{op}", {"size": size, "provider": "atst_fast", **more}

    return [
        Kernel(name, moved, flops, launches, case(name))
        for name, moved, flops, launches in (
            ("frame_attention", 8 * n * d + 4 * n * s.heads, 4 * n * per_key, 2 * (depth - 1)),
            ("frame_attention_backward", 16 * n * d + 4 * n * s.heads, 10 * n * per_key, depth - 1),
            ("frame_attention_packed", 4 * (m + n) * d, 4 * m * per_key, 2),
            ("frame_attention_packed_backward", 8 * (m + n) * d, 10 * m * per_key, 1),
            ("patch_embed", mel + 2 * n * d, 2 * 256 * n * d, 2),
            ("patch_embed_backward", mel + 2 * n * d, 2 * 256 * n * d, 1),
            ("add_norm", 8 * n * d, 0, 4 * depth - 4),
            ("add_norm_backward", 10 * n * d, 0, 2 * depth - 2),
            ("bias_gelu", 16 * n * d, 0, 2 * depth - 2),
            ("bias_gelu_backward", 24 * n * d, 0, depth - 1),
            ("select_rows", 4 * m * d, 0, 2),
            ("select_rows_backward", 2 * (m + n) * d, 0, 1),
            ("batch_norm_relu", 6 * m * wide, 0, 3),
            ("batch_norm_relu_backward", 10 * m * wide, 0, 2),
            ("frame_loss", 4 * m * s.out, 0, 1),
            ("frame_loss_backward", 6 * m * s.out, 0, 1),
        )
    ]


def products(s: Step) -> Iterator[tuple[str, float, int, int, int]]:
    """What is left to the library: name, rows, inner width, outer width, and how often (twice more going back)."""
    n, m, d = s.rows, s.read, s.dim
    networks = 4  # the teacher's forward, the student's, and twice that back
    for rows, layers in ((n, s.depth - 1), (m, 1)):
        yield "qkv", n if layers > 1 else (2 * n + m) / 3, d, 3 * d, networks * layers
        yield "projection", rows, d, d, networks * layers
        yield "fc1", rows, d, 4 * d, networks * layers
        yield "fc2", rows, 4 * d, d, networks * layers
    yield "projector", m, d, s.hidden, networks
    yield "projector", m, s.hidden, s.out, networks
    yield "predictor", m, s.out, s.hidden, 3
    yield "predictor", m, s.hidden, s.out, 3


def product_floor(rows: float, inner: int, outer: int) -> float:
    return max(2 * rows * inner * outer / PEAK, 2 * (rows * (inner + outer) + inner * outer) / BANDWIDTH)


def flops(s: Step) -> float:
    """Of all products, attention and patch embedding included, but for the scores that its backward computes again."""
    again = 2 * s.tokens * s.dim * (s.rows * (s.depth - 1) + s.read)
    triton = sum(k.flops * k.launches for k in kernels(s)) - again
    return triton + sum(2 * rows * inner * outer * times for _, rows, inner, outer, times in products(s))


def step_seconds(s: Step, structure: str) -> dict[str, float]:
    """Seconds of the parts of a step at least, by what is counted above."""
    which = {k.name: k for k in kernels(s)}
    unit = s.rows * s.dim / BANDWIDTH

    def passes(*which: Pass) -> float:
        return sum(getattr(p, structure) for p in which) * unit

    def floor(*names: str) -> float:
        return sum(which[name].floor * which[name].launches for name in names)

    forward, backward = passes(*FORWARD), passes(*BACKWARD)
    # the last block has fewer rows behind its attention, in ours from its queries on
    last = s.read / s.rows
    blocks = (s.depth - 1 + last) * (2 * forward + backward)
    attention = floor("frame_attention", "frame_attention_packed")
    attention += floor("frame_attention_backward", "frame_attention_packed_backward")
    if structure != "ours":
        flash = max(which["frame_attention_backward"].flops / PEAK, passes(ATTENTION[1]))
        attention = s.depth * (2 * which["frame_attention"].floor + flash)
    frames = s.clips * s.frames
    # bytes per mel frame: frames cut out and windowed, their spectrum, its power; decibels, floor, scale; two views
    peer_front_end = {"eager": 23e3, "compiled": 20e3}
    per_parameter = {"eager": 28 + 12 + 3 * 6, "compiled": 28 + 12 + 3 * 6, "ours": 38}
    heads = {"eager": 3 * 10 + 2 * 16, "compiled": 3 * 6 + 2 * 10, "ours": 3 * 6 + 2 * 10}
    rest = "patch_embed", "patch_embed_backward", "select_rows", "select_rows_backward"
    more = {"eager": 2.0, "compiled": 1.2, "ours": 1.0}[structure]  # casts and masks in passes of their own
    return {
        "matrix products": sum(product_floor(*sizes) * times for _, *sizes, times in products(s)),
        "attention": attention,
        "between the products of the blocks": blocks,
        "heads": heads[structure] * s.read * s.hidden / BANDWIDTH,
        "patch embedding, rows, loss": more * floor(*rest, "frame_loss", "frame_loss_backward"),
        "AdamW, teacher, casts of weights": per_parameter[structure] * s.parameters / BANDWIDTH,
        "front end": frames * peer_front_end[structure] / BANDWIDTH if structure != "ours" else 0.19e-3 * s.clips / 144,
    }


def kernel_table(s: Step, measured) -> Iterator[tuple[str, ...]]:
    """``measured(kernel)`` says what is known of it."""
    yield "kernel", "bytes", "flops", "memory", "products", "floor", "per step", "measured"
    for k in kernels(s):
        work = f"{k.bytes / 1e6:,.0f} MB", f"{k.flops / 1e9:,.0f} G" if k.flops else "-"
        times = ms(k.memory), ms(k.flops / PEAK), ms(k.floor), f"{k.launches} x = {ms(k.floor * k.launches)}"
        yield (k.name, *work, *times, measured(k))


def pass_table(s: Step) -> Iterator[tuple[str, ...]]:
    def cells(passes: tuple[Pass, ...], form: str) -> Iterator[str]:
        return (form.format(sum(getattr(p, name) for p in passes) * s.rows * s.dim / 1e6) for name in STRUCTURES)

    yield "one block", *(f"{name}, MB" for name in STRUCTURES)
    for title, passes in (("forward, of student and of teacher", FORWARD), ("backward", BACKWARD)):
        for p in passes:
            yield p.what, *cells((p,), "{:,.0f}")
        yield f"**{title}**", *cells(passes, "**{:,.0f}**")
    for p in ATTENTION:
        yield p.what, *cells((p,), "{:,.0f}")


def step_table(s: Step) -> Iterator[tuple[str, ...]]:
    parts = {name: step_seconds(s, name) for name in STRUCTURES}
    yield f"{s.name}, {s.clips} clips", *STRUCTURES
    for part in parts["ours"]:
        yield part, *(ms(parts[name][part]) for name in STRUCTURES)
    totals = [sum(parts[name].values()) for name in STRUCTURES]
    yield "**at least**", *(f"**{ms(total)}**" for total in totals)
    yield "clips/s at most", *(f"{s.clips / total:,.0f}" for total in totals)
    yield "share of 989 TFLOP/s at most", *(f"{flops(s) / total / PEAK:.0%}" for total in totals)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds else "-"


def markdown(rows: Iterator[tuple[str, ...]]) -> list[str]:
    first, *rest = rows
    return [f"| {' | '.join(row)} |" for row in (first, ("---",) * len(first), *rest)]
