"""The document of a calibration as text for the terminal, with the ranking as bars.

print(summary(calibration.to_dict()))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from swaa_edge.config import SwaaConfig

_BAR = 40


def summary(document: dict[str, Any]) -> str:
    """The losses, the ranking as bars, the comparison if there is one, and the --fa-layers to use."""
    lines = [*_facts(document), ""]
    if document["ranking"]:
        lines += [*_bars(document), ""]
    if document["held_out"]["table"]:
        lines += [*_comparison(document), ""]
    if document["stopped"]:
        lines.append(f"Stopped early ({document['stopped']}); the same command resumes from here.")
    if document["chosen"]:
        lines.append(_conclusion(document))
    return "\n".join(lines).rstrip("\n")


def _facts(document: dict[str, Any]) -> Iterator[str]:
    swaa = SwaaConfig.from_dict(document["swaa"])
    decode = {True: "FA decode", False: "no FA decode"}.get(swaa.fa_decode, f"FA decode in {swaa.fa_decode}")
    yield (
        f"{document['model']['name']}, {document['layers']} layers; window {swaa.window_size}, "
        f"{swaa.sink_count} sinks, {decode}"
    )
    yield (
        f"{document['samples']} samples of {document['prompt_tokens']:,} tokens; loss in nats per token, over "
        f"{document['answer_tokens']:,} answer tokens"
    )
    for name, key in (("full attention", "full_loss"), ("all layers slide", "sliding_loss")):
        if document[key] is not None:
            yield f"{name + ':':<17} {document[key]:.4f}"


def _bars(document: dict[str, Any]) -> Iterator[str]:
    rows = document["ranking"]
    most = max((abs(row["gain"]) for row in rows), default=0.0) or 1.0
    yield document["gain"] + ":"
    for row in rows:
        error = "" if row["error"] is None else f" ± {row['error']:.4f}"
        bar = "#" * round(_BAR * max(0.0, row["gain"]) / most)
        keeps = "FA" if row["chosen"] else "  "
        yield f"layer {row['layer']:>3}  {keeps}  {row['gain']:+.4f}{error}  {bar}".rstrip()


def _comparison(document: dict[str, Any]) -> Iterator[str]:
    held_out = document["held_out"]
    width = max(len(row["fa_layers"]) for row in held_out["table"])
    yield f"on {held_out['samples']} held-out samples, by FA layers:"
    for row in sorted(held_out["table"], key=lambda row: row["loss"]):
        error = "" if row["error"] is None else f" ± {row['error']:.4f}"
        mark = "  <- chosen" if row["chosen"] else ""
        yield f"{row['fa_layers']:>{width}}  loss {row['loss']:.4f}  ({row['added']:+.4f}{error}){mark}"


def _conclusion(document: dict[str, Any]) -> str:
    layers, kept = ",".join(map(str, document["chosen"])), len(document["chosen"])
    text = f"--fa-layers {layers}  ({kept} of {document['layers']} layers"
    if document["chosen_loss"] is not None:
        text += f"; loss {document['chosen_loss']:.4f}"
    if document["recovered"] is not None:
        text += f", recovers {document['recovered']:.0%} of the loss that sliding adds"
    return text + ")"
