"""Removes steps from a failing session as long as it fails in the same way.

Steps contain positions and sequences, so most can be removed without invalidating the others, and a replay takes a
second or less. Hypothesis' own shrinking of rules takes minutes.

Use: `message, steps = shrunk(lambda: Session(engine, zoo, setup), steps, message)`
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from support.reuse.session import Session


def shrunk(make: Callable[[], Session], steps: list[list], message: str, seconds: float = 60) -> tuple[str, list[list]]:
    """The message and steps of the shortest failure found within `seconds`."""
    deadline, size = time.monotonic() + seconds, len(steps) // 2
    while size:
        start, before = 0, len(steps)
        while start < len(steps) and time.monotonic() < deadline:
            left = steps[:start] + steps[start + size :]
            found = failure(make, left)
            if found and kind(found[0]) == kind(message):
                message, steps = found
            else:
                start += size
        size = size // 2 if len(steps) == before or size > 1 else size
    return message, steps


def failure(make: Callable[[], Session], steps: list[list]) -> tuple[str, list[list]] | None:
    """The failure of these steps: its message and the steps up to it; None if they pass or cannot be taken."""
    session = make()
    try:
        session.replay(steps)
    except AssertionError as error:
        return str(error), list(session.steps)
    except (KeyError, ValueError, IndexError):
        return None
    finally:
        session.close()
    return None


def kind(message: str) -> str:
    """The line of the message that describes the failure, without its numbers."""
    return re.sub(r"[-\d.]+", "#", message.splitlines()[1])
