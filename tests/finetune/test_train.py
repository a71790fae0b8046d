"""LoRA under the SWAA mask: it learns, stops, resumes and keeps its recipe; the engine runs what was trained."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from support.models import PRE_TOKENIZER, tiny_model
from support.oracle.verdict import WORST_F16
from swaa_edge import SwaaConfig, hf
from swaa_edge.errors import ConfigError, OutputError, TrainingError, UnsupportedModelError
from swaa_edge.files.lora_training import read_training
from swaa_edge.finetune.settings import Settings
from swaa_edge.finetune.train import Run

RECIPE = SwaaConfig(12, 2, [1], True, tail_count=5)
NO_TAIL = dataclasses.replace(RECIPE, tail_count=0)
FAST = {"lora_rank": 4, "batch_size": 2, "gradient_accumulation_steps": 1, "bf16": False, "seed": 5}
QUICK = Settings(learning_rate=5e-3, val_fraction=0.2, eval_steps=2, patience=0, epochs=2, **FAST)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_it_learns_and_the_adapter_keeps_its_recipe(base, data, tmp_path):
    before = (base / "model.safetensors").read_bytes()
    steps = []
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    outcome = run.train(on_progress=steps.append)
    val = [line["val_loss"] for line in outcome.history if "val_loss" in line]
    assert not outcome.stopped and outcome.step == outcome.total == 8 and [at.done for at in steps] == [*range(1, 9)]
    assert (outcome.examples, outcome.val_examples) == (8, 2)
    losses = [line["loss"] for line in outcome.history if "loss" in line]
    assert val[-1] < 0.8 * val[0] and losses[-1] < losses[0]
    assert steps[-1].text == f"step 6 of 8, loss {losses[2]:.3f}, validation loss {val[-2]:.3f}"
    kept = read_training(tmp_path / "mine")
    assert kept.swaa == RECIPE and kept.swaa.adapter == "mine"
    assert kept.base.name == "tiny-qwen3" and kept.base.n_layers == 3 and kept.more["steps"] == 8
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["r"] == 4 and set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj"}
    assert any(weight.abs().max() > 0 for name, weight in weights_of(tmp_path / "mine").items() if "lora_B" in name)
    assert (base / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "mine" / "training").exists()


def test_the_loss_is_of_the_answers_under_the_mask(base, data, tmp_path):
    # The first validation loss, before training, is that of the untrained model under the mask.
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    batch = run._collator(run.validation)
    model = AutoModelForCausalLM.from_pretrained(base)
    losses = {}
    for name, recipe in (("swaa", RECIPE), ("full", None)):
        hf.apply(model, recipe)
        given = batch if recipe else {key: value for key, value in batch.items() if key != "decode_mask"}
        with torch.no_grad():
            losses[name] = model(**given).loss.item()
    trainer = run._trainer(tmp_path / "state", TrainerCallback())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses["swaa"], rel=1e-4)
    assert abs(losses["swaa"] - losses["full"]) > 1e-3


def test_a_stopped_run_resumes_to_the_same_weights(base, data, tmp_path):
    Run(base, data, tmp_path / "straight", RECIPE, QUICK).train()
    run = Run(base, data, tmp_path / "stopped", RECIPE, QUICK)
    outcome = run.train(on_progress=lambda at: run.stop() if at.done == 2 else None)
    assert outcome.stopped and outcome.step == 3 and not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    again = Run(base, data, tmp_path / "stopped", RECIPE, QUICK)
    rest = again.train()
    assert rest.resumed == 3 and rest.step == 8
    straight, resumed = weights_of(tmp_path / "straight"), weights_of(tmp_path / "stopped")
    assert straight.keys() == resumed.keys()
    for name in straight:
        torch.testing.assert_close(resumed[name], straight[name], rtol=1e-4, atol=1e-6)


def test_the_state_of_another_run_is_not_resumed(base, data, tmp_path):
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    run.train(on_progress=lambda at: run.stop())
    other = SwaaConfig(13, 2, [1], True)
    for recipe in (other, NO_TAIL):
        with pytest.raises(OutputError, match=r"the training of another run \(different swaa\); choose another folder"):
            Run(base, data, tmp_path / "mine", recipe, QUICK)
    with pytest.raises(OutputError, match=r"the training of another run \(different settings\)"):
        Run(base, data, tmp_path / "mine", RECIPE, Settings(lora_rank=8))
    outcome = Run(base, data, tmp_path / "mine", other, QUICK, force=True).train()
    assert outcome.resumed == 0 and read_training(tmp_path / "mine").swaa == other
    with pytest.raises(OutputError, match="holds an adapter; choose another folder, or replace it"):
        Run(base, data, tmp_path / "mine", other, QUICK)
    with pytest.raises(OutputError, match="is not empty"):
        Run(base, data, base, other, QUICK)


def test_the_state_of_a_version_without_tails_is_resumed(base, data, tmp_path):
    run = Run(base, data, tmp_path / "mine", NO_TAIL, QUICK)
    run.train(on_progress=lambda at: run.stop())
    stored = json.loads((tmp_path / "mine" / "training" / "run.json").read_text())
    assert stored["swaa"] == {"window_size": 12, "sink_count": 2, "fa_layers": [1], "fa_decode": True}
    assert Run(base, data, tmp_path / "mine", NO_TAIL, QUICK).folder.last_checkpoint().step == 2


def test_the_state_of_another_version_is_refused(base, data, tmp_path):
    state = tmp_path / "mine" / "training"
    state.mkdir(parents=True)
    (state / "run.json").write_text(json.dumps({"settings": {"rank": 4, "rate": 1e-4}}))
    with pytest.raises(OutputError, match="mine holds the interrupted training of another version of swaa-edge"):
        Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    assert Run(base, data, tmp_path / "mine", RECIPE, QUICK, force=True).folder.last_checkpoint() is None


def test_a_loss_of_nan_stops_before_it_spoils_the_weights(base, data, tmp_path, monkeypatch):
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    calls = iter(range(100))
    compute = Trainer.compute_loss

    def broken(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        return loss * float("nan") if model.training and next(calls) >= 5 else loss

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    with pytest.raises(
        TrainingError,
        match=r"the loss became nan at step 6; lower --learning-rate \(now 0.005\); the checkpoint of step 4",
    ):
        run.train()
    monkeypatch.undo()
    assert Run(base, data, tmp_path / "mine", RECIPE, QUICK).train().resumed == 4


def test_memory_that_runs_out_is_an_error(base, data, tmp_path, monkeypatch):
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    compute = Trainer.compute_loss

    def full(self, model, inputs, *args, **kwargs):
        if model.training:
            torch.empty(1 << 60, dtype=torch.uint8)  # how torch reports the memory of the CPU
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", full)
    with pytest.raises(TrainingError, match="memory ran out at step 1; lower --batch-size or --max-length"):
        run.train()

    def full_card(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Trainer, "compute_loss", full_card)
    with pytest.raises(TrainingError, match="memory ran out at step 1"):
        run.train()

    def broken(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run.train()


def test_early_stop_keeps_the_best(base, data, tmp_path):
    # A learning rate far too high: the validation loss rises, so the run ends early with its best checkpoint.
    settings = Settings(learning_rate=1.0, val_fraction=0.2, eval_steps=1, patience=2, max_steps=40, **FAST)
    outcome = Run(base, data, tmp_path / "mine", RECIPE, settings).train()
    val = [line["val_loss"] for line in outcome.history if "val_loss" in line]
    assert not outcome.stopped and outcome.step < 40 and val[-1] > min(val)
    model = AutoModelForCausalLM.from_pretrained(base)
    hf.apply(model, RECIPE)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "mine")
    run = Run(base, data, tmp_path / "other", RECIPE, settings)
    with torch.no_grad():
        assert tuned(**run._collator(run.validation)).loss.item() == pytest.approx(min(val), rel=1e-3)


def test_target_modules_that_do_not_exist(base, data, tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=r"no layers named qkv; --target-modules can be down_proj, .*q_proj"
    ):
        Run(base, data, tmp_path / "mine", RECIPE, Settings(target_modules=("qkv",)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lora_rank": 0}, "lora_rank = 0 must be at least 1"),
        ({"learning_rate": 0}, "learning_rate = 0 must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan must be greater than 0"),
        ({"val_fraction": 1.0}, "val_fraction = 1.0 must be at least 0 and less than 1"),
        ({"target_modules": ()}, "target_modules must name at least one"),
        ({"patience": -1}, "patience = -1 must be at least 0"),
        ({"seed": -1}, "seed = -1 must be from 0 to 4294967295"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ConfigError) as caught:
        Settings(**wrong)
    assert message in str(caught.value)


def test_an_adapter_brings_its_recipe_and_refuses_another(base, data, tmp_path):
    Run(base, data, tmp_path / "mine", RECIPE, Settings(max_steps=1, val_fraction=0, **FAST)).train()
    model = AutoModelForCausalLM.from_pretrained(base)
    hf.load_adapter(model, tmp_path / "mine")
    assert hf.applied(model) == RECIPE
    other = AutoModelForCausalLM.from_pretrained(base)
    hf.apply(other, NO_TAIL)
    with pytest.raises(ConfigError, match=r"another recipe: its tail_count is 5, but 0 was requested"):
        hf.load_adapter(other, tmp_path / "mine")
    hf.apply(other, SwaaConfig(13, 2, [1], True))
    with pytest.raises(ConfigError, match=r"trained under another recipe: its window_size is 12, but 13 was requested"):
        hf.load_adapter(other, tmp_path / "mine")
    with pytest.raises(UnsupportedModelError, match="is for tiny-qwen3 with 3 layers, but the model has 2"):
        hf.load_adapter(copy.deepcopy(tiny_model("qwen3", seed=2, layers=2)), tmp_path / "mine")


def test_bfloat16(base, data, tmp_path):
    settings = Settings(learning_rate=5e-3, val_fraction=0, max_steps=2, **FAST | {"bf16": True})
    outcome = Run(base, data, tmp_path / "mine", RECIPE, settings).train()
    assert outcome.step == 2
    assert all(weight.dtype == torch.float32 for weight in weights_of(tmp_path / "mine").values())


@pytest.mark.native
def test_the_engine_runs_what_was_trained(base, data, tmp_path):
    from swaa_edge import SwaaLlama
    from swaa_edge.convert.hf import convert
    from swaa_edge.metadata import read_swaa

    settings = Settings(learning_rate=2e-2, val_fraction=0, max_steps=6, **FAST)
    Run(base, data, tmp_path / "mine", RECIPE, settings).train()
    merged = convert(base, tmp_path / "tuned.gguf", outtype="f32", lora=tmp_path / "mine", pre=PRE_TOKENIZER)
    assert read_swaa(merged) == RECIPE and read_swaa(merged).adapter == "mine"
    model = AutoModelForCausalLM.from_pretrained(base)
    hf.apply(model, RECIPE)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "mine")
    tokens = np.random.default_rng(1).integers(6, 768, 70).tolist()
    prompt = 60
    decode = torch.tensor([[at >= prompt for at in range(len(tokens))]])
    with torch.no_grad():
        expected = tuned(torch.tensor([tokens]), decode_mask=decode).logits[0].numpy()
        with tuned.disable_adapter():
            before = tuned(torch.tensor([tokens]), decode_mask=decode).logits[0].numpy()
        wrong = {}
        for tail in (0, 4, 6):
            hf.apply(model, dataclasses.replace(RECIPE, tail_count=tail))
            wrong[tail] = tuned(torch.tensor([tokens]), decode_mask=decode).logits[0].numpy()
    llm = SwaaLlama(str(merged), n_ctx=256, n_threads=1, verbose=False, logits_all=True)
    llm.eval(tokens[:prompt])
    for token in tokens[prompt:]:
        llm.eval([token])
    got = np.array(llm.scores[: len(tokens)])
    llm.reset()
    llm.eval(tokens, decode_from=prompt - RECIPE.tail_count)
    at_once = np.array(llm.scores[: len(tokens)])
    llm.close()
    for found in (got, at_once):
        assert np.abs(found - expected).max() < WORST_F16 * expected.std()
        for tail, other in wrong.items():
            assert np.abs(found - other).max() > 2 * WORST_F16 * expected.std(), tail
    assert np.abs(before - expected).max() > 5 * WORST_F16 * expected.std()
