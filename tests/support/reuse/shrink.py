"""Leaves steps out of a failing session, as long as it still fails in the same way.

Steps name positions and sequences outright, so most of them can go without making the others senseless, and a replay
takes a second or less. Hypothesis' own shrinking of rules takes minutes.

Use: `message, steps = shrunk(lambda: Session(engine, zoo, setup), steps, message)`
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from support.reuse.session import Session


def shrunk(make: Callable[[], Session], steps: list[list], message: str, seconds: float = 60) -> tuple[str, list[list]]:
    """The last failure's message and its steps, which are as few as `seconds` allow."""
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
    """How these steps fail, with the steps up to there; None if they don't or can't be taken."""
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
    """The line that says what is wrong, without its numbers."""
    return re.sub(r"[-\d.]+", "#", message.splitlines()[1])
