"""One run as one JSON file and as tables.

The JSON: what machine.describe() returns, ``date``, and ``cases``, each with ``group``, ``name``, ``params``,
``median_s``, ``iqr_s``, ``min_s``, ``rounds``, ``extra_info`` (what the benchmark counts: bytes, flops, dtype, items;
``parity``, the error and what is allowed of it; ``runs``, who runs our operator), ``floor_s`` (null where neither bytes
nor flops are known), ``floor_by`` (which of the two it is), ``share_of_copy`` and ``share_of_products`` (of the
machine's measured rates) and ``ratio_to_atst_fast`` (its median over ours, per item, null where there is no
counterpart). ``left_out`` are cases without a time, each with ``why`` and whether that is a ``fault``.
A run on a GPU has its name, clocks and driver, and its own rates. A share above 100 % means that the data was in the
caches. A floor is the larger of bytes over the best measured bandwidth and flops over the rate of matrix products.
"""

import datetime
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atst_fast.bench.operator import OURS
from atst_fast.bench.session import LeftOut
from atst_fast.files import write_atomically

_COLUMNS = ("case", "provider", "median", "IQR", "rate", "of copy", "of matmul", f"x {OURS}", "parity", "")
# A spread of this share of the median is not the code's: something else ran on the machine.
NOISY = 0.5
_LEFT = (0, 1, 9)  # columns that are aligned so


def collect(benchmarks: Iterable, machine: dict, left_out: Iterable[LeftOut] = ()) -> dict:
    """The result of what was measured: ``group``, ``name``, ``params``, ``extra_info`` and ``stats`` of each case. Its
    date is that of ``machine``, if it has one."""
    cases = [_case(b, machine) for b in benchmarks]
    ours = {_comparison(case): case for case in reversed(cases) if case["params"].get("provider") == OURS}
    for case in cases:
        own = ours.get(_comparison(case))
        case["ratio_to_atst_fast"] = _seconds_per_item(case) / _seconds_per_item(own) if own else None
    return {"date": now(), **machine, "cases": cases, "left_out": [asdict(case) for case in left_out]}


def _seconds_per_item(case: dict) -> float:
    return case["median_s"] / case["extra_info"].get("items", (1, ""))[0]


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _case(benchmark: Any, machine: dict) -> dict:
    stats, extra, params = benchmark.stats, dict(benchmark.extra_info), benchmark.params or {}
    rates = machine.get("rates_of_threads", {}).get(str(params.get("threads")), machine["rates"])
    bandwidth = max(v for k, v in rates.items() if k.endswith("bytes_per_s"))
    by = {
        "bytes": extra.get("bytes", 0) / bandwidth,
        "flops": extra["flops"] / _rate_of_products(extra, rates) if "flops" in extra else 0.0,
    }
    floor = max(by.values())
    if "peak_flops" in extra:
        extra["share_of_peak"] = extra["flops"] / stats.median / extra["peak_flops"]
    copied = extra["bytes"] / stats.median / rates["copy_bytes_per_s"] if "bytes" in extra else None
    return {
        "group": benchmark.group or benchmark.name.split("[")[0],
        "name": benchmark.name,
        "params": {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in params.items()},
        "median_s": stats.median,
        "iqr_s": stats.iqr,
        "min_s": stats.min,
        "rounds": stats.rounds,
        "extra_info": extra,
        "floor_s": floor or None,
        "floor_by": max(by, key=lambda k: by[k]) if floor else None,
        "share_of_copy": copied,
        "share_of_products": by["flops"] / stats.median if "flops" in extra else None,
    }


def _rate_of_products(extra: dict, rates: dict) -> float:
    half = extra.get("dtype") in ("bfloat16", "float16")
    return rates["bf16_flops" if half and "bf16_flops" in rates else "sgemm_flops"]


def _comparison(case: dict) -> tuple:
    """What cases have in common that are compared with one another."""
    others = sorted((k, str(v)) for k, v in case["params"].items() if k != "provider")
    return case["group"], case["name"].split("[")[0], tuple(others)


def key(case: dict) -> tuple:
    """What the same case of another run has in common with it."""
    return *_comparison(case), str(case["params"].get("provider"))


def file_name(result: dict) -> Path:
    """<device>/<date>-<commit>.json"""
    device, commit = result["device"], result["commit"]
    folder = _slug(device["name"] if on_gpu(result) else f"{device['name']} {device['cores']} cores")
    date = re.sub(r"[-:]", "", result["date"])[:15]
    return Path(folder) / f"{date}-{commit['id']}{'-dirty' if commit['dirty'] else ''}.json"


def write(result: dict, path: Path) -> Path:
    """In one step; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(result, indent=1) + "\n"))
    return path


def on_gpu(result: dict) -> bool:
    return result["device"]["isa"].startswith("sm_")


def title(result: dict) -> str:
    """The machine in one line."""
    device = result["device"]
    units = f"{device['cores']} {'multiprocessors' if on_gpu(result) else 'cores'}, {device['isa']}"
    where = f"SM clock {device.get('clocks_sm', '?')} MHz" if on_gpu(result) else f"{result['threads']} threads"
    return f"{device['name']}, {units}, {where}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", name.lower())).strip("-")


def tables(result: dict) -> list[str]:
    """The lines to print: the machine, then one table per group; comparisons are kept apart by their order."""
    rates, missing = result["rates"], result.get("left_out", [])
    lines = [
        "",
        f"{title(result)}, torch {result['versions']['torch']}, commit {result['commit']['id']}"
        + (" with changes" if result["commit"]["dirty"] else ""),
        f"copy {rates['copy_bytes_per_s'] / 1e9:.1f}, a += b {rates['add_bytes_per_s'] / 1e9:.1f}, "
        f"a *= c {rates['scale_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"sgemm{' (TF32)' if result['device'].get('tf32') else ''} {rates['sgemm_flops'] / 1e9:.0f} GFLOP/s"
        + (f", bfloat16 {rates['bf16_flops'] / 1e12:.0f} TFLOP/s" if "bf16_flops" in rates else ""),
    ]
    for group in dict.fromkeys(c["group"] for c in [*result["cases"], *missing]):
        cases = [c for c in result["cases"] if c["group"] == group]
        runs = {c["extra_info"]["runs"] for c in cases if "runs" in c["extra_info"]}
        lines += ["", f"{group}{': ' * bool(runs)}{', '.join(sorted(runs))}", *(aligned(_rows(cases)) if cases else [])]
        lines += _without_time([c for c in missing if c["group"] == group])
    return lines


def _without_time(missing: list[dict]) -> list[str]:
    """One line per reason."""
    reasons: dict[tuple, list[str]] = {}
    for case in missing:
        what = " ".join([str(case["params"]["size"]), *_values({**case["params"], "size": ""})]).strip()
        reasons.setdefault((case["fault"], case["params"].get("provider"), case["why"]), []).append(what)
    lines = []
    for (fault, provider, why), which in reasons.items():
        some = "; ".join(which[:3]) + (f" and {len(which) - 3} more" if len(which) > 3 else "")
        lines.append(f"  {'FAILED' if fault else 'not run'}: {provider}: {why}{f' ({some})' if fault else ''}")
    return lines


def aligned(rows: list[tuple[str, ...]], left: tuple[int, ...] = _LEFT) -> list[str]:
    """Rows of as many cells as lines of a table; ``left`` are the columns that begin at one place."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _rows(cases: list[dict]) -> list[tuple[str, ...]]:
    first: dict[tuple, int] = {}
    for i, case in enumerate(cases):
        first.setdefault(_comparison(case), i)
    cases = sorted(cases, key=lambda c: (first[_comparison(c)], c["params"].get("provider") != OURS, c["median_s"]))
    return [_COLUMNS, *(_row(c) for c in cases)]


def label(case: dict) -> str:
    """The parameters of a case but its provider."""
    return " ".join([case["name"].split("[")[0].removeprefix("test_"), *_values(case["params"])])


def _row(case: dict) -> tuple[str, ...]:
    extra, median = case["extra_info"], case["median_s"]
    ratio = f"{case['ratio_to_atst_fast']:.2f}" if case["ratio_to_atst_fast"] else ""
    return (
        label(case),
        str(case["params"].get("provider", "")),
        seconds(median),
        seconds(case["iqr_s"]),
        _rate(extra, median, case["floor_by"]),
        _percent(case.get("share_of_copy")),
        _percent(case.get("share_of_products")),
        ratio,
        f"{extra['parity']['error']:.0e}" if "parity" in extra else "",
        _note(extra, median, noisy=case["iqr_s"] > NOISY * median),
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def _note(extra: dict, median: float, noisy: bool) -> str:
    parts = ["noisy" * noisy, extra.get("note", "")]
    if "items" in extra:
        number, unit = extra["items"]
        parts.append(f"{number / median:,.0f} {unit}/s")
    if "share_of_peak" in extra:
        parts.append(f"{extra['flops'] / median / 1e12:.0f} TFLOP/s, {extra['share_of_peak']:.1%} of peak")
    if "reserved_bytes" in extra:
        parts.append(f"{extra['reserved_bytes'] / 2**30:.1f} GiB")
    return ", ".join(filter(None, parts))


def _values(params: dict) -> list[str]:
    named = {k: v for k, v in params.items() if k != "provider" and v != ""}
    return [str(v) if k in ("size", "arch", "way", "lengths", "dtype") else f"{k}={v}" for k, v in named.items()]


def _rate(extra: dict, median: float, floor_by: str | None) -> str:
    if floor_by == "flops":
        rate = extra["flops"] / median
        return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GFLOP/s"
    return f"{extra['bytes'] / median / 1e9:.1f} GB/s" if "bytes" in extra else ""


def seconds(time: float) -> str:
    """With its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if time >= scale:
            return f"{time / scale:.3g} {unit}" if time < 1000 * scale else f"{time / scale:.0f} {unit}"
    return f"{time * 1e6:.3g} us"
