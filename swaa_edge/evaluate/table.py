"""Render the document of a comparison as text: a table, a legend, and a conclusion.

print(table(document))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from swaa_edge.config import SwaaConfig
from swaa_edge.engine.configurations import FULL
from swaa_edge.evaluate.report import pareto
from swaa_edge.support.table import table as aligned

Row = dict[str, Any]


def front(rows: Sequence[Row]) -> list[str]:
    """Return the configurations on the Pareto front of accuracy and prefill speed-up."""
    known = [row for row in rows if row["prefill_ratio"] is not None]
    return pareto({row["config"]: (-row["prefill_ratio"], row["accuracy"]) for row in known})


def conclusion(rows: Sequence[Row]) -> str | None:
    """Return the result in one sentence, or None if there is nothing to compare."""
    full = next((row for row in rows if row["config"] == FULL), None)
    others = [row for row in rows if row["config"] != FULL and row["prefill_ratio"] is not None]
    if full is None or not others:
        return None
    if not full["correct"]:
        return "Full attention answers no question correctly, so these questions can't compare configurations."
    best = max(others, key=lambda row: (row["accuracy"], row["prefill_ratio"]))
    text = f"{best['config']} {keeps(best, full)} at a prefill {speed_up(best['prefill_ratio'])}"
    fastest = max(others, key=lambda row: (row["prefill_ratio"], row["accuracy"]))
    if fastest is not best:
        text += f"; the fastest, {fastest['config']}, {keeps(fastest, full)} at a {speed_up(fastest['prefill_ratio'])}"
    return text + "."


def keeps(row: Row, full: Row) -> str:
    """Return text that compares a configuration's accuracy with full attention."""
    fraction = row["accuracy"] / full["accuracy"]
    return f"keeps {fraction:.0%} of full attention's accuracy ({row['accuracy']:.1%} of {full['accuracy']:.1%})"


def speed_up(ratio: float) -> str:
    """Return "speed-up of 2.00x" for 2, or "slow-down of 2.00x" for 0.5."""
    return f"speed-up of {ratio:.2f}x" if ratio >= 1 else f"slow-down of {1 / ratio:.2f}x"


def table(document: dict[str, Any]) -> str:
    """Return the document as text."""
    parts = [list(_facts(document))]
    if document["table"]:
        parts += [[aligned(_answers(document))], list(_notes(document))]
    if document["perplexity"] and document["perplexity"]["perplexity"]:
        parts += [[aligned(_predictions(document["perplexity"]))], list(_ppl_notes(document["perplexity"]))]
    if document["stopped"]:
        parts.append([_stopped(document)])
    elif document["conclusion"]:
        parts.append([document["conclusion"]])
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _answers(document: dict[str, Any]) -> list[list[str]]:
    rows = document["table"]
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    columns: dict[str, Callable[[Row], str]] = {
        "config": lambda row: row["config"] + (" *" if row["config"] in document["front"] else ""),
        "accuracy": lambda row: f"{row['accuracy']:.1%}",
        "95% interval": lambda row: "{:.1%}-{:.1%}".format(*row["interval"]),
    }
    if len(tasks) > 1:
        columns |= {task: lambda row, task=task: _accuracy(row["tasks"].get(task)) for task in tasks}
    columns |= {
        "prefill": lambda row: _seconds(row["prefill_seconds"]),
        "ratio": lambda row: "-" if row["prefill_ratio"] is None else f"{row['prefill_ratio']:.2f}x",
        "decode tok/s": lambda row: "-" if row["decode_tok_s"] is None else f"{row['decode_tok_s']:,.1f}",
    }
    return [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]


def _accuracy(counts: Row | None) -> str:
    return "-" if counts is None else f"{counts['accuracy']:.1%}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.2f} s"


def _facts(document: dict[str, Any]) -> Iterator[str]:
    model, settings = document["model"], document["settings"]
    size = f"{model['bytes'] / 1e9:.2f} GB"
    yield f"{model['name']} ({model['architecture']}, {model['layers']} layers, {model['type']}, {size})"
    lengths = ", ".join(f"{length:,}" for length in settings["lengths"])
    template = "the model's chat template" if settings["chat"] else "plain text"
    seed = document["samples"]["seed"]
    yield f"tasks: {', '.join(settings['tasks'])}; prompts of {lengths} tokens, {template}; seed {seed}"


def _notes(document: dict[str, Any]) -> Iterator[str]:
    rows = document["table"]
    counts = {row["samples"] for row in rows}
    many = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts)
    yield f"accuracy: correct answers of {many} per configuration, with Wilson's 95% interval."
    if any(row["prefill_ratio"] is not None for row in rows):
        yield "prefill: median time; ratio: speed-up over full attention. *: Pareto front of accuracy and ratio."
    if document["settings"]["skipped"]:
        yield f"{document['settings']['skipped']} questions exceed the context and were skipped."
    longest = max([*document["settings"]["lengths"], *(row["prompt_tokens"] for row in rows)])
    idle = [row["config"] for row in rows if row["swaa"] and SwaaConfig.from_dict(row["swaa"]).reach >= longest]
    if idle:
        yield (
            f"{', '.join(idle)}: the window covers the whole prompt of {longest:,.0f} tokens, so nothing slides; give "
            "a smaller --window."
        )


def _predictions(found: dict[str, Any]) -> list[list[str]]:
    columns: dict[str, Callable[[Row], str]] = {
        "config": lambda row: row["config"],
        "perplexity": lambda row: f"{row['ppl']:,.3f}",
        "loss added": lambda row: _added(row["nll_increase"], row["nll_increase_error"]),
        "KL": lambda row: f"{row['kl']:.4f}",
        "same token": lambda row: f"{row['same_top']:.1%}",
        "KL past window": lambda row: "-" if row["past_window"] is None else f"{row['past_window']['kl']:.4f}",
    }
    return [list(columns), *([cell(row) for cell in columns.values()] for row in found["perplexity"])]


def _added(value: float, error: float | None) -> str:
    return f"{value:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _ppl_notes(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['windows']} windows of {found['length']:,} tokens of text; nats per token, ± one standard error."
    yield "same token: how often the most likely next token is the same as under full attention."


def _stopped(document: dict[str, Any]) -> str:
    at = document["progress"]
    parts = [f"{at['answers']:,} of {at['of']:,} answers"] if at["of"] else []
    parts += [f"{at['windows']:,} of {at['of_windows']:,} windows"] if at["of_windows"] else []
    text = f"Stopped early ({document['stopped']}) after {' and '.join(parts)}"
    if not at["kept"]:
        return text + ", which are lost, since the cache folder is not writable; give --journal FILE."
    return text + "; the same command resumes there, and writes its files when it is complete."
