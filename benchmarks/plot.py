"""Draw one result: the time of each case in units of ours, and the floor; the roofline; the curves that it has.

python -m benchmarks.plot [RESULT.json] [--out FOLDER]
"""

import argparse
import json
from pathlib import Path

from atst_fast.bench.plot import pictures
from benchmarks.report import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="default: the newest under benchmarks/results")
    parser.add_argument("--out", type=Path, help="default: a folder beside the result, of its name")
    args = parser.parse_args()
    path = args.result or max(RESULTS.glob("*/*.json"), key=lambda p: p.name, default=None)
    if path is None or not path.exists():
        parser.error(f"no result {path or f'under {RESULTS}'}; measure with: pytest benchmarks --benchmark-enable")
    for picture in pictures(json.loads(path.read_text()), args.out or path.with_suffix("")):
        print(f"drawn to {picture}")


if __name__ == "__main__":
    main()
