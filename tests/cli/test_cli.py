"""The command group: help without heavy imports, one-line errors, exit codes; and the shared SWAA options."""

import importlib
import json
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import swaa_edge
from support.fakes.gguf_bytes import model
from swaa_edge import SwaaConfig
from swaa_edge.cli import COMMANDS, cli
from swaa_edge.cli.options.swaa import swaa_options, swaa_options_or_full
from swaa_edge.errors import ConfigError, GenerationError

HELP = """\
Commands:
  convert    Convert a Hugging Face model directory to GGUF, with SWAA keys.
  annotate   Write SWAA keys into an existing GGUF, or remove them.
  inspect    Show a model, its SWAA settings, layers and KV memory.
  run        Complete one prompt, or answer one question about it, streamed to
             stdout.
  chat       Chat with a model.
  serve      Serve a model over OpenAI's API.
  bench      Compare the speed of full attention and SWAA configurations.
  eval       Compare the accuracy of configurations on long prompts.
  calibrate  Find the layers that should keep full attention.
  recommend  Pick a configuration from the results of eval.
  distill    Collect the model's own correct responses as training data.
  finetune   Train a LoRA adapter under the SWAA mask.
  demo       Show what SWAA costs and gains, in a minute, on a small model.
"""


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="swaa-edge")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0 and result.stdout.endswith(HELP)
    assert run("-h").stdout == result.stdout


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'llama_cpp', 'gguf', 'numpy', 'swaa_edge.llama', 'swaa_edge.cli.run'}"
    code = f"""
import sys
from swaa_edge.cli import cli
for args in (["--help"], ["--version"], ["annotate", "--help"], ["inspect", "--help"]):
    cli(args, standalone_mode=False)
print("LOADED", sorted({heavy} & set(sys.modules)), file=sys.stderr)
"""
    assert python(code).stderr == "LOADED []\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    result = run(name, "--help")
    assert result.exit_code == 0, result.output
    assert f"swaa-edge {name}" in result.stdout.split("Options:")[0].split("\n", 1)[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_points_at_a_command_of_that_name(name):
    module, attribute = COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command) and command.name == name


def test_version_is_that_of_the_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+", swaa_edge.__version__)
    assert run("--version").stdout == f"swaa-edge, version {swaa_edge.__version__}\n"


def test_the_package_exports_few_names():
    assert swaa_edge.__all__ == ["SwaaConfig", "SwaaError", "SwaaLlama", "__version__"]
    with pytest.raises(AttributeError, match="no attribute 'Llama'"):
        swaa_edge.Llama  # noqa: B018


def test_the_converter_is_a_subpackage():
    module = importlib.import_module("swaa_edge.convert.annotate")
    assert module.__name__ == "swaa_edge.convert.annotate"


@pytest.mark.parametrize(
    "args, message",
    [
        (["annotat"], "Error: No such command 'annotat'"),
        (["--nothing"], "Error: No such option '--nothing'"),
        (["inspect"], "Error: Missing argument 'MODEL.gguf'; see swaa-edge inspect --help"),
        (["inspect", "a", "--wide"], "Error: No such option '--wide'"),
        (["annotate", "a", "-o", "b", "--window", "wide"], "Error: Invalid value for '--window': 'wide'"),
        (["annotate", "a", "--recipe", "fast"], "Error: give either -o OUT.gguf or --in-place"),
        (["annotate", "a", "-o", "b", "--in-place", "--strip"], "Error: give either -o OUT.gguf or --in-place"),
        (["annotate", "a", "-o", "b"], "Error: no settings given; use --recipe NAME"),
        (["annotate", "a", "-o", "b", "--strip", "--recipe", "fast"], "Error: --strip removes the keys"),
        (["annotate", "a", "-o", "b", "--sinks", "4"], "Error: SWAA settings need a window; add --window N"),
        (["annotate", "a", "-o", "b", "--recipe", "fast", "--config", "c"], "Error: --recipe and --config"),
        (["convert", "a", "-o", "b", "--adapter-only"], "Error: --adapter-only converts the adapter given with --lora"),
        (
            ["convert", "a", "-o", "b", "--lora", "c", "--adapter-only", "--quantize", "Q8_0"],
            "Error: --quantize does not apply to --adapter-only",
        ),
        (
            ["convert", "a", "-o", "b", "--lora", "c", "--adapter-only", "--pre", "gpt-2"],
            "Error: --pre does not apply to --adapter-only",
        ),
        (["bench", "a", "--quick"], "Error: --quick works only with --attention; see swaa-edge bench --help"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(args, message):
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.stderr
    assert "see swaa-edge" in result.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["inspect", "none.gguf"], "Error: none.gguf does not exist; give the path of a .gguf file\n"),
        (["annotate", "a", "-o", "b", "--recipe", "qualty"], "Error: unknown recipe 'qualty'; did you mean quality?\n"),
        (["annotate", "a", "-o", "b", "--window", "0"], "Error: window_size = 0 is out of range: 1 to 2147483647\n"),
        (
            ["annotate", "a", "-o", "b", "--window", "8", "--fa-layers", "x"],
            'Error: fa_layers = \'x\' is not a list of layers, slice text such as "1::2" or ":1/4", "none" or "all"\n',
        ),
        (
            ["annotate", "a", "-o", "b", "--config", "none.json"],
            "Error: cannot read the settings file none.json: No such file or directory\n",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_and_exit_code_1(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)
    assert list(tmp_path.iterdir()) == []


def test_annotate_from_end_to_end(tmp_path):
    source, out, back = (tmp_path / name for name in ("model.gguf", "out.gguf", "back.gguf"))
    source.write_bytes(model())
    done = run("annotate", source, "-o", out, "--window", 512, "--sinks", 8, "--fa-layers", "1,3", "--fa-decode")
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"wrote {out}\n", "")
    assert SwaaConfig.from_gguf(out) == SwaaConfig(512, 8, [1, 3], True)
    again = run("annotate", source, "-o", out, "--recipe", "fast")
    assert again.exit_code == 1 and "pass --force" in again.stderr
    assert run("annotate", source, "-o", out, "--recipe", "fast", "--force").exit_code == 0
    assert SwaaConfig.from_gguf(out).recipe == "fast"
    assert run("annotate", out, "-o", back, "--strip").exit_code == 0
    assert back.read_bytes() == model()
    assert run("annotate", out, "--in-place", "--strip").stdout == f"wrote {out}\n"
    assert out.read_bytes() == model()


def raising(error):
    @click.command()
    def fails():
        raise error

    return fails


@pytest.mark.parametrize(
    "error, code, stderr",
    [
        (ConfigError("a = 1 is wrong; 2 would be right"), 1, "Error: a = 1 is wrong; 2 would be right\n"),
        (GenerationError("two\nlines"), 1, "Error: two lines\n"),
        (KeyboardInterrupt(), 130, "Interrupted\n"),
        (click.Abort(), 130, "Interrupted\n"),
        (OSError(5, "Input/output error", "disk"), 1, "Error: disk: Input/output error\n"),
        (OSError("no number"), 1, "Error: no number\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_errors_and_interrupts_of_a_command(error, code, stderr, monkeypatch):
    monkeypatch.setattr(type(cli), "get_command", lambda *_: raising(error))
    result = run("run")
    assert (result.exit_code, result.stderr.lstrip("\n")) == (code, stderr)


def test_a_bug_is_not_reported_as_a_user_error(monkeypatch):
    monkeypatch.setattr(type(cli), "get_command", lambda *_: raising(ZeroDivisionError()))
    assert isinstance(run("run").exception, ZeroDivisionError)


def test_a_closed_pipe_is_not_an_error():
    # print buffers its text; flushed only at exit, a closed pipe would be a traceback.
    code = """
import click
from swaa_edge.cli import cli
type(cli).get_command = lambda *_: click.Command("run", callback=lambda: print("text"))
cli(["run"])
"""
    command = f"unset PYTHONUNBUFFERED; {sys.executable} -c '{code}' | true"
    piped = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (piped.stdout, piped.stderr) == ("", "")


@click.command()
@swaa_options_or_full
@click.argument("rest", nargs=-1)
def probe(swaa, rest):
    click.echo(json.dumps([swaa if not swaa else {**swaa.to_dict()}, list(rest)]))


def chosen(*args):
    result = CliRunner().invoke(probe, args, standalone_mode=False)
    if result.exception:
        raise result.exception
    return json.loads(result.stdout)[0]


def test_options_choose_a_configuration(tmp_path):
    quality = {"window_size": 2048, "sink_count": 100, "fa_layers": "1::2", "fa_decode": True, "tail_count": 128}
    quality |= {"recipe": "quality", "adapter": None}
    assert chosen() is None
    assert chosen("--full-attention") is False
    assert chosen("--recipe", "quality", "prompt") == quality
    changed = quality | {"sink_count": 4, "fa_decode": False, "recipe": "custom"}
    assert chosen("--recipe", "quality", "--sinks", "4", "--no-fa-decode") == changed
    assert chosen("--recipe", "quality", "--tail", "0") == quality | {"tail_count": 0, "recipe": "custom"}
    assert chosen("--window", "8") == SwaaConfig(8).to_dict()
    assert chosen("--window", "8", "--fa-decode", "--fa-layers", "0,2")["fa_layers"] == [0, 2]
    file = tmp_path / "paper.json"
    file.write_text(json.dumps({"sliding_window_size": 2000, "keep_first": 10, "force_fa_decode": True}))
    assert chosen("--config", str(file)) == SwaaConfig(2000, 10, "none", True).to_dict()
    assert chosen("--config", str(file), "--window", "9") == SwaaConfig(9, 10, "none", True).to_dict()


def test_options_that_exclude_each_other():
    for args in (["--recipe", "fast", "--config", "x.json"], ["--full-attention", "--window", "8"], ["--sinks", "8"]):
        with pytest.raises(click.UsageError):
            chosen(*args)


def test_without_the_full_attention_option():
    plain = click.command()(swaa_options(lambda swaa: click.echo(repr(swaa))))
    assert CliRunner().invoke(plain, []).stdout == "None\n"
    assert CliRunner().invoke(plain, ["--full-attention"]).exit_code == 2
