"""docs/results.md as text: the figures that results.py measured, as tables and sentences computed from them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any


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
        tuned="\n".join(_tuned(document["tuning"], rows)),
        **facts,
    )


_PAGE = """\
# What each strategy costs and brings

<!-- Written by scripts/demo/results.py from docs/results/demo.json; edit neither. -->

The demo model ([swaa_edge/models](../swaa_edge/models/README.md), {layers} layers, trained with full attention over
{context:,} tokens) answers the same {samples_per_task} questions per task under every configuration, through the
quantized engine: prompts of {prompt_tokens:,} tokens, window {window}, and what is asked for always lies further from
the prompt's end than the window reaches. Half of the questions want the answer at once (*direct*: its first token
comes out of the prefill), half after a sentence that repeats what was asked for (*spoken*: it comes out of decode).
[eval.md](eval.md) says what the tasks are. Rows with LoRA are those above them with weights that were fine-tuned under
the row's own mask, as told below.

{table}

Accuracy in percent; ± is half of Wilson's 95 % interval of the mean. Prefill: times as fast as full attention, median
over the same prompts, measured in turns on {cpu} ({threads} threads). The demo model is so small, and its prompts so
short, that attention is only part of their time.

{sentences}

![Accuracy over prefill time](results/accuracy.png)

## What fine-tuning adds

{tuned}

## Which layers keep full attention

{calibrated}

## Again

```
python scripts/demo/results.py measure && python scripts/demo/results.py write
```

Seeds: {seed} for the questions, {calibration_seed} for those that calibrate reads, {learned_seed} for what is learned
from. Model: sha256 `{sha256}...`.
"""


#: Rows that are a preset, with this model's window and sinks.
_RECIPES = {"sinks + FA decode": "fast", "quarter 1::4": "balanced", "all three": "quality"}
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
    "LoRA": lambda row: "yes" if row["swaa"] and row["swaa"]["adapter"] else "",
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
        (
            name
            for name, row in rows.items()
            if name not in ("full", "naive", "sinks", "FA decode", "interleaving") and not row["swaa"]["adapter"]
        ),
        key=lambda name: (rows[name]["accuracy"], rows[name]["prefill_ratio"]),
    )
    return [
        f"- A bare window keeps {kept('naive')} of full attention's accuracy: the collapse is real.",
        f"- The best strategy alone is {singles}, which keeps {kept(singles)}.",
        f"- The best combination here, {together}, keeps {kept(together)} and reads prompts "
        f"{rows[together]['prefill_ratio']:.2f} times as fast.",
    ]


def _tuned(tuning: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    """What was learned from, and each recipe before and after, with its interval."""
    settings, data = tuning["settings"], tuning["data"]
    told = (
        f"`distill` asked the model under full attention about {data['records']} documents of another seed, in a "
        f"sentence, and kept the {data['kept']} right replies. Each is the answer to both questions about its "
        "document: "
        "also where the question wants the answer at once, an adapter may learn to say a sentence first, and under FA "
        "decode only a reply that is on its way sees the whole prompt. `finetune` learned from these under each row's "
        f"mask (rank {settings['rank']}, alpha {settings['alpha']:g}, rsLoRA, {', '.join(settings['targets'])}; "
        f"{settings['steps']} steps of {settings['batch'] * settings['accumulate']} prompts), `convert --lora` merged "
        "and quantized the result."
    )
    lines = [
        textwrap.fill(told, 120),
        "",
        "| recipe | without | with LoRA | outside the interval | direct questions answered at once | trained in |",
        "|---|---|---|---|---|---|",
    ]
    for name, outcome in tuning["outcomes"].items():
        before, after = rows[name], rows[tuned_name(name)]
        apart = after["interval"][0] > before["interval"][1]
        minutes = f"{outcome['seconds'] / 60:.1f} min"
        called = f"{name} (`{_RECIPES[name]}`)" if name in _RECIPES else name
        outside, at_once = "yes" if apart else "no", f"{tuning['at_once'][name]:.0%}"
        lines.append(f"| {called} | {_mean(before)} | {_mean(after)} | {outside} | {at_once} | {minutes} |")
    best = max((tuned_name(name) for name in tuning["outcomes"]), key=lambda name: rows[name]["accuracy"])
    apart = 100 * (rows["full"]["accuracy"] - rows[best]["accuracy"])
    side = f"{abs(apart):.1f} points {'below' if apart > 0 else 'above'}" if round(apart, 1) else "level with"
    lines += ["", f"The best of them, {best}, is {side} full attention without LoRA."]
    return lines


def tuned_name(name: str) -> str:
    """The name of a configuration's row with LoRA."""
    return f"{name} + LoRA"


def _calibrated(document: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    found = document["calibration"]
    quarters = {f"quarter {offset}::4": rows[f"quarter {offset}::4"] for offset in range(4)}
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
    told = (
        f"`calibrate` read {found['greedy']['samples']} samples of another seed. Greedily it keeps the layers "
        f"{chosen['greedy']}; by the loss that one layer adds when it slides (nll) {chosen['nll']}; by the loss that "
        f"one layer saves when it alone doesn't (keep) {chosen['keep']}. On the questions above, which it never saw, "
        f"the greedy choice {verdict}."
    )
    lines = [textwrap.fill(told, 120)]
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
