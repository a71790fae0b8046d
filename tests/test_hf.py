"""SWAA in transformers against the oracle, in batches, packed and in `generate`; and against the engine."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.models import tiny_model
from support.oracle import verdict
from support.oracle.grid import Case, schedule
from support.oracle.oracle import Rule, oracle_logits
from support.oracle.transformers_swaa import (
    LAYERS,
    RULE,
    adapted,
    check_batch,
    check_packed,
    config_of,
    error_of,
    padded,
    some_tokens,
    with_tail,
)
from swaa_edge import SwaaConfig, hf
from swaa_edge.errors import ConfigError, UnsupportedModelError

NAMED = ["llama", "mistral", "qwen2", "qwen3", "qwen3moe"]
OTHERS = ["granite", "olmo2", "glm4", "smollm3", "phi3"]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", NAMED)
def test_a_padded_batch_is_the_oracle(arch, side, train):
    check_batch(arch, RULE, side, seed=len(arch), train=train)


@pytest.mark.parametrize("arch", OTHERS)
def test_other_families_by_default(arch):
    check_batch(arch, RULE, "right", seed=3, train=False)


@pytest.mark.parametrize("seed", range(12))
def test_random_rules(seed):
    rng = np.random.default_rng(100 + seed)
    window, sinks = int(rng.choice([1, 2, 5, 16, 70])), int(rng.choice([0, 1, 4, 70]))
    flags = rng.random((2, LAYERS)) < 0.6
    rule = Rule(window, sinks, *(tuple(bool(flag) for flag in row) for row in flags))
    side, tail, turns = str(rng.choice(["left", "right"])), int(rng.choice([0, 1, 5, 70])), bool(rng.random() < 0.5)
    check_batch("qwen3", rule, side, seed, train=bool(seed % 2), tail=tail, turns=turns)


@pytest.mark.parametrize("turns", [False, True], ids=["turn", "turns"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tail", [1, 5, 70])
def test_a_padded_batch_with_a_tail_is_the_oracle(tail, side, turns):
    check_batch("qwen3", RULE, side, seed=tail, train=True, tail=tail, turns=turns)


def test_the_comparison_tells_rules_apart():
    rng = np.random.default_rng(9)
    tokens = some_tokens(rng, 40)
    is_decode = [at >= 30 for at in range(40)]
    plain, model = tiny_model("qwen3", seed=8, layers=LAYERS), adapted("qwen3")
    flags = torch.tensor([is_decode])
    with torch.no_grad():
        right = model(torch.tensor([tokens]), decode_mask=flags).logits[0]
        late = model(torch.tensor([tokens]), decode_mask=flags.roll(1, 1).logical_and(flags)).logits[0]
        never = model(torch.tensor([tokens])).logits[0]
    expected = oracle_logits(plain, tokens, is_decode, RULE)
    assert error_of(right, expected) < 1e-4
    assert error_of(late, expected) > 0.05 and error_of(never, expected) > 0.05
    for change in ({"window": 8}, {"sinks": 2}, {"sliding": (True,) * 4}, {"fa_decode": (False,) * 4}):
        wrong = Rule(
            **{name: change.get(name, getattr(RULE, name)) for name in ("window", "sinks", "sliding", "fa_decode")}
        )
        assert error_of(right, oracle_logits(plain, tokens, is_decode, wrong)) > 0.05, change
    with torch.no_grad():
        right = adapted("qwen3", tail=5)(torch.tensor([tokens]), decode_mask=flags).logits[0]
    for tail in range(9):
        error = error_of(right, oracle_logits(plain, tokens, with_tail(is_decode, tail), RULE))
        assert error < 1e-4 if tail == 5 else error > 0.05, tail


def test_layers_without_fa_decode_have_no_tail():
    rule = Rule(RULE.window, RULE.sinks, RULE.sliding, (False,) * LAYERS)
    tokens = torch.tensor([some_tokens(np.random.default_rng(17), 40)])
    for arguments in ({}, {"decode_mask": torch.arange(40)[None] >= 30}):
        with torch.no_grad():
            found = [adapted("qwen3", rule, tail=tail)(tokens, **arguments).logits for tail in (0, 9)]
        assert torch.equal(*found)


@pytest.fixture
def uncompiled():
    """Flex attention as torch computes it by definition: compiling it for a CPU takes minutes, if it succeeds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("attention", ["swaa_sdpa", "swaa_flex"])
@pytest.mark.parametrize("tail", [0, 5, 70])
def test_packed_sequences_do_not_see_each_other(tail, attention):
    # The last one begins with a generated token: what comes before it is another sequence, not its prompt.
    check_packed(RULE, (30, 21, 44, 9), (25, 4, 44, 0), attention, tail=tail)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tail", [0, 5])
def test_flex_attention_is_the_oracle(tail, side):
    check_batch("qwen3", RULE, side, seed=11, train=False, attention="swaa_flex", tail=tail, turns=tail > 0)


@pytest.mark.usefixtures("uncompiled")
def test_flex_attentions_block_mask_leaves_out_what_the_window_hides():
    # What makes its memory and time grow with the window: whole blocks of keys that no query of a block sees.
    model = adapted("qwen3", Rule(100, 3, (True,) * LAYERS, (False,) * LAYERS), attention="swaa_flex")
    masks = []
    attend = hf.flex_attention_forward
    hf.flex_attention_forward = lambda *args, **kwargs: masks.append(args[4]) or attend(*args, **kwargs)
    try:
        with torch.no_grad():
            model(torch.tensor([some_tokens(np.random.default_rng(16), 1024)]), use_cache=False)
    finally:
        hf.flex_attention_forward = attend
    assert len(masks) == LAYERS and all(mask is masks[0] for mask in masks)
    # 8 blocks of 128 queries: each sees the block of the sinks, its own and the one before.
    counts = masks[0].kv_num_blocks + masks[0].full_kv_num_blocks
    assert counts.flatten().tolist() == [1, 2, 3, 3, 3, 3, 3, 3]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("attention", ["swaa_sdpa", "swaa_flex"])
@pytest.mark.parametrize("tail", [1, 5, 70])
def test_without_decode_mask_the_last_tokens_of_each_sequence_are_the_tail(tail, attention):
    rng = np.random.default_rng(18)
    sequences = [some_tokens(rng, n) for n in (40, 3, 25)]
    model, plain = adapted("qwen3", tail=tail, attention=attention), tiny_model("qwen3", seed=8, layers=LAYERS)
    rows = {}
    with torch.no_grad():
        for side in ("left", "right"):
            tokens, mask = padded(sequences, side)
            rows[side] = model(tokens, attention_mask=mask).logits[mask.bool()]
        tokens = torch.tensor([[token for sequence in sequences for token in sequence]])
        positions = torch.tensor([[at for sequence in sequences for at in range(len(sequence))]])
        rows["packed"] = model(tokens, position_ids=positions, use_cache=False).logits[0]
    flags = [[at >= len(sequence) - tail for at in range(len(sequence))] for sequence in sequences]
    expected = [oracle_logits(plain, sequence, row, RULE) for sequence, row in zip(sequences, flags, strict=True)]
    for name, found in rows.items():
        assert error_of(found, np.concatenate(expected)) < 1e-4, name


def test_each_turn_after_a_cache_has_its_tail():
    rng, tail = np.random.default_rng(19), 5
    tokens = torch.tensor([some_tokens(rng, 60)])
    model, plain = adapted("qwen3", tail=tail), tiny_model("qwen3", seed=8, layers=LAYERS)
    # Prompt, two generated tokens, a prompt shorter than the tail, a generated token, a prompt.
    rows, cache, flags = [], None, []
    for count in (30, 1, 1, 3, 1, 24):
        with torch.no_grad():
            out = model(tokens[:, len(flags) : len(flags) + count], past_key_values=cache, use_cache=True)
        rows, cache = [*rows, out.logits[0]], out.past_key_values
        flags += [at >= count - tail for at in range(count)]
    assert error_of(torch.cat(rows), oracle_logits(plain, tokens[0].tolist(), flags, RULE)) < 1e-4


@pytest.mark.parametrize(("arch", "tail"), [*((arch, 0) for arch in NAMED), ("qwen3", 5), ("llama", 1), ("qwen2", 70)])
def test_generate_prefills_and_decodes(arch, tail):
    rng = np.random.default_rng(12)
    sequences = [some_tokens(rng, n) for n in (33, 12)]
    tokens, mask = padded(sequences, "left")
    model, plain = adapted(arch, tail=tail), tiny_model(arch, seed=8, layers=LAYERS)
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row, prompt in enumerate(sequences):
        made = out.sequences[row, tokens.shape[1] :].tolist()
        whole = prompt + made
        expected = oracle_logits(plain, whole, [at >= len(prompt) - tail for at in range(len(whole))], RULE)
        steps = torch.stack([step[row] for step in out.logits])
        assert error_of(steps, expected[len(prompt) - 1 : -1]) < 1e-3
        assert made == expected[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_gradient_checkpointing_changes_nothing():
    rng = np.random.default_rng(13)
    tokens, mask = padded([some_tokens(rng, n) for n in (40, 25)], "right")
    decode = hf.decode_mask([30, 20], mask)
    labels = torch.where(decode, tokens, -100)
    grads = []
    for checkpointing in (False, True):
        model = adapted("qwen3").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(tokens, attention_mask=mask, decode_mask=decode, labels=labels, use_cache=False).loss
        loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1])


def test_the_loss_is_that_of_the_oracles_logits():
    rng = np.random.default_rng(14)
    tokens = some_tokens(rng, 50)
    decode = torch.tensor([[at >= 40 for at in range(50)]])
    labels = torch.where(decode, torch.tensor([tokens]), -100)
    loss = adapted("llama").train()(torch.tensor([tokens]), decode_mask=decode, labels=labels).loss
    rows = torch.tensor(oracle_logits(tiny_model("llama", seed=8, layers=LAYERS), tokens, decode[0].tolist(), RULE))
    expected = torch.nn.functional.cross_entropy(rows[39:49], torch.tensor(tokens[40:]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_settings_are_saved_with_the_model(tmp_path):
    adapted("qwen3").save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="swaa")
    assert hf.applied(again) == config_of(RULE)
    tokens = torch.tensor([some_tokens(np.random.default_rng(15), 40)])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, adapted("qwen3")(tokens).logits)
        hf.apply(again, None)
        full = tiny_model("qwen3", seed=8, layers=LAYERS)(tokens).logits
        torch.testing.assert_close(again(tokens).logits, full, rtol=1e-3, atol=1e-4)
    assert hf.applied(again) is None


def test_decode_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert hf.decode_mask([1, 3], mask).int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    for lengths, message in (([1], "there are 1 prompt lengths for 2"), ([1, 4], "prompt length 4 of sequence 1")):
        with pytest.raises(ConfigError, match=message):
            hf.decode_mask(lengths, mask)


def test_what_would_be_silently_wrong_is_an_error():
    tokens = torch.tensor([[7, 8, 9, 10]])
    model = adapted("qwen3")
    with pytest.raises(ConfigError, match=r"decode_mask is \(1, 3\), but the tokens are \(1, 4\)"):
        model(tokens, decode_mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="needs decode_mask, which marks the tokens of the answers"):
        model.train()(tokens)
    with pytest.raises(ConfigError, match="SWAA builds its own masks"):
        model.eval()(tokens, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    bare = copy.deepcopy(tiny_model("qwen3", seed=8, layers=LAYERS))
    bare.set_attn_implementation("swaa")
    with pytest.raises(ConfigError, match="no SWAA settings"):
        bare(tokens)


def test_what_cannot_slide_is_refused():
    model = copy.deepcopy(tiny_model("qwen3", seed=8, layers=LAYERS))
    with pytest.raises(ConfigError, match="fa_layers"):
        hf.apply(model, SwaaConfig(8, fa_layers=[4]))
    with pytest.raises(ConfigError, match="attention = flash must be one of"):
        hf.apply(model, SwaaConfig(8), attention="flash")
    model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(UnsupportedModelError, match="sliding_attention of its own"):
        hf.apply(model, SwaaConfig(8))
    mistral = copy.deepcopy(tiny_model("mistral", seed=8, layers=LAYERS))
    mistral.config.sliding_window = 64
    with pytest.raises(UnsupportedModelError, match="sliding_window = 64 of its own"):
        hf.apply(mistral, SwaaConfig(8))


# What was trained is what runs: the logits of one training pass against those of the engine's prefill and decode.

ENGINE_CASES = [
    Case.parse(line)
    for line in (
        "qwen3/4 W256 S257 s1101 d0101 f16 table b256 u64 t1 p700+8,300+12 streams explicit r2",
        "llama/4 W31 S4 T100 s1011 d1001 f16 table b512 u97 t1 p900+12 unified explicit r1",
        "mistral/3 W257 S1 T5 s111 d010 f32 dense b512 u512 t1 p500+4,400+4 unified explicit r4",
    )
]


@pytest.mark.native
@pytest.mark.parametrize("case", ENGINE_CASES, ids=lambda case: case.arch)
def test_the_engine_computes_what_was_trained(engine, zoo, case):
    fed = schedule(case)
    model = copy.deepcopy(zoo.model(case.arch, case.layers)).train()
    tokens, mask = padded(fed.tokens, "right")
    decode = hf.decode_mask([prompt for prompt, _ in case.sequences], mask)
    engines = verdict.engine_rows(engine, zoo, case, fed)
    for tail in {case.tail, max(case.tail - 1, 0)}:
        hf.apply(model, config_of(case.rule, tail))
        with torch.no_grad():
            ours = model(tokens, attention_mask=mask, decode_mask=decode).logits[mask.bool()].numpy()
        figures = verdict.compare(ours, engines, verdict.decode_flags(fed))
        assert bool(verdict.problems(case, figures, None)) == (tail != case.tail), (tail, figures)
