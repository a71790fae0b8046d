"""Makes the report of the GPU check: a JSON document, a table in Markdown, and the list of failed checks.

document = make_document(facts, results, still_open); write(document, Path("docs/gpu")); problems(document)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Ratios of the whole request that the SWAA authors published. vLLM, Qwen3-4B, 128k tokens in, 512 out.
PUBLISHED = {"stream": 8.0, "memory": 1.79, "fast": 1.71, "balanced": 1.45, "quality": 1.26}
#: Accepted ratios of SWAA off to the unpatched library.
OFF_RATIO = (0.98, 1.02)


def make_document(facts: dict[str, Any], results: dict[str, Any], still_open: dict[str, str]) -> dict[str, Any]:
    """Make the JSON document of a run.

    facts: fields about the whole run. The fields `card` and `commit` are also copied into every row.
    results: the result of each stage, or None for a stage without a result.
    still_open: the stages that did not finish, each with the reason.
    """
    done = {name: result for name, result in results.items() if result is not None}
    own = {"card": facts["card"], "commit": facts["commit"]}

    def stages(prefix: str) -> list[dict[str, Any]]:
        return [result for name, result in done.items() if name.startswith(prefix)]

    return {
        **facts,
        "rows": [row | own for result in stages("bench-") for row in result["rows"]],
        "off_speed": [row | own for result in stages("off-speed") for row in result["rows"]],
        "ops": stages("ops-"),
        "sanitizer": stages("sanitizer-"),
        "oracle": done.get("oracle", {}).get("cases", []),
        "off": done.get("off", {}).get("cases", []),
        "stages": {name: result["stage_seconds"] for name, result in done.items()},
        "stopped": [f"{name}: {text}" for name, result in done.items() for text in result.get("problems", [])],
        "open": still_open,
    }


def problems(document: dict[str, Any]) -> list[str]:
    """Return one line per failed check. Stages that did not run are in the document's field `open` instead."""
    found = list(document["stopped"])
    for result in document["ops"]:
        if result["failures"] or result["passed"] != result["total"] or result["exit_code"]:
            found.append(f"{result['op']}: {result['passed']}/{result['total']} passed; {result['failures'][:1]}")
        if result["op"].endswith("KV_BLOCKS") and result["unsupported"]:
            found.append(f"{result['op']}: {result['unsupported']} cases not supported")
    for result in document["sanitizer"]:
        if result["errors"] or result["failures"]:
            found.append(f"compute-sanitizer {result['tool']}: {result['errors']} errors, {result['failures'][:1]}")
    for part in ("oracle", "off"):
        found += [f"{part}: {row['case']}: {text}" for row in document[part] for text in row["problems"]]
    for row in document["off_speed"]:
        for key in ("prefill_ratio", "decode_ratio"):
            if row["recipe"] == "off" and _timed(document) and not OFF_RATIO[0] <= row[key] <= OFF_RATIO[1]:
                found.append(f"SWAA off, {row['prompt_tokens']} tokens: {key} {row[key]:.3f} is outside {OFF_RATIO}")
    for row in document["rows"]:
        least = target(document, row)
        if least and row["ratio"] < least:
            found.append(f"{row['recipe']}: ratio {row['ratio']:.2f} of the whole request, expected at least {least}")
    return found


def target(document: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Return the published ratio that a row must reach, or None for other workloads and recipes."""
    workload = (row["shape"], row["prompt_tokens"], row["decode_tokens"], row["kv"], row["ubatch"])
    if not _timed(document) or workload != ("qwen3-4b", 131072, 512, "f16", 512):
        return None
    return PUBLISHED.get(row["recipe"])


def _timed(document: dict[str, Any]) -> bool:
    return document["backend"] == "cuda" and document["size"] == "full"


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write the JSON and the table into `folder`, in files named after the GPU. Return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", (document["card"] or document["backend"]).split(",")[0].lower()).strip("-")
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    for path, text in zip(
        paths, (json.dumps(document, indent=1) + "\n", "\n".join(table(document)) + "\n"), strict=True
    ):
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    return paths


def table(document: dict[str, Any]) -> Iterator[str]:
    """The report as lines of Markdown."""
    commit = (document["commit"] or "unknown")[:12] + (" with uncommitted changes" if document["uncommitted"] else "")
    yield f"# GPU check: {document['card'] or document['backend']}"
    yield ""
    yield f"Commit {commit}, {document['made']}, backend {document['backend']}, size {document['size']}."
    if document["built_for"]:
        yield f"Built on another machine for compute capability {document['built_for']} and any processor with AVX2."
    if document["left_out"]:
        yield f"Left out of the build: {document['left_out']}."
    found = problems(document)
    yield ""
    yield "**All checks passed.**" if not found else "**Failed:**"
    yield from (f"- {line}" for line in found)
    if document["open"]:
        yield ""
        yield "Not finished:"
        yield from (f"- {name}: {why.splitlines()[0]}" for name, why in document["open"].items())
    yield from _correctness(document)
    yield from _speed("SWAA off against the unpatched library", document, document["off_speed"])
    shapes = dict.fromkeys((row["shape"], row["kv"], row["ubatch"]) for row in document["rows"])
    for shape, kv, ubatch in shapes:
        rows = [row for row in document["rows"] if (row["shape"], row["kv"], row["ubatch"]) == (shape, kv, ubatch)]
        yield from _speed(f"{shape}, Q8_0, {kv} K and V, ubatch {ubatch}", document, rows)
    if document["rows"]:
        yield ""
        yield "Ratios: time of full attention on the unpatched library divided by the recipe's; above 1 is faster."
        yield "Bound: the prefill speed-up over `off` if a sliding layer cost no more than the keys that it sees."


def _correctness(document: dict[str, Any]) -> Iterator[str]:
    yield from ("", "| correctness | passed | of | not supported |", "|---|---:|---:|---:|")
    for result in [*document["ops"], *document["sanitizer"]]:
        name = f"{result['op']}, {result['tool']}: {result['errors']} errors" if "tool" in result else result["op"]
        name += ", truncated by the time limit" if result["truncated"] else ""
        yield f"| {name} | {result['passed']} | {result['total']} | {result['unsupported']} |"
    for part, name in (("oracle", "end to end against the oracle"), ("off", "SWAA off: the unpatched library's bits")):
        passed = sum(not row["problems"] for row in document[part])
        yield f"| {name} | {passed} | {len(document[part])} | |"


def _speed(title: str, document: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield from ("", f"### {title}", "")
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---:|---|" + "---:|" * (len(_COLUMNS) - 2)
    for row in rows:
        values = row | {"published": target(document, row)}
        cells = ("" if values[key] is None else format(values[key], form) for key, form in _COLUMNS.values())
        yield f"| {' | '.join(cells)} |"


#: Title, field of a row, and format.
_COLUMNS = {
    "prompt": ("prompt_tokens", ","),
    "recipe": ("recipe", ""),
    "request s": ("seconds", ".3f"),
    "request": ("ratio", ".2f"),
    "published": ("published", ".2f"),
    "prefill s": ("prefill_seconds", ".3f"),
    "prefill": ("prefill_ratio", ".2f"),
    "bound": ("bound", ".2f"),
    "of bound": ("ratio_to_bound", ".0%"),
    "decode s": ("decode_seconds", ".3f"),
    "decode": ("decode_ratio", ".2f"),
}
