"""One run as one JSON file and as tables: ``python -m benchmarks.report FILE`` prints those of a file.

The JSON: what machine.describe() returns, ``date``, and ``cases``, each with ``group``, ``name``, ``params``,
``median_s``, ``iqr_s``, ``min_s``, ``rounds``, the ``extra_info`` of the benchmark, ``floor_s`` (null where neither
bytes nor flops are known), ``floor_by`` (which of the two it is) and ``ratio_to_atst_fast`` (its median over ours, per
item, null where there is no counterpart). A run on a GPU has its name, clocks and driver, and its own rates.
A share of the floor above 100 % means that the data was in the caches.
"""

import datetime
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "results"
OURS = "atst_fast"
GPU_CASES = pytest.StashKey[list]()  # where benchmarks/gpu/conftest.py leaves the cases of a run
GPU_MACHINE = pytest.StashKey[dict]()  # and the machine, with the run's date


def collect(benchmarks: Iterable, machine: dict) -> dict:
    cases = [_case(b, machine["rates"]) for b in benchmarks]
    for case in cases:
        ours = [c for c in cases if _comparison(c) == _comparison(case) and c["params"].get("provider") == OURS]
        case["ratio_to_atst_fast"] = _seconds_per_item(case) / _seconds_per_item(ours[0]) if ours else None
    return {"date": now(), **machine, "cases": cases}


def _seconds_per_item(case: dict) -> float:
    return case["median_s"] / case["extra_info"].get("items", (1, ""))[0]


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _case(benchmark, rates: dict) -> dict:
    stats, extra = benchmark.stats, dict(benchmark.extra_info)
    floors = [
        extra["bytes"] / max(v for k, v in rates.items() if k.endswith("bytes_per_s")) if "bytes" in extra else 0.0,
        extra["flops"] / _rate_of_products(extra, rates) if "flops" in extra else 0.0,
    ]
    by_memory = floors[0] > floors[1]
    if "peak_flops" in extra:
        extra["share_of_peak"] = extra["flops"] / stats.median / extra["peak_flops"]
    return {
        "group": benchmark.group or benchmark.name.split("[")[0],
        "name": benchmark.name,
        "params": {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in (benchmark.params or {}).items()},
        "median_s": stats.median,
        "iqr_s": stats.iqr,
        "min_s": stats.min,
        "rounds": stats.rounds,
        "extra_info": extra,
        "floor_s": max(floors) or None,
        "floor_by": ("bytes" if by_memory else "flops") if max(floors) else None,
    }


def _rate_of_products(extra: dict, rates: dict) -> float:
    half = extra.get("dtype") in ("bfloat16", "float16")
    return rates["bf16_flops" if half and "bf16_flops" in rates else "sgemm_flops"]


def _comparison(case: dict) -> tuple:
    """What cases have in common that are compared with one another."""
    others = sorted((k, str(v)) for k, v in case["params"].items() if k != "provider")
    return case["group"], case["name"].split("[")[0], tuple(others)


def save(result: dict) -> Path:
    """Write the result under its device's folder, in one step, and return where."""
    return write(result, path_of(result))


def path_of(result: dict) -> Path:
    """benchmarks/results/<device>/<date>-<commit>.json"""
    device, commit = result["device"], result["commit"]
    folder = _slug(device["name"] if on_gpu(result) else f"{device['name']} {device['cores']} cores")
    date = re.sub(r"[-:]", "", result["date"])[:15]
    return RESULTS / folder / f"{date}-{commit['id']}{'-dirty' if commit['dirty'] else ''}.json"


def write(result: dict, path: Path) -> Path:
    """In one step; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
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
    rates = result["rates"]
    lines = [
        "",
        f"{title(result)}, torch {result['versions']['torch']}, commit {result['commit']['id']}"
        + (" with changes" if result["commit"]["dirty"] else ""),
        f"copy {rates['copy_bytes_per_s'] / 1e9:.1f}, a += b {rates['add_bytes_per_s'] / 1e9:.1f}, "
        f"a *= c {rates['scale_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"sgemm{' (TF32)' if result['device'].get('tf32') else ''} {rates['sgemm_flops'] / 1e9:.0f} GFLOP/s"
        + (f", bfloat16 {rates['bf16_flops'] / 1e12:.0f} TFLOP/s" if "bf16_flops" in rates else ""),
    ]
    for group in dict.fromkeys(c["group"] for c in result["cases"]):
        lines += ["", group, *_table([c for c in result["cases"] if c["group"] == group])]
    return lines


def _table(cases: list[dict]) -> list[str]:
    cases = sorted(cases, key=lambda c: (_first_index(cases, c), c["params"].get("provider") != OURS, c["median_s"]))
    rows = [("case", "provider", "median", "IQR", "rate", "of floor", f"x {OURS}", "")]
    rows += [_row(c) for c in cases]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i in (0, 1, 7) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _first_index(cases: list[dict], case: dict) -> int:
    return next(i for i, c in enumerate(cases) if _comparison(c) == _comparison(case))


def _row(case: dict) -> tuple[str, ...]:
    params, extra, median = case["params"], case["extra_info"], case["median_s"]
    label = " ".join([case["name"].split("[")[0].removeprefix("test_"), *_values(params)])
    share = f"{case['floor_s'] / median:.0%}" if case["floor_s"] else ""
    ratio = f"{case['ratio_to_atst_fast']:.2f}" if case["ratio_to_atst_fast"] else ""
    provider = str(params.get("provider", ""))
    return (
        label,
        provider,
        _time(median),
        _time(case["iqr_s"]),
        _rate(extra, median, case["floor_by"]),
        share,
        ratio,
        _note(extra, median),
    )


def _note(extra: dict, seconds: float) -> str:
    parts = [extra.get("note", "")]
    if "share_of_peak" in extra:
        parts.append(f"{extra['flops'] / seconds / 1e12:.0f} TFLOP/s, {extra['share_of_peak']:.1%} of peak")
    if "reserved_bytes" in extra:
        parts.append(f"{extra['reserved_bytes'] / 2**30:.1f} GiB")
    return ", ".join(filter(None, parts))


def _values(params: dict) -> list[str]:
    return [str(v) if k in ("size", "arch") else f"{k}={v}" for k, v in params.items() if k != "provider"]


def _rate(extra: dict, seconds: float, floor_by: str | None) -> str:
    if "items" in extra:
        number, unit = extra["items"]
        return f"{number / seconds:,.0f} {unit}/s"
    if floor_by == "flops":
        return f"{extra['flops'] / seconds / 1e9:.1f} GFLOP/s"
    return f"{extra['bytes'] / seconds / 1e9:.1f} GB/s" if "bytes" in extra else ""


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


if __name__ == "__main__":
    print("\n".join(tables(json.loads(Path(sys.argv[1]).read_text()))))
