"""SwaaConfig: both spellings, layer lists, limits, and errors that name what is wrong."""

import json
import sys

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.strategies import configs
from swaa_edge import SwaaConfig, SwaaError
from swaa_edge.config import FULL_ATTENTION, RECIPES
from swaa_edge.errors import ConfigError

INT32_MAX = 2**31 - 1


def layers(flags):
    return [layer for layer, flag in enumerate(flags) if flag]


@pytest.mark.parametrize(
    "spec, fa",
    [
        ("1::2", [1, 3, 5]),
        ("::2", [0, 2, 4]),
        ("1::4", [1, 5]),
        (":3", [0, 1, 2]),
        ("-2:", [4, 5]),
        ("::-3", [2, 5]),
        ("4:1", []),
        ("9:", []),
        ("none", []),
        ("all", [0, 1, 2, 3, 4, 5]),
        ([], []),
        ([5, 0, 5], [0, 5]),
        ((2,), [2]),
        (range(1, 6, 2), [1, 3, 5]),
        (numpy.array([1, 4]), [1, 4]),
        ("1,3", [1, 3]),
        ("4", [4]),
        (" 1 : : 2 ", [1, 3, 5]),
        (":1/3", [0, 1]),
        (":1/4", [0, 1]),  # a layer and a half
        ("1/2:", [3, 4, 5]),
        ("-1/4:", [4, 5]),
        ("1/3:5/6:2", [2, 4]),
        (":7/6", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_fa_layers_are_those_that_do_not_slide(spec, fa):
    sliding = SwaaConfig(16, fa_layers=spec).sliding_layers(6)
    assert all(type(flag) is bool for flag in sliding)
    assert layers(sliding) == [layer for layer in range(6) if layer not in fa]


bounds = st.none() | st.integers(-50, 50)


@given(bounds, bounds, bounds.filter(lambda step: step != 0), st.integers(1, 40))
def test_slice_text_means_what_python_means_by_it(start, stop, step, n_layers):
    text = ":".join("" if part is None else str(part) for part in (start, stop, step))
    sliding = SwaaConfig(1, fa_layers=text).sliding_layers(n_layers)
    assert layers(not flag for flag in sliding) == sorted(range(n_layers)[start:stop:step])


@given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 200))
def test_a_fraction_of_the_layers_is_rounded_up(part, whole, n_layers):
    sliding = SwaaConfig(1, fa_layers=f":{part}/{whole}").sliding_layers(n_layers)
    count = min(-(-n_layers * part // whole), n_layers)
    assert layers(not flag for flag in sliding) == list(range(count))


@pytest.mark.parametrize(
    "fa_layers, fa_decode, decodes",
    [
        ("1::2", True, [0, 2]),
        ("1::2", False, []),
        ("1::2", [0], [0]),
        ("1::2", [0, 1], [0]),  # layer 1 has full attention anyway
        ("1::2", [], []),
        ("none", "2:", [2, 3]),
        ("all", True, []),
    ],
)
def test_fa_decode_holds_only_where_a_layer_slides(fa_layers, fa_decode, decodes):
    assert layers(SwaaConfig(16, 0, fa_layers, fa_decode).fa_decode_layers(4)) == decodes


@given(configs, st.integers(1, 40))
def test_settings_from_the_layers_select_the_same_layers(config, n_layers):
    try:
        sliding, fa_decode = config.sliding_layers(n_layers), config.fa_decode_layers(n_layers)
    except ConfigError:
        return  # it names a layer that such a model doesn't have
    labels = {"recipe": config.recipe, "adapter": config.adapter}
    found = SwaaConfig.from_layers(config.window_size, config.sink_count, sliding, fa_decode, **labels)
    assert (found.sliding_layers(n_layers), found.fa_decode_layers(n_layers)) == (sliding, fa_decode)
    assert (found.window_size, found.sink_count) == (config.window_size, config.sink_count)
    assert (found.recipe, found.adapter) == (config.recipe, config.adapter)


def test_settings_from_the_layers_are_spelled_by_index():
    found = SwaaConfig.from_layers(8, 2, [True, False, True], [True, True, False])
    assert (found.fa_layers, found.fa_decode, found.recipe, found.adapter) == ((1,), (0,), "custom", None)
    assert SwaaConfig.from_layers(8, 2, [True, False], [True, True]).fa_decode is True
    assert SwaaConfig.from_layers(8, 2, [False, False], [True, True]).fa_decode is False


def test_the_reach_is_window_and_sinks():
    assert SwaaConfig(window_size=9, sink_count=2).reach == 11
    assert FULL_ATTENTION is False


def test_equal_settings_are_equal_and_hashable():
    first = SwaaConfig(2048, 100, [3, 1], True, recipe="quality")
    assert first == SwaaConfig(window_size=2048, sink_count=100, fa_layers=(1, 3), fa_decode="all")
    assert len({first, SwaaConfig(2048, 100, "1,3", True), SwaaConfig(2048, 100, "1,3", False)}) == 2
    assert SwaaConfig(5, fa_layers=[]) == SwaaConfig(5, fa_layers="none")
    with pytest.raises(AttributeError):
        first.window_size = 1


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"window_size": 0}, ["window_size = 0", "1 to 2147483647"]),
        ({"window_size": -1}, ["window_size = -1"]),
        ({"window_size": INT32_MAX + 1}, ["window_size = 2147483648", "2147483647"]),
        ({"window_size": 10**5000}, ["window_size", "2147483647"]),
        ({"window_size": True}, ["window_size = True", "whole number"]),
        ({"window_size": 2048.0}, ["window_size = 2048.0", "whole number"]),
        ({"window_size": "2048"}, ["window_size = '2048'"]),
        ({"window_size": None}, ["window_size", "full attention"]),
        ({"sliding_window_size": None}, ["sliding_window_size is null", "full attention"]),
        ({}, ["window_size"]),
        ({"window_size": 8, "sink_count": -1}, ["sink_count = -1", "0 to 2147483647"]),
        ({"window_size": 8, "sink_count": INT32_MAX + 1}, ["sink_count = 2147483648"]),
        ({"window_size": 8, "sink_count": False}, ["sink_count = False"]),
        ({"window_size": 8, "fa_layers": [-1]}, ["fa_layers has -1", "-1:"]),
        ({"window_size": 8, "fa_layers": [True]}, ["fa_layers has True"]),
        ({"window_size": 8, "fa_layers": [1.5]}, ["fa_layers has 1.5"]),
        ({"window_size": 8, "fa_layers": 3}, ["fa_layers = 3", "1::2"]),
        ({"window_size": 8, "fa_layers": None}, ["fa_layers = None"]),
        ({"window_size": 8, "fa_layers": {"1": 2}}, ["fa_layers"]),
        ({"window_size": 8, "fa_layers": "1::0"}, ["fa_layers = '1::0'"]),
        ({"window_size": 8, "fa_layers": "odd"}, ["fa_layers = 'odd'", "none", "all"]),
        ({"window_size": 8, "fa_layers": "1:2:3:4"}, ["1:2:3:4"]),
        ({"window_size": 8, "fa_layers": "-1"}, ["fa_layers = '-1'"]),
        ({"window_size": 8, "fa_layers": ""}, ["fa_layers = ''"]),
        ({"window_size": 8, "fa_layers": "+:"}, ["'+:'"]),
        ({"window_size": 8, "fa_layers": "²:"}, ["fa_layers"]),
        ({"window_size": 8, "fa_decode": 1}, ["fa_decode = 1", "true, false"]),
        ({"window_size": 8, "fa_decode": "true"}, ["fa_decode = 'true'", "without quotes"]),
        ({"window_size": 8, "fa_decode": None}, ["fa_decode = None"]),
        ({"window_size": 8, "recipe": ""}, ["recipe = ''"]),
        ({"window_size": 8, "recipe": "two\nlines"}, ["recipe"]),
        ({"window_size": 8, "adapter": "x" * 256}, ["adapter", "255"]),
        ({"window_sise": 8}, ["'window_sise'", "did you mean window_size?"]),
        ({"window_size": 8, "keepfirst": 8}, ["'keepfirst'", "keep_first"]),
        ({"window_size": 8, "zzz": 8}, ["'zzz'", "sliding_window_size", "fa_decode"]),
        ({"window_size": 8, 5: 8}, ["5"]),
        ({"window_size": 8, "sliding_window_size": 9}, ["window_size = 8", "sliding_window_size = 9"]),
        ({"window_size": 8, "sliding_window_size": True}, ["contradicts"]),
        ({"window_size": 8, "fa_layers": "none", "non_sliding_layers": [1]}, ["fa_layers = 'none'", "[1]"]),
        ({"window_size": 8, "force_fa_decode": True, "fa_decode": False}, ["force_fa_decode", "fa_decode"]),
    ],
)
def test_wrong_settings_name_field_value_and_limit(settings, parts):
    with pytest.raises(ConfigError) as caught:
        SwaaConfig.from_dict(settings)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and len(message) < 300
    assert isinstance(caught.value, SwaaError) and isinstance(caught.value, ValueError)


def test_a_layer_that_the_model_lacks_is_named_with_the_layer_count():
    with pytest.raises(ConfigError, match=r"fa_layers has layer 6, but the model has 6 layers: 0 to 5"):
        SwaaConfig(8, fa_layers=[1, 6]).sliding_layers(6)
    with pytest.raises(ConfigError, match=r"fa_decode has layer 9, but the model has 6 layers"):
        SwaaConfig(8, fa_decode=[9]).fa_decode_layers(6)
    for wrong in (0, -1, 1.0, True, "6"):
        with pytest.raises(ConfigError, match="n_layers"):
            SwaaConfig(8).sliding_layers(wrong)


def test_both_spellings_mean_the_same():
    ours = SwaaConfig(2000, 100, [1, 3], [0])
    paper = {"sliding_window_size": 2000, "keep_first": 100, "non_sliding_layers": [1, 3], "force_fa_decode": [0]}
    assert SwaaConfig.from_dict(paper) == ours
    mixed = {"window_size": 2000, "keep_first": 100, "fa_layers": [1, 3], "force_fa_decode": [0]}
    assert SwaaConfig.from_dict(mixed) == ours
    # The same setting in both spellings is fine if the values agree.
    assert SwaaConfig.from_dict(paper | {"window_size": 2000, "fa_layers": "1,3"}) == ours
    assert SwaaConfig.from_dict({"sliding_window_size": 8}) == SwaaConfig(8, 0, "none", False)


@given(configs)
def test_a_dictionary_or_json_gives_the_same_settings_back(config):
    back = SwaaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config and hash(back) == hash(config)
    assert (back.recipe, back.adapter) == (config.recipe, config.adapter)


def test_json_file(tmp_path):
    path = tmp_path / "swaa.json"
    path.write_text('{"sliding_window_size": 2000, "force_fa_decode": true, "non_sliding_layers": [3]}')
    assert SwaaConfig.from_json(path) == SwaaConfig(2000, 0, [3], True)


@pytest.mark.parametrize(
    "content, part",
    [
        (b'{"window_size": 8', "not a JSON file"),
        (b"", "not a JSON file"),
        (b"\xff\xfe\x00", "not a JSON file"),
        (b"[" * 100_000, "not a JSON file"),
        (b"[1]", "JSON object"),
        (b'{"window_size": ' + b"9" * 5000 + b"}", "swaa.json"),
        (b'{"window_size": 8, "window_size": 9}', "'window_size' is given twice"),
        (b'{"window_sizes": 8}', "did you mean window_size?"),
        (b'{"window_size": NaN}', "window_size = nan"),
    ],
)
def test_a_wrong_json_file_is_one_line_with_its_name(tmp_path, content, part):
    path = tmp_path / "swaa.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        SwaaConfig.from_json(path)
    assert part in str(caught.value) and "swaa.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_json_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.json: No such file"):
        SwaaConfig.from_json(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="cannot read"):
        SwaaConfig.from_json(tmp_path)


def test_the_recipes():
    table = {
        name: (r.config.window_size, r.config.sink_count, r.config.fa_layers, r.config.fa_decode, r.seconds)
        for name, r in RECIPES.items()
    }
    assert table == {
        "quality": (2048, 100, "1::2", True, 2.72),
        "balanced": (2048, 100, "1::4", True, 2.37),
        "early": (2048, 100, ":1/4", True, None),
        "fast": (2048, 100, "none", True, 2.01),
        "memory": (2048, 100, "1::2", False, 1.92),
        "stream": (2048, 100, "none", False, 0.43),
    }
    assert all(SwaaConfig.from_recipe(name).recipe == name for name in RECIPES)


@pytest.mark.parametrize("name", ["qualty", "", None, [], "custom"])
def test_an_unknown_recipe_names_those_that_exist(name):
    with pytest.raises(ConfigError, match=r"unknown recipe .*quality"):
        SwaaConfig.from_recipe(name)


def test_import_is_light():
    # In a process of its own, since pytest's may hold anything by now.
    import subprocess

    code = "import sys, swaa_edge; print(sorted({'torch', 'llama_cpp', 'numpy', 'gguf', 'click'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
