"""An option that takes several numbers.

click.option("--prompt-tokens", type=Numbers(int, 16, 2**31 - 1, "4096,8192"))
"""

from __future__ import annotations

from typing import Any

import click


class Numbers(click.ParamType):
    """Comma-separated numbers of type `kind`, from `least` to `most`."""

    def __init__(self, kind: type, least: float, most: float, example: str) -> None:
        self.name, self._kind, self._least, self._most, self._example = "numbers", kind, least, most, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        try:
            numbers = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(self._least <= number <= self._most for number in numbers):
            self.fail(f"{value!r} must be numbers from {self._least} to {self._most}, as in {self._example}")
        return tuple(dict.fromkeys(numbers))
