"""End-to-end cases: what the oracle says is computed beforehand and travels; here the engine is held against it.

`prepare` runs where torch and transformers are, `check` where the GPU is. Of each case some rows travel: all decoded
ones, the first after each edge, and a sample of the others. Beside the logits under the case's rule there are those
under full attention, for a yardstick: a GPU multiplies in TF32 or half precision, and how much that costs on this
model is seen where no window is involved.

    prepare(Path("prepared"), CASES)                              # python3 scripts/gpu/check.py pack does it
    for row in check(Path("prepared"), Path("build/bin"), gpu=True): print(row["case"], row["problems"])
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu.errors import CheckError

if TYPE_CHECKING:
    from engine import Engine, Result
    from grid import Case, Plan

# Of a case's prompt rows, so many travel.
_ROWS = 48
# Full attention itself, on the same device, may be this far from the oracle; beyond it no case can be judged.
_WORST_PLAIN = {"f16": 0.3, "f32": 0.3, "q8_0": 1.0}
_ALL_LAYERS = 1 << 20


def prepare(folder: Path, lines: Sequence[str], models_of: Sequence[str] = ()) -> None:
    """Write the models, cases.json and expected.npz of `lines` into `folder`, anew; also the models of `models_of`.

    Needs tests/ on sys.path, torch and transformers.
    """
    import verdict
    from grid import Case, plan
    from grid_models import Zoo
    from rule import Rule

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    zoo = Zoo(folder)
    cases = [Case.parse(line) for line in lines]
    zoo.prepare((case.arch, case.layers) for case in [*cases, *map(Case.parse, models_of)])
    arrays: dict[str, np.ndarray] = {}
    for number, case in enumerate(cases):
        made = plan(case)
        rows = chosen_rows(case, made)
        full = dataclasses.replace(case, sliding="0" * case.layers)
        assert full.rule.sliding == Rule.full(case.layers).sliding
        for name, rule in (("swaa", case), ("full", full)):
            # Half precision in the file: a part in two thousand, where the limits are at a seventh.
            arrays[f"{number}-{name}"] = verdict.expected_rows(zoo, rule, made)[rows].astype(np.float16)
        arrays[f"{number}-rows"] = rows.astype(np.int32)
    np.savez_compressed(folder / "expected.npz", **arrays)
    (folder / "cases.json").write_text(json.dumps([str(case) for case in cases], indent=1) + "\n")


def chosen_rows(case: Case, made: Plan) -> np.ndarray:
    """Which rows of all sequences, one after another, are compared: int64 [at most _ROWS and the decoded ones]."""
    flags = np.concatenate([np.array(flags, dtype=bool) for flags in made.is_decode])
    starts = np.cumsum([0, *map(len, made.tokens)])[:-1]
    edges = (0, case.window - 1, case.window, case.window + case.sinks, case.n_ubatch, case.n_batch, 256, 512)
    wanted = {int(start) + edge for start in starts for edge in edges}
    wanted |= {int(start) + prompt - 1 for start, (prompt, _) in zip(starts, case.sequences, strict=True)}
    prompt_rows = [row for row in range(len(flags)) if not flags[row]]
    wanted &= set(prompt_rows)
    others = [row for row in prompt_rows if row not in wanted]
    wanted |= set(random.Random(case.seed).sample(others, min(len(others), max(0, _ROWS - len(wanted)))))
    return np.array(sorted(wanted | set(np.flatnonzero(flags).tolist())))


def check(
    folder: Path, library: Path, *, gpu: bool, on_case: Callable[[str], object] | None = None
) -> Iterator[dict[str, Any]]:
    """Run the prepared cases with the library: a dict per case, `problems` [] for a pass.

    gpu: have all layers on it, and fail where they are not. on_case: called with each line before it runs.
    """
    from engine import Engine, EngineError
    from figures import compare, flags_of
    from grid import Case, plan

    expected = np.load(folder / "expected.npz")
    with Engine(library) as engine:
        for number, line in enumerate(json.loads((folder / "cases.json").read_text())):
            if on_case:
                on_case(line)
            case = Case.parse(line)
            made = plan(case)
            rows = expected[f"{number}-rows"]
            row: dict[str, Any] = {"case": line, "rows": len(rows), "problems": []}
            figures = {}
            try:
                for name, given in (("full", dataclasses.replace(case, sliding="0" * case.layers)), ("swaa", case)):
                    logits, policy = _logits(engine, folder, given, made, gpu)
                    if name == "swaa" and policy != case.policy:
                        row["problems"].append(f"the policy in use is {policy}")
                    wanted = expected[f"{number}-{name}"].astype(np.float32)
                    figures[name] = compare(wanted, logits[rows], flags_of(made)[rows])
            except (EngineError, CheckError) as error:
                row["problems"].append(" ".join(str(error).split())[:400])
            else:
                row["problems"] += judge(case, figures["swaa"], figures["full"])
            yield row | {name: dataclasses.asdict(found) for name, found in figures.items()}


def judge(case: Case, figures: Any, plain: Any) -> list[str]:
    """What is too far, one line each: against full attention's own distance on this device, which has a limit too."""
    from figures import problems

    most = _WORST_PLAIN[case.kv]
    found = [f"full attention itself is off by {plain.worst:.4g}"] if not plain.worst <= most else []
    # The relative limits of a quantized cache, whatever the cache: here it is the arithmetic that rounds.
    return found + problems(dataclasses.replace(case, kv="q8_0"), figures, plain)


def same_bits(folder: Path, ours: Path, theirs: Path, lines: Sequence[str], *, gpu: bool) -> Iterator[dict[str, Any]]:
    """SWAA off in the library `ours`, without keys and switched off, against the unpatched one: a dict per case.

    What the CPU computes of attention is left to upstream's kernels. A library that doesn't repeat itself bit for bit
    is told apart: `repeats` is false, and `problems` says so.
    """
    from engine import Engine, EngineError
    from grid import Case, plan

    off = {"swaa.enabled": False}
    with Engine(ours, own_kernels=False) as our, Engine(theirs) as their:
        for line in lines:
            case = Case.parse(line)
            made = plan(dataclasses.replace(case, phases="auto"))
            row: dict[str, Any] = {"case": line, "problems": []}
            try:
                first, again = (_raw(their, folder, case, made, {}, gpu) for _ in range(2))
                row["repeats"] = first == again
                if not row["repeats"]:
                    row["problems"].append("the unpatched library gives other bits when it runs again")
                for what, overrides in (("without keys", {}), ("switched off", case.overrides | off)):
                    if _raw(our, folder, case, made, overrides, gpu) != first:
                        row["problems"].append(f"{what}: other bits than the unpatched library's")
            except (EngineError, CheckError) as error:
                row["problems"].append(" ".join(str(error).split())[:400])
            yield row


def _run(
    engine: Engine, folder: Path, case: Case, made: Plan, overrides: dict, gpu: bool, policy: str = "auto"
) -> Result:
    settings = case.settings | {"gpu_layers": _ALL_LAYERS if gpu else 0, "policy": policy}
    result = engine.run(folder / f"{case.arch}-{case.layers}.gguf", made.steps, overrides, **settings)
    told = re.findall(r"offloaded (\d+)/(\d+) layers to GPU", result.log)
    if gpu and (not told or told[-1][0] != told[-1][1]):
        raise CheckError(f"not all layers are on the GPU: {told[-1] if told else 'the engine found none'}")
    return result


def _logits(engine: Engine, folder: Path, case: Case, made: Plan, gpu: bool) -> tuple[np.ndarray, str]:
    from figures import rows_of

    result = _run(engine, folder, case, made, case.overrides, gpu, case.policy)
    return np.concatenate(rows_of(made, result)), result.policy


def _raw(engine: Engine, folder: Path, case: Case, made: Plan, overrides: dict, gpu: bool) -> bytes:
    return b"".join(logits.tobytes() for logits in _run(engine, folder, case, made, overrides, gpu).logits)
