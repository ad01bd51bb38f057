"""Where results are kept. ``python -m benchmarks.report FILE`` prints the tables of one."""

import json
import sys
from pathlib import Path

from atst_fast.bench import report

RESULTS = Path(__file__).parent / "results"


def save(result: dict) -> Path:
    """Write the result under its device's folder, in one step, and return where."""
    return report.write(result, RESULTS / report.file_name(result))


if __name__ == "__main__":
    print("\n".join(report.tables(json.loads(Path(sys.argv[1]).read_text()))))
