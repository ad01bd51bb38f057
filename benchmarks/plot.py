"""Draw one result: the time of each case in units of ours, and the floor; and beside it the roofline.

python -m benchmarks.plot [RESULT.json] [--out PICTURE.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.report import OURS, RESULTS, title


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="default: the newest under benchmarks/results")
    parser.add_argument("--out", type=Path, help="default: beside the result")
    args = parser.parse_args()
    path = args.result or max(RESULTS.glob("*/*.json"), key=lambda p: p.name, default=None)
    if path is None or not path.exists():
        parser.error(f"no result {path or f'under {RESULTS}'}; measure with: pytest benchmarks --benchmark-enable")
    out = args.out or path.with_suffix(".png")
    result = json.loads(path.read_text())
    draw(result, out)
    print(f"drawn to {out}")
    if roofline(result, out.with_stem(f"{out.stem}-roofline")):
        print(f"drawn to {out.with_stem(f'{out.stem}-roofline')}")


def draw(result: dict, out: Path) -> None:
    """One panel per group: a bar per case (median, IQR as whisker) in units of ours, and its floor as a black line."""
    groups = list(dict.fromkeys(case["group"] for case in result["cases"]))
    counts = [sum(case["group"] == g for case in result["cases"]) for g in groups]
    figure, panels = plt.subplots(
        len(groups),
        1,
        figsize=(9, 1.2 + 0.24 * sum(counts) + 0.7 * len(groups)),
        height_ratios=counts,
        squeeze=False,
        layout="constrained",
    )
    for panel, group in zip(panels[:, 0], groups):
        _panel(panel, group, [case for case in result["cases"] if case["group"] == group])
    _finish(figure, result, out)


def _finish(figure, result: dict, out: Path) -> None:
    made = f"commit {result['commit']['id']}, torch {result['versions']['torch']}, {result['date'][:10]}"
    figure.suptitle(f"{title(result)}\n{made}", fontsize=9)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _panel(panel, group: str, cases: list[dict]) -> None:
    for y, case in enumerate(cases):
        ratio, median = case["ratio_to_atst_fast"] or 1.0, case["median_s"]
        spread = case["iqr_s"] / median * ratio / 2
        panel.barh(y, ratio, xerr=spread, color="tab:orange" if _ours(case) else "tab:gray", height=0.8)
        if case["floor_s"]:
            panel.plot([case["floor_s"] / median * ratio] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.5)
        panel.text(ratio + spread, y, f"  {ratio:.2f}: {median * 1e3:.3g} ms", va="center", fontsize=6)
    panel.set_yticks(range(len(cases)), [case["name"].removeprefix("test_") for case in cases], fontsize=6)
    panel.set_xlim(right=panel.get_xlim()[1] * 1.15)
    panel.invert_yaxis()
    panel.set_xlabel(f"time / time of {OURS} (black line: floor of this machine)", fontsize=7)
    panel.set_title(group, fontsize=8, loc="left")
    panel.tick_params(axis="x", labelsize=7)
    panel.grid(axis="x", alpha=0.3)


def roofline(result: dict, out: Path) -> bool:
    """Operations per second over operations per byte, below what this machine can do; False if no case counts both.

    Ours is filled, a peer is hollow; what is above the slope ran from the caches.
    """
    cases = [c for c in result["cases"] if {"bytes", "flops"} <= set(c["extra_info"])]
    if not cases:
        return False
    figure, panel = plt.subplots(figsize=(9, 6), layout="constrained")
    groups = list(dict.fromkeys(c["group"] for c in cases))
    points = [(c["extra_info"]["flops"] / c["extra_info"]["bytes"], c["extra_info"]["flops"], c) for c in cases]
    for i, group in enumerate(groups):
        for ours in (True, False):
            chosen = [p for p in points if p[2]["group"] == group and _ours(p[2]) == ours]
            x, y = [p[0] for p in chosen], [p[1] / p[2]["median_s"] for p in chosen]
            look = {"color": f"C{i}"} if ours else {"edgecolors": f"C{i}", "facecolors": "none"}
            panel.scatter(x, y, label=group if ours else None, s=36 if ours else 24, **look)
    for x, flops, case in points:
        if _ours(case):
            label = case["name"].removeprefix("test_").replace(OURS, "").replace("[-", "[").replace("-]", "]")
            panel.annotate(label, (x, flops / case["median_s"]), (6, -3), textcoords="offset points", fontsize=6)
    _ceilings(panel, result["rates"], [p[0] for p in points])
    panel.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    panel.legend(fontsize=7)
    _finish(figure, result, out)
    return True


def _ours(case: dict) -> bool:
    return str(case["params"].get("provider", OURS)).startswith(OURS)


def _ceilings(panel, rates: dict, intensities: list[float]) -> None:
    """The bandwidth as a slope up to each measured rate of operations."""
    bandwidth = max(v for k, v in rates.items() if k.endswith("bytes_per_s"))
    seen = [*intensities, *(top / bandwidth for top in _flops(rates))]
    left, right = min(seen) / 3, 3 * max(seen)
    tops = dict(zip(("float32 product", "bfloat16 product"), _flops(rates)))
    for name, top in tops.items():
        panel.plot([top / bandwidth, right], [top, top], color="black", linewidth=1)
        panel.text(right, top, f"{name}: {top / 1e12:.3g} TFLOP/s", ha="right", va="bottom", fontsize=7)
    end = max(tops.values())
    panel.plot([left, end / bandwidth], [left * bandwidth, end], color="black", linewidth=1)
    panel.text(left, left * bandwidth, f"memory: {bandwidth / 1e9:.4g} GB/s", va="top", fontsize=7)


def _flops(rates: dict) -> list[float]:
    return [rates[k] for k in ("sgemm_flops", "bf16_flops") if k in rates]


if __name__ == "__main__":
    main()
