"""LoRA under the SWAA mask: it learns, stops and goes on, keeps its recipe; and what was trained is what runs."""

import copy
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from support.models import PRE_TOKENIZER, save_model, tiny_model, tiny_tokenizer
from support.oracle.figures import WORST_F16
from swaa_edge import SwaaConfig, hf
from swaa_edge.cli import cli
from swaa_edge.errors import ConfigError, OutputError, TrainingError, UnsupportedModelError
from swaa_edge.files.lora_training import read_training
from swaa_edge.finetune.settings import Settings
from swaa_edge.finetune.train import Run

RECIPE = SwaaConfig(12, 2, [1], True)
QUICK = Settings(rank=4, batch=2, accumulate=1, rate=5e-3, holdout=0.2, every=2, patience=0, epochs=2, seed=5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    return save_model(tiny_model("qwen3", seed=2, layers=3), tiny_tokenizer(), folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    words = ("apple", "river", "stone", "cloud", "tiger")
    records = [{"prompt": f"{word} " * (6 + i), "answer": f"it is {word}"} for i, word in enumerate(words * 2)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_it_learns_and_the_adapter_knows_its_recipe(base, data, tmp_path):
    before = (base / "model.safetensors").read_bytes()
    steps = []
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    outcome = run.train(on_step=steps.append)
    held = [line["held_out"] for line in outcome.history if "held_out" in line]
    assert (
        not outcome.stopped and outcome.step == outcome.total == 8 and [step.step for step in steps] == [*range(1, 9)]
    )
    assert (outcome.examples, outcome.held_out) == (8, 2)
    assert held[-1] < 0.8 * held[0]
    assert steps[-1].loss < steps[2].loss
    kept = read_training(tmp_path / "mine")
    assert kept.swaa == RECIPE and kept.swaa.adapter == "mine"
    assert kept.base.name == "tiny-qwen3" and kept.base.n_layers == 3 and kept.more["steps"] == 8
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["r"] == 4 and set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj"}
    assert any(weight.abs().max() > 0 for name, weight in weights_of(tmp_path / "mine").items() if "lora_B" in name)
    assert (base / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "mine" / "training").exists()


def test_the_loss_is_of_the_answers_under_the_mask(base, data, tmp_path):
    # The first held-out loss, before anything was learned, is what the mask of the recipe gives by itself.
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    batch = run._collator(run.held_out)
    model = AutoModelForCausalLM.from_pretrained(base)
    losses = {}
    for name, recipe in (("right", RECIPE), ("full", None)):
        hf.apply(model, recipe)
        given = batch if recipe else {key: value for key, value in batch.items() if key != "decode_mask"}
        with torch.no_grad():
            losses[name] = model(**given).loss.item()
    trainer = run._trainer(tmp_path / "state", TrainerCallback())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses["right"], rel=1e-4)
    assert abs(losses["right"] - losses["full"]) > 1e-3


def test_a_stopped_run_goes_on_as_if_it_had_not_been(base, data, tmp_path):
    Run(base, data, tmp_path / "straight", RECIPE, QUICK).train()
    run = Run(base, data, tmp_path / "stopped", RECIPE, QUICK)
    outcome = run.train(on_step=lambda at: run.stop() if at.step == 2 else None)
    assert outcome.stopped and outcome.step == 3 and not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    again = Run(base, data, tmp_path / "stopped", RECIPE, QUICK)
    rest = again.train()
    assert rest.resumed == 3 and rest.step == 8
    straight, resumed = weights_of(tmp_path / "straight"), weights_of(tmp_path / "stopped")
    assert straight.keys() == resumed.keys()
    for name in straight:
        torch.testing.assert_close(resumed[name], straight[name], rtol=1e-4, atol=1e-6)


def test_the_state_of_another_run_is_not_gone_on_with(base, data, tmp_path):
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    run.train(on_step=lambda at: run.stop())
    other = SwaaConfig(13, 2, [1], True)
    with pytest.raises(OutputError, match=r"another run \(swaa differ\)"):
        Run(base, data, tmp_path / "mine", other, QUICK)
    with pytest.raises(OutputError, match=r"another run \(settings differ\)"):
        Run(base, data, tmp_path / "mine", RECIPE, Settings(rank=8))
    outcome = Run(base, data, tmp_path / "mine", other, QUICK, force=True).train()
    assert outcome.resumed == 0 and read_training(tmp_path / "mine").swaa == other
    with pytest.raises(OutputError, match="holds an adapter already"):
        Run(base, data, tmp_path / "mine", other, QUICK)
    with pytest.raises(OutputError, match="is not empty"):
        Run(base, data, base, other, QUICK)


def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(base, data, tmp_path, monkeypatch):
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    calls = iter(range(100))
    compute = Trainer.compute_loss

    def broken(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        return loss * float("nan") if model.training and next(calls) >= 5 else loss

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 6; lower --rate, now 0.005; the state of step 4"):
        run.train()
    monkeypatch.undo()
    assert Run(base, data, tmp_path / "mine", RECIPE, QUICK).train().resumed == 4


def test_memory_that_runs_out_is_told(base, data, tmp_path, monkeypatch):
    run = Run(base, data, tmp_path / "mine", RECIPE, QUICK)
    compute = Trainer.compute_loss

    def full(self, model, inputs, *args, **kwargs):
        if model.training:
            torch.empty(1 << 60, dtype=torch.uint8)  # what torch says of the machine's memory
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", full)
    with pytest.raises(TrainingError, match="memory ran out at step 1; lower --batch or --max-length"):
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
    # Far too fast: the loss of what is held out rises, so the run ends early, and its best state is the adapter.
    settings = Settings(rank=4, batch=2, accumulate=1, rate=1.0, holdout=0.2, every=1, patience=2, steps=40, seed=5)
    outcome = Run(base, data, tmp_path / "mine", RECIPE, settings).train()
    held = [line["held_out"] for line in outcome.history if "held_out" in line]
    assert not outcome.stopped and outcome.step < 40 and held[-1] > min(held)
    model = AutoModelForCausalLM.from_pretrained(base)
    hf.apply(model, RECIPE)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "mine")
    run = Run(base, data, tmp_path / "other", RECIPE, settings)
    with torch.no_grad():
        assert tuned(**run._collator(run.held_out)).loss.item() == pytest.approx(min(held), rel=1e-3)


def test_targets_that_are_not_there(base, data, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"no layers called qkv; --targets can name down_proj, .*q_proj"):
        Run(base, data, tmp_path / "mine", RECIPE, Settings(targets=("qkv",)))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"rate": 0}, "rate = 0 must be more than 0"),
        ({"rate": float("nan")}, "rate = nan must be more than 0"),
        ({"holdout": 1.0}, "holdout = 1.0 must be from 0 to under 1"),
        ({"targets": ()}, "targets must name at least one"),
        ({"patience": -1}, "patience = -1 must be at least 0"),
    ],
)
def test_settings_out_of_range(wrong, told):
    with pytest.raises(ConfigError) as caught:
        Settings(**wrong)
    assert told in str(caught.value)


def test_an_adapter_brings_its_recipe_and_refuses_another(base, data, tmp_path):
    Run(base, data, tmp_path / "mine", RECIPE, Settings(rank=4, steps=1, accumulate=1, holdout=0)).train()
    model = AutoModelForCausalLM.from_pretrained(base)
    hf.load_adapter(model, tmp_path / "mine")
    assert hf.applied(model) == RECIPE
    other = AutoModelForCausalLM.from_pretrained(base)
    hf.apply(other, SwaaConfig(13, 2, [1], True))
    with pytest.raises(ConfigError, match=r"trained under another recipe: its window_size is 12, but 13 was requested"):
        hf.load_adapter(other, tmp_path / "mine")
    with pytest.raises(UnsupportedModelError, match="is for tiny-qwen3, of 3 layers; the model has 2"):
        hf.load_adapter(copy.deepcopy(tiny_model("qwen3", seed=2, layers=2)), tmp_path / "mine")


def test_bfloat16(base, data, tmp_path):
    settings = Settings(rank=4, batch=2, accumulate=1, rate=5e-3, holdout=0, steps=2, half=True)
    outcome = Run(base, data, tmp_path / "mine", RECIPE, settings).train()
    assert outcome.step == 2
    assert all(weight.dtype == torch.float32 for weight in weights_of(tmp_path / "mine").values())


# The command.


def command(*words, code=0):
    result = CliRunner().invoke(cli, ["finetune", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_trains_and_draws(base, data, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "loss.png"
    options = ("--rank", 4, "--batch", 2, "--accumulate", 1, "--holdout", 0.2, "--steps", 3, "--every", 1)
    result = command(
        base,
        "--data",
        data,
        "-o",
        tmp_path / "mine",
        "--window",
        12,
        "--sinks",
        2,
        "--fa-decode",
        *options,
        "--gradient-checkpointing",
        "--plot",
        plot,
        "--json",
        "-",
    )
    document = json.loads(result.stdout)
    assert document["step"] == 3 and document["swaa"]["window_size"] == 12 and document["history"]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert read_training(tmp_path / "mine").swaa == SwaaConfig(12, 2, "none", True)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("BASE", "--data", "DATA", "-o", "OUT"), 2, "an adapter is trained under one recipe; give --recipe NAME"),
        (("BASE", "--data", "no.jsonl", "-o", "OUT", "--window", "9"), 1, "cannot read the data file no.jsonl"),
        (("nowhere", "--data", "DATA", "-o", "OUT", "--window", "9"), 1, "there is no folder nowhere"),
        (("BASE", "--data", "DATA", "-o", "OUT", "--window", "9", "--rank", "0"), 1, "rank = 0 must be at least 1"),
        (("BASE", "--data", "DATA", "-o", "OUT", "--window", "9", "--fa-layers", "7"), 1, "fa_layers"),
    ],
)
def test_the_command_says_what_is_wrong(base, data, tmp_path, words, code, told):
    names = {"BASE": base, "DATA": data, "OUT": tmp_path / "out"}
    result = command(*(names.get(word, word) for word in words), code=code)
    assert told in result.output and len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    code = "import sys; from swaa_edge.cli import cli; cli(['finetune', '--help'], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_ctrl_c_keeps_what_was_learned(base, data, tmp_path):
    words = [base, "--data", data, "-o", tmp_path / "mine", "--window", 12, "--holdout", 0, "--steps", 4000]
    words += ["--rank", 4, "--every", 4000, "--progress"]
    # A shell lets what it runs in the background ignore Ctrl-C, and children inherit that.
    process = subprocess.Popen(
        [sys.executable, "-m", "swaa_edge", "finetune", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    for line in process.stderr:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    watchdog.cancel()
    assert "the same command goes on from there" in rest and "Traceback" not in rest
    states = [*(tmp_path / "mine" / "training").glob("checkpoint-*/trainer_state.json")]
    assert len(states) == 1 and json.loads(states[0].read_text())["global_step"] > 0


# What was trained is what runs.


@pytest.mark.native
def test_the_engine_runs_what_was_trained(base, data, tmp_path):
    from swaa_edge import SwaaLlama
    from swaa_edge.convert.hf import convert
    from swaa_edge.metadata import read_swaa

    settings = Settings(rank=4, batch=2, accumulate=1, rate=2e-2, holdout=0, steps=6, seed=5)
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
    llm = SwaaLlama(str(merged), n_ctx=256, n_threads=1, verbose=False, logits_all=True)
    llm.eval(tokens[:prompt])
    for token in tokens[prompt:]:
        llm.eval([token])
    got = np.array(llm.scores[: len(tokens)])
    llm.close()
    assert np.abs(got - expected).max() < WORST_F16 * expected.std()
    assert np.abs(before - expected).max() > 5 * WORST_F16 * expected.std()
