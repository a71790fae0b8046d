#!/usr/bin/env python3
"""Measure the accuracy and speed of each strategy of SWAA on the demo model, and write docs/results.md.

python scripts/demo/results.py measure        # writes docs/results/demo.json; resumes an interrupted run
python scripts/demo/results.py measure-tail   # writes docs/results/demo-tail.json; resumes an interrupted run
python scripts/demo/results.py write          # writes docs/results.md and its plot from both files
python scripts/demo/results.py check          # fails if docs/results.md is stale
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "scripts")]  # where swaa_edge and this package lie

from demo.results_page import page

DATA = ROOT / "docs" / "results" / "demo.json"
TAIL = DATA.with_name("demo-tail.json")
PAGE = ROOT / "docs" / "results.md"


def measure(samples: int, threads: int) -> None:
    """Calibrate, fine-tune, and evaluate every configuration on the same questions, or resume an interrupted run."""
    from demo import results_measure

    _save(DATA, results_measure.measure(samples, threads))


def measure_tail(samples: int, threads: int) -> None:
    """Evaluate recipes with several tails on some of the questions, or resume an interrupted run."""
    from demo import results_tail

    _save(TAIL, results_tail.measure_tail(samples, threads))


def _save(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)} written; next: {Path(sys.argv[0]).name} write", file=sys.stderr)


def _load() -> tuple[dict[str, Any], dict[str, Any]]:
    document, tail = (json.loads(path.read_text(encoding="utf-8")) for path in (DATA, TAIL))
    return document, tail


def write() -> None:
    """Write docs/results.md and its plot."""
    from swaa_edge.evaluate.plot import plot_accuracy

    document, tail = _load()
    PAGE.write_text(page(document, tail), encoding="utf-8")
    plot_accuracy(document, DATA.with_name("accuracy.png"))


def check() -> None:
    """Exit with an error if docs/results.md is stale."""
    if PAGE.read_text(encoding="utf-8") != page(*_load()):
        sys.exit("docs/results.md is stale: python scripts/demo/results.py write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="measure | measure-tail | write | check")
    for name, run, samples in (("measure", measure, 200), ("measure-tail", measure_tail, 50)):
        add = commands.add_parser(name, help=run.__doc__).add_argument
        add("--samples", type=int, default=samples, metavar="N", help="samples per task (default: %(default)s)")
        add("--threads", type=int, default=os.cpu_count(), metavar="N", help="CPU threads (default: all cores)")
    commands.add_parser("write", help=write.__doc__)
    commands.add_parser("check", help=check.__doc__)
    given = vars(parser.parse_args())
    run = {"measure": measure, "measure-tail": measure_tail, "write": write, "check": check}[given.pop("command")]
    run(**given)


if __name__ == "__main__":
    main()
