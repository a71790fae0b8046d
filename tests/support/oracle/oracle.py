"""The oracle: the logits of a SWAA model by definition, computed by transformers in fp32.

The engine finds live blocks, packs masks and splits batches; the oracle does none of that. It makes one forward pass
over the whole history, with a boolean matrix per layer that spells out the rule of the design. That is exact: K and V
of a token never change, and what a query sees depends only on its position, the key's position and its own decode flag.

Use: `oracle_logits(model, tokens, is_decode, Rule(window=31, sinks=4, sliding=(True, False), fa_decode=(True, False)))`
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from support.oracle.rule import Rule

ATTENTION_NAME = "swaa_oracle"


def visible(positions: torch.Tensor, is_decode: torch.Tensor, rule: Rule, layer: int) -> torch.Tensor:
    """The keys that each query sees in one layer.

    positions: int64 [T], the place of each token in its sequence; is_decode: bool [T], true where the token was
    generated and fed back. Returns bool [T, T]: row = query, column = key.
    """
    p, j = positions[:, None], positions[None, :]
    causal = j <= p
    if not rule.sliding[layer]:
        return causal
    whole_history = is_decode[:, None] & torch.tensor(rule.fa_decode[layer])
    return causal & ((p - j < rule.window) | (j < rule.sinks) | whole_history)


def masked_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain softmax attention under `module.oracle_visible`, in the call shape transformers expects.

    query [B, H, Q, D]; key, value [B, H_kv, K, D]; oracle_visible bool [Q, K]. Returns ([B, Q, H, D], weights).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * scaling
    scores = scores.masked_fill(~module.oracle_visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    module.oracle_calls += 1
    return (weights @ value).transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, masked_attention)


def attention_modules(model) -> list[torch.nn.Module]:
    """The attention module of each layer, in layer order; ValueError if there isn't exactly one for every layer."""
    found = {
        m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")
    }
    n_layers = model.config.num_hidden_layers
    if sorted(found) != list(range(n_layers)):
        raise ValueError(f"attention modules of layers {sorted(found)}, expected 0 to {n_layers - 1}")
    return [found[i] for i in range(n_layers)]


def forward_with(model, tokens: Sequence[int], masks: Sequence[torch.Tensor], positions: torch.Tensor, cache=None):
    """One forward pass with the mask given per layer. tokens: [Q]; masks: per layer bool [Q, K]; positions: [Q].

    Returns logits, float32 [Q, vocab]. RuntimeError if any layer didn't attend through the mask exactly once.
    """
    layers = attention_modules(model)
    if len(masks) != len(layers):
        raise ValueError(f"{len(masks)} masks for {len(layers)} layers")
    model.set_attn_implementation(ATTENTION_NAME)
    for module, mask in zip(layers, masks, strict=True):
        module.oracle_visible, module.oracle_calls = mask, 0
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=cache is not None,
        )
    calls = [module.oracle_calls for module in layers]
    if calls != [1] * len(layers):
        raise RuntimeError(f"the oracle's attention ran {calls} times per layer, expected once in each")
    return out.logits[0].float()


def oracle_logits(
    model, tokens: Sequence[int], is_decode: Sequence[bool], rule: Rule, positions: Sequence[int] | None = None
) -> np.ndarray:
    """Logits of one sequence after each of its tokens.

    model: a transformers causal LM, fp32, eval mode. tokens, is_decode, positions: [T]; positions default to 0..T-1.
    Returns float32 [T, vocab].
    """
    place = torch.arange(len(tokens)) if positions is None else torch.tensor(list(positions))
    decode = torch.tensor(list(is_decode), dtype=torch.bool)
    # Layers with the same flags share one matrix.
    made: dict[tuple[bool, bool], torch.Tensor] = {}
    masks = []
    for layer, flags in enumerate(zip(rule.sliding, rule.fa_decode, strict=True)):
        if flags not in made:
            made[flags] = visible(place, decode, rule, layer)
        masks.append(made[flags])
    return forward_with(model, tokens, masks, place).numpy()
