#!/usr/bin/env python3
"""What each strategy of SWAA costs and brings on the demo model: measured into JSON, and written as docs/results.md.

    python scripts/results.py measure     # docs/results/demo.json; an interrupted run goes on where it was
    python scripts/results.py write       # docs/results.md from it, and the plots
    python scripts/results.py check       # fails if docs/results.md isn't what `write` gives
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from swaa_edge import SwaaConfig  # noqa: E402
from swaa_edge.demo import ANSWER, CONTEXT, MODEL, SINKS, WINDOW  # noqa: E402

DATA = ROOT / "docs" / "results" / "demo.json"
PAGE = ROOT / "docs" / "results.md"
#: Seeds: the questions of the table are others than those that calibrate saw.
EVALUATED, CALIBRATED = 41, 42
SAMPLES = 200


def configurations(n_layers: int, chosen: Sequence[int]) -> dict[str, Any]:
    """Each strategy alone, each pair, all three, and the layers that calibrate chose beside every periodic quarter."""

    def swaa(fa_layers: Any, sinks: int, fa_decode: bool) -> SwaaConfig:
        return SwaaConfig(WINDOW, sinks, fa_layers, fa_decode)

    quarters = {f"quarter {offset}::4": swaa(f"{offset}::4", SINKS, True) for offset in range(4)}
    return {
        "full": False,
        "naive": swaa("none", 0, False),
        "sinks": swaa("none", SINKS, False),
        "FA decode": swaa("none", 0, True),
        "interleaving": swaa("1::2", 0, False),
        "sinks + FA decode": swaa("none", SINKS, True),
        "sinks + interleaving": swaa("1::2", SINKS, False),
        "FA decode + interleaving": swaa("1::2", 0, True),
        "all three": swaa("1::2", SINKS, True),
        **quarters,
        "quarter calibrated": swaa(list(chosen), SINKS, True),
    }


def measure(samples: int, threads: int) -> None:
    """Calibrate on samples of its own, then ask every configuration the same questions; answers are kept."""
    from swaa_edge import SwaaLlama
    from swaa_edge.benchreport import machine
    from swaa_edge.calibrate.cases import from_samples
    from swaa_edge.calibrate.search import calibrate
    from swaa_edge.evaluate.journal import Journal
    from swaa_edge.evaluate.prompts import Prompts
    from swaa_edge.evaluate.run import evaluate
    from swaa_edge.evaluate.tasks import TASKS, Plan, build
    from swaa_edge.modelfile import read_model

    def load(swaa: Any, n_ctx: int) -> SwaaLlama:
        return SwaaLlama(
            str(MODEL), swaa=swaa, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0,
            verbose=False,
        )  # fmt: skip

    def asked(seed: int, count: int) -> list[Any]:
        return build(
            Plan(tuple(TASKS), (CONTEXT - ANSWER,), samples=count, seed=seed, beyond=WINDOW), prompts
        )

    n_layers = read_model(MODEL).n_layers
    build_folder = ROOT / "build"
    build_folder.mkdir(exist_ok=True)
    with Prompts(MODEL) as prompts:
        cases = from_samples(asked(CALIBRATED, 16), prompts)
        questions = asked(EVALUATED, samples)
    read = hashlib.sha256(b"".join(sample.prompt.tobytes() for sample in questions)).hexdigest()
    key = {"model": _sha256(MODEL), "samples": samples, "prompts": read}
    with Journal(build_folder / "results-calibrate.jsonl", key) as journal:
        base = SwaaConfig(WINDOW, SINKS, "none", True)
        methods = {
            method: calibrate(load, base, n_layers, cases, keep=n_layers // 4, method=method, journal=journal)
            for method in ("nll", "keep", "greedy")
        }
    chosen = methods["greedy"].chosen
    configs = configurations(n_layers, chosen)
    with Journal(build_folder / "results-eval.jsonl", key | {"chosen": list(chosen)}) as journal:
        report = evaluate(
            load, configs, questions, max_tokens=ANSWER, journal=journal, together=True, on_progress=_show
        )
    print(file=sys.stderr)
    if report.stopped:
        sys.exit("stopped early; the same command goes on from here")
    document = report.to_dict()
    del document["answers"]
    document |= {
        "calibration": {name: _calibration(found.to_dict()) for name, found in methods.items()},
        "model": {"file": MODEL.name, "sha256": key["model"], "layers": n_layers},
        "settings": {
            "context": CONTEXT, "prompt_tokens": CONTEXT - ANSWER, "window": WINDOW, "sinks": SINKS,
            "samples_per_task": samples, "seed": EVALUATED, "calibration_seed": CALIBRATED, "threads": threads,
        },
        "machine": machine(),
    }  # fmt: skip
    DATA.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{DATA.relative_to(ROOT)} written; now: {Path(sys.argv[0]).name} write", file=sys.stderr)


def _calibration(found: dict[str, Any]) -> dict[str, Any]:
    wanted = ("method", "keep", "chosen", "ranking", "full_loss", "sliding_loss", "chosen_loss", "samples")
    return {name: found[name] for name in wanted}


def _show(at: Any) -> None:
    left = "" if at.seconds_left is None else f", about {at.seconds_left / 60:.0f} min left"
    print(f"\r{at.answers}/{at.total} answers{left}   ", end="", file=sys.stderr, flush=True)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def page(document: dict[str, Any]) -> str:
    """docs/results.md: the figures as tables, and what they say in sentences that are computed from them."""
    settings, rows = document["settings"], {row["config"]: row for row in document["table"]}
    facts = {
        "layers": document["model"]["layers"],
        "sha256": document["model"]["sha256"][:16],
        "cpu": document["machine"]["cpu"],
        **settings,
    }
    return _PAGE.format(
        table="\n".join(_table(_strategies(rows, document), _COLUMNS)),
        sentences="\n".join(_sentences(rows)),
        calibrated="\n".join(_calibrated(document, rows)),
        **facts,
    )


_PAGE = """\
# What each strategy costs and brings

<!-- Written by scripts/results.py from docs/results/demo.json; edit neither. -->

The demo model ([swaa_edge/models](../swaa_edge/models/README.md), {layers} layers, trained with full attention over
{context:,} tokens) answers the same {samples_per_task} questions per task under every configuration, through the
quantized engine: prompts of {prompt_tokens:,} tokens, window {window}, and what is asked for always lies further from
the prompt's end than the window reaches. Half of the questions want the answer at once (*direct*: its first token
comes out of the prefill), half after a sentence that repeats what was asked for (*spoken*: it comes out of decode).
[eval.md](eval.md) says what the tasks are. The column LoRA is for fine-tuned weights; these have none.

{table}

Accuracy in percent; ± is half of Wilson's 95 % interval of the mean. Prefill: times as fast as full attention, median
over the same prompts, measured in turns on {cpu} ({threads} threads). The demo model is so small, and its prompts so
short, that attention is only part of their time.

{sentences}

![Accuracy over prefill time](results/accuracy.png)

## Which layers keep full attention

{calibrated}

## Again

```
python scripts/results.py measure && python scripts/results.py write
```

Seeds: {seed} for the questions, {calibration_seed} for those that calibrate reads. Model: sha256 `{sha256}...`.
"""


_TASKS = ("needle", "multi-needle", "kv", "chain")


def _mean(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f} ± {50 * (high - low):.1f}"


def _layers(row: dict[str, Any]) -> str:
    spec = row["swaa"]["fa_layers"]
    return spec if isinstance(spec, str) else ", ".join(map(str, spec))


_COLUMNS = {
    "configuration": lambda row: row["config"],
    "window": lambda row: str(row["swaa"]["window_size"]) if row["swaa"] else "full",
    "sinks": lambda row: str(row["swaa"]["sink_count"]) if row["swaa"] else "",
    "FA layers": lambda row: _layers(row) if row["swaa"] else "all",
    "FA decode": lambda row: ("yes" if row["swaa"]["fa_decode"] else "no") if row["swaa"] else "",
    "LoRA": lambda row: "",
    **{task: (lambda row, task=task: f"{100 * row['tasks'][task]['accuracy']:.1f}") for task in _TASKS},
    "mean": _mean,
    "direct": lambda row: f"{100 * row['styles']['direct']:.1f}",
    "spoken": lambda row: f"{100 * row['styles']['spoken']:.1f}",
    "prefill": lambda row: f"{row['prefill_ratio']:.2f}x",
}


def _strategies(rows: dict[str, Any], document: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, row in rows.items():
        cells = [cell for cell in document["cells"] if cell["config"] == name]
        styles = {}
        for style in ("direct", "spoken"):
            mine = [cell for cell in cells if cell["style"] == style]
            styles[style] = sum(cell["correct"] for cell in mine) / sum(cell["samples"] for cell in mine)
        found.append(row | {"styles": styles})
    return found


def _table(rows: Iterable[dict[str, Any]], columns: dict[str, Any]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]


def _sentences(rows: dict[str, Any]) -> list[str]:
    full = rows["full"]["accuracy"]

    def kept(name: str) -> str:
        return f"{rows[name]['accuracy'] / full:.0%}"

    singles = max(("sinks", "FA decode", "interleaving"), key=lambda name: rows[name]["accuracy"])
    together = max(
        (name for name in rows if name not in ("full", "naive", "sinks", "FA decode", "interleaving")),
        key=lambda name: (rows[name]["accuracy"], rows[name]["prefill_ratio"]),
    )
    return [
        f"- A bare window keeps {kept('naive')} of full attention's accuracy: the collapse is real.",
        f"- The best strategy alone is {singles}, which keeps {kept(singles)}.",
        f"- The best combination here, {together}, keeps {kept(together)} and reads prompts "
        f"{rows[together]['prefill_ratio']:.2f} times as fast.",
    ]


def _calibrated(document: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    found = document["calibration"]
    quarters = {name: row for name, row in rows.items() if name.startswith("quarter ") and "::" in name}
    best = max(quarters, key=lambda name: quarters[name]["accuracy"])
    mine = rows["quarter calibrated"]
    apart = 100 * (mine["accuracy"] - quarters[best]["accuracy"])
    if apart > 0:
        verdict = f"beats every periodic quarter, the best of which ({best.split()[1]}) is {apart:.1f} points behind"
    elif apart == 0:
        verdict = f"is as good as the best periodic quarter ({best.split()[1]})"
    else:
        verdict = f"does not beat the best periodic quarter ({best.split()[1]}), which is {-apart:.1f} points ahead"
    chosen = {name: ", ".join(map(str, row["chosen"])) for name, row in found.items()}
    lines = [
        f"`calibrate` read {found['greedy']['samples']} samples of another seed. Greedily it keeps the layers "
        f"{chosen['greedy']}; by the loss that one layer adds when it slides (nll) {chosen['nll']}; by the loss that "
        f"one layer saves when it alone doesn't (keep) {chosen['keep']}. On the questions above, which it never saw, "
        f"the greedy choice {verdict}.",
    ]
    table = [
        "",
        "| layer | loss added when it alone slides | loss saved when it alone keeps full attention |",
        "|---|---|---|",
    ]
    lines += ["", _concentration(found["keep"])]
    gains = {method: {row["layer"]: row["gain"] for row in found[method]["ranking"]} for method in ("nll", "keep")}
    for layer in sorted(gains["nll"]):
        table.append(f"| {layer} | {gains['nll'][layer]:+.4f} | {gains['keep'][layer]:+.4f} |")
    return [*lines, *table, "", "Losses in nats per token of the right answer."]


def _concentration(found: dict[str, Any]) -> str:
    """Whether one layer does it all, which decides what patterns and strategies can show on this model."""
    best = found["ranking"][0]
    share = best["gain"] / (found["sliding_loss"] - found["full_loss"])
    told = f"Layer {best['layer']} alone, kept, brings back {share:.0%} of the loss that sliding adds."
    if share > 0.9:
        return (
            f"{told} This model looks up there whatever it looks up: every pattern that keeps the layer recovers "
            "everything, with or without the other strategies, and no choice of layers can beat one that has it. A "
            "large model retrieves in many layers."
        )
    return f"{told} The rest takes other layers."


def write() -> None:
    """The page and its plot."""
    from swaa_edge.evaluate.plot import plot_accuracy

    document = json.loads(DATA.read_text(encoding="utf-8"))
    PAGE.write_text(page(document), encoding="utf-8")
    plot_accuracy(document, DATA.with_name("accuracy.png"))


def check() -> None:
    """Raise SystemExit if the page isn't what its data give."""
    if PAGE.read_text(encoding="utf-8") != page(json.loads(DATA.read_text(encoding="utf-8"))):
        sys.exit("docs/results.md is stale: python scripts/results.py write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="measure | write | check")
    measuring = commands.add_parser("measure", help=measure.__doc__)
    measuring.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help="per task; default %(default)s")
    measuring.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    commands.add_parser("write", help=write.__doc__)
    commands.add_parser("check", help=check.__doc__)
    given = vars(parser.parse_args())
    {"measure": measure, "write": write, "check": check}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
