"""Writes the text of docs/results.md, with the figures that results.py measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any


def page(document: dict[str, Any], tail: dict[str, Any]) -> str:
    """Return the text of docs/results.md.

    document: the content of docs/results/demo.json.
    tail: the content of docs/results/demo-tail.json.
    """
    settings, rows = document["settings"], {row["config"]: row for row in document["table"]}
    return _PAGE.format(
        table="\n".join(_table(rows, document["cells"])),
        sentences="\n".join(_sentences(rows)),
        calibrated="\n".join(_calibrated(document["calibration"], rows)),
        tail="\n".join(_tail(tail)),
        tail_samples=tail["samples_per_task"],
        tuned="\n".join(_tuned(document["tuning"], rows)),
        layers=document["model"]["layers"],
        sha256=document["model"]["sha256"][:16],
        cpu=document["machine"]["cpu"],
        **settings,
    )


_PAGE = """\
# What each strategy costs and brings

<!-- Written by scripts/demo/results.py from docs/results/demo.json; edit neither. -->

The demo model ([swaa_edge/models](../swaa_edge/models/README.md), {layers} layers, trained with full attention over
{context:,} tokens) answers the same {samples_per_task} questions per task under every configuration. The model
is quantized and runs in the engine. Prompts have {prompt_tokens:,} tokens, the window is {window} tokens, and the
answer is always further from the end of the prompt than the window reaches. Half of the questions ask for the answer
alone (*direct*), so prefill predicts the first token of the answer. The other half ask for a sentence that repeats the
question first (*spoken*), so decode predicts the answer. [eval.md](eval.md) describes the tasks. Each row with LoRA
uses weights that were fine-tuned under the mask of that row, as described below.

{table}

Accuracies are in percent; the number after ± is half the width of Wilson's 95% interval of the mean. The column prefill
is the median speed-up over full attention on the same prompts, measured on {cpu} with {threads} threads while the
configurations took turns. The model and its prompts are so small that attention is only part of the prefill time.

{sentences}

![Accuracy over prefill time](results/accuracy.png)

## What a dense tail adds

The rows above have no tail. With a tail, the last tokens of each prompt attend to all tokens, as generated tokens do.
The table below covers the first {tail_samples} questions of each task. The recipes use the same window and sinks as in
the table above.

{tail}

## What fine-tuning adds

{tuned}

## Which layers keep full attention

{calibrated}

## Reproduce it

```
python scripts/demo/results.py measure && python scripts/demo/results.py measure-tail
python scripts/demo/results.py write
```

The seeds are {seed} for the questions, {calibration_seed} for the samples of `calibrate` and {learned_seed} for the
training examples. The SHA-256 of the model file begins with `{sha256}`.
"""


#: Rows that correspond to a recipe, with this model's window and sinks.
_RECIPES = {"sinks + FA decode": "fast", "quarter 1::4": "balanced", "all three": "quality"}
_TASKS, _STYLES = ("needle", "multi-needle", "kv", "chain"), ("direct", "spoken")


def _mean(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f} ± {50 * (high - low):.1f}"


def _table(rows: dict[str, Any], cells: Iterable[dict[str, Any]]) -> Iterator[str]:
    titles = (
        "configuration",
        "window",
        "sinks",
        "FA layers",
        "FA decode",
        "LoRA",
        *_TASKS,
        "mean",
        *_STYLES,
        "prefill",
    )
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for name, row in rows.items():
        swaa = row["swaa"]
        settings = ("full", "", "all", "", "")
        if swaa:
            layers = swaa["fa_layers"] if isinstance(swaa["fa_layers"], str) else ", ".join(map(str, swaa["fa_layers"]))
            yes = ["yes" if swaa["fa_decode"] else "no", "yes" if swaa["adapter"] else ""]
            settings = (str(swaa["window_size"]), str(swaa["sink_count"]), layers, *yes)
        tasks = [row["tasks"][task]["accuracy"] for task in _TASKS]
        tasks, styles = ([f"{100 * value:.1f}" for value in values] for values in (tasks, _styles(cells, name)))
        prefill = f"{row['prefill_ratio']:.2f}x"
        yield f"| {' | '.join((name, *settings, *tasks, _mean(row), *styles, prefill))} |"


def _styles(cells: Iterable[dict[str, Any]], name: str) -> list[float]:
    """Return the accuracy of a configuration for each style of question."""
    mine = [[cell for cell in cells if cell["config"] == name and cell["style"] == style] for style in _STYLES]
    return [sum(cell["correct"] for cell in found) / sum(cell["samples"] for cell in found) for found in mine]


def _tail(document: dict[str, Any]) -> Iterator[str]:
    rows = {row["config"]: row for row in document["table"]}
    full = rows["full"]["accuracy"]
    titles = ("configuration", "tail", *_TASKS, "mean", *_STYLES, "of full attention")
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for name, row in rows.items():
        count = str(row["swaa"]["tail_count"]) if row["swaa"] else ""
        values = [*(row["tasks"][task]["accuracy"] for task in _TASKS), *_styles(document["cells"], name)]
        figures = [f"{100 * value:.1f}" for value in values]
        figures.insert(len(_TASKS), _mean(row))
        kept = f"{row['accuracy'] / full:.0%}"
        yield f"| {' | '.join((name.partition(',')[0], count, *figures, kept))} |"


def _sentences(rows: dict[str, Any]) -> list[str]:
    full = rows["full"]["accuracy"]

    def kept(name: str) -> str:
        return f"{rows[name]['accuracy'] / full:.0%}"

    alone = ("sinks", "FA decode", "interleaving")
    single = max(alone, key=lambda name: rows[name]["accuracy"])
    others = [name for name in rows if name not in ("full", "naive", *alone) and not rows[name]["swaa"]["adapter"]]
    together = max(others, key=lambda name: (rows[name]["accuracy"], rows[name]["prefill_ratio"]))
    return [
        f"- A bare window keeps {kept('naive')} of full attention's accuracy.",
        f"- The best single strategy is `{single}`, which keeps {kept(single)} of full attention's accuracy.",
        f"- The best combination here is `{together}`, which keeps {kept(together)} of full attention's "
        f"accuracy, with a prefill speed-up of {rows[together]['prefill_ratio']:.2f}.",
    ]


def _tuned(tuning: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    """Return lines about the training examples, and a table of accuracy before and after fine-tuning."""
    settings, data = tuning["settings"], tuning["data"]
    text = (
        f"Under full attention, `distill` asked the model a spoken question about each of {data['records']} "
        f"documents, built from another seed, and kept the {data['kept']} correct responses. Each response is "
        "the training example for both the direct and the spoken question about its document. Under FA decode, only "
        "tokens after the prompt see the whole prompt. So an adapter may learn to begin with a sentence even if "
        "the question asks for the answer alone. For each row, `finetune` trained an adapter on these examples under "
        "the mask of the row "
        f"(rank {settings['lora_rank']}, alpha {settings['lora_alpha']:g}, rsLoRA, "
        f"{', '.join(settings['target_modules'])}; {settings['max_steps']} steps of "
        f"{settings['batch_size'] * settings['gradient_accumulation_steps']} prompts), and `convert --lora` merged the "
        "adapter into the model and quantized the result."
    )
    lines = [
        textwrap.fill(text, 120),
        "",
        "| recipe | without | with LoRA | beyond the interval | direct questions answered directly | training time |",
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
    lines += ["", f"The best fine-tuned configuration, `{best}`, is {side} full attention without LoRA."]
    return lines


def tuned_name(name: str) -> str:
    """Return the row's name for a fine-tuned configuration."""
    return f"{name} + LoRA"


def _calibrated(found: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    quarters = {f"quarter {offset}::4": rows[f"quarter {offset}::4"] for offset in range(4)}
    rival = max(quarters, key=lambda name: quarters[name]["accuracy"])
    mine = rows["quarter calibrated"]
    apart = 100 * (mine["accuracy"] - quarters[rival]["accuracy"])
    quarter, name = "periodic pattern of a quarter of the layers", rival.split()[1]
    if apart > 0:
        verdict = f"beats every {quarter}; the best of these ({name}) is {apart:.1f} points behind"
    elif apart == 0:
        verdict = f"is as good as the best {quarter} ({name})"
    else:
        verdict = f"does not beat the best {quarter} ({name}), which is {-apart:.1f} points ahead"
    chosen = {name: ", ".join(map(str, row["chosen"])) for name, row in found.items()}
    text = (
        f"`calibrate` evaluated {found['greedy']['samples']} samples of another seed. The layers chosen for full "
        f"attention are {chosen['greedy']} with the method `greedy`, {chosen['nll']} with `nll`, and {chosen['keep']} "
        f"with `keep`. On the questions above, which `calibrate` did not see, the choice of `greedy` {verdict}."
    )
    best = found["keep"]["ranking"][0]
    fraction = best["gain"] / (found["keep"]["sliding_loss"] - found["keep"]["full_loss"])
    added, saved = ({row["layer"]: row["gain"] for row in found[method]["ranking"]} for method in ("nll", "keep"))
    return [
        textwrap.fill(text, 120),
        "",
        f"If only layer {best['layer']} keeps full attention, this removes {fraction:.0%} of the loss that is added "
        "when all layers slide.",
        "",
        "| layer | loss added if only it slides | loss saved if only it keeps full attention |",
        "|---|---|---|",
        *(f"| {layer} | {added[layer]:+.4f} | {saved[layer]:+.4f} |" for layer in sorted(added)),
        "",
        "The losses are in nats per token of the correct answer.",
    ]
