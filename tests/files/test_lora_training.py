"""What an adapter was trained with: stored beside it, read back, and compared with a model and with settings."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from swaa_edge import SwaaConfig
from swaa_edge.errors import ConfigError, ModelFileError, UnsupportedModelError
from swaa_edge.files.lora_training import BaseModel, Training, read_training, save_training

RECIPE = SwaaConfig(9, 2, fa_layers=[1], fa_decode=True, tail_count=7, recipe="mine", adapter="tuned")
BASE = BaseModel("Tiny-1B", 4, "0123abcd")


def test_what_is_saved_is_read_back(tmp_path):
    save_training(tmp_path, Training(RECIPE, BASE, {"loss": 1.5}))
    found = read_training(tmp_path)
    assert (found.swaa, found.swaa.recipe, found.swaa.adapter) == (RECIPE, "mine", "tuned")
    assert (found.base, found.more) == (BASE, {"loss": 1.5})
    assert SwaaConfig.from_json(tmp_path / "swaa.json") == RECIPE


def test_an_adapter_recorded_without_a_tail_has_none(tmp_path):
    save_training(tmp_path, Training(RECIPE, BASE))
    recipe = {"window_size": 9, "sink_count": 2, "fa_layers": [1], "fa_decode": True, "recipe": "quality"}
    (tmp_path / "swaa.json").write_text(json.dumps(recipe))
    assert read_training(tmp_path).swaa == SwaaConfig(9, 2, [1], True, tail_count=0)


def test_the_tail_counts_only_where_layers_decode_with_full_attention():
    trained = Training(SwaaConfig(9, 2, [1], fa_decode=False, tail_count=7), BASE)
    trained.check_recipe(SwaaConfig(9, 2, [1]), "tuned")
    trained.check_recipe(SwaaConfig(9, 2, [1], fa_decode=[1], tail_count=5), "tuned")  # layer 1 doesn't slide


def test_an_adapter_from_elsewhere_has_neither_file(tmp_path):
    assert read_training(tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "swaa.json").unlink(), r"lacks swaa\.json; copy the adapter's whole folder"),
        (lambda folder: (folder / "swaa_training.json").unlink(), r"lacks swaa_training\.json; copy"),
        (lambda folder: (folder / "swaa_training.json").write_text("[]"), r"swaa_training\.json is damaged; copy"),
        (lambda folder: (folder / "swaa_training.json").write_text("{"), r"swaa_training\.json is damaged; copy"),
        (
            lambda folder: (folder / "swaa_training.json").write_text(
                json.dumps({"version": 2, "base": {"name": "x", "n_layers": 1, "fingerprint": "y"}})
            ),
            r"swaa_training\.json has version 2; this swaa-edge reads version 1",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    save_training(tmp_path, Training(RECIPE, BASE))
    damage(tmp_path)
    with pytest.raises(ModelFileError, match=message):
        read_training(tmp_path)


@pytest.mark.parametrize(
    ("requested", "difference"),
    [
        (SwaaConfig(9, 2, "1", "all", 7), None),
        (SwaaConfig(9, 2, [1], [0, 2, 3], 7), None),
        (SwaaConfig(9, 2, [1], True), "its tail_count is 7, but 0 was requested"),
        (SwaaConfig(9, 2, [1], True, 8), "its tail_count is 7, but 8 was requested"),
        (None, "full attention was requested"),
        (SwaaConfig(10, 2, [1], True), "its window_size is 9, but 10 was requested"),
        (SwaaConfig(9, 0, [1], True), "its sink_count is 2, but 0 was requested"),
        (SwaaConfig(9, 2, "1::2", True), r"its list of FA layers is \[1\], but \[1, 3\] was requested"),
        (SwaaConfig(9, 2, [1], [0]), r"its list of FA-decode layers is \[0, 2, 3\], but \[0\] was requested"),
    ],
)
def test_settings_are_compared_layer_by_layer(requested, difference):
    training = Training(RECIPE, BASE)
    if difference is None:
        training.check_recipe(requested, "tuned")
        return
    message = f"^the adapter tuned was trained under another recipe: {difference}; leave the settings out to use its"
    with pytest.raises(ConfigError, match=message):
        training.check_recipe(requested, "tuned")


def test_a_base_model_differs_from_one_with_a_change_in_any_one_matrix(model_dir, tmp_path):
    original = model_dir("qwen3")
    known = BaseModel.of(original)
    assert (known.name, known.n_layers) == (original.name, 2)
    assert BaseModel.of(shutil.copytree(original, tmp_path / "copy")).fingerprint == known.fingerprint
    weights = load_file(original / "model.safetensors")
    matrices = [name for name in weights if weights[name].ndim == 2]
    assert len(matrices) > 10
    for name in matrices:
        other = shutil.copytree(original, tmp_path / name)
        # As merging does: all of one matrix changes, nothing else, and no size.
        save_file(weights | {name: weights[name] * 1.01}, other / "model.safetensors", metadata={"format": "pt"})
        assert BaseModel.of(other).fingerprint != known.fingerprint, name
    with pytest.raises(UnsupportedModelError, match=f"is not {original.name}, the base model of tuned: its weights di"):
        Training(RECIPE, known).check_base(other, "tuned")


def test_folders_that_hold_no_model(tmp_path, model_dir):
    with pytest.raises(ModelFileError, match="has no safetensors files; give the folder of a Hugging Face model"):
        BaseModel.of(tmp_path)
    folder = shutil.copytree(model_dir("qwen3"), tmp_path / "copy")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"copy is not a readable Hugging Face model \('text_config'\); down"):
        BaseModel.of(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"model\.safetensors is not a safetensors file"):
        BaseModel.of(folder)
