"""Fixtures on a tiny SwaaLlama whose ring is small, so that it forgets after a few hundred tokens.

Layer 1 of 4 keeps full attention, the others slide over 24 tokens and 2 sinks, and none decodes with full attention:
then what was computed doesn't depend on phases, and a model that evaluates everything at once is the reference.

"""

import itertools
import random

import numpy as np
import pytest

from swaa_edge import native
from swaa_edge.config import SwaaConfig

RING = SwaaConfig(24, 2, fa_layers=[1])
#: All layers slide and decode with full attention: here phases change the logits.
SLIDING = SwaaConfig(8, 1, fa_decode=True)
VOCAB, UBATCH, RING_CELLS = 768, 32, 256


def text(seed, count):
    """`count` random tokens, without the special ones."""
    generator = random.Random(seed)
    return [generator.randrange(6, VOCAB) for _ in range(count)]


PROMPT = text(1, 300)
SHORT_PROMPT = [5 + 37 * i % 700 for i in range(65)]  # two batches of 32 and one token


def tokens_of(llm, prompt, count):
    return list(itertools.islice(llm.generate(prompt, temp=0), count))


def last_logits(llm):
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(VOCAB,)).copy()


def close(found, expected):
    """Whether two rows of logits differ by rounding only: f16 K and V, and sums in another order."""
    return np.abs(found - expected).max() < 0.02 * expected.std()


def reused(llm, prompt):
    """Tokens of `prompt` that were not evaluated again, according to the timings."""
    timings = llm.last_timings
    assert timings.reused_tokens + timings.prompt_tokens == len(prompt)
    return timings.reused_tokens


def raw_logits(llm, *parts):
    """Logits after the last of `parts` (phase, tokens), each one llama_decode, without SwaaLlama.eval."""
    llm._ctx.kv_cache_clear()
    past = 0
    for phase, tokens in parts:
        native.set_decode_from(llm.ctx, {"AUTO": native.AUTO, "PREFILL": native.NEVER, "DECODE": 0}[phase])
        llm._batch.set_batch(batch=tokens, n_past=past, logits_all=False)
        llm._ctx.decode(llm._batch)
        past += len(tokens)
    native.set_decode_from(llm.ctx, native.AUTO)
    return last_logits(llm)


@pytest.fixture(scope="module")
def path(gguf_model):
    return str(gguf_model("qwen3", layers=4))


@pytest.fixture
def load(path):
    """load(**arguments): a SwaaLlama of the tiny model on its ring; closed when the test ends."""
    from swaa_edge import SwaaLlama

    made = []

    def make(model=path, **arguments):
        settings = {"n_ctx": 1024, "n_batch": UBATCH, "n_ubatch": UBATCH, "n_threads": 1, "n_threads_batch": 1}
        made.append(SwaaLlama(model, **{"swaa": RING, "verbose": False} | settings | arguments))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def cold(load):
    """cold(tokens): logits after tokens that a fresh cache without a ring evaluates as one prompt."""
    reference = load(swa_full=True)

    def logits(tokens):
        reference.reset()
        reference.eval(tokens)
        return last_logits(reference)

    return logits


@pytest.fixture
def decoded(monkeypatch):
    """The llama_decode calls so far: a list of (phase, tokens in the batch).

    The phase is "PREFILL" or "DECODE" if all tokens lie on one side of the decode boundary, "AUTO" if none is set, and
    else the number of decode tokens.
    """
    native.load()
    from llama_cpp._internals import LlamaContext

    calls, boundary = [], [native.AUTO]
    set_decode_from, decode = native.set_decode_from, LlamaContext.decode

    def spied_boundary(context, position):
        set_decode_from(context, position)
        boundary[0] = position

    def spied_decode(self, batch):
        n = batch.n_tokens()
        after = sum(batch.batch.pos[i] >= boundary[0] for i in range(n))
        phase = "AUTO" if boundary[0] == native.AUTO else {0: "PREFILL", n: "DECODE"}.get(after, after)
        calls.append((phase, n))
        decode(self, batch)

    monkeypatch.setattr(native, "set_decode_from", spied_boundary)
    monkeypatch.setattr(LlamaContext, "decode", spied_decode)
    return calls
