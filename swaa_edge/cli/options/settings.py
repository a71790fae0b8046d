"""Makes a click option for a field of a settings class.

setting = functools.partial(setting_option, CalibrateSettings)
@setting("--seed", int, "N", "Seed of the retrieval tasks.")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def setting_option(settings: type, flag: str, kind: Any, metavar: str | None, text: str) -> Callable[..., Any]:
    """Return a click option for a field of `settings`. The option has the field's default value.

    flag: name of the option, such as --seed. The field has the same name.
    kind: click type of the option.
    text: help text, without the default value.
    """
    default = getattr(settings, flag.removeprefix("--").replace("-", "_"))
    shown = (
        ",".join(part if isinstance(part, str) else f"{part:g}" for part in default)
        if isinstance(default, tuple)
        else default
    )
    return click.option(flag, type=kind, metavar=metavar, default=shown, show_default=shown is not None, help=text)
