"""``atst-fast bench``: the operators beside what one would call otherwise, as a table, a JSON and pictures."""

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from atst_fast.bench import compare, machine, report
from atst_fast.bench.cases import OPERATORS
from atst_fast.bench.operator import OURS, Case
from atst_fast.bench.session import LeftOut, Measured, Session, run
from atst_fast.ops import build_info
from atst_fast.train.config import UserError
from atst_fast.train.device import pick_device
from atst_fast.train.files import explain, make_folder

AXES = ("frames", "tokens", "batch", "depth", "threads")


@dataclass(frozen=True)
class BenchConfig:
    """Measures operators on made-up inputs. A speed counts only where the results are right in the same run."""

    ops: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """operators, such as log_mel; default: all of them"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one; of several, CUDA_VISIBLE_DEVICES chooses"""
    providers: tuple[str, ...] = ()
    """whom to measure beside atst_fast; default: everybody who is installed"""
    size: tuple[str, ...] = ()
    """sizes of the inputs, such as small; default: all but tiny"""
    seconds: float = 0.5
    """how long to measure each case"""
    json: Path | None = None
    """file to write the result to"""
    compare: Path | None = None
    """earlier result to compare with: ratios, and whether they are more than noise"""
    out: Path | None = None
    """folder for pictures (times.png, roofline.png, scaling-<operator>.png); measures the curves too"""
    curves: tuple[str, ...] = ()
    """axes of the curves: frames, tokens, batch, depth, threads; with --out, default: all that an operator has"""
    list: bool = False
    """only list the operators with their sizes and providers"""


def bench(config: BenchConfig) -> int:
    """Measure and show; returns the exit code: 1 if a provider failed or its results are wrong, 130 if interrupted."""
    device = check(config)
    if config.list:
        print("\n".join(listed(device)))
        return 0
    cases = chosen(config, device)
    earlier = None if config.compare is None else compare.load(config.compare)
    if config.out is not None:
        make_folder(config.out)
    if config.json is not None:  # what cannot be written is found out before minutes have been measured
        make_folder(config.json.parent)
        if config.json.is_dir():
            raise UserError(f"--json must be a file, got the folder {config.json}")
    note("measuring what this machine can do ...")
    here = {"date": report.now(), **describe(device, cases)}
    code = 0
    measured: list[Measured] = []
    missing: list[LeftOut] = []
    try:
        progress = Progress(len(cases))
        for done in run(cases, Session(config.seconds), progress.tell):
            if isinstance(done, Measured):
                measured.append(done)
            else:
                missing.append(done)
    except KeyboardInterrupt:
        code = 130
    note("")
    result = report.collect(measured, here, missing)
    show(config, result, earlier)
    return code or int(any(case.fault for case in missing))


def check(config: BenchConfig) -> str:
    """The device. Raises UserError for the first value that makes no sense, by the name of its option."""
    device = pick_device(config.device).type
    if device == "cuda" and (why := build_info()["cuda"]).startswith("none"):
        note(f"this build has no CUDA kernels ({why}): where {OURS} has no Triton kernel, its reference runs\n")
    operators = [OPERATORS[name] for name in config.ops or OPERATORS if name in OPERATORS]
    allowed = {
        "ops": (config.ops, [*OPERATORS]),
        "size": (config.size, unique(size for o in operators for size in o.sizes[device])),
        "providers": (
            config.providers,
            unique(name for o in operators for name, p in o.providers.items() if device in p.devices),
        ),
        "curves": (config.curves, [a for a in AXES if any(a in o.axes(device) for o in operators)]),
    }
    for name, (given, known) in allowed.items():
        for value in given:
            if value not in known:
                option = "the operator" if name == "ops" else f"--{name}"
                raise UserError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    if not 0 < config.seconds <= 60:
        raise UserError(f"--seconds must be positive and at most 60, got {config.seconds!r}")
    if config.out is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("bench: --out needs the package matplotlib: pip install 'atst_fast[train,bench]'")
    return device


def chosen(config: BenchConfig, device: str) -> list[Case]:
    """The cases that are asked for; those of atst_fast always, for the ratios are to them."""
    operators = [OPERATORS[name] for name in config.ops or OPERATORS]
    sizes = [case for operator in operators for case in operator.cases(device)]
    if config.size:
        sizes = [case for case in sizes if case.size in config.size]
    else:
        sizes = [case for case in sizes if case.size != "tiny"]
    curves = []
    if config.out is not None or config.curves:
        curves = [case for o in operators for case in o.curve_cases(device, config.curves or None)]
    providers = {OURS, *config.providers}
    return [case for case in (*sizes, *curves) if not config.providers or case.provider in providers]


def describe(device: str, cases: Iterable[Case]) -> dict:
    return machine.describe_gpu() if device == "cuda" else machine.describe({case.threads for case in cases})


def show(config: BenchConfig, result: dict, earlier: dict | None) -> None:
    print("\n".join(report.tables(result)))
    if config.json is not None:
        with explain(f"write {config.json}"):
            print(f"\nwritten to {report.write(result, config.json)}")
    if earlier is not None:
        print("\n".join(compare.lines(result, earlier)))
    if config.out is not None:
        from atst_fast.bench.plot import pictures

        with explain(f"draw to {config.out}"):
            for path in pictures(result, config.out):
                print(f"drawn to {path}")


def listed(device: str) -> list[str]:
    rows: list[tuple[str, ...]] = [("operator", "sizes", "providers")]
    for name, operator in OPERATORS.items():
        providers = [p for p, provider in operator.providers.items() if device in provider.devices]
        rows.append((name, ", ".join(operator.sizes[device]), ", ".join(providers)))
    return report.aligned(rows, left=(0, 1, 2))


class Progress:
    """Which case is being measured: one line on a terminal that the next one replaces."""

    def __init__(self, cases: int) -> None:
        self.cases, self.told = cases, 0

    def tell(self, case: Case) -> None:
        self.told += 1
        note(f"{self.told}/{self.cases} {case.name.removeprefix('test_')}")


def note(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
