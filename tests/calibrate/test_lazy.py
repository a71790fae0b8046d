"""The visible fraction of each layer's attention against transformers."""

import numpy as np
import pytest

from swaa_edge import SwaaConfig
from swaa_edge.calibrate.cases import Case


def random_tokens(count, seed):
    return tuple(np.random.default_rng(seed).integers(6, 768, count).tolist())


@pytest.mark.native
def test_fractions_match_the_reference(load):
    import torch

    from support import models
    from support.oracle.oracle import attention_modules, forward_with
    from swaa_edge.calibrate.lazy import QUERIES, visible_attention

    model = models.tiny_model("qwen3", layers=4)
    swaa, cases = SwaaConfig(40, 3), [Case("a", random_tokens(200, 0), (7, 8)), Case("b", random_tokens(20, 1), (9,))]
    expected = np.zeros(4)
    for case in cases:
        tokens = [*case.prompt, *case.answer[:-1]]
        count, weights = len(tokens), {}

        def keep(module, _, output, weights=weights):
            weights[module.layer_idx] = output[1][0]

        hooks = [module.register_forward_hook(keep) for module in attention_modules(model)]
        place = torch.arange(count)
        forward_with(model, tokens, [place[:, None] >= place] * 4, place)
        for hook in hooks:
            hook.remove()
        for layer, probabilities in weights.items():  # [heads, queries, keys]
            seen = [
                [float(head[p, [j for j in range(p + 1) if p - j < 40 or j < 3]].sum()) for head in probabilities]
                for p in range(max(0, count - QUERIES), count)
            ]
            expected[layer] += np.mean(seen) / len(cases)
    found = visible_attention(load, swaa, 4, cases)
    assert found == pytest.approx(expected.tolist(), abs=2e-3)
    assert max(found) - min(found) > 0.005 and max(found) < 0.9, "layers differ by more than that"
