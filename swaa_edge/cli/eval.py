"""`swaa-edge eval`: compare long-context accuracy and speed of configurations.

swaa-edge eval model.gguf --task needle,kv --prompt-tokens 4096 --configs full,naive,quality
"""

from __future__ import annotations

from typing import Any

import click

from swaa_edge.cli.options.engine import engine_options
from swaa_edge.cli.options.eval import Grouped, check_options, eval_options
from swaa_edge.cli.options.output import print_result, raise_stopped, run_shown
from swaa_edge.cli.options.swaa import Chosen, raw_swaa_options
from swaa_edge.engine.settings import EngineSettings


@click.command("eval", cls=Grouped)
@click.argument("model", metavar="MODEL.gguf")
@eval_options
@engine_options
@raw_swaa_options
def evaluate(
    model: str,
    configs: str | None,
    no_chat: bool,
    progress: bool | None,
    engine: EngineSettings,
    chosen: Chosen,
    **options: Any,
) -> None:
    """Compare long-context accuracy and speed of full attention and SWAA configurations.

    Every configuration answers the same questions. Built-in tasks hide facts in prose, and their prompts have
    exactly --prompt-tokens tokens. After Ctrl-C, the same command resumes the run. If the copies of the model
    together take at most 1 GiB of memory, the configurations take turns; otherwise, they run one after another. By
    default, an adapter (--lora) that was trained under a recipe is compared with full attention without the adapter.

    \b
    swaa-edge eval model.gguf --task needle,kv --prompt-tokens 4096,8192 --json eval.json --plot eval.png
    swaa-edge eval model.gguf --configs full,naive,quality,fast --window 128 --sinks 8 --prompt-tokens 2000
    swaa-edge eval model.gguf --task questions.jsonl --judge http://localhost:8000/v1 --judge-model NAME
    """
    from swaa_edge.evaluate import compare

    check_options(**options)
    settings = {"base": chosen.base, "changes": chosen.changes, "chat": not no_chat}
    comparison = run_shown(compare, model, configs, progress=progress, engine=engine, **settings, **options)
    progress = comparison.to_dict()["progress"]
    if comparison.stopped is None or progress["answers"] or progress["windows"]:
        print_result(comparison, as_json=options["json_file"] == "-")
    raise_stopped(comparison.stopped)
