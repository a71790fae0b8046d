"""`swaa-edge recommend`: picks a configuration from what `swaa-edge eval` measured.

swaa-edge recommend eval.json --target-speedup 2 -o settings.json
"""

from __future__ import annotations

import json

import click

from swaa_edge.support.atomic import atomic_output


@click.command()
@click.argument("measured", metavar="EVAL.json")
@click.option("--target-speedup", type=click.FloatRange(0, min_open=True), metavar="X", help="At least so fast.")
@click.option("--min-accuracy", type=click.FloatRange(0, 1), metavar="Y", help="At least this accuracy, 0 to 1.")
@click.option("-o", "--output", metavar="CONFIG.json", help="Write the settings, for --config of every command.")
@click.option("--force", is_flag=True, help="Replace CONFIG.json if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: the choice, why, and the front.")
def recommend(
    measured: str,
    target_speedup: float | None,
    min_accuracy: float | None,
    output: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Pick a configuration from what eval measured.

    EVAL.json is what `swaa-edge eval --json` wrote. With --target-speedup it is the most accurate configuration
    whose prefill is at least X times as fast as full attention's, with --min-accuracy the fastest that is accurate
    enough, with both the most accurate that meets both.

    \b
    swaa-edge recommend eval.json --target-speedup 2 -o settings.json
    swaa-edge recommend eval.json --min-accuracy 0.9
    """
    if target_speedup is None and min_accuracy is None:
        raise click.UsageError("say what you aim at: --target-speedup X, --min-accuracy Y or both")

    from swaa_edge.calibrate import recommend as tool
    from swaa_edge.errors import ConfigError

    choice = tool.recommend(tool.read_table(measured), target_speedup=target_speedup, min_accuracy=min_accuracy)
    chosen = choice.chosen
    if output is not None:
        if chosen.config is None:
            raise ConfigError(f"nothing to write: the choice is {choice.why}, and full attention has no settings")
        with atomic_output(output, force=force) as file:
            file.write_text(json.dumps(chosen.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        settings = chosen.config.to_dict() if chosen.config else None
        front = [{"config": row.name, "accuracy": row.accuracy, "prefill_ratio": row.speedup} for row in choice.front]
        document = {"config": chosen.name, "swaa": settings, "accuracy": chosen.accuracy}
        document |= {"interval": list(chosen.interval), "prefill_ratio": chosen.speedup, "why": choice.why}
        click.echo(json.dumps(document | {"front": front}, indent=2))
        return
    click.echo(choice.why)
    if output is not None:
        click.echo(f"wrote {output}")
