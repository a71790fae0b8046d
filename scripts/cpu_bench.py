#!/usr/bin/env python3
"""Attention on the CPU, the unpatched library against ours, in one run: as ratios, beside what the machine can do.

    python scripts/cpu_bench.py --quick                  # 8,192 tokens, up to five minutes on two cores
    python scripts/cpu_bench.py --json cpu.json          # 2k, 8k, 32k, q8_0, SWAA: half an hour

A model of the Qwen3-0.6B shape with random Q8_0 weights and few layers runs on both libraries, each in a process of
its own that stays alive; the sides take turns, and medians count. cpu/fit.py tells how attention's part of a time is
found, cpu/plan.py what is measured, cpu/figures.py what each figure is. It needs `make setup` and `make baseline`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cpu.measuring import Libraries, Run  # noqa: E402
from cpu.plan import Settings  # noqa: E402
from cpu.report import make_document, text  # noqa: E402
from cpu.roofline import NoRoofline, Roofline  # noqa: E402

from swaa_edge.errors import OutputError, SwaaError  # noqa: E402
from swaa_edge.support.atomic import atomic_output  # noqa: E402

_MOST_TOKENS = 1_000_000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage before it."""
        self.exit(2, f"Error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="only 8,192 tokens, two layers, no SWAA")
    parser.add_argument("--json", metavar="FILE", help="write a JSON document, too; - is stdout, without a table")
    parser.add_argument("--layers", type=_number, metavar="N", help="of the model (default: 4; 2 with --quick)")
    parser.add_argument("--threads", type=_number, metavar="N", default=_cores(), help="default: the cores")
    parser.add_argument("--depths", type=_numbers, metavar="N,...", help="default: 2048,8192,32768; 8192 with --quick")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="DIR",
        default=ROOT / "build" / "baseline" / "lib",
        help="folder of the unpatched library (default: build/baseline/lib)",
    )
    parser.add_argument(
        "--library",
        type=Path,
        metavar="DIR",
        default=ROOT / "build" / "editable" / "bin",
        help="folder of the patched library (default: build/editable/bin)",
    )
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the model files here, and use those there")
    parser.add_argument("--no-roofline", action="store_true", help="don't measure what the machine can do at best")
    return parser


def _number(value: str) -> int:
    digits = value.replace("_", "")
    if not (digits.isascii() and digits.isdigit()) or not 0 < int(digits) <= _MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{value!r} must be a whole number from 1 to {_MOST_TOKENS}")
    return int(digits)


def _numbers(value: str) -> tuple[int, ...]:
    return tuple(sorted({_number(part.strip()) for part in value.split(",")}))


def _cores() -> int:
    # Those that this process may use, where the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    given = parser.parse_args(arguments)
    for option, folder, target in (("--baseline", given.baseline, "baseline"), ("--library", given.library, "setup")):
        if not any(folder.glob("*llama.*")):
            parser.error(f"{option}: {folder} holds no llama.cpp library; `make {target}` builds one")
    if given.models is not None and not given.models.is_dir():
        parser.error(f"--models: {given.models} is no folder; create it, or leave the option out")
    try:
        return _run(given)
    except OutputError as error:
        parser.error(str(error))
    except SwaaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    chosen = {name: value for name, value in vars(given).items() if name in ("layers", "depths") and value is not None}
    settings = (Settings.quickly if given.quick else Settings)(given.threads, **chosen)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with contextlib.ExitStack() as stack:
        # Claimed before the minutes of measuring.
        to_file = given.json not in (None, "-")
        output = stack.enter_context(atomic_output(given.json, force=True)) if to_file else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swaa-edge-cpu-bench-")))
        roofline, without = None, []
        if not given.no_roofline:
            try:
                roofline = Roofline.compiled(folder)
            except NoRoofline as error:
                without.append(f"roofline: {error}")
                print(f"no roofline: {error}", file=sys.stderr)
        libraries = stack.enter_context(
            Libraries.started(given.library.resolve(), given.baseline.resolve(), stock=not settings.quick)
        )
        run = Run(settings, libraries, given.models or folder, roofline, lambda line: print(line, file=sys.stderr))
        run.skipped += without
        stopped = _measured(run)
        if stopped is not None and not run.samples:
            raise stopped
        told = stopped and (str(stopped) or "interrupted")
        document = make_document(run, {"roofline": roofline, "load": load, "stopped": told})
        if output is not None:
            output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2) if given.json == "-" else text(document))
    if stopped is not None:
        raise stopped
    return 0


def _measured(run: Run) -> Any:
    """What ended the run early, if something did."""
    try:
        run.all()
    except (SwaaError, KeyboardInterrupt) as error:
        return error
    return None


if __name__ == "__main__":
    sys.exit(main())
