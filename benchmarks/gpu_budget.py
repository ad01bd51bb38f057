"""What each CUDA kernel should take on an H200, from what it must move and do: ``python -m benchmarks.gpu_budget``.

Prints the tables of docs/gpu_budget.md; ``--write`` puts them there, with those of token_budget.py. Bytes and
shared-memory wavefronts are those that the kernels' files derive; instructions are counted in the machine code that
nvcc makes for sm_90 (tests/cuda/static.py), in the loop that does the work. A time is the longest of five, as if each
resource were busy without a pause and nothing else mattered: a prediction, not a measurement. What was measured comes
from the newest results of an H200 under benchmarks/results, if there are any.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import token_budget
from benchmarks.report import RESULTS
from tests.cuda import static
from tests.cuda.budget import BUDGET

DOC = Path(__file__).parent.parent / "docs" / "gpu_budget.md"
MARKS = "<!-- python -m benchmarks.gpu_budget --write -->\n", "<!-- end -->\n"
TOKEN_MARKS = "<!-- python -m benchmarks.gpu_budget --write: tokens -->\n", "<!-- end of tokens -->\n"
ARCH = 90

SMS, CLOCK = 132, 1.98e9
BANDWIDTH = 4.3e12  # bytes/s: nine tenths of the datasheet's 4.8e12
FP32 = SMS * 128 * CLOCK  # instructions of a thread per second; 67 TFLOP/s where each is a fused multiply-add
FP64, FROM_FP32 = SMS * 64 * CLOCK, SMS * 16 * CLOCK  # operations; conversions to float64
ISSUE = SMS * 4 * CLOCK  # instructions of a warp per second
WAVEFRONTS = SMS * CLOCK  # shared-memory accesses of 128 bytes per second
_FP32 = "FFMA+FADD+FMUL"


@dataclass(frozen=True)
class Work:
    """One launch. Per unit: bytes of global memory, shared-memory wavefronts, and what its loops say about a thread."""

    kernel: str  # in tests/cuda/budget.py
    what: str
    units: int
    bytes: float
    per_unit: Callable[[static.Record, str], float]
    wavefronts: float = 0.0
    measured: tuple[str, str, dict] | None = None  # group, name and parameters of the benchmark's case


def loop(record: static.Record, **exactly: int) -> static.Code:
    """The longest innermost loop with exactly these instructions: LDG_128=8 means LDG.128."""
    inner = [code for code in record.loops if not any(code.holds(other) for other in record.loops)]
    fits = [code for code in inner if all(code.count(k.replace("_", ".")) == n for k, n in exactly.items())]
    if not fits:
        raise LookupError(f"{record.name}: no loop has {exactly}: the model no longer fits the kernel")
    return max(fits, key=lambda code: code.length)


def per(elements: int, **exactly: int) -> Callable[[static.Record, str], float]:
    """A thread's instructions per unit, in a loop that does so many units at a time."""
    return lambda record, pattern: _count(loop(record, **exactly), pattern) / elements


def _count(code: static.Code, pattern: str) -> int:
    return code.length if pattern == "all" else code.count(pattern)


def mel(frames: int, filters: int, bins: int) -> Callable[[static.Record, str], float]:
    """Of a frame: a tile is so many of them and 8 warps, each of which transforms an eighth and sums 8 filters.

    The transform is the section with the most arithmetic; it also holds the path of odd hops, and, in log_mel, what one
    warp of the eight does to publish a maximum. The longest filters of the groups of 8 have ``bins`` in all, rounded up
    as mel_tables.cuh rounds them; the products' loop does 8 or 4 of them for a quarter of the frames. What is around it
    is done once a group.
    """

    def count(record: static.Record, pattern: str) -> float:
        transform = max(record.sections, key=lambda code: code.count(_FP32))
        products = loop(record, FFMA=32)
        staging = [
            code for code in record.loops if [code.count(name) for name in ("LDG", "STS", "FMUL")] == [16, 16, 0]
        ]
        samples = min(staging, key=lambda code: code.length)  # the longer one reflects, at the ends of a clip
        around = min((code for code in record.loops if code.holds(products)), key=lambda code: code.length)
        once = 8 * sum(_count(code, pattern) for code in (transform, samples))
        once += filters / 8 * (_count(around, pattern) - _count(products, pattern))
        return (once + bins / (32 / (frames / 4)) * _count(products, pattern)) * 32 / frames

    return count


def augment(record: static.Record, pattern: str) -> float:
    """Of a value: mixed (a thread does four at a time), then made from four rows (two at a time)."""
    return per(4, LDG=8, MUFU=12)(record, pattern) + per(2, LDS=10, STG=2)(record, pattern)


PARAMETERS, CLIPS, FRAMES, FBANK_FRAMES = 86_000_000, 144, 1001, 998
_BASE, _BATCH = {"size": "base", "provider": "atst_fast"}, {"size": "batch", "provider": "atst_fast"}
_OPTIMIZER = "adamw_ema", "test_adamw_ema", {**_BASE, "form": "hf", "clip": False}
WORK = [
    Work(
        "log_mel/log_mel_kernel<16>",
        "144 clips of 10 s, float32, one unit a frame",
        CLIPS * FRAMES,
        4 * 160_000 / FRAMES + 4 * 64,
        mel(16, 64, bins=196),
        wavefronts=237,
        measured=("log_mel", "test_log_mel", {**_BATCH, "dtype": "float32"}),
    ),
    Work(
        "kaldi_fbank/kaldi_fbank_kernel<8>",
        "144 clips of 10 s, 128 filters, float32, one unit a frame",
        CLIPS * FBANK_FRAMES,
        4 * 160_000 / FBANK_FRAMES + 4 * 128,
        mel(32, 128, bins=188),
        wavefronts=160,
        measured=("kaldi_fbank", "test_kaldi_fbank", {**_BATCH, "model": "ssast", "dtype": "float32"}),
    ),
    Work(
        "augment/augment_kernel",
        "a view of 144 clips, 64 x 1001 values each",
        CLIPS * 64 * FRAMES,
        12,
        augment,
        measured=("augment_views", "test_augment_views", {**_BATCH, "push": False}),
    ),
    Work(
        "ema/ema_kernel",
        "86 M parameters, float32",
        PARAMETERS,
        12,
        per(16, LDG_128=8, STG_128=4),
        measured=("ema_update_", "test_ema_update_", _BASE),
    ),
    Work(
        "ema/adamw_kernel",
        "86 M parameters, teacher, both bfloat16 copies",
        PARAMETERS,
        40,
        per(4, LDG_128=5, STG_128=4, STG_64=2),
        measured=_OPTIMIZER,
    ),
    Work("ema/norm_kernel", "86 M gradients, float32", PARAMETERS, 4, per(64, LDG_128=16, DFMA=64)),
]


def times(work: Work, record: static.Record) -> dict[str, float]:
    """Seconds that each resource is busy."""
    return {
        "memory": work.units * work.bytes / BANDWIDTH,
        "float32": work.units * work.per_unit(record, _FP32) / FP32,
        "float64": work.units * max(work.per_unit(record, "DFMA") / FP64, work.per_unit(record, "F2F") / FROM_FP32),
        "shared": work.units * work.wavefronts / WAVEFRONTS,
        "issue": work.units * work.per_unit(record, "all") / 32 / ISSUE,
    }


def measured(work: Work | token_budget.Kernel) -> str:
    """By the newest result that has the case: operators and steps are measured by runs of their own."""
    group, name, params = work.measured or (None, None, {})
    for path in sorted(RESULTS.glob("*h200*/*.json"), key=lambda p: p.name, reverse=True):
        for case in json.loads(path.read_text())["cases"]:
            same = case["group"] == group and case["name"].split("[")[0] == name
            if same and params.items() <= case["params"].items():
                return _ms(case["median_s"])
    return "not measured"


def token_tables() -> list[str]:
    """Lines of Markdown, by counting alone: nothing is compiled."""
    base, small = token_budget.BASE, token_budget.SMALL
    tables = (
        token_budget.kernel_table(base, measured),
        token_budget.pass_table(base),
        token_budget.step_table(base),
        token_budget.step_table(small),
    )
    lines = [line for rows in tables for line in [*token_budget.markdown(rows), ""]]
    return lines[:-1]


def table() -> list[str]:
    """Lines of Markdown."""
    columns = "kernel", "work", "memory", "float32", "float64", "shared", "issue", "predicted", "measured"
    resources = "kernel", "registers", "threads", "shared memory", "blocks per SM", "warps of 64"
    rows, sizes = [columns, ("---",) * len(columns)], [resources, ("---",) * len(resources)]
    for work in WORK:
        record, budget = _record(work.kernel), BUDGET[work.kernel]
        busy = times(work, record)
        longest = max(busy, key=lambda name: busy[name])
        operations = work.units * work.per_unit(record, _FP32) / 1e6
        moved = f"{work.what}: {work.units * work.bytes / 1e6:,.0f} MB, {operations:,.0f} M float32 instructions"
        predicted = f"{_ms(busy[longest])} ({longest})"
        rows.append((work.kernel, moved, *map(_ms, busy.values()), predicted, measured(work)))
        blocks = static.occupancy(record.registers, budget.threads, budget.shared, ARCH)
        warps = blocks * -(-budget.threads // 32)
        numbers = record.registers, budget.threads, f"{budget.shared:,} B", blocks, warps
        sizes.append((work.kernel, *map(str, numbers)))
    return [f"| {' | '.join(row)} |" for row in rows] + [""] + [f"| {' | '.join(row)} |" for row in sizes]


def _record(kernel: str) -> static.Record:
    folder, _, name = kernel.partition("/")
    source = static.CSRC / folder / f"{folder}_cuda.cu"
    return next(r for r in static.nvcc_records(source, ARCH) if r.name == name)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds else "-"


def shown(marks: tuple[str, str]) -> list[str]:
    """The lines of the page between two marks."""
    return DOC.read_text().partition(marks[0])[2].partition(marks[1])[0].splitlines()


def write(marks: tuple[str, str], lines: list[str]) -> None:
    before, _, rest = DOC.read_text().partition(marks[0])
    _, _, after = rest.partition(marks[1])
    DOC.write_text(before + marks[0] + "\n".join(lines) + "\n" + marks[1] + after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/gpu_budget.md")
    found = {TOKEN_MARKS: token_tables(), MARKS: table()}
    if parser.parse_args().write:
        for marks, lines in found.items():
            write(marks, lines)
    print("\n".join(line for lines in found.values() for line in [*lines, ""]))
