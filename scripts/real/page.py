"""Writes the text of docs/results-real.md: tables of the measured figures, and sentences about the figures.

text = page(document)
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from real.cells import RECIPES
from real.figures import FULL, Figures, Value
from swaa_edge.config import TAIL
from swaa_edge.support.table import table

#: The recipes' names, by row.
_CALLED = {row: name for name, row in RECIPES.items()}


def page(document: dict[str, Any]) -> str:
    """Return the text of docs/results-real.md.

    document: the results from measure.py.
    """
    figures, settings = Figures(document), document["settings"]
    return _PAGE.format(
        model=document["model"] | {"sha256": document["model"]["sha256"][:16]},
        machine=document["machine"],
        threads=" or ".join(map(str, document["threads"])) + (" thread" if document["threads"] == [1] else " threads"),
        commit=document["commit"][:12],
        cue=settings["cue"],
        scored=settings["scored"],
        sinks=settings["sinks"],
        corpus=", ".join(f"{name} `{sha256[:16]}`" for name, sha256 in document["corpus"].items()),
        summary="\n".join(_summary(figures)),
        progress="" if document["complete"] else "Some rows of the plan are not measured yet.\n\n",
        tables="\n\n".join(_tables(figures)),
        tails="\n".join(_tails(figures, settings["tails"])),
        calibrated="\n".join(_calibrated(figures)) or _MISSING,
        lora="\n".join(_lora(figures)) or _MISSING,
    )


_MISSING = "Not measured yet."

_PAGE = """\
# A real model: what each strategy costs and brings

<!-- Written by scripts/real/measure.py from docs/results/real.json; edit neither. -->

SmolLM2-135M-Instruct (`{model[file]}`, {model[layers]} layers, trained for 8,192 tokens) answers questions about
documents of real English text under every configuration, in the engine. Only rows with "LoRA" are fine-tuned. The
documents are made from Python's language reference and Debian's manuals. The window is a sixteenth or an eighth of the
context; the sinks are the first {sinks} tokens. The text that a question asks about always lies further from the end of
the prompt than the window reaches.

- *passages*: the prompt ends with the first {cue} tokens of a passage of the document. The figure is the model's loss
  on the passage's next {scored} tokens, in nats per token.
- *exact*: the fraction of these tokens that the model predicts correctly.
- *shuffled*: the same loss for a planted passage of shuffled tokens, which the model can predict only by copying.
- *excess*: the loss that a configuration adds to full attention's, as a fraction of the loss that a bare window of the
  same size adds.
- *facts*: the question is about a sentence hidden in the document, and is asked through the chat template. The prompt
  includes the beginning of the correct response, which the model must continue with the name or number. A fact counts
  only if full attention continues it correctly.
- *KL*: the KL divergence from full attention on another text, the docstrings of Python's library. All tokens of this
  text are prompt tokens, so FA decode and the tail have no effect.
- *pairs*: the number of query-key pairs that the prefill computes, as a fraction of full attention's.
- *prefill*: the speed-up over full attention for prefilling the document without a tail: the median over the documents.
  The configurations took turns on each document, on {machine[cpu]} ({threads}). Such a small model spends much
  of its time outside attention.

{progress}Brackets and ± give 95 % intervals by bootstrap over the documents; for facts they give Wilson intervals. For
KL, ± is one standard error.

{summary}

{tables}

## What the tail brings

In layers with FA decode, the last T tokens of the prompt attend to the whole document. The table gives the excess for
each T:

{tails}

## Which layers keep full attention

{calibrated}

## What LoRA adds

{lora}

## Reproduce it

```
scripts/real/fetch.py && scripts/real/measure.py --train && scripts/real/measure.py && scripts/real/measure.py --write
```

Data written at commit `{commit}`; model sha256 `{model[sha256]}`.
Texts: {corpus}. Other versions of Python and of Debian's packages contain other texts, so their figures differ.
"""


def _tables(figures: Figures) -> Iterator[str]:
    for length in figures.lengths:
        documents = figures.documents(length)
        asked = figures.asked(length, "passages")
        known = figures.facts(length, FULL, 0)[1]
        yield (
            f"## {length:,} tokens\n\n{documents} documents with {asked} passages of each kind and "
            f"{figures.asked(length, 'facts')} facts. Full attention continues {known} of these facts correctly; only "
            "these facts count."
        )
        for window in figures.windows(length):
            yield f"### Window {window}\n\n" + "\n".join(_table(figures, length, window))


def _table(figures: Figures, length: int, window: int) -> Iterator[str]:
    titles = (
        "configuration",
        "T",
        "passages",
        "excess",
        "exact",
        "shuffled",
        "excess",
        "facts",
        "KL",
        "pairs",
        "prefill",
    )
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for row, tail in figures.cells(length, window):
        yield f"| {' | '.join(_cells(figures, length, row, tail))} |"


def _cells(figures: Figures, length: int, row: str, tail: int) -> Iterator[str]:
    name = figures.rows[length, row]["config"]
    yield f"{name} (`{_CALLED[name]}`)" if name in _CALLED else name
    yield str(tail) if figures.decodes(length, row) else ""
    for task in ("passages", "shuffled"):
        yield _plus_minus(figures.loss(length, row, tail, task))
        yield _excess(figures, length, row, tail, task)
        if task == "passages":
            yield f"{figures.exact(length, row, tail, task).value:.0%}"
    right, count, interval = figures.facts(length, row, tail)
    yield f"{right}/{count}" + ("" if row == FULL else f" {_percent(interval)}")
    text = figures.text(length, row)
    yield "" if row == FULL or text is None else f"{text['kl']:.3f} ± {text['kl_error'] or 0:.3f}"
    yield f"{figures.pairs(length, row, tail):.0%}"
    yield f"{figures.prefill(length, row):.2f}x"


def _excess(figures: Figures, length: int, row: str, tail: int, task: str) -> str:
    if row == FULL:
        return "0%"
    return _percent(figures.excess(length, row, tail, task), ".1%")


def _percent(value: Value, form: str = ".0%") -> str:
    low, high = (format(end, form).rstrip("%") for end in value[1:])
    return f"{format(value.value, form)} [{low}, {high}]"


def _plus_minus(value: Value) -> str:
    return f"{value.value:.2f} ± {(value.high - value.low) / 2:.2f}"


def _summary(figures: Figures) -> Iterator[str]:
    """Yield a summary for each length and window, and then a line about each strategy alone.

    A summary gives the loss that a bare window adds, and the best configuration.
    """
    for length in figures.lengths:
        for window in figures.windows(length):
            full, naive = (figures.loss(length, row, 0, "passages").value for row in (FULL, f"naive @ {window}"))
            best = min(
                (cell for cell in figures.cells(length, window) if figures.untrained(length, cell[0])),
                key=lambda cell: figures.excess(length, *cell, "passages").value,
            )
            name = figures.rows[length, best[0]]["config"]
            excess = _percent(figures.excess(length, *best, "passages"))
            yield textwrap.fill(
                f"- {length:,} tokens, window {window}: a bare window raises the loss on far passages from {full:.2f} "
                f"to {naive:.2f}. {name}{_with(best[1])} leaves the least of this increase, {excess}, "
                f"with {figures.pairs(length, *best):.0%} of the query-key pairs.",
                120,
                subsequent_indent="  ",
            )
    if not figures.lengths:
        return
    length = figures.lengths[0]
    window = figures.windows(length)[0]
    parts = []
    for config in ("sinks", "FA decode", "1::4", "1::2"):
        if row := figures.named(length, config, window):
            parts.append(f"{config} leaves {figures.excess(length, row, 0, 'passages').value:.0%}")
    if (row := figures.named(length, "FA decode", window)) and TAIL in figures.tails(length, row):
        tail = f"{figures.excess(length, row, TAIL, 'passages').value:.0%}"
        parts.append(f"FA decode with a tail of {TAIL} leaves {tail}")
    if parts:
        text = f"- Each strategy alone at {length:,} tokens, window {window}: {', '.join(parts)} of the excess."
        yield textwrap.fill(text, 120, subsequent_indent="  ")


def _with(tail: int) -> str:
    return f" with T = {tail}" if tail else ""


def _tails(figures: Figures, tails: list[int]) -> Iterator[str]:
    """Yield the lines of the table: the tasks of each row that was measured with every T."""
    yield f"| configuration | tokens | window | asked | {' | '.join(f'T {tail}' for tail in tails)} |"
    yield "|" + "---|" * (4 + len(tails))
    for (length, row), about in figures.rows.items():
        if figures.tails(length, row) != list(tails) or about["window"] not in figures.windows(length):
            continue
        for task in ("passages", "shuffled"):
            cells = [_percent(figures.excess(length, row, tail, task), ".1%") for tail in tails]
            yield f"| {about['config']} | {length:,} | {about['window']} | {task} | {' | '.join(cells)} |"


def _calibrated(figures: Figures) -> Iterator[str]:
    chosen = figures.document["calibration"]
    lengths = [length for length in figures.lengths if figures.named(length, "calibrated quarter greedy", length // 16)]
    if not lengths:
        return
    settings = figures.document["settings"]["calibration"]
    yield textwrap.fill(
        f"`calibrate` measured losses on {settings['documents']} other documents of {settings['length']:,} tokens, "
        f"with a tail of {settings['tail']}. The table compares the layers that it keeps in full attention with every "
        f"fourth and every second layer, all with sinks, FA decode and a tail of {TAIL}. "
        "It gives the excess on far passages:",
        120,
    )
    yield ""
    yield f"| layers | which | {' | '.join(f'{length:,} tokens' for length in lengths)} |"
    yield "|" + "---|" * (2 + len(lengths))
    rows = {"every fourth": ("1::4", RECIPES["balanced"]), "every second": ("1::2", RECIPES["quality"])}
    rows |= {name: (", ".join(map(str, found["layers"])), f"calibrated {name}") for name, found in chosen.items()}
    for name, (layers, config) in rows.items():
        cells = []
        for length in lengths:
            row = figures.named(length, config, length // 16)
            cells.append(_percent(figures.excess(length, row, TAIL, "passages"), ".1%") if row else "")
        yield f"| {name} | {layers} | {' | '.join(cells)} |"
    yield from _verdicts(figures, lengths)


def _verdicts(figures: Figures, lengths: list[int]) -> Iterator[str]:
    """Yield sentences that compare the layers chosen by `greedy` with periodic layers of the same number.

    Two choices count as different if the interval of the difference excludes 0.
    """
    for size, rival in (("quarter", RECIPES["balanced"]), ("half", RECIPES["quality"])):
        for length in lengths:
            mine = figures.named(length, f"calibrated {size} greedy", length // 16)
            other = figures.named(length, rival, length // 16)
            if not (mine and other):
                continue
            apart = figures.apart(length, (mine, TAIL), (other, TAIL), "passages")
            verdict = (
                "neither better nor worse than"
                if apart.low <= 0 <= apart.high
                else "better than"
                if apart.high < 0
                else "worse than"
            )
            yield ""
            yield textwrap.fill(
                f"At {length:,} tokens, the greedy {size} of the layers is {verdict} the periodic {size}: its loss is "
                f"different by {apart.value:+.3f} nats per token [{apart.low:+.3f}, {apart.high:+.3f}].",
                120,
            )


def _lora(figures: Figures) -> Iterator[str]:
    """Yield a description of the training, and a table of the rows with an adapter and without the adapter."""
    tuned = [
        (length, row, about)
        for (length, row), about in figures.rows.items()
        if about.get("adapter") and figures.has(length, _without_lora(row), about["swaa"]["tail_count"])
    ]
    if not tuned:
        return
    training = next(iter(figures.document["lora"].values()))
    settings = training["settings"]
    yield textwrap.fill(
        f"For each row, `finetune` trained a LoRA adapter (rank {settings['lora_rank']}) under the row's mask and "
        f"tail, with {training['data']['examples']} conversations about shorter documents in {settings['epochs']:g} "
        f"epochs, {training['steps']} optimizer steps each. The responses are the model's own correct answers to "
        "questions about hidden facts (`distill`). No such document appears in any table. Below each row is the same "
        "configuration without an adapter.",
        120,
    )
    yield ""
    yield "| configuration | T | passages | excess | shuffled | excess | facts |"
    yield "|" + "---|" * 7
    for length, row, about in tuned:
        tail = about["swaa"]["tail_count"]
        for name in (row, _without_lora(row)):
            cells = [figures.rows[length, name]["config"], str(tail)]
            for task in ("passages", "shuffled"):
                cells += [
                    _plus_minus(figures.loss(length, name, tail, task)),
                    _excess(figures, length, name, tail, task),
                ]
            right, count, interval = figures.facts(length, name, tail)
            yield f"| {' | '.join(cells)} | {right}/{count} {_percent(interval)} |"
    for length, row, about in tuned:
        tail = about["swaa"]["tail_count"]
        apart = figures.apart(length, (row, tail), (_without_lora(row), tail), "passages")
        yield ""
        yield textwrap.fill(
            f"The adapter for {_without_lora(row).partition(' @')[0]} with T = {tail} changes the loss on far passages "
            f"by {apart.value:+.3f} nats per token [{apart.low:+.3f}, {apart.high:+.3f}].",
            120,
        )


def _without_lora(row: str) -> str:
    """Return the row without the adapter. "fast + LoRA @ 128, fast-0" becomes "fast @ 128"."""
    return row.partition(",")[0].replace(" + LoRA", "")


def quick_table(document: dict[str, Any]) -> str:
    """Return the table of a short run for a terminal."""
    figures = Figures(document)
    length = figures.lengths[0]
    window = figures.windows(length)[0]
    rows = [["configuration", "T", "passages", "excess", "shuffled", "excess", "facts", "prefill"]]
    for row, tail in figures.cells(length, window):
        name = figures.rows[length, row]["config"]
        cells = [name, str(tail) if figures.decodes(length, row) else "-"]
        for task in ("passages", "shuffled"):
            share = "0%" if row == FULL else f"{figures.excess(length, row, tail, task).value:.0%}"
            cells += [f"{figures.loss(length, row, tail, task).value:.2f}", share]
        right, count, _ = figures.facts(length, row, tail)
        rows.append([*cells, f"{right}/{count}", f"{figures.prefill(length, row):.2f}x"])
    return (
        f"SmolLM2-135M-Instruct, {length:,} tokens, window {window}\n\n{table(rows)}\n\n"
        f"passages, shuffled: loss in nats per token on {figures.asked(length, 'passages')} far passages of each kind\n"
        "excess: the fraction of the loss added by a bare window that remains\n"
        "Details, intervals and longer prompts: docs/results-real.md"
    )
