"""What a SwaaLlama takes of memory: as little as its context needs, and nothing once it is closed.

Each measurement has a process of its own, since a process keeps what it once had.
"""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.native

MIB = 1 << 20

PRELUDE = """
import ctypes, gc, json, sys
from swaa_edge import SwaaConfig, SwaaLlama

def resident():
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def load(**arguments):
    settings = {"swaa": SwaaConfig(24, 2), "n_batch": 32, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}
    return SwaaLlama(sys.argv[1], **{"verbose": False} | settings | arguments)
"""


def run(path, code):
    done = subprocess.run([sys.executable, "-c", f"{PRELUDE}\n{code}", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def path(gguf_model):
    return str(gguf_model("qwen3", layers=4))


@pytest.fixture
def measure(path):
    """measure(code): what `code`, run after PRELUDE, leaves in `result`."""
    if not sys.platform.startswith("linux"):
        pytest.skip("resident memory is read from /proc")

    return lambda code: json.loads(run(path, f"{code}\nprint(json.dumps(result))").stdout)


def test_a_long_context_on_a_ring_costs_little(measure):
    code = """
llm = load(n_ctx={n_ctx})
llm.eval(list(range(10, 300)))
result = [resident(), llm.kv_bytes]
"""
    short, long = (measure(code.format(n_ctx=n_ctx)) for n_ctx in (1024, 128 * 1024))
    assert long[1] == short[1]  # K and V are those of the ring
    # A list of cells, and the tokens. Rows of n_ctx logits alone would be 384 MiB.
    assert long[0] - short[0] < 40 * MIB


def test_logits_of_all_tokens_only_on_request(measure):
    code = """
llm = load(n_ctx=32 * 1024, n_batch=2048, logits_all={every})
result = [resident(), llm.scores.shape, llm.scores.nbytes if llm.scores.strides[0] else 0]
"""
    one, every = (measure(code.format(every=every)) for every in (False, True))
    assert one[1] == every[1] == [32 * 1024, 768]
    assert (one[2], every[2]) == (0, 32 * 1024 * 768 * 4)
    assert one[0] < every[0] + 16 * MIB  # of the large array, pages that are never written are not resident


@pytest.mark.parametrize("fa_layers", [[], [1]])
@pytest.mark.parametrize("fa_decode", [False, [0, 2], True])
def test_what_is_reserved_is_enough(path, fa_layers, fa_decode):
    """While the prompt is shorter than the window and later, in prefill and decode, buffers keep the size they had."""
    code = f"""
swaa = SwaaConfig(1900, 20, fa_layers={fa_layers}, fa_decode={fa_decode})
llm = load(swaa=swaa, n_ctx=4096, n_batch=64, n_ubatch=64, verbose=True)
next(llm.generate([7 + i % 700 for i in range(2500)], temp=0))
next(llm.generate([7 + i % 700 for i in range(2600)], temp=0))
llm.close()
"""
    said = run(path, code).stderr
    assert "compute buffer size is" in said and "does not match expectation" not in said


@pytest.mark.parametrize("failing", [False, True])
def test_opening_and_closing_again_and_again(measure, failing):
    code = f"""
def cycle():
    if {failing}:
        try:
            load(n_ctx=512, rope_scaling_type=-1, type_v=8, flash_attn=False)
        except Exception:
            return
        raise SystemExit("that should have failed")
    llm = load(n_ctx=2048)
    llm.eval(list(range(10, 400)))
    llm.load_state(llm.save_state())
    llm.close()
    llm.close()

result = []
for part in range(3):
    for _ in range(15):
        cycle()
    result.append(resident())
"""
    first, middle, last = measure(code)
    # One model with its context has over 6 MiB. What the first cycles leave behind is caches of the libraries.
    assert last - middle < 1.5 * MIB, f"{(last - middle) / 15 / 1024:.0f} KiB more with each cycle"
    assert middle - first < 6 * MIB


def test_nothing_works_after_a_close(path):
    from swaa_edge import SwaaConfig, SwaaLlama
    from swaa_edge.errors import GenerationError

    llm = SwaaLlama(path, swaa=SwaaConfig(24, 2), n_ctx=512, verbose=False)
    llm.eval([7, 8, 9])
    state = llm.save_state()
    llm.close()
    uses = [
        lambda: llm.eval([7]),
        lambda: llm.load_state(state),
        lambda: llm.kv_bytes,
        lambda: llm.tokenize(b"text"),
        lambda: llm.detokenize([7]),
        lambda: llm.create_completion("text"),
        lambda: llm.create_chat_completion([{"role": "user", "content": "text"}]),
        lambda: next(llm.generate([7])),
        lambda: llm.embed("text"),
        *(llm.save_state, llm.shift, llm.n_ctx, llm.n_vocab, llm.token_eos),
    ]
    for use in uses:
        with pytest.raises(GenerationError, match="this model is closed; load it again"):
            use()
    assert llm.scores.nbytes == llm.input_ids.nbytes == 0
