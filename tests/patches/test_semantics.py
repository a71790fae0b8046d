"""The engine's window beyond the random grid: reuse of cached tokens, shifts, states, and refusals.

Compared with the oracle's logits, or with another run of the engine that must give the same ones.

    pytest tests/patches/test_semantics.py
"""

import numpy as np
import pytest

from support.engine.process import Engine, EngineDied, EngineError, tokens_of
from support.fakes.gguf_bytes import array, kv, model, swaa_keys
from support.oracle import verdict
from support.oracle.grid import VOCAB, Case
from support.oracle.oracle import oracle_logits
from support.oracle.rule import Rule
from support.oracle.shifted import shifted

pytestmark = pytest.mark.native

# FA decode in some sliding layers, the window in others, one FA layer; sinks end inside the second block.
RULE = Rule(31, 4, (True, False, True, True), (True, False, False, True))
LAYERS = 4


def random_tokens(n, seed=0):
    return np.random.default_rng(seed).integers(6, VOCAB, n).tolist()


def close(got, expected, limit=verdict.WORST_F16):
    """Fail unless `got` is within `limit` standard deviations of `expected` (both [rows, vocab]) everywhere."""
    error = np.abs(got - expected).max() / expected.std()
    assert error < limit, f"{error:.3f} standard deviations"


class Runner:
    """One model under one rule, by engine and oracle."""

    def __init__(self, engine, zoo, arch="llama", rule=RULE):
        self.engine, self.rule = engine, rule
        self.path, self.model = zoo.gguf(arch, LAYERS), zoo.model(arch, LAYERS)

    def run(self, steps, **settings):
        return self.engine.run(self.path, steps, self.rule.overrides, **settings).logits

    def expected(self, tokens, n_decode=0):
        """Logits of `tokens`, the last `n_decode` of which were generated."""
        return oracle_logits(self.model, tokens, [i >= len(tokens) - n_decode for i in range(len(tokens))], self.rule)


@pytest.fixture
def llama(engine, zoo):
    return Runner(engine, zoo)


# Phases


def test_one_token_more_than_a_batch(llama):
    tokens = random_tokens(257)
    steps = [("decode", tokens_of(tokens[:256]), "prefill"), ("decode", tokens_of(tokens[256:], 256), "prefill")]
    as_prefill, as_decode = llama.expected(tokens), llama.expected(tokens, n_decode=1)
    assert np.abs(as_prefill[-1] - as_decode[-1]).max() > 3 * verdict.WORST_F16 * as_prefill.std()
    close(np.concatenate(llama.run(steps, n_batch=256)), as_prefill)
    # Left to itself the engine can't tell that token from a generated one.
    steps[1] = ("decode", steps[1][1], "auto")
    close(np.concatenate(llama.run(steps, n_batch=256)), as_decode)


def test_a_boundary_holds_until_it_is_set_again(llama):
    tokens = random_tokens(120)
    steps = [("decode_from", 0, 100)]
    steps += [("decode", tokens_of([token], i)) for i, token in enumerate(tokens[:95])]
    steps += [("decode", tokens_of(tokens[95:110], 95)), ("decode", tokens_of(tokens[110:], 110))]
    close(np.concatenate(llama.run(steps)), llama.expected(tokens, n_decode=20))


@pytest.mark.parametrize("policy", ["table", "copy", "dense"])
@pytest.mark.parametrize("n_ubatch", [512, 97, 64, 1])
def test_prompt_and_decode_tokens_in_one_batch(llama, policy, n_ubatch):
    # The boundary lies inside the batch, inside a ubatch, and the tail is longer than one.
    tokens, other = random_tokens(700), random_tokens(400, 1)
    steps = [("decode_from", 0, 530), ("decode_from", 1, 250)]
    steps += [("decode", tokens_of(tokens[:500], 0, 0))]
    steps += [("decode", tokens_of(tokens[500:], 500, 0) + tokens_of(other[:300], 0, 1))]
    steps += [("decode", tokens_of(other[300:], 300, 1))]
    for unified in (True, False):
        first, second, third = llama.run(
            steps,
            sequences=2,
            unified=unified,
            n_ctx=2048,
            n_ubatch=n_ubatch,
            policy=policy,
            flash_attn=policy != "dense",
        )
        close(np.concatenate([first, second[:200]]), llama.expected(tokens, n_decode=170))
        close(np.concatenate([second[200:], third]), llama.expected(other, n_decode=150))


def test_a_boundary_follows_its_tokens(engine, zoo, llama):
    # After a shift, tokens at the new positions still decode; a copy decodes from where its source does; a sequence
    # that lost all its tokens goes back to AUTO.
    prompt, answer = random_tokens(600), random_tokens(60, 1)
    steps = [("decode_from", 0, 600), ("decode", tokens_of(prompt[:300])), ("decode", tokens_of(prompt[300:], 300))]
    steps += [("seq_rm", 0, 40, 240), ("seq_add", 0, 240, -1, -200)]
    steps += [("decode", tokens_of(answer[:30], 400)), ("decode", tokens_of(answer[30:], 430))]
    got = np.concatenate(llama.run(steps)[2:])
    close(got, shifted(llama.model, prompt, (40, 240), answer, n_decode=60, rule=llama.rule))

    steps = [("decode_from", 0, 600), ("decode", tokens_of(prompt[:300])), ("decode", tokens_of(prompt[300:], 300))]
    steps += [("seq_cp", 0, 1, -1, -1), ("decode", tokens_of(answer, 600, 1))]
    steps += [("seq_rm", 1, -1, -1), ("decode", tokens_of(prompt[:200], 0, 1))]
    *_, copied, again = llama.run(steps, sequences=2, unified=True, n_ctx=2048)
    close(copied, llama.expected(prompt + answer, n_decode=60)[600:])
    close(again, llama.expected(prompt[:200]))


def test_a_boundary_inside_what_a_shift_removes(llama):
    # Prompt of 300, generated from there; positions 40 to 339 are removed, so position 340 becomes 40.
    tokens, more = random_tokens(400), random_tokens(30, 1)
    steps = [("decode_from", 0, 300), ("decode", tokens_of(tokens[:300])), ("decode", tokens_of(tokens[300:], 300))]
    steps += [("seq_rm", 0, 40, 340), ("seq_add", 0, 340, -1, -300), ("decode", tokens_of(more, 100))]
    follows = np.concatenate(llama.run(steps)[2:])
    steps[-1:-1] = [("decode_from", 0, 0)]
    close(follows, np.concatenate(llama.run(steps)[2:]), 1e-6)


@pytest.mark.parametrize(("seq", "position"), [(1, 0), (-2, 0), (0, -2)])
def test_a_boundary_that_cannot_be(engine, zoo, seq, position):
    with pytest.raises(EngineError, match=f"decode boundary {position} of sequence {seq} refused"):
        engine.run(zoo.gguf("llama", LAYERS), [("decode_from", seq, position)], RULE.overrides)


@pytest.mark.parametrize("policy", ["table", "copy", "dense"])
@pytest.mark.parametrize(
    ("sliding", "fa_decode"),
    [("1101", "0011"), ("1011", "1001"), ("1011", "0001"), ("0111", "0100"), ("1110", "0010"), ("1111", "0101")],
)
def test_phases_alternate(engine, zoo, policy, sliding, fa_decode):
    # The graphs of both phases have the same size here and differ only in which mask each layer reads, so a memory
    # plan that was made for one must not serve the other.
    rule = Rule(31, 4, tuple(c == "1" for c in sliding), tuple(c == "1" for c in fa_decode))
    llama = Runner(engine, zoo, rule=rule)
    tokens = random_tokens(700)
    steps, is_decode = [("decode", tokens_of(tokens[:600]), "prefill")], [False] * 600
    for count, phase in [
        (1, "decode"),
        (1, "prefill"),
        (5, "decode"),
        (5, "prefill"),
        (5, "decode"),
        (1, "decode"),
    ] * 5:
        start = len(is_decode)
        steps.append(("decode", tokens_of(tokens[start : start + count], start), phase))
        is_decode += [phase == "decode"] * count
    got = np.concatenate(llama.run(steps, n_batch=600, n_ubatch=128, policy=policy, flash_attn=policy != "dense"))
    close(got, oracle_logits(llama.model, tokens[: len(is_decode)], is_decode, rule))


def test_a_batch_without_positions_and_sequences(llama):
    # llama_batch_get_one leaves both to the library.
    tokens = random_tokens(90)
    steps = [("decode_plain", tokens[:80])] + [("decode_plain", [token]) for token in tokens[80:]]
    expected = llama.expected(tokens, n_decode=10)
    close(np.concatenate(llama.run(steps)), expected[79:])  # logits of each batch's last token only


# Ways to compute the same


def test_batches_and_ubatches_change_nothing(llama):
    tokens = random_tokens(1100)
    expected = llama.expected(tokens)
    for n_batch, n_ubatch in ((1100, 512), (512, 512), (512, 97), (97, 97), (256, 64), (33, 1)):
        steps = [("decode", tokens_of(tokens[i : i + n_batch], i), "prefill") for i in range(0, 1100, n_batch)]
        close(np.concatenate(llama.run(steps, n_batch=n_batch, n_ubatch=n_ubatch)), expected)


def test_policies_agree(llama):
    tokens = random_tokens(1200)
    steps = [("decode", tokens_of(tokens[i : i + 200], i), "prefill") for i in range(0, 1000, 200)]
    steps += [("decode", tokens_of(tokens[i : i + 1], i), "decode") for i in range(1000, 1020)]
    runs = {
        policy: np.concatenate(llama.run(steps, policy=policy, flash_attn=policy != "dense"))
        for policy in ("table", "copy", "dense")
    }
    expected = llama.expected(tokens[:1020], n_decode=20)
    # The same rows of K and V go through the same kernel, only from another place.
    close(runs["copy"], runs["table"], 0.01)
    for got in runs.values():
        close(got, expected)


def test_the_mask_alone_is_the_same_with_flash_attention(llama):
    # policy "dense" may be forced with flash attention on: the full-width mask in the stock kernel.
    tokens = random_tokens(700)
    steps = [("decode", tokens_of(tokens[i : i + 100], i), "prefill") for i in range(0, 700, 100)]
    close(np.concatenate(llama.run(steps, policy="dense")), np.concatenate(llama.run(steps, policy="table")), 0.01)


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_runs_give_equal_bits(llama, threads):
    tokens = random_tokens(800)
    steps = [("decode", tokens_of(tokens[:500])), ("decode", tokens_of(tokens[500:], 500))]
    first, second = (np.concatenate(llama.run(steps, threads=threads)) for _ in range(2))
    assert first.tobytes() == second.tobytes()


# Reuse of the cache


def test_a_reused_prefix(llama):
    # A chat whose last answer is discarded: its tokens were decode tokens, and the remaining ones keep their K and V.
    tokens, more = random_tokens(900), random_tokens(60, seed=1)
    steps = [("decode", tokens_of(tokens[i : i + 300], i), "prefill") for i in range(0, 900, 300)]
    steps += [("decode", tokens_of([token], 900 + i), "decode") for i, token in enumerate(more[:20])]
    steps += [("seq_rm", 0, 910, -1), ("decode", tokens_of(more[20:50], 910), "prefill")]
    steps += [("decode", tokens_of([token], 940 + i), "decode") for i, token in enumerate(more[50:])]
    history = tokens + more[:10] + more[20:]
    is_decode = [False] * 900 + [True] * 10 + [False] * 30 + [True] * 10
    got = llama.run(steps)
    close(np.concatenate(got[23:]), oracle_logits(llama.model, history, is_decode, llama.rule)[910:])


def test_a_hole_that_is_filled_elsewhere(llama):
    # Removed cells are reused in any order, so positions and cells no longer run alongside.
    first, second, third = random_tokens(600, 1), random_tokens(500, 2), random_tokens(400, 3)
    settings = {"sequences": 3, "unified": True, "n_ctx": 1536}
    steps = [("phase", "prefill")]
    for i in range(0, 500, 50):
        steps.append(("decode", tokens_of(first[i : i + 50], i, 0) + tokens_of(second[i : i + 50], i, 1)))
    steps += [("seq_rm", 1, -1, -1)]
    steps += [("decode", tokens_of(third, 0, 2)), ("decode", tokens_of(first[500:], 500, 0))]
    *_, got_third, got_first = llama.run(steps, **settings)
    close(got_third, llama.expected(third))
    close(got_first, llama.expected(first)[500:])


@pytest.mark.parametrize("unified", [True, False])
def test_a_copied_prefix(llama, unified):
    prefix, one, two = random_tokens(700, 1), random_tokens(90, 2), random_tokens(120, 3)
    steps = [("phase", "prefill"), ("decode", tokens_of(prefix[:400])), ("decode", tokens_of(prefix[400:], 400))]
    steps += [("seq_cp", 0, 1, -1, -1)]
    steps += [("decode", tokens_of(one[:80], 700, 0) + tokens_of(two[:100], 700, 1)), ("phase", "decode")]
    steps += [("decode", tokens_of(one[80:], 780, 0) + tokens_of(two[100:], 800, 1))]
    *_, prompts, answers = llama.run(steps, sequences=2, unified=unified, n_ctx=2048)
    expected_one = llama.expected(prefix + one, n_decode=10)[700:]
    expected_two = llama.expected(prefix + two, n_decode=20)[700:]
    close(np.concatenate([prompts[:80], answers[:10]]), expected_one)
    close(np.concatenate([prompts[80:], answers[10:]]), expected_two)


def test_a_prompt_that_two_sequences_share(llama):
    prefix, one, two = random_tokens(600, 1), random_tokens(40, 2), random_tokens(40, 3)
    steps = [("phase", "prefill"), ("decode", tokens_of(prefix[:300], 0, (0, 1)))]
    steps += [("decode", tokens_of(prefix[300:], 300, (0, 1)))]
    steps += [("decode", tokens_of(one, 600, 0) + tokens_of(two, 600, 1))]
    *_, got = llama.run(steps, sequences=2, unified=True)
    close(got[:40], llama.expected(prefix + one)[600:])
    close(got[40:], llama.expected(prefix + two)[600:])


@pytest.mark.parametrize("unified", [True, False])
def test_a_state_in_another_sequence(llama, unified):
    tokens, more = random_tokens(650), random_tokens(50, 1)
    steps = [("phase", "prefill"), ("decode", tokens_of(tokens[:400])), ("decode", tokens_of(tokens[400:], 400))]
    steps += [("state_get", 0), ("seq_rm", 0, -1, -1), ("state_set", 1), ("decode", tokens_of(more, 650, 1))]
    *_, got = llama.run(steps, sequences=2, unified=unified, n_ctx=2048)
    close(got, llama.expected(tokens + more)[650:])


def test_after_a_context_shift(llama):
    # Tokens 40 to 239 are removed, the later ones move down by 200; positions 0 to 3 are the sink tokens, as before.
    tokens, more = random_tokens(600), random_tokens(40, 1)
    steps = [("phase", "prefill"), ("decode", tokens_of(tokens[:300])), ("decode", tokens_of(tokens[300:], 300))]
    steps += [("seq_rm", 0, 40, 240), ("seq_add", 0, 240, -1, -200)]
    steps += [("decode", tokens_of(more[:30], 400)), ("phase", "decode")]
    steps += [("decode", tokens_of([token], 430 + i)) for i, token in enumerate(more[30:])]
    got = np.concatenate(llama.run(steps)[2:])
    close(got, shifted(llama.model, tokens, (40, 240), more, n_decode=10, rule=llama.rule))


# The tests' own foundations


def test_a_crash_is_one_failure(engine, zoo):
    with Engine(engine.library) as other:
        with pytest.raises(EngineDied, match="SIGABRT"):
            other.run(zoo.gguf("llama", LAYERS), [("abort",)])
        assert other.run(zoo.gguf("llama", LAYERS), [("decode", tokens_of([7]))]).logits[0].shape == (1, VOCAB)


# Refusals: the library's own, below the checks that Python makes first


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"version": kv("swaa.version", "u32", 2)}, "swaa.version"),
        ({"version": kv("swaa.version", "u32", 0)}, "swaa.version"),
        ({"version": None}, "swaa.version"),
        ({"window_size": kv("swaa.window_size", "u32", 0)}, "swaa.window_size"),
        ({"window_size": kv("swaa.window_size", "u32", 2**31)}, "swaa.window_size"),
        ({"window_size": kv("swaa.window_size", "str", "2048")}, "swaa.window_size"),
        ({"window_size": array("swaa.window_size", "u32", [7])}, "swaa.window_size"),
        ({"window_size": None}, "swaa.window_size"),
        ({"sink_count": kv("swaa.sink_count", "i32", -1)}, "swaa.sink_count"),
        ({"sink_count": kv("swaa.sink_count", "u32", 2**32 - 1)}, "swaa.sink_count"),
        ({"sliding_layers": array("swaa.sliding_layers", "bool", [1] * 3)}, "swaa.sliding_layers"),
        ({"sliding_layers": array("swaa.sliding_layers", "bool", [1] * 5)}, "swaa.sliding_layers"),
        ({"sliding_layers": array("swaa.sliding_layers", "bool", [])}, "swaa.sliding_layers"),
        ({"sliding_layers": array("swaa.sliding_layers", "u32", [1] * 4)}, "swaa.sliding_layers"),
        ({"sliding_layers": array("swaa.sliding_layers", "str", ["1"] * 4)}, "swaa.sliding_layers"),
        ({"sliding_layers": kv("swaa.sliding_layers", "str", "1111")}, "swaa.sliding_layers"),
        ({"fa_decode_layers": array("swaa.fa_decode_layers", "bool", [1] * 3)}, "swaa.fa_decode_layers"),
        ({"fa_decode_layers": kv("swaa.fa_decode_layers", "bool", 1)}, "swaa.fa_decode_layers"),
        ({"enabled": kv("swaa.enabled", "u32", 1)}, "swaa.enabled"),
        ({"tail_count": kv("swaa.tail_count", "i32", 4)}, "swaa.tail_count"),
        ({"tail_count": kv("swaa.tail_count", "u32", 2**31)}, "swaa.tail_count"),
    ],
)
def test_wrong_keys_in_a_file(engine, tmp_path, changed, key):
    path = tmp_path / "wrong.gguf"
    norm = kv("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5)
    path.write_bytes(model(extra=[norm, *swaa_keys(**changed)]))
    with pytest.raises(EngineError, match=rf"model refused: {key}\b") as caught:
        engine.run(path, [])
    assert not isinstance(caught.value, EngineDied)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"swaa.version": 2}, "swaa.version"),
        ({"swaa.window_size": 0}, "swaa.window_size"),
        ({"swaa.window_size": -5}, "swaa.window_size"),
        ({"swaa.window_size": 2**40}, "swaa.window_size"),
        ({"swaa.window_size": 7.0}, "swaa.window_size"),
        ({"swaa.sink_count": -1}, "swaa.sink_count"),
        ({"swaa.sink_count": True}, "swaa.sink_count"),
        ({"swaa.tail_count": -1}, "swaa.tail_count"),
        ({"swaa.tail_count": "128"}, "swaa.tail_count"),
        ({"swaa.sliding_layers": "111"}, "swaa.sliding_layers"),
        ({"swaa.sliding_layers": "11112"}, "swaa.sliding_layers"),
        ({"swaa.sliding_layers": "11a1"}, "swaa.sliding_layers"),
        ({"swaa.sliding_layers": 1}, "swaa.sliding_layers"),
        ({"swaa.fa_decode_layers": ""}, "swaa.fa_decode_layers"),
        ({"swaa.enabled": 0}, "swaa.enabled"),
    ],
)
def test_wrong_overrides(engine, zoo, changed, key):
    with pytest.raises(EngineError, match=rf"model refused: {key}\b") as caught:
        engine.run(zoo.gguf("llama", LAYERS), [], RULE.overrides | changed)
    assert not isinstance(caught.value, EngineDied)


@pytest.mark.parametrize("policy", ["table", "copy"])
def test_a_policy_that_needs_flash_attention(engine, zoo, policy):
    with pytest.raises(EngineError, match=rf"context refused: .*{policy}.*flash attention"):
        engine.run(zoo.gguf("llama", LAYERS), [], RULE.overrides, policy=policy, flash_attn=False)


def test_the_library_reports_its_configuration(engine, zoo):
    config = engine.run(zoo.gguf("llama", LAYERS), [], RULE.overrides | {"swaa.tail_count": 9}).config
    assert config["tail_count"] == 9
    assert engine.run(zoo.gguf("llama", LAYERS), [], RULE.overrides).config["tail_count"] == 0
    config = engine.run(zoo.gguf("llama", LAYERS), [], RULE.overrides).config
    assert (config["window_size"], config["sink_count"], config["sliding"]) == (RULE.window, RULE.sinks, RULE.sliding)
    assert config["fa_decode"] == RULE.fa_decode
    assert engine.run(zoo.gguf("llama", LAYERS), []).config is None


def test_windows_and_sinks_at_the_end_of_their_range(engine, zoo):
    # p - j < W and j < S must not overflow: all of these see everything.
    tokens = random_tokens(300)
    whole = oracle_logits(zoo.model("llama", LAYERS), tokens, [False] * 300, Rule.full(LAYERS))
    for window, sinks in ((2**31 - 1, 0), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1)):
        case = Case.parse(f"llama/4 W{window} S{sinks} s1111 d0000 f16 table b512 u97 t1 p300+0 unified explicit r0")
        [got] = engine.run(zoo.gguf("llama", LAYERS), [("decode", tokens_of(tokens))], case.overrides).logits
        close(got, whole)
