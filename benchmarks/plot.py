"""Draw one result: the time of each case in units of ours, and the floor.

python -m benchmarks.plot [RESULT.json] [--out PICTURE.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.report import OURS, RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="default: the newest under benchmarks/results")
    parser.add_argument("--out", type=Path, help="default: beside the result")
    args = parser.parse_args()
    path = args.result or max(RESULTS.glob("*/*.json"), key=lambda p: p.name, default=None)
    if path is None or not path.exists():
        parser.error(f"no result {path or f'under {RESULTS}'}; measure with: pytest benchmarks --benchmark-enable")
    out = args.out or path.with_suffix(".png")
    draw(json.loads(path.read_text()), out)
    print(f"drawn to {out}")


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
    device = result["device"]
    figure.suptitle(
        f"{device['name']}, {device['cores']} cores, {device['isa']}, {result['threads']} threads\n"
        f"commit {result['commit']['id']}, torch {result['versions']['torch']}, {result['date'][:10]}",
        fontsize=9,
    )
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _panel(panel, group: str, cases: list[dict]) -> None:
    for y, case in enumerate(cases):
        ratio, median = case["ratio_to_atst_fast"] or 1.0, case["median_s"]
        ours = str(case["params"].get("provider", OURS)).startswith(OURS)
        spread = case["iqr_s"] / median * ratio / 2
        panel.barh(y, ratio, xerr=spread, color="tab:orange" if ours else "tab:gray", height=0.8)
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


if __name__ == "__main__":
    main()
