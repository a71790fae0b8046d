"""The plan of measure.py: the configurations, lengths, windows and tails to measure, in order.

    for stage in first_stages(): print(stage.length, [row.name for row in stage.rows])

A row is a configuration that is measured with several tails. Each row prefills a document only once. For each tail,
only the last tokens of a prompt are evaluated again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from swaa_edge.config import FULL_ATTENTION, TAIL, Configuration, SwaaConfig
from swaa_edge.support.journal import digest

SINKS = 16
TAILS = (0, 1, 16, 64, 128, 256)
#: No tail, and the recipes' tail.
WITHOUT_AND_WITH = (0, TAIL)
#: Documents per length. Each document has at least five samples of each task, or four at 8k tokens.
DOCUMENTS = {2048: 20, 4096: 8, 8192: 4}
#: Windows of text per length for the perplexity.
TEXTS = {2048: 5, 4096: 2, 8192: 2}
#: The recipes are these rows.
RECIPES = {
    "quality": "sinks + 1::2 + FA decode",
    "balanced": "sinks + 1::4 + FA decode",
    "early": "sinks + 0:8 + FA decode",
    "fast": "sinks + FA decode",
    "memory": "sinks + 1::2",
    "stream": "sinks",
}
#: Measured seconds per prefill token on one thread, and the attention's extra seconds per 1,000 visible tokens.
_TOKEN, _VISIBLE = 0.0038, 0.0009
#: Seconds per token of a question or answer. Batches are small here, and an answer needs the logits of all tokens.
_ASKED = 0.0052
#: Approximate number of tokens of a question.
_QUESTION = 26


@dataclasses.dataclass(frozen=True)
class Row:
    """A configuration, and the tails to measure it with.

    swaa: the configuration. Only a configuration for an adapter has a tail.
    adapter: name of the LoRA adapter.
    trained_as: digest of the adapter's file.
    window: the window size in tokens, or None for full attention.
    """

    name: str
    swaa: Configuration
    tails: Sequence[int] = (0,)
    adapter: str | None = None
    trained_as: str = ""

    @property
    def window(self) -> int | None:
        return self.swaa.window_size if self.swaa else None

    @property
    def key(self) -> str:
        return f"{self.name} @ {self.window}" + (f", {self.adapter}" if self.adapter else "")

    @property
    def identity(self) -> str:
        """A digest of the configuration and of the adapter. A record of other settings under the same name differs."""
        return digest({"swaa": self.swaa.to_dict() if self.swaa else None, "adapter": self.trained_as})


@dataclasses.dataclass(frozen=True)
class Stage:
    """The rows that are measured in turn on the same documents."""

    length: int
    documents: int
    rows: Sequence[Row]


FULL = Row("full", FULL_ATTENTION)


def row(window: int, sinks: bool, fa_layers: str, fa_decode: bool, tails: Sequence[int] = (0,)) -> Row:
    """Return a row with these strategies. The row's name lists the strategies."""
    parts = (["sinks"] if sinks else []) + ([fa_layers] if fa_layers != "none" else [])
    name = " + ".join(parts + (["FA decode"] if fa_decode else [])) or "naive"
    return Row(name, SwaaConfig(window, SINKS if sinks else 0, fa_layers, fa_decode), tails)


def calibrated(window: int, name: str, layers: Sequence[int]) -> Row:
    return Row(f"calibrated {name}", SwaaConfig(window, SINKS, list(layers), True), WITHOUT_AND_WITH)


def headline(length: int) -> list[Row]:
    """Return the most important rows: full attention, bare windows, and the recipe `fast`.

    Bare windows and `fast` have two window sizes. With the smaller window, `fast` is also measured with full attention
    in the first layers. With 8 such layers out of 30, attention costs about 40 percent of full attention in all layers.
    """
    rows = [FULL]
    for window in (length // 16, length // 8):
        rows += [
            row(window, False, "none", False),
            row(window, True, "none", True, TAILS if length < 8192 and window == length // 16 else WITHOUT_AND_WITH),
        ]
    return rows + [row(length // 16, True, layers, True, WITHOUT_AND_WITH) for layers in ("0:5", "0:8")]


def others(length: int, chosen: Mapping[str, Sequence[int]]) -> list[Row]:
    """Return the rows that `headline` leaves out.

    chosen: the full-attention layers that each calibration chose, by the calibration's name.
    """
    rows: list[Row] = []
    small, large = length // 16, length // 8
    for window in (small, large) if length < 8192 else (small,):
        if length == 2048 and window == small:
            for sinks in (True, False):
                for layers in ("none", "1::4", "1::2"):
                    rows += [row(window, sinks, layers, False)] if sinks or layers != "none" else []
                    if not sinks or layers != "none":
                        rows.append(row(window, sinks, layers, True, WITHOUT_AND_WITH))
        else:
            tails = WITHOUT_AND_WITH if window == small else (TAIL,)
            rows += [row(window, True, "none", False), row(window, True, "1::2", False)]
            periodic = [row(window, True, layers, True, tails) for layers in ("1::4", "1::2")]
            rows += periodic if window == small else [*periodic, row(window, True, "0:8", True, tails)]
    names = [name for name in chosen if length == 2048 or "greedy" in name]
    return [*rows, *(calibrated(small, name, chosen[name]) for name in names)]


def tuned() -> list[Row]:
    """Return the rows with a LoRA adapter. Each row has the tail of the adapter's training."""
    rows = []
    for recipe, tail in (("fast", TAIL), ("fast", 0), ("balanced", TAIL)):
        base = row(2048 // 16, True, "1::4" if recipe == "balanced" else "none", True)
        swaa = dataclasses.replace(base.swaa, tail_count=tail)
        rows.append(Row(f"{base.name} + LoRA", swaa, (tail,), f"{recipe}-{tail}"))
    return rows


def first_stages() -> list[Stage]:
    """Return one stage per length, with the most important rows."""
    return [Stage(length, documents, headline(length)) for length, documents in DOCUMENTS.items()]


def later_stages(chosen: Mapping[str, Sequence[int]]) -> list[Stage]:
    """Return one stage per length, with the remaining rows. chosen: as in `others`."""
    return [Stage(length, documents, others(length, chosen)) for length, documents in DOCUMENTS.items()]


def quick() -> Stage:
    """Return the stage of a run of about a minute."""
    window = 2048 // 8
    fast = row(window, True, "none", True, WITHOUT_AND_WITH)
    return Stage(2048, 2, [FULL, row(window, False, "none", False), fast, row(window, True, "1::4", True, (TAIL,))])


def texts_of(length: int, chosen: Mapping[str, Sequence[int]]) -> list[Row]:
    """Return the rows for the measurement of perplexity.

    At 4k and 8k tokens, only full attention and rows with the smaller window are returned. At 8k, rows of later
    stages are left out too.

    All tokens of the text are prompt tokens, so FA decode has no effect. Rows that differ only in FA decode become one
    row without FA decode.
    """
    found: dict[Configuration, Row] = {}
    for each in (*headline(length), *(others(length, chosen) if length < 8192 else ())):
        if each.swaa and (length == 2048 or each.window == length // 16):
            swaa = dataclasses.replace(each.swaa, fa_decode=False)
            found.setdefault(swaa, Row(each.name.replace(" + FA decode", "").replace("FA decode", "naive"), swaa))
    return [FULL, *found.values()]


def seconds(stage: Stage, questions: Sequence[tuple[int, int, int]]) -> float:
    """Return the expected seconds of a stage on one thread.

    questions: kinds of questions per document. A kind is the number of questions, the tokens of an answer, and the
        number of different prompt lengths. The tail is evaluated once per length.
    """
    total = 0.0
    for each in stage.rows:
        visible = stage.length / 2 if each.window is None else min(each.window, stage.length / 2)
        total += stage.length * (_TOKEN + _VISIBLE * visible / 1000)
        for tail in each.tails:
            for count, tokens, lengths in questions:
                asked = count * (_QUESTION + tokens) + lengths * max(tail - _QUESTION, 0)
                total += asked * (_ASKED + _VISIBLE * stage.length / 1000)
    return total * stage.documents
