#!/usr/bin/env python3
"""Show which answers a real model loses with a bare window, and which answers sinks, FA decode and a tail restore.

    scripts/real/demo.py    # after scripts/real/fetch.py; some seconds

The prompt is story.txt with 420 tokens, and the window has 256 tokens. First, the model answers a question about the
beginning of the story. Then the prompt ends with the first words of an early line, and the model continues the line.
Sampling is greedy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "scripts")]  # where swaa_edge and this package lie

from real.fetch import real_model
from swaa_edge.config import FULL_ATTENTION, Configuration, SwaaConfig
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.errors import SwaaError

STORY = (Path(__file__).parent / "story.txt").read_text(encoding="utf-8")
QUESTION = "Who built the lighthouse?"
REPEATED = "He carried the lens up the cliff himself, wrapped in"
FAST = SwaaConfig(window_size=256, sink_count=16, fa_decode=True)
CONFIGURATIONS: dict[str, Configuration] = {
    "full attention": FULL_ATTENTION,
    "window": SwaaConfig(FAST.window_size),
    "window, sinks, FA decode": FAST,
    "window, sinks, FA decode, tail 32": dataclasses.replace(FAST, tail_count=32),
}


def texts(model: Path, swaa: Configuration, threads: int | None = None) -> tuple[str, str]:
    """Return the answer to `QUESTION` and the continuation of `REPEATED`."""
    with contextlib.closing(EngineSettings(n_threads=threads, n_gpu_layers=0).load(model, swaa=swaa, n_ctx=512)) as llm:
        message = {"role": "user", "content": f"{STORY}\n{QUESTION}"}
        answer = llm.create_chat_completion([message], max_tokens=24, temperature=0.0)
        copied = llm.create_completion(f"{STORY}\n{REPEATED}", max_tokens=16, temperature=0.0)
        return answer["choices"][0]["message"]["content"], copied["choices"][0]["text"]


def report(threads: int | None = None) -> Iterator[str]:
    yield f"question: {QUESTION}\nrepeated: {REPEATED}"
    for name, swaa in CONFIGURATIONS.items():
        answer, copied = (" ".join(text.split()) for text in texts(real_model().q8_0, swaa, threads))
        yield f"\n{name}\n  answer:    {answer}\n  continued: {copied}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), metavar="N", help="CPU threads (default: all cores)"
    )
    try:
        for part in report(parser.parse_args(arguments).threads):
            print(part, flush=True)
    except SwaaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
