"""The reasons for which a stage of the GPU check ends early: an error, or the time limit.

raise CheckError("nvcc is not on PATH; CUDA's toolkit is needed, or --backend cpu")
"""

from __future__ import annotations

from typing import Any


class CheckError(Exception):
    """This machine lacks something or a step failed; the message is for the person who runs the check."""


class OutOfTime(Exception):
    """The time limit of this call has passed; `partial`, the stage's result so far, does not count as finished."""

    def __init__(self, partial: dict[str, Any] | None = None) -> None:
        super().__init__("out of time")
        self.partial = partial
