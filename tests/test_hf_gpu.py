"""SWAA in transformers on a GPU, where its attention is torch's flex attention, compiled: against the oracle, and what
memory it takes. Skipped without a CUDA card; on one, tests/test_finetune.py trains there, too.

    PYTHONPATH=. python3 -m pytest tests/test_hf_gpu.py tests/test_finetune.py
"""

import copy

import numpy as np
import pytest
import torch
from models import tiny_model
from oracle import Rule, oracle_logits
from test_hf import LAYERS, NAMED, RULE, adapted, config_of, error_of, padded, some_tokens

from swaa_edge import hf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
SEQUENCES, PROMPTS = (300, 41, 130), (211, 41, 1)
#: Block masks of flex attention come in 128 x 128: the window's edge in blocks of its own, and FA beside it.
WIDE = Rule(150, 3, RULE.sliding, RULE.fa_decode)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """No TF32, so that a wrong mask can't hide behind rounding."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")


def expected_of(arch: str, rule: Rule, sequences: list[list[int]]) -> list[np.ndarray]:
    plain = tiny_model(arch, seed=8, layers=LAYERS)
    flags = ([at >= prompt for at in range(len(s))] for s, prompt in zip(sequences, PROMPTS, strict=True))
    return [oracle_logits(plain, tokens, decode, rule) for tokens, decode in zip(sequences, flags, strict=True)]


@pytest.mark.parametrize("rule", [RULE, WIDE], ids=["W7", "W150"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", NAMED[:1] + NAMED[3:4])
def test_a_padded_batch_is_the_oracle(arch, side, rule):
    rng = np.random.default_rng(21)
    sequences = [some_tokens(rng, count) for count in SEQUENCES]
    tokens, mask = padded(sequences, side)
    model = adapted(arch, rule).cuda()
    with torch.no_grad():
        decode = hf.decode_mask(PROMPTS, mask).cuda()
        logits = model(tokens.cuda(), attention_mask=mask.cuda(), decode_mask=decode).logits.cpu()
    for row, expected in enumerate(expected_of(arch, rule, sequences)):
        assert error_of(logits[row][mask[row].bool()], expected) < 1e-3, row


def test_packed_sequences_are_the_oracle():
    rng = np.random.default_rng(22)
    sequences = [some_tokens(rng, count) for count in SEQUENCES]
    positions = torch.tensor([[p for s in sequences for p in range(len(s))]]).cuda()
    decode = [[p >= n for s, n in zip(sequences, PROMPTS, strict=True) for p in range(len(s))]]
    tokens = torch.tensor([[token for sequence in sequences for token in sequence]]).cuda()
    with torch.no_grad():
        asked = {"position_ids": positions, "decode_mask": torch.tensor(decode).cuda(), "use_cache": False}
        logits = adapted("qwen3", WIDE).cuda()(tokens, **asked).logits[0].cpu()
    start = 0
    for expected in expected_of("qwen3", WIDE, sequences):
        assert error_of(logits[start : start + len(expected)], expected) < 1e-3
        start += len(expected)


def test_gradients_are_those_of_a_mask():
    """Flex attention's backward pass on the card against scaled dot-product attention's on the CPU."""
    rng = np.random.default_rng(23)
    tokens, mask = padded([some_tokens(rng, count) for count in SEQUENCES], "right")
    found = []
    for device, attention in (("cpu", "swaa_sdpa"), ("cuda", "swaa_flex")):
        model = adapted("qwen3", WIDE, attention).to(device).train()
        asked = {"attention_mask": mask.to(device), "decode_mask": hf.decode_mask(PROMPTS, mask).to(device)}
        labels = tokens.masked_fill(mask == 0, -100).to(device)
        model(tokens.to(device), labels=labels, **asked).loss.backward()
        found.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    cpu, gpu = found
    assert cpu.keys() == gpu.keys() and len(cpu) > 20
    for name, wanted in cpu.items():
        assert (gpu[name] - wanted).norm() < 1e-3 * wanted.norm(), name


def test_generating_is_what_the_cpu_generates():
    rng = np.random.default_rng(24)
    tokens, mask = padded([some_tokens(rng, count) for count in SEQUENCES], "left")
    told = []
    for device in ("cpu", "cuda"):
        model = adapted("qwen3", WIDE).to(device)
        asked = {"attention_mask": mask.to(device), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        told.append(model.generate(tokens.to(device), **asked).cpu())
    assert torch.equal(*told)


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
