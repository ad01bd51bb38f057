"""``atst-fast profile``: where the time of a training step goes, as a trace, a picture and a table."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity

from atst_fast.train import trace
from atst_fast.train.config import RATE, SECONDS, UserError
from atst_fast.train.device import pick_device
from atst_fast.train.files import explain, make_folder, write_atomically
from atst_fast.train.method import METHODS
from atst_fast.train.precision import pick_precision
from atst_fast.train.synthetic import batches, make_stepper

TRACE, PICTURE = "trace.json.gz", "profile.png"
_SHOWN = 20  # kernels in table and picture


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Profiles some steps of pretraining on made-up audio, after others that warm up."""

    out: Path
    """folder for trace.json.gz (chrome://tracing, ui.perfetto.dev) and profile.png"""
    method: Literal["frame", "clip"] = "frame"
    """ATST-Frame or ATST-Clip"""
    arch: Literal["tiny", "small", "base"] = "small"
    """size of the encoder"""
    batch_size: int = 64
    """clips per step"""
    clip_seconds: float | None = None
    """length of a clip's crop, of both with --method clip; default: 10, with --method clip 6"""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """as in pretraining; auto: bf16 on a GPU"""
    graph: bool = True
    """run the step as a CUDA graph; without a GPU it does nothing"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    steps: int = 3
    """steps that are profiled"""
    warmup: int = 6
    """steps before them: kernels are compiled and the graph is recorded"""

    @property
    def samples(self) -> tuple[int, ...]:
        """Of each crop of a clip."""
        return tuple(int((self.clip_seconds or seconds) * RATE) for seconds in SECONDS[self.method])


def check(config: ProfileConfig) -> None:
    """Raise UserError for the first value that makes no sense, by the name of its option."""
    rules = {
        "batch_size": (config.batch_size >= 1, "at least 1"),
        "clip_seconds": (config.clip_seconds is None or 1 <= config.clip_seconds <= 600, "between 1 and 600"),
        "steps": (config.steps >= 1, "at least 1"),
        "warmup": (config.warmup >= 1, "at least 1"),
    }
    for name, (fine, expected) in rules.items():
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(config, name)!r}")


def profile(config: ProfileConfig) -> int:
    """Write trace and picture, print the table; returns the exit code 0."""
    from matplotlib.figure import Figure  # now, not after the work: it may be missing

    check(config)
    device = pick_device(config.device)
    make_folder(config.out)
    path = config.out / TRACE
    with explain(f"write {path}"):
        found = run(config, device, path)
    title = describe(config, device, found)
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    draw(figure, found, title)
    with explain(f"write {config.out / PICTURE}"):
        write_atomically(config.out / PICTURE, partial(figure.savefig, format="png"))
    print("\n".join([title, *table(found), f"{path}, {config.out / PICTURE}"]))
    return 0


def run(config: ProfileConfig, device: torch.device, path: Path) -> trace.Breakdown:
    """Take the steps, write the trace, and sum it up."""
    torch.manual_seed(0)
    stepper = make_stepper(
        config.arch,
        samples=config.samples,
        precision=pick_precision(config.precision, device),
        device=device,
        graph=config.graph,
        method=config.method,
    )
    source = batches(config.batch_size, sum(config.samples), device)
    on_gpu = device.type == "cuda"

    def steps(number: int) -> None:
        for _ in range(number):
            batch = next(source)
            stepper(batch.waveform, batch.step)
        if on_gpu:
            torch.cuda.synchronize(device)

    steps(config.warmup)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function(trace.WINDOW):
        steps(config.steps)
    write_atomically(path, partial(_export, profiler))
    return trace.breakdown(trace.read(path), config.steps)


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    # torch compresses what is called .gz, and the temporary file is not
    compressed = path.with_name(f"{path.name}.gz")
    try:
        profiler.export_chrome_trace(str(compressed))
        compressed.replace(path)
    finally:
        compressed.unlink(missing_ok=True)


def describe(config: ProfileConfig, device: torch.device, found: trace.Breakdown) -> str:
    """What was run, in one line."""
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    precision = pick_precision(config.precision, device) + (" in a CUDA graph" if on_gpu and config.graph else "")
    speed = f"{found.seconds * 1e3:.1f} ms a step under the profiler, {config.batch_size / found.seconds:,.0f} clips/s"
    title = METHODS[config.method].title
    return f"{title} {config.arch}, {config.batch_size} clips, {precision}, {where}: {speed}"


def table(found: trace.Breakdown) -> list[str]:
    """Lines: the parts of a step, then what takes longest."""
    lines = ["", f"{'part':<18}{'ms':>10}{'share':>8}"]
    for name, seconds in found.parts.items():
        lines.append(f"{name:<18}{seconds * 1e3:>10.3f}{seconds / found.seconds:>8.1%}")
    lines += ["", f"{'calls':>7}{'ms':>10}{'share':>8}  {'part':<18}kernel or operator"]
    for item in found.items[:_SHOWN]:
        times = f"{item.calls:>7.0f}{item.seconds * 1e3:>10.3f}{item.seconds / found.seconds:>8.1%}"
        lines.append(f"{times}  {item.part:<18}{item.name[:90]}")
    return [*lines, ""]


def draw(figure: Any, found: trace.Breakdown, title: str) -> None:
    """All parts as one bar, and what takes longest below."""
    from matplotlib import colormaps

    colours = {name: colormaps["tab20"](i) for i, name in enumerate(trace.PARTS)}
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 5])
    left = 0.0
    for name, seconds in found.parts.items():
        share = seconds / found.seconds
        label = f"{name} {share:.0%}"
        top.barh(0, seconds * 1e3, left=left, color=colours[name], edgecolor="white", label=label)
        left += seconds * 1e3
    top.set(yticks=[], xlabel="ms", title=title, xlim=(0, max(left, 1e-6)))
    top.title.set_fontsize(9)
    top.legend(ncols=6, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.6))
    items = found.items[:_SHOWN]
    bottom.barh(range(len(items)), [i.seconds * 1e3 for i in items], color=[colours[i.part] for i in items])
    bottom.set_yticks(range(len(items)), [f"{i.name[:60]} x {i.calls:.0f}" for i in items], fontsize=7)
    bottom.invert_yaxis()
    bottom.set(xlabel="ms per step")
    bottom.grid(axis="x", alpha=0.25)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
