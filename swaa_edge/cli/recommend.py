"""`swaa-edge recommend`: choose a configuration from the results of `swaa-edge eval`.

swaa-edge recommend eval.json --target-speedup 2 -o settings.json
"""

from __future__ import annotations

import click

from swaa_edge.cli.options.output import force_option, json_flag, print_result


@click.command()
@click.argument("measured", metavar="EVAL.json")
@click.option(
    "--target-speedup",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="Minimum prefill speed-up over full attention.",
)
@click.option("--min-accuracy", type=click.FloatRange(0, 1), metavar="Y", help="Minimum accuracy, from 0 to 1.")
@click.option("-o", "--output", metavar="CONFIG.json", help="Write the chosen settings to a file for --config.")
@force_option
@json_flag
def recommend(
    measured: str,
    target_speedup: float | None,
    min_accuracy: float | None,
    output: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Choose a configuration from the results of eval.

    EVAL.json is a document that `swaa-edge eval --json` wrote. --target-speedup X chooses the most accurate
    configuration with a speed-up of at least X. --min-accuracy Y chooses the fastest configuration with an accuracy of
    at least Y. If both options are given, the command chooses the most accurate configuration that meets both.

    \b
    swaa-edge recommend eval.json --target-speedup 2 -o settings.json
    swaa-edge recommend eval.json --min-accuracy 0.9
    """
    if target_speedup is None and min_accuracy is None:
        raise click.UsageError("give --target-speedup X, --min-accuracy Y or both")
    from swaa_edge.calibrate import recommend as choose

    choice = choose(measured, target_speedup=target_speedup, min_accuracy=min_accuracy, output=output, force=force)
    print_result(choice, as_json)
    if output is not None and not as_json:
        click.echo(f"wrote {output}")
