"""Compares the engine's logits on the GPU machine with the oracle's logits.

`prepare` computes the oracle's logits during packing, with torch and transformers. `check` and `same_bits` run on the
GPU machine.

Not all rows of logits are packed. For each case, the archive holds the decoded rows, a sample of the other rows, and
the first rows after each edge. An edge is, for example, the end of the window.

A GPU multiplies in TF32 or half precision. The archive therefore also holds logits under full attention. The error of
full attention shows how much of a case's error is rounding.

    prepare(Path("prepared"), CASES)                              # python3 scripts/gpu/check.py pack does it
    for row in check(Path("prepared"), Path("build/bin"), gpu=True): print(row["case"], row["problems"])
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu.runner import CheckError

# The tests' helpers are imported inside functions, because check.py adds tests/ to sys.path later.
if TYPE_CHECKING:
    from support.engine.process import Engine, Result
    from support.oracle.grid import Case, Schedule
    from support.oracle.verdict import Figures

# Number of prompt rows per case in the archive.
_ROWS = 48
# Largest accepted error of full attention. Beyond this error, no case can be judged.
_WORST_PLAIN = {"f16": 0.3, "f32": 0.3, "q8_0": 1.0}
_ALL_LAYERS = 1 << 20


def prepare(folder: Path, lines: Sequence[str], models_of: Sequence[str] = ()) -> None:
    """Replace the content of `folder` by cases.json, expected.npz and models.

    lines: cases to write to cases.json and expected.npz, with their models.
    models_of: more cases, of which only the models are written.

    Needs torch, transformers, and tests/ on sys.path.
    """
    from support.oracle import verdict
    from support.oracle.grid import Case, schedule
    from support.oracle.grid_models import Zoo

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    zoo = Zoo(folder)
    cases = [Case.parse(line) for line in lines]
    zoo.prepare((case.arch, case.layers) for case in [*cases, *map(Case.parse, models_of)])
    arrays: dict[str, np.ndarray] = {}
    for number, case in enumerate(cases):
        fed = schedule(case)
        rows = chosen_rows(case, fed)
        for name, rule in (("swaa", case), ("full", _full_attention(case))):
            # Half precision is accurate to one part in two thousand, far below the limits.
            arrays[f"{number}-{name}"] = verdict.expected_rows(zoo, rule, fed)[rows].astype(np.float16)
        arrays[f"{number}-rows"] = rows.astype(np.int32)
    np.savez_compressed(folder / "expected.npz", **arrays)
    (folder / "cases.json").write_text(json.dumps([str(case) for case in cases], indent=1) + "\n")


def chosen_rows(case: Case, fed: Schedule) -> np.ndarray:
    """Return the indexes (int64) of the rows to compare, counted over the concatenated sequences.

    The rows are all decoded rows and at most _ROWS prompt rows.
    """
    flags = np.concatenate([np.array(flags, dtype=bool) for flags in fed.is_decode])
    starts = np.cumsum([0, *map(len, fed.tokens)])[:-1]
    edges = (0, case.window - 1, case.window, case.window + case.sinks, case.n_ubatch, case.n_batch, 256, 512)
    chosen = {int(start) + edge for start in starts for edge in edges}
    chosen |= {int(start) + prompt - 1 for start, (prompt, _) in zip(starts, case.sequences, strict=True)}
    prompt_rows = [row for row in range(len(flags)) if not flags[row]]
    chosen &= set(prompt_rows)
    others = [row for row in prompt_rows if row not in chosen]
    chosen |= set(random.Random(case.seed).sample(others, min(len(others), max(0, _ROWS - len(chosen)))))
    return np.array(sorted(chosen | set(np.flatnonzero(flags).tolist())))


def check(folder: Path, library: Path, *, gpu: bool) -> Iterator[dict[str, Any]]:
    """Run the prepared cases with the library and yield a dict per case.

    The list `problems` of a case is empty if the case passed.

    gpu: whether to put all layers on the GPU. A case then fails if a layer is not on the GPU.
    """
    from support.engine.process import Engine, EngineError
    from support.oracle.grid import Case, schedule
    from support.oracle.verdict import compare, decode_flags, rows_of

    expected = np.load(folder / "expected.npz")
    with Engine(library) as engine:
        for number, line in enumerate(json.loads((folder / "cases.json").read_text())):
            case = Case.parse(line)
            fed = schedule(case)
            rows = expected[f"{number}-rows"]
            row: dict[str, Any] = {"case": line, "rows": len(rows), "problems": []}
            figures = {}
            try:
                for name, given in (("full", _full_attention(case)), ("swaa", case)):
                    result = _run(engine, folder, given, fed, given.overrides, gpu, given.policy)
                    if name == "swaa" and result.policy != case.policy:
                        row["problems"].append(f"the policy in use is {result.policy}")
                    oracle = expected[f"{number}-{name}"].astype(np.float32)
                    logits = np.concatenate(rows_of(fed, result))[rows]
                    figures[name] = compare(oracle, logits, decode_flags(fed)[rows])
            except (EngineError, CheckError) as error:
                row["problems"].append(" ".join(str(error).split())[:400])
            else:
                row["problems"] += judge(case, figures["swaa"], figures["full"])
            yield row | {name: dataclasses.asdict(found) for name, found in figures.items()}


def judge(case: Case, figures: Figures, plain: Figures) -> list[str]:
    """Compare a case's errors with the errors of full attention on this device. Return one line per problem.

    An error of full attention above the limit is also a problem.
    """
    from support.oracle.verdict import problems

    limit = _WORST_PLAIN[case.kv]
    found = [f"full attention itself is off by {plain.worst:.4g}"] if not plain.worst <= limit else []
    # Every cache type gets the limits of a quantized cache, because the GPU's arithmetic rounds.
    return found + problems(dataclasses.replace(case, kv="q8_0"), figures, plain)


def same_bits(folder: Path, ours: Path, theirs: Path, lines: Sequence[str], *, gpu: bool) -> Iterator[dict[str, Any]]:
    """Compare the logits of both libraries bit for bit, with SWAA off, and yield a dict per case.

    ours, theirs: folders of the patched and the unpatched library.

    SWAA is turned off in two ways: by a model without SWAA keys, and by the key `swaa.enabled`. On the CPU, upstream's
    kernels compute attention in both libraries. If two runs of the unpatched library differ, `repeats` is false and
    `problems` reports the difference.
    """
    from support.engine.process import Engine, EngineError
    from support.oracle.grid import Case, schedule

    off = {"swaa.enabled": False}
    with Engine(ours, own_kernels=False) as our, Engine(theirs) as their:
        for line in lines:
            case = Case.parse(line)
            fed = schedule(dataclasses.replace(case, boundary="auto"))
            row: dict[str, Any] = {"case": line, "problems": []}
            try:
                first, again = (_bits(_run(their, folder, case, fed, {}, gpu)) for _ in range(2))
                row["repeats"] = first == again
                if not row["repeats"]:
                    row["problems"].append("the unpatched library gives other bits when it runs again")
                for what, overrides in (("without keys", {}), ("switched off", case.overrides | off)):
                    if _bits(_run(our, folder, case, fed, overrides, gpu)) != first:
                        row["problems"].append(f"{what}: other bits than the unpatched library's")
            except (EngineError, CheckError) as error:
                row["problems"].append(" ".join(str(error).split())[:400])
            yield row


def _full_attention(case: Case) -> Case:
    return dataclasses.replace(case, sliding="0" * case.layers)


def _run(
    engine: Engine, folder: Path, case: Case, fed: Schedule, overrides: dict, gpu: bool, policy: str = "auto"
) -> Result:
    settings = case.settings | {"gpu_layers": _ALL_LAYERS if gpu else 0, "policy": policy}
    result = engine.run(folder / f"{case.arch}-{case.layers}.gguf", fed.steps, overrides, **settings)
    offloaded = re.findall(r"offloaded (\d+)/(\d+) layers to GPU", result.log)
    if gpu and (not offloaded or offloaded[-1][0] != offloaded[-1][1]):
        raise CheckError(f"not all layers are on the GPU: {offloaded[-1] if offloaded else 'the engine found none'}")
    return result


def _bits(result: Result) -> bytes:
    return b"".join(logits.tobytes() for logits in result.logits)
