"""Pictures of a result: the time of each case in units of ours, the roofline, and curves. They need matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from atst_fast.bench.operator import OURS
from atst_fast.bench.report import seconds, title
from atst_fast.files import write_atomically


def pictures(result: dict, folder: Path) -> list[Path]:
    """All that the cases of a result make: times.png, roofline.png, scaling-<operator>.png. Returns what was drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [folder / "times.png", folder / "roofline.png"]
    made = [path for path, draw in zip(drawn, (times, roofline)) if draw(result, path)]
    operators = dict.fromkeys(c["group"].partition(" over ")[0] for c in result["cases"] if _over(c))
    for operator in operators:
        made.append(folder / f"scaling-{operator.strip('_')}.png")
        scaling(result, operator, made[-1])
    return made


def times(result: dict, out: Path) -> bool:
    """One panel per group: a bar per case (median, IQR as whisker) in units of ours, and its floor as a black line;
    False if there is none."""
    cases = [case for case in result["cases"] if not _over(case)]
    groups = list(dict.fromkeys(case["group"] for case in cases))
    if not groups:
        return False
    counts = [sum(case["group"] == g for case in cases) for g in groups]
    figure, panels = plt.subplots(
        len(groups),
        1,
        figsize=(9, 1.2 + 0.24 * sum(counts) + 0.7 * len(groups)),
        height_ratios=counts,
        squeeze=False,
        layout="constrained",
    )
    for panel, group in zip(panels[:, 0], groups):
        _bars(panel, group, [case for case in cases if case["group"] == group])
    return _finish(figure, result, out)


def _finish(figure, result: dict, out: Path) -> bool:
    made = f"commit {result['commit']['id']}, torch {result['versions']['torch']}, {result['date'][:10]}"
    figure.suptitle(f"{title(result)}\n{made}", fontsize=9)
    write_atomically(out, lambda path: figure.savefig(path, dpi=130, format="png"))
    plt.close(figure)
    return True


def _bars(panel, group: str, cases: list[dict]) -> None:
    for y, case in enumerate(cases):
        ratio, median = case["ratio_to_atst_fast"] or 1.0, case["median_s"]
        spread = case["iqr_s"] / median * ratio / 2
        panel.barh(y, ratio, xerr=spread, color="tab:orange" if _ours(case) else "tab:gray", height=0.8)
        if case["floor_s"]:
            panel.plot([case["floor_s"] / median * ratio] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.5)
        panel.text(ratio + spread, y, f"  {ratio:.2f}: {seconds(median)}", va="center", fontsize=6)
    panel.set_yticks(range(len(cases)), [case["name"].removeprefix("test_") for case in cases], fontsize=6)
    panel.set_xlim(right=panel.get_xlim()[1] * 1.15)
    panel.invert_yaxis()
    panel.set_xlabel(f"time / time of {OURS} (black line: floor of this machine)", fontsize=7)
    panel.set_title(group, fontsize=8, loc="left")
    panel.tick_params(axis="x", labelsize=7)
    panel.grid(axis="x", alpha=0.3)


def roofline(result: dict, out: Path) -> bool:
    """Operations per second over operations per byte, below what this machine can do; False if no case counts both.

    Ours is filled, a peer is hollow; what is above the slope ran from the caches. Cases on another number of threads
    than the rates are of are not drawn, nor are curves and tiny sizes.
    """
    cases = [c for c in result["cases"] if {"bytes", "flops"} <= set(c["extra_info"]) and _under_roof(c, result)]
    if not cases:
        return False
    figure, panel = plt.subplots(figsize=(9, 6), layout="constrained")
    groups = list(dict.fromkeys(c["group"] for c in cases))
    points = [(c["extra_info"]["flops"] / c["extra_info"]["bytes"], c["extra_info"]["flops"], c) for c in cases]
    for i, group in enumerate(groups):
        for ours in (True, False):
            chosen = [p for p in points if p[2]["group"] == group and _ours(p[2]) == ours]
            x, y = [p[0] for p in chosen], [p[1] / p[2]["median_s"] for p in chosen]
            color = f"C{i % 10}"
            look: dict[str, Any] = {"color": color} if ours else {"edgecolors": color, "facecolors": "none"}
            marker = "os^Dv"[i // 10 % 5]
            panel.scatter(x, y, label=group if ours else None, s=36 if ours else 24, marker=marker, **look)
    for x, flops, case in points:
        if str(case["params"].get("provider")) == OURS:
            label = case["name"].removeprefix("test_").replace(OURS, "").replace("[-", "[").replace("-]", "]")
            panel.annotate(label, (x, flops / case["median_s"]), (6, -3), textcoords="offset points", fontsize=6)
    _ceilings(panel, result["rates"], [p[0] for p in points])
    panel.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    panel.legend(fontsize=7)
    return _finish(figure, result, out)


def _under_roof(case: dict, result: dict) -> bool:
    params = case["params"]
    alone = params.get("threads", result["threads"]) == result["threads"]
    return alone and not _over(case) and params.get("size") != "tiny"


def _ours(case: dict) -> bool:
    return str(case["params"].get("provider", OURS)).startswith(OURS)


def _over(case: dict) -> str:
    """The axis of a curve's case."""
    return case["group"].partition(" over ")[2]


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


def scaling(result: dict, operator: str, out: Path) -> bool:
    """Seconds over each axis that was varied, a row of panels per direction: a line per provider, its quartiles as a
    band."""
    cases = [c for c in result["cases"] if c["group"].partition(" over ")[0] == operator and _over(c)]
    axes = list(dict.fromkeys(map(_over, cases)))
    ways = list(dict.fromkeys(c["params"].get("way", "") for c in cases))
    size = 0.8 + 4.0 * len(axes), 1.0 + 3.0 * len(ways)
    figure, panels = plt.subplots(len(ways), len(axes), figsize=size, squeeze=False, layout="constrained")
    for row, way in zip(panels, ways):
        for panel, axis in zip(row, axes):
            _lines(panel, axis, [c for c in cases if _over(c) == axis and c["params"].get("way", "") == way])
            panel.set_title(f"{operator} {way}".strip(), fontsize=8, loc="left")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    return _finish(figure, result, out)


def _lines(panel, axis: str, cases: list[dict]) -> None:
    providers = list(dict.fromkeys(c["params"]["provider"] for c in cases))
    for i, provider in enumerate(sorted(providers, key=lambda p: not p.startswith(OURS))):
        own = sorted((c for c in cases if c["params"]["provider"] == provider), key=lambda c: c["params"][axis])
        x, y = [c["params"][axis] for c in own], [c["median_s"] for c in own]
        half = [c["iqr_s"] / 2 for c in own]
        width = 2 if provider == OURS else 1
        panel.plot(x, y, marker="o", markersize=3, color=f"C{i}", linewidth=width, label=provider)
        low = [max(t - h, t / 10) for t, h in zip(y, half)]
        panel.fill_between(x, low, [t + h for t, h in zip(y, half)], color=f"C{i}", alpha=0.15)
    panel.set(xscale="log", yscale="log")
    panel.set_xlabel(axis, fontsize=7)
    panel.set_ylabel("seconds", fontsize=7)
    ticks = sorted({c["params"][axis] for c in cases})
    panel.set_xticks(ticks, list(map(str, ticks)), fontsize=7)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
