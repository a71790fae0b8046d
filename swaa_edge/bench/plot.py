"""Draw what `bench` measured: prefill speed, and speed-up beside its bound, over the prompt length.

plot(report.to_dict(), "bench.png")
"""

from __future__ import annotations

import os
from typing import Any

from swaa_edge.bench.client import UNPATCHED
from swaa_edge.engine.configurations import FULL
from swaa_edge.support.figure import figure


def plot(document: dict[str, Any], path: str | os.PathLike[str], kind: str | None = None) -> None:
    """Draw `Report.to_dict()` into the file `path`.

    kind: "png", "svg" or "pdf"; None takes the type from the name. Raises `ConfigError` without matplotlib.
    """
    rows = document["rows"]
    with figure(path, size=(10, 4.2), kind=kind) as canvas:
        speed, ratio = canvas.subplots(1, 2)
        for number, name in enumerate(dict.fromkeys(row["config"] for row in rows)):
            mine = [row for row in rows if row["config"] == name]
            lengths, style = [row["prompt_tokens"] for row in mine], {"color": f"C{number}", "marker": "o"}
            speed.plot(lengths, [row["prefill_tok_s"] for row in mine], label=name, **style)
            if name not in (FULL, UNPATCHED):
                ratio.plot(lengths, [row["prefill_ratio"] for row in mine], label=name, **style)
                bounds = [row["bound"] or float("nan") for row in mine]
                ratio.plot(lengths, bounds, color=style["color"], linestyle=":", label=f"{name}, bound")
        speed.set(xlabel="prompt tokens", ylabel="prefill, tokens per second", ylim=(0, None))
        ratio.set(xlabel="prompt tokens", ylabel="prefill, speed-up over full attention", ylim=(0, None))
        ratio.axhline(1, color="gray", linewidth=0.8)
        for axes in (speed, ratio):
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
        canvas.suptitle(f"{document['model']['name']} on {document['machine']['cpu']}", fontsize="medium")
