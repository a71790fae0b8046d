"""inspect: exact text and JSON for small files, figures worked out by hand, and what SWAA can't be applied to."""

import json

import pytest
from click.testing import CliRunner

from support.fakes.gguf_bytes import kv, model, shard, swaa_keys
from swaa_edge import SwaaConfig
from swaa_edge.cli import cli
from swaa_edge.cli.inspect import draw
from swaa_edge.convert.annotate import annotate
from swaa_edge.describe import describe
from swaa_edge.files.model import read_model

HEADS = [kv("llama.attention.key_length", "u32", 32), kv("llama.attention.value_length", "u32", 32)]
MIXED = """\
model         tiny
architecture  llama
parameters    45 (45)
quantization  F32; tensors: 2 F32
size          1.0 KiB
layers        4
heads         8, KV heads 2, head size 32
context       4,096 tokens
vocabulary    3 tokens

SWAA          on, keys of version 1, recipe quality
  window      2,048 tokens
  sinks       64 tokens
  tail        9 tokens
  sliding     2 of 4 layers

layers        # full attention (FA)  + sliding, decodes with FA  . sliding
  0-3         +#.#

KV memory                                                       8k                 32k                128k
                                                     f16      q8_0       f16      q8_0       f16      q8_0
  full attention (FA): 2 layers                  4.0 MiB   2.1 MiB  16.0 MiB   8.5 MiB  64.0 MiB  34.0 MiB
  sliding, decodes with FA: 1 layer              2.0 MiB   1.1 MiB   8.0 MiB   4.2 MiB  32.0 MiB  17.0 MiB
  sliding: 1 layer                               704 KiB   374 KiB   704 KiB   374 KiB   704 KiB   374 KiB
  total                                          6.7 MiB   3.6 MiB  24.7 MiB  13.1 MiB  96.7 MiB  51.4 MiB
  total with --swa-full                          8.0 MiB   4.2 MiB  32.0 MiB  17.0 MiB   128 MiB  68.0 MiB
  sliding layers keep a ring of 2,816 tokens (window, sinks and a ubatch of 512)
"""


def test_the_text(write):
    path = write(model(extra=[*HEADS, *swaa_keys(tail_count=kv("swaa.tail_count", "u32", 9))]))
    result = CliRunner().invoke(cli, ["inspect", str(path)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == MIXED


def test_a_type_that_does_not_fit_the_heads_has_no_size(write):
    path = write(model())
    text = CliRunner().invoke(cli, ["inspect", str(path)]).stdout
    assert "  total                                          2.0 MiB         -   8.0 MiB         -  32.0 MiB" in text
    assert json.loads(CliRunner().invoke(cli, ["inspect", str(path), "--json"]).stdout)["kv_memory"][0]["q8_0"] is None


def test_a_file_without_keys_is_full_attention(write):
    text = CliRunner().invoke(cli, ["inspect", str(write(model()))]).stdout
    assert "SWAA          off (full attention): the file has no SWAA keys" in text
    assert "0-3         ####" in text and "ring" not in text and "sliding:" not in text


def test_the_json_is_one_document_with_the_same_facts(write):
    path = write(model(extra=[*HEADS, *swaa_keys()]))
    result = CliRunner().invoke(cli, ["inspect", str(path), "--json"])
    report = json.loads(result.stdout)
    assert (report["file"], report["files"], report["size"]) == (str(path), 1, path.stat().st_size)
    assert report["model"] == {
        "name": "tiny",
        "architecture": "llama",
        "parameters": 45,
        "file_type": "F32",
        "tensor_types": {"F32": 2},
        "layers": 4,
        "heads": 8,
        "kv_heads": 2,
        "key_length": 32,
        "value_length": 32,
        "context_length": 4096,
        "vocabulary": 3,
        "swaa_refusal": None,
    }
    assert report["swaa"] == {
        "version": 1,
        "window_size": 2048,
        "sink_count": 64,
        "fa_layers": [1, 3],
        "fa_decode": [0],
        "tail_count": 0,
        "recipe": "quality",
        "adapter": None,
    }
    assert report["layers"] == ["sliding_fa_decode", "fa", "sliding", "fa"]
    # One layer of 2 KV heads of 32: 128 numbers a token; f16 is 256 bytes, q8_0 136.
    at_8k, _, at_128k = report["kv_memory"]
    assert at_8k["ring_cells"] == 2816  # 2048 + 64 + 512 in blocks of 256
    assert at_8k["f16"] == {
        "fa": 2 * 256 * 8192,
        "sliding_fa_decode": 256 * 8192,
        "sliding": 256 * 2816,
        "total": 3 * 256 * 8192 + 256 * 2816,
        "total_swa_full": 4 * 256 * 8192,
    }
    assert at_128k["q8_0"]["fa"] == 2 * 136 * 131072 and at_128k["context"] == 131072
    assert SwaaConfig.from_dict({key: report["swaa"][key] for key in report["swaa"] if key != "version"}) == (
        SwaaConfig.from_gguf(path)
    )


@pytest.mark.parametrize(
    "layers, rows",
    [
        (28, ["0-27        +#+#+#+#+# +#+#+#+#+# +#+#+#+#"]),
        (36, ["0-35        +#+#+#+#+# +#+#+#+#+# +#+#+#+#+# +#+#+#"]),
        (80, ["0-39        " + " ".join(["+#+#+#+#+#"] * 4), "40-79       " + " ".join(["+#+#+#+#+#"] * 4)]),
    ],
)
def test_the_map_at_usual_sizes(write, tmp_path, layers, rows):
    annotate(write(model(layers)), tmp_path / "out.gguf", SwaaConfig.from_recipe("quality"))
    text = draw(describe(read_model(tmp_path / "out.gguf")))
    drawn = text.split("\n\n")[2].splitlines()
    assert [line.strip() for line in drawn[1:]] == rows
    assert max(map(len, text.splitlines())) <= 110


def test_a_split_model_is_summed_up(write, tmp_path):
    paths = [write(shard(number), f"m-{number + 1:05d}-of-00003.gguf") for number in range(3)]
    report = describe(read_model(paths[0]))
    assert (report["files"], report["size"]) == (3, sum(path.stat().st_size for path in paths))
    assert report["model"]["parameters"] == 27 and "in 3 files" in draw(report)
    result = CliRunner().invoke(cli, ["inspect", str(paths[2])])
    assert result.exit_code == 1 and "m-00001-of-00003.gguf" in result.stderr


@pytest.mark.parametrize(
    "content, part",
    [
        (b"not a model", "not a GGUF"),
        (model(extra=swaa_keys())[:-40], "truncated"),
        (model(extra=swaa_keys(version=kv("swaa.version", "u32", 9))), "swaa.version = 9"),
        (model(extra=[kv("swaa.recipe", "str", "quality")]), "swaa.version is missing"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_errors_are_one_line(write, content, part, options):
    result = CliRunner().invoke(cli, ["inspect", str(write(content)), *options])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ") and part in result.stderr and result.stderr.count("\n") == 1


def test_names_from_a_file_cannot_move_the_cursor(write):
    name = kv("general.name", "str", "tiny")
    path = write(model(tensors=[]).replace(name, kv("general.name", "str", "a\x1b[2J\nb")))
    assert "model         a?[2J?b\n" in CliRunner().invoke(cli, ["inspect", str(path)]).stdout


@pytest.mark.parametrize(("arch", "part"), [("gemma2", "sliding windows of its own"), ("mamba2", "recurrent")])
def test_an_architecture_that_swaa_cannot_be_applied_to(write, arch, part):
    path = write(model(arch=arch))
    message = read_model(path).refusal
    assert part in message
    result = CliRunner().invoke(cli, ["annotate", str(path), "--in-place", "--recipe", "fast"])
    assert result.exit_code == 1 and result.stderr == f"Error: {message}\n"
    text = CliRunner().invoke(cli, ["inspect", str(path)]).stdout
    assert part in text and "KV memory of plain K and V in every layer" in text
