"""What can end a stage of the GPU check early: something that is wrong or missing, or the time.

raise CheckError("nvcc is not on PATH; CUDA's toolkit is needed, or --backend cpu")
"""

from __future__ import annotations

from typing import Any


class CheckError(Exception):
    """Something this machine lacks or a step that failed, in words for whoever runs the check."""


class OutOfTime(Exception):
    """The time of this call is used up; what a stage has so far is `partial`, which counts as not done."""

    def __init__(self, partial: dict[str, Any] | None = None) -> None:
        super().__init__("out of time")
        self.partial = partial
