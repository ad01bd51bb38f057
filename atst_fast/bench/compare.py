"""Two results of the same cases beside each other: ratios, and whether they are more than noise."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from atst_fast.bench import report

# What two runs of one program differ by even where the rounds of each agree: clocks, addresses, neighbours.
LEAST_BAND = 0.02


class Change(NamedTuple):
    """A case of both runs: medians in seconds, and the band within which their ratio says nothing, as in 1 ± band."""

    case: dict
    before: float
    now: float
    band: float

    @property
    def ratio(self) -> float:
        return self.now / self.before

    @property
    def verdict(self) -> str:
        if 1 / (1 + self.band) <= self.ratio <= 1 + self.band:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def load(path: Path) -> dict:
    """A result that was written before. Raises ValueError with what is wrong with the file."""
    try:
        result = json.loads(path.read_text())
        times = [(report.key(case), case["median_s"], case["iqr_s"]) for case in result["cases"]]
        result["device"]["name"], result["versions"]["torch"], result["commit"]["id"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        kinds = {KeyError: f"it lacks {error}", TypeError: "it has another form", AttributeError: "it has another form"}
        why = kinds.get(type(error), "it is not JSON")
        raise ValueError(f"bench: {path} is no result of a benchmark: {why}") from error
    for key, median, spread in times:
        if not all(isinstance(x, int | float) for x in (median, spread)) or not (0 < median < math.inf and spread >= 0):
            said = f"its {key[1]} has the median {median!r} and the spread {spread!r}"
            raise ValueError(f"bench: {path} is no result of a benchmark: {said}")
    return result


def changes(result: dict, earlier: dict) -> list[Change]:
    """The cases of both. The band is the sum of both spreads: quartile distance over median."""
    before = {report.key(case): case for case in earlier["cases"]}
    found = []
    for case in result["cases"]:
        then = before.get(report.key(case))
        if then is not None:
            spreads = case["iqr_s"] / case["median_s"] + then["iqr_s"] / then["median_s"]
            found.append(Change(case, then["median_s"], case["median_s"], max(spreads, LEAST_BAND)))
    return found


def lines(result: dict, earlier: dict) -> list[str]:
    """What to print: a table of the cases of both, and what makes the runs differ beside the code."""
    found = changes(result, earlier)
    here, then = (r["commit"]["id"] + " with changes" * bool(r["commit"].get("dirty")) for r in (result, earlier))
    shown = ["", f"now ({here}) beside {earlier.get('date', 'an earlier run')} ({then})"]
    shown += [f"  another {what}: {a}, before {b}" for what, a, b in differences(result, earlier)]
    if not found:
        return [*shown, "  no case is in both"]
    rows: list[tuple[str, ...]] = [("case", "provider", "before", "now", "now / before", "noise", "")]
    for change in found:
        provider = str(change.case["params"].get("provider", ""))
        times = report.seconds(change.before), report.seconds(change.now)
        compared = f"{change.ratio:.2f}", f"± {change.band:.0%}", change.verdict
        rows.append((report.label(change.case), provider, *times, *compared))
    alone = len(result["cases"]) - len(found)
    shown += report.aligned(rows, left=(0, 1, 6))
    return [*shown, *([f"  {alone} cases are not in the earlier result"] if alone else [])]


def differences(result: dict, earlier: dict) -> list[tuple[str, str, str]]:
    """What is not the same about both runs though times depend on it: its name, now and before."""
    names = {
        "device": lambda r: r["device"]["name"],
        "instruction set": lambda r: r["device"].get("isa"),
        "number of threads": lambda r: r.get("threads"),
        "torch": lambda r: r["versions"]["torch"],
    }
    both = [(what, str(read(result)), str(read(earlier))) for what, read in names.items()]
    return [(what, a, b) for what, a, b in both if a != b]
