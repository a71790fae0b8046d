"""Which tokens a context shift forgets, and whether the rest can go on without them.

A shift drops tokens after the first ones and moves the rest down, so that a full context has room again. Positions
change, K and V stay as computed. In a ring it works as long as what the next token will see is still held.

    n_keep, n_discard = plan_shift(llm.ctx, llm.swaa, llm.n_tokens, None, None)
"""

from __future__ import annotations

from swaa_edge import native
from swaa_edge.config import SwaaConfig
from swaa_edge.errors import GenerationError


def plan_shift(
    context: int, swaa: SwaaConfig | None, n_tokens: int, n_keep: int | None, n_discard: int | None
) -> tuple[int, int]:
    """`n_keep` and `n_discard` with their defaults, for sequence 0 of a `llama_context *` with `n_tokens` tokens.

    Raises `GenerationError` for what can't be done.
    """
    sinks = swaa.sink_count if swaa else 0
    n_keep = max(sinks, 1) if n_keep is None else n_keep
    rest = n_tokens - n_keep
    if n_tokens < 3 or not 0 <= n_keep <= n_tokens - 2:
        raise GenerationError(
            f"n_keep = {n_keep} leaves nothing to forget of {n_tokens} tokens; at least 2 must follow"
        )
    n_discard = rest // 2 if n_discard is None else n_discard
    if not 0 < n_discard < rest:
        raise GenerationError(
            f"n_discard = {n_discard} must be from 1 to {rest - 1}: {rest} of {n_tokens} tokens follow"
        )
    if swaa and not _can_go_on(context, swaa, n_tokens, n_keep, n_discard):
        raise GenerationError(
            f"the ring has forgotten what would come into view after a shift by {n_discard} with n_keep = {n_keep}; "
            f"keep {sinks} and discard fewer, or load the model with swa_full=True"
        )
    return n_keep, n_discard


def _can_go_on(context: int, swaa: SwaaConfig, n_tokens: int, n_keep: int, n_discard: int) -> bool:
    """Whether the ring holds all that the next token sees after the shift, at the positions they have before it."""
    end = n_tokens - n_discard
    # What moves down into the window was in the window. New to it is what stays and is no sink; new among the sinks,
    # what moves down there because fewer are kept.
    return native.holds(context, 0, end - swaa.window_size + 1, n_keep) and native.holds(
        context, 0, n_keep + n_discard, min(swaa.sink_count, end) + n_discard
    )
