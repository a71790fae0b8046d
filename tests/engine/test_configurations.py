"""Names to configurations: the named ones, changes to them, defaults by the model file, and what is refused."""

import json

import pytest

from support.fakes.evaluate import write_model
from support.fakes.gguf_bytes import swaa_keys
from swaa_edge.config import FULL_ATTENTION, RECIPES, SwaaConfig
from swaa_edge.engine.configurations import DEFAULT, configurations, like
from swaa_edge.errors import ConfigError
from swaa_edge.files.model import read_model


@pytest.fixture
def plain(tmp_path):
    return write_model(tmp_path / "plain.gguf")


@pytest.fixture
def keyed(tmp_path):
    return write_model(tmp_path / "keyed.gguf", *swaa_keys())


def test_names(keyed, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"sliding_window_size": 50, "keep_first": 3}))
    found = configurations(keyed, f"naive, fast,,{mine},file,full")
    assert list(found) == ["full", "naive", "fast", "mine", "file"], "full attention is first, wherever it is named"
    assert found == {
        "full": FULL_ATTENTION,
        "naive": SwaaConfig(2048),
        "fast": RECIPES["fast"].config,
        "mine": SwaaConfig(50, 3),
        "file": SwaaConfig(2048, 64, [1, 3], [0]),
    }
    assert found["fast"].recipe == "fast"
    assert configurations(read_model(keyed), ["naive", "fast", str(mine), "file"]) == found


def test_changes_apply_to_each_and_to_naive_by_the_window_only(plain):
    changes = {"window_size": 60, "sink_count": 4, "fa_layers": "0::2"}
    found = configurations(plain, "naive,fast", changes=changes)
    assert found == {"full": False, "naive": SwaaConfig(60), "fast": SwaaConfig(60, 4, "0::2", True, 128)}
    assert found["fast"].recipe == "custom"


def test_a_mapping_holds_configurations_already(plain):
    assert configurations(plain, {"mine": SwaaConfig(5)}) == {"full": False, "mine": SwaaConfig(5)}


def test_without_names(plain, keyed):
    quality = RECIPES["quality"].config
    assert configurations(plain, base=quality) == {"full": False, "quality": quality}
    assert configurations(plain, base=quality, changes={"sink_count": 1}) == {
        "full": False,
        "custom": SwaaConfig(2048, 1, "1::2", True, 128),
    }
    assert configurations(plain, changes={"window_size": 9}) == {"full": False, "custom": SwaaConfig(9)}
    assert tuple(configurations(plain)) == DEFAULT
    assert configurations(keyed) == {"full": False, "file": SwaaConfig(2048, 64, [1, 3], [0])}


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"names": "fsat"}, "there is no configuration fsat (is it fast?); there are full, naive, quality, balanced, "),
        ({"names": "fast,fast"}, "--configs has fast twice; name each configuration once"),
        ({"names": "a/fast.json"}, "--configs: a/fast.json would be named fast, a built-in name; rename the file"),
        ({"names": "file"}, "--configs file: {plain} has no SWAA keys; name a recipe or a FILE.json"),
        (
            {"names": "fast", "base": SwaaConfig(5)},
            "--configs can't be combined with --recipe or --config; list recipes and",
        ),
        ({"changes": {"sink_count": 4}}, "SWAA settings need a window; add --window N, or start from --recipe NAME"),
        ({"changes": {"window_size": 0}}, "window_size = 0"),
        ({"names": "none.json"}, "cannot read the settings file none.json: No such file or directory"),
    ],
)
def test_mistakes(plain, arguments, error):
    with pytest.raises(ConfigError) as caught:
        configurations(plain, **arguments)
    assert str(caught.value).startswith(error.replace("{plain}", str(plain)))


def test_like():
    assert like("qualty", ["full", "quality"]) == " (is it quality?)" and like("zzz", ["full"]) == ""
