"""The text of docs/results-real.md: tables of the figures that measure.py measured, and sentences made from them.

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
    """The text of docs/results-real.md for a document of measure.py."""
    figures, settings = Figures(document), document["settings"]
    return _PAGE.format(
        model=document["model"] | {"sha256": document["model"]["sha256"][:16]},
        machine=document["machine"],
        threads=document["threads"],
        commit=document["commit"][:12],
        cue=settings["cue"],
        scored=settings["scored"],
        sinks=settings["sinks"],
        corpus=", ".join(f"{name} `{sha256[:16]}`" for name, sha256 in document["corpus"].items()),
        summary="\n".join(_summary(figures)),
        tables="\n\n".join(_tables(figures)),
        tails="\n".join(_tails(figures, settings["tails"])),
        calibrated="\n".join(_calibrated(figures) if document["calibration"] else ["Not measured yet."]),
    )


_PAGE = """\
# A real model: what each strategy costs and brings

<!-- Written by scripts/real/measure.py from docs/results/real.json; edit neither. -->

SmolLM2-135M-Instruct (`{model[file]}`, {model[layers]} layers, trained for 8,192 tokens) reads documents
of real English, Python's language reference and Debian's manuals, under every configuration, through the engine,
without training. The window is a sixteenth or an eighth of the context; the sinks are the first {sinks} tokens. The
text that a question asks for is always further from the end of the prompt than the window reaches.

- *passages*: the prompt ends with the first {cue} tokens of a passage of the document; the loss of the passage's next
  {scored} tokens in nats per token. *exact*: the fraction of these tokens that the model predicts. *shuffled*: the same
  loss for a planted passage of shuffled tokens, which the model can only copy.
- *excess*: the loss added to that of full attention, as a fraction of what a bare window of the same size adds.
- *facts*: a sentence hidden in the document, asked for through the chat template; the model sees the beginning of the
  right response and must continue it with the name or number. Only facts that full attention gets right count.
- *KL*: divergence from full attention on other text, docstrings of Python's library, all of it read as a prompt, so
  that FA decode and the tail make no difference.
- *pairs*: query-key pairs that the prefill computes, as a fraction of full attention's. *prefill*: speed-up over full
  attention when reading the document, which the tail follows; median over the documents, the configurations taking
  turns, on {machine[cpu]} ({threads} threads). So small a model spends much of its time outside attention.

Brackets and ± are 95 % intervals: by bootstrap over the documents, Wilson's for facts; ± for KL is one standard error.

{summary}

{tables}

## What the tail brings

The last T tokens of the prompt see the whole document in layers with FA decode. Excess over full attention:

{tails}

## Which layers keep full attention

{calibrated}

## Reproduce it

```
scripts/real/fetch.py && scripts/real/measure.py && scripts/real/measure.py --write
```

Commit `{commit}`; model sha256 `{model[sha256]}`.
Texts: {corpus}. Other versions of Python and other Debian packages have other texts, and give other figures.
"""


def _tables(figures: Figures) -> Iterator[str]:
    for length in figures.lengths:
        documents = figures.documents(length)
        asked = figures.asked(length, "passages")
        known = figures.facts(length, FULL, 0)[1]
        yield (
            f"## {length:,} tokens\n\n{documents} documents with {asked} passages of each kind and "
            f"{figures.asked(length, 'facts')} facts, of which full attention gets {known} right and which count."
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
    """What the figures decide: the damage, the strategies one by one, and the best configuration of each length."""
    for length in figures.lengths:
        for window in figures.windows(length):
            full, naive = (figures.loss(length, row, 0, "passages").value for row in (FULL, f"naive @ {window}"))
            best = min(
                (cell for cell in figures.cells(length, window) if cell[0] != FULL),
                key=lambda cell: figures.excess(length, *cell, "passages").value,
            )
            name = figures.rows[length, best[0]]["config"]
            excess = _percent(figures.excess(length, *best, "passages"))
            yield textwrap.fill(
                f"- {length:,} tokens, window {window}: a bare window raises the loss on far passages from {full:.2f} "
                f"to {naive:.2f}. {name}{_with(best[1])} leaves least of that, {excess}, for "
                f"{figures.pairs(length, *best):.0%} of the query-key pairs.",
                120,
                subsequent_indent="  ",
            )
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
    """A line per row that was measured with every T, and task."""
    yield f"| configuration | tokens | window | asked | {' | '.join(f'T {tail}' for tail in tails)} |"
    yield "|" + "---|" * (4 + len(tails))
    for (length, row), about in figures.rows.items():
        if figures.tails(length, row) != list(tails):
            continue
        for task in ("passages", "shuffled"):
            cells = [_percent(figures.excess(length, row, tail, task), ".1%") for tail in tails]
            yield f"| {about['config']} | {length:,} | {about['window']} | {task} | {' | '.join(cells)} |"


def _calibrated(figures: Figures) -> Iterator[str]:
    chosen = figures.document["calibration"]
    settings = figures.document["settings"]["calibration"]
    yield textwrap.fill(
        f"`calibrate` read {settings['documents']} other documents of {settings['length']:,} tokens with a tail of "
        f"{settings['tail']}. The layers that it keeps in full attention, beside every fourth and every second layer, "
        f"all with sinks, FA decode and a tail of {TAIL}; excess on far passages:",
        120,
    )
    lengths = [length for length in figures.lengths if figures.named(length, "calibrated quarter greedy", length // 16)]
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
    """Whether the greedy choice beats the periodic one of its size, by the interval of the difference."""
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
                f"At {length:,} tokens the greedy {size} is {verdict} the periodic one, by their difference of "
                f"{apart.value:+.3f} nats per token [{apart.low:+.3f}, {apart.high:+.3f}].",
                120,
            )


def quick_table(document: dict[str, Any]) -> str:
    """The table of a short run, for a terminal."""
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
        f"Loss in nats per token of {figures.asked(length, 'passages')} passages that stand far back; excess: the part "
        "of a bare window's damage that is left.\nDetails, intervals and longer prompts: docs/results-real.md"
    )
