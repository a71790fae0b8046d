"""`swaa-edge bench`: compare the speed of full attention and SWAA configurations.

swaa-edge bench model.gguf --prompt-tokens 4096,16384 --configs quality,balanced
"""

from __future__ import annotations

import contextlib
import json
from functools import partial
from typing import Any

import click

from swaa_edge.cli.options.engine import engine_options
from swaa_edge.cli.options.numbers import Numbers
from swaa_edge.cli.options.output import force_option, json_option, print_result, progress_option, raise_stopped
from swaa_edge.cli.options.swaa import Chosen, raw_swaa_options
from swaa_edge.config import RECIPES
from swaa_edge.engine.settings import EngineSettings
from swaa_edge.shapes import SHAPES, TYPES, temporary_shape
from swaa_edge.support.atomic import atomic_outputs
from swaa_edge.support.progress import progress_bar

# The model of --attention if no model is given. A few layers are enough to compare attention.
_SHAPE, _LAYERS, _QUICK_LAYERS = "qwen3-0.6b", 4, 2


@click.command()
@click.argument("model", metavar="[MODEL.gguf]", required=False)
@click.option(
    "--prompt-tokens",
    type=Numbers(int, 1, 2**31 - 1, "4096,8192"),
    metavar="N,N,...",
    help="Prompt lengths in tokens, up to the context length.  [default: 4096,8192; --attention: 2048,8192,32768; "
    "--quick: 8192]",
)
@click.option(
    "--configs",
    metavar="NAME,...",
    help=f"Configurations to compare: full (always included), naive, {', '.join(RECIPES)}, file, FILE.json.  "
    "[default: file if the model has SWAA keys, else naive,quality,balanced,fast; --attention: none]",
)
@click.option("--baseline", metavar="DIR", help="Also compare with the unpatched libllama in this folder.")
@click.option(
    "--attention",
    is_flag=True,
    help="Compare swaa-edge's CPU attention with llama.cpp's (with and without flash attention), in f16 and q8_0.",
)
@click.option("--quick", is_flag=True, help="With --attention: a shorter run, of at most about 5 minutes on two cores.")
@click.option(
    "--decode", type=click.IntRange(0), metavar="N", help="Tokens to decode per prompt.  [default: 32; --attention: 64]"
)
@click.option(
    "--repeat",
    type=click.IntRange(1),
    metavar="N",
    help="Number of rounds per prompt length.  [default: 3, or 2 above 8192 tokens; --attention: 3; --quick: 5]",
)
@json_option
@click.option("--plot", "plot_file", metavar="FILE.png", help="Plot speed and speed-up against prompt length.")
@force_option
@click.option(
    "--shape",
    metavar="NAME",
    help=f"Measure a model of this shape with random weights: {', '.join(SHAPES)}.  "
    "[default with --attention: the first]",
)
@click.option("--layers", type=click.IntRange(1), metavar="N", help="With --shape: number of layers.")
@click.option(
    "--type", "ftype", metavar="TYPE", help=f"With --shape: weight type ({', '.join(TYPES)}).  [default: {TYPES[0]}]"
)
@click.option("--vocab", type=click.IntRange(1), metavar="N", help="With --shape: size of the vocabulary.")
@progress_option
@partial(engine_options, lora=False)
@raw_swaa_options
def bench(
    model: str | None,
    prompt_tokens: tuple[int, ...] | None,
    configs: str | None,
    attention: bool,
    quick: bool,
    json_file: str | None,
    plot_file: str | None,
    force: bool,
    progress: bool | None,
    engine: EngineSettings,
    chosen: Chosen,
    shape: str | None,
    **options: Any,
) -> None:
    """Compare the speed of full attention and SWAA configurations.

    In one run, the configurations take turns in every round, and the table shows the medians of all rounds. A ratio
    above 1 means faster than full attention. The bound is the prefill speed-up to expect if a sliding layer spent
    attention time only on the keys that it sees. After Ctrl-C, the results so far are printed.

    \b
    swaa-edge bench model.gguf --prompt-tokens 4096,16384 --configs quality,balanced
    swaa-edge bench --shape qwen3-0.6b --layers 4 --window 2048 --sinks 64 --plot bench.png
    swaa-edge bench --attention --quick --baseline build/baseline/lib
    """
    from swaa_edge.bench import bench as compare
    from swaa_edge.bench import bench_attention, plot
    from swaa_edge.engine.configurations import configurations
    from swaa_edge.support.figure import check_plot, picture_type

    _check_attention(attention, quick, plot_file)
    if attention and model is None:
        shape, options["layers"] = shape or _SHAPE, options["layers"] or (_QUICK_LAYERS if quick else _LAYERS)
    sizes = {name: value for name in ("layers", "ftype", "vocab") if (value := options.pop(name)) is not None}
    _check_shape(model, shape, sizes)
    if plot_file is not None:
        check_plot()
    kind = None if plot_file is None else picture_type(plot_file)
    with progress_bar(progress) as shown, contextlib.ExitStack() as stack:
        # Check both output files before measuring, which takes minutes.
        files = stack.enter_context(atomic_outputs((json_file, plot_file), force=force, others=(model,)))
        path = model or stack.enter_context(temporary_shape(shape, **sizes))
        sides = None
        if not attention or configs is not None or chosen != Chosen():
            sides = configurations(path, configs, base=chosen.base, changes=chosen.changes)
        run = partial(bench_attention, quick=quick) if attention else compare
        report = run(path, sides, prompt_tokens, engine=engine, on_progress=shown, **options)
        document = report.to_dict()
        if not document["rows"]:
            raise KeyboardInterrupt
        if json_file in files:
            files[json_file].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if plot_file is not None:
            plot(document, files[plot_file], kind)
    # Print last. If the pipe on stdout is closed, the files are already complete.
    print_result(report, as_json=json_file == "-")
    raise_stopped(report.stopped)


def _check_attention(attention: bool, quick: bool, plot_file: str | None) -> None:
    if quick and not attention:
        raise click.UsageError("--quick works only with --attention")
    if attention and plot_file is not None:
        raise click.UsageError("--attention draws no plot; use --json FILE instead of --plot")


def _check_shape(model: str | None, shape: str | None, sizes: dict[str, Any]) -> None:
    if (model is None) == (shape is None):
        raise click.UsageError("give either MODEL.gguf or --shape NAME")
    if sizes and shape is None:
        raise click.UsageError("--layers, --type and --vocab work only with --shape; remove them for a model file")
