"""The oracle after a context shift: logits of tokens that follow after others left the cache.

shifted(model, tokens, (4, 20), more, n_decode, rule)
"""

import torch

from support.oracle.oracle import forward_with, visible


def shifted(model, tokens, removed, more, n_decode, rule):
    """Logits of `more`, fed after the tokens removed[0] to removed[1] - 1 left the cache and later keys moved down."""
    from transformers import DynamicCache

    def masks(positions, is_decode, n_rows):
        return [visible(positions, is_decode, rule, layer)[-n_rows:] for layer in range(len(rule.sliding))]

    start, end = removed
    n = len(tokens)
    cache, positions, is_decode = DynamicCache(), torch.arange(n), torch.zeros(n, dtype=torch.bool)
    forward_with(model, tokens, masks(positions, is_decode, n), positions, cache)
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[start - end]]))
    for layer in cache.layers:
        late = layer.keys[:, :, end:]
        half = late.shape[-1] // 2
        turned = late * cos[:, None] + torch.cat((-late[..., half:], late[..., :half]), dim=-1) * sin[:, None]
        layer.keys = torch.cat((layer.keys[:, :, :start], turned), dim=2)
        layer.values = torch.cat((layer.values[:, :, :start], layer.values[:, :, end:]), dim=2)
    kept = n - (end - start)
    positions = torch.arange(kept + len(more))
    is_decode = positions >= kept + len(more) - n_decode
    rows = len(more)
    return forward_with(model, more, masks(positions, is_decode, rows), positions[kept:], cache).numpy()
