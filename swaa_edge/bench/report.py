"""The results of a benchmark: samples, rows, document, table and plot.

print(report); report.to_dict()["rows"]
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from swaa_edge.bench import bound
from swaa_edge.bench.client import PATCHED, UNPATCHED, Timing
from swaa_edge.bench.workload import Workload
from swaa_edge.config import Configuration
from swaa_edge.engine.configurations import FULL
from swaa_edge.support.figure import figure
from swaa_edge.support.interrupt import Stopped
from swaa_edge.support.machine import machine
from swaa_edge.support.table import table


@dataclasses.dataclass
class Run:
    """The facts about a run, for every benchmark.

    repeat: rounds per prompt length, or None for the default.
    libraries: the result of `client.described` for each library, by name.
    load: the system's load average over the minute before the run, or None if unknown.
    """

    work: Workload
    configs: dict[str, Configuration]
    repeat: int | None
    libraries: dict[str, dict[str, Any]]
    load: float | None = dataclasses.field(
        default_factory=lambda: os.getloadavg()[0] if hasattr(os, "getloadavg") else None, kw_only=True
    )
    stopped: Stopped = dataclasses.field(default=None, kw_only=True)

    def facts(self) -> dict[str, Any]:
        """Return settings, prompt, model, machine, libraries and the reason for an early end, as plain JSON values."""
        work, model = self.work, self.work.model
        return {
            "settings": {"decode": work.decode, "repeat": self.repeat, **dataclasses.asdict(work.engine)},
            "prompt": work.prompt,
            "model": {
                "path": os.fspath(model),
                "name": model.name,
                "architecture": model.architecture,
                "layers": model.n_layers,
                "heads": list(model.n_heads),
                "kv_heads": list(model.n_kv_heads),
                "type": model.file_type,
                "parameters": model.n_parameters,
                "bytes": model.size,
            },
            "machine": machine() | {"load": self.load},
            "libraries": self.libraries,
            "stopped": str(self.stopped) if self.stopped else None,
        }


@dataclasses.dataclass
class Report(Run):
    """The samples so far: one Timing per round.

    samples: each key is (name of a configuration or `UNPATCHED`, prompt length).
    """

    samples: dict[tuple[str, int], list[Timing]] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per configuration and prompt length, as plain JSON values.

        A ratio is the median time of full attention divided by the median time of the configuration. Above 1, the
        configuration is faster.

        A value that can't be computed is None. Examples are the bound of a prompt with fewer than three ubatches, and
        the decode speed if no tokens were decoded.
        """
        return [
            self._row(name, length)
            for length in dict.fromkeys(length for _, length in self.samples)
            for name in (UNPATCHED, *self.configs)
            if (name, length) in self.samples and (FULL, length) in self.samples
        ]

    def line(self, n_tokens: int) -> bound.Line | None:
        """Fit a line to the median ubatch times of full attention on the patched library."""
        rounds = [timing.ubatch_seconds for timing in self.samples.get((FULL, n_tokens), [])]
        medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
        n_ubatch = self.work.engine.n_ubatch
        return bound.fit_line(medians[: n_tokens // n_ubatch], n_ubatch)

    def _row(self, name: str, n_tokens: int) -> dict[str, Any]:
        prefill, decode = self._medians(name, n_tokens)
        config, timings = self.configs.get(name) or None, self.samples[name, n_tokens]
        ratios, to_unpatched = (self._ratios(name, other, n_tokens) for other in (FULL, UNPATCHED))
        line = None if name == UNPATCHED else self.line(n_tokens)
        best = line and bound.bound(line, config, n_tokens, self.work.engine.n_ubatch, self.work.model.n_heads)
        new = self.work.decode
        return {
            "config": name,
            "recipe": config.recipe if config else None,
            "swaa": config.to_dict() if config else None,
            "prompt_tokens": n_tokens,
            "prefill_seconds": prefill,
            "prefill_tok_s": n_tokens / prefill,
            "prefill_ratio": ratios[0],
            "bound": best,
            "ratio_to_bound": ratios[0] / best if best else None,
            "decode_tokens": new,
            "decode_tok_s": new / decode if new else None,
            "decode_ratio": ratios[1],
            "ratio": ratios[2],
            "prefill_vs_unpatched": to_unpatched[0],
            "decode_vs_unpatched": to_unpatched[1],
            "vs_unpatched": to_unpatched[2],
            "device": self.device(name),
            "compute_buffer_bytes": timings[0].compute_bytes,
            "kv_bytes": timings[0].kv_bytes,
            "repeats": [dataclasses.asdict(timing) for timing in timings],
        }

    def _ratios(self, name: str, reference: str, n_tokens: int) -> tuple[float | None, float | None, float | None]:
        """Return the speed-ups of `name` over `reference`: prefill, decode, and both together."""
        if (reference, n_tokens) not in self.samples:
            return None, None, None
        (their_prefill, their_decode), (prefill, decode) = (self._medians(side, n_tokens) for side in (reference, name))
        both = (their_prefill + their_decode) / (prefill + decode)
        return their_prefill / prefill, their_decode / decode if self.work.decode else None, both

    def device(self, name: str) -> str:
        """Return the hardware that ran `name`: the GPUs or the CPU. If some layers ran on the CPU, the number of layers
        on the GPUs is added."""
        layers, n_layers = self.work.engine.n_gpu_layers, self.work.model.n_layers
        gpus = self.libraries[UNPATCHED if name == UNPATCHED else PATCHED]["gpus"]
        if not gpus or layers == 0:
            return str(machine()["cpu"])
        # With the output layer, a model has n_layers + 1 layers to place.
        return " + ".join(gpus) + (f", {layers} of {n_layers} layers" if 0 < layers <= n_layers else "")

    def _medians(self, name: str, n_tokens: int) -> tuple[float, float]:
        """Return the median seconds of the prefill and of the decode."""
        timings = self.samples[name, n_tokens]
        return (
            statistics.median(sum(timing.ubatch_seconds) for timing in timings),
            statistics.median(sum(timing.decode_seconds) for timing in timings),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as plain JSON values: rows with their raw samples, the fits, and `Run.facts`."""
        fits = []
        for length in dict.fromkeys(length for _, length in self.samples):
            if line := self.line(length):
                fraction = bound.attention_fraction(line, length, self.work.engine.n_ubatch)
                fits.append({"prompt_tokens": length, "a": line.a, "b": line.b, "attention_share": fraction})
        return {"rows": self.rows(), "fit": fits, **self.facts()}

    def __str__(self) -> str:
        """Return the report as text: heading, table and notes."""
        document = self.to_dict()
        rows = document["rows"]
        columns = [column for column in _COLUMNS if UNPATCHED in document["libraries"] or not column[2]]
        cells: list[list[str] | None] = [[title for title, *_ in columns]]
        for at, row in enumerate(rows):
            if at and row["prompt_tokens"] != rows[at - 1]["prompt_tokens"]:
                cells.append(None)
            cells.append([cell(row) for _, cell, _ in columns])
        return "\n".join([*heading(document), "", table(cells, left=0), "", *self._notes(document)])

    @staticmethod
    def _notes(document: dict[str, Any]) -> Iterator[str]:
        yield from warnings(document)
        yield "prefill, decode, request (both): speed-up over full attention on the same library."
        yield "bound: the prefill speed-up if a sliding layer cost no more than the keys that it sees."
        if UNPATCHED in document["libraries"]:
            yield "vs unpatched: speed-up over full attention on the unpatched library."


def number(value: float | None, form: str) -> str:
    """Return `value` formatted, or a dash for None."""
    return "-" if value is None else format(value, form)


def ratio(value: float | None) -> str:
    """Return a speed-up as "1.23x", or a dash for None."""
    return "-" if value is None else f"{value:.2f}x"


# Title, cell, and whether the column needs a baseline.
_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str], bool]] = [
    ("prompt", lambda row: f"{row['prompt_tokens']:,}", False),
    ("config", lambda row: row["config"], False),
    ("prefill tok/s", lambda row: f"{row['prefill_tok_s']:,.1f}", False),
    ("prefill", lambda row: ratio(row["prefill_ratio"]), False),
    ("bound", lambda row: ratio(row["bound"]), False),
    ("of bound", lambda row: number(row["ratio_to_bound"], ".0%"), False),
    ("vs unpatched", lambda row: ratio(row["prefill_vs_unpatched"]), True),
    ("decode tok/s", lambda row: number(row["decode_tok_s"], ",.1f"), False),
    ("decode", lambda row: ratio(row["decode_ratio"]), False),
    ("vs unpatched", lambda row: ratio(row["decode_vs_unpatched"]), True),
    ("request", lambda row: ratio(row["ratio"]), False),
    ("vs unpatched", lambda row: ratio(row["vs_unpatched"]), True),
    ("compute MiB", lambda row: f"{row['compute_buffer_bytes'] / 2**20:,.1f}", False),
    ("KV MiB", lambda row: f"{row['kv_bytes'] / 2**20:,.1f}", False),
]


def heading(document: dict[str, Any]) -> Iterator[str]:
    """Yield lines about the model, device, settings, prompt and libraries."""
    model, this, settings, rows = (document[name] for name in ("model", "machine", "settings", "rows"))
    cores = this["cores"]
    threads = settings["n_threads"] or f"{cores} in prefill, {max(cores // 2, 1)} in decode"
    size = f"{model['bytes'] / 1e9:.2f} GB"
    cache = f"{settings['cache_type']} KV cache, " if "cache_type" in settings else ""
    yield f"{model['name']} ({model['architecture']}, {model['layers']} layers, {model['type']}, {size})"
    device = rows[0].get("device", this["cpu"])
    yield (
        f"{'' if device == this['cpu'] else f'on {device}; '}{this['cpu']}, threads: {threads}; "
        f"{cache}ubatch {settings['n_ubatch']}; prompt: {document['prompt']}"
    )
    for name, library in document["libraries"].items():
        yield f"{name} library: {library['path']} (ggml {library['ggml']})"


def warnings(document: dict[str, Any]) -> Iterator[str]:
    """Yield warnings that the machine was busy, or that the run ended early."""
    load, cores = document["machine"]["load"], document["machine"]["cores"]
    if load is not None and load > cores / 4:
        yield f"The machine was busy at the start (load {load:.1f} on {cores} cores); the times may be noise."
    if document["stopped"]:
        yield f"Stopped early ({document['stopped']}); these are the results until then."


def plot(document: dict[str, Any], path: str | os.PathLike[str], kind: str | None = None) -> None:
    """Draw speed, speed-up and bound by prompt length.

    document: the result of `Report.to_dict()`.
    path: the file to write.
    kind: "png", "svg" or "pdf", or None for the type that the suffix of `path` names.

    Raises `ConfigError` if matplotlib is not installed, or if the suffix is unknown.
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
