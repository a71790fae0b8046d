"""SWAA in transformers on a GPU, where its attention is torch's flex attention, compiled: against the oracle, and what
memory it takes. Skipped without a CUDA card; on one, tests/finetune/test_train.py trains there, too.

    PYTHONPATH=. python3 -m pytest tests/test_hf_gpu.py tests/finetune/test_train.py
"""

import copy

import numpy as np
import pytest
import torch

from support.models import tiny_model
from support.oracle.oracle import Rule
from support.oracle.transformers_swaa import (
    LAYERS,
    RULE,
    adapted,
    check_batch,
    check_packed,
    config_of,
    padded,
    some_tokens,
)
from swaa_edge import hf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
SEQUENCES, PROMPTS = (300, 41, 130), (211, 41, 1)
#: Block masks of flex attention come in 128 x 128: the window's edge in blocks of its own, and FA beside it.
WIDE = Rule(150, 3, RULE.sliding, RULE.fa_decode)


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32, so that a wrong mask can't hide behind rounding."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("rule", "tail"), [(RULE, 0), (WIDE, 20)], ids=["W7", "W150-T20"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_padded_batch_is_the_oracle(arch, side, rule, tail):
    check_batch(arch, rule, side, seed=21, train=False, lengths=(41, 400), device="cuda", limit=1e-3, tail=tail)


def test_packed_sequences_are_the_oracle():
    check_packed(WIDE, SEQUENCES, PROMPTS, device="cuda", limit=1e-3, tail=20)


def test_gradients_are_those_of_a_mask():
    """Flex attention's backward pass on the card against scaled dot-product attention's on the CPU."""
    rng = np.random.default_rng(23)
    tokens, mask = padded([some_tokens(rng, count) for count in SEQUENCES], "right")
    found = []
    for device, attention in (("cpu", "swaa_sdpa"), ("cuda", "swaa_flex")):
        model = adapted("qwen3", WIDE, attention).to(device).train()
        arguments = {"attention_mask": mask.to(device), "decode_mask": hf.decode_mask(PROMPTS, mask).to(device)}
        labels = tokens.masked_fill(mask == 0, -100).to(device)
        model(tokens.to(device), labels=labels, **arguments).loss.backward()
        found.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    cpu, gpu = found
    assert cpu.keys() == gpu.keys() and len(cpu) > 20
    for name, expected in cpu.items():
        assert (gpu[name] - expected).norm() < 1e-3 * expected.norm(), name


def test_generating_is_what_the_cpu_generates():
    rng = np.random.default_rng(24)
    tokens, mask = padded([some_tokens(rng, count) for count in SEQUENCES], "left")
    generated = []
    for device in ("cpu", "cuda"):
        model = adapted("qwen3", WIDE, tail=20).to(device)
        arguments = {"attention_mask": mask.to(device), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        generated.append(model.generate(tokens.to(device), **arguments).cpu())
    assert torch.equal(*generated)


def test_training_memory_grows_with_the_length_not_with_its_square():
    model = copy.deepcopy(tiny_model("qwen3", seed=8, layers=LAYERS)).cuda().bfloat16().train()
    rule = Rule(1024, 16, (True, False, True, True), (False,) * LAYERS)
    hf.apply(model, config_of(rule))
    peaks = []
    for length in (8192, 8192, 16384, 32768):  # the first compiles
        tokens = torch.randint(6, 768, (1, length), device="cuda")
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # A boolean mask would take a gigabyte at 32k, for each kind of layer.
    assert peaks[3] < 2.2 * peaks[2] < 2.2**2 * peaks[1], peaks
