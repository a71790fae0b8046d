"""Ctrl-C stops a model within one ubatch, even during a C call. A stopped run keeps its results.

with interruptible(llm): llm.eval(tokens)
with ends_early(report, lambda: journal.records): measure(report)
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

from swaa_edge.errors import GenerationCancelled, SwaaError

#: Why a run ended early: "interrupted" or an error. None means that the run is complete.
Stopped = SwaaError | Literal["interrupted"] | None


class Cancellable(Protocol):
    def cancel(self) -> None: ...


@contextlib.contextmanager
def interruptible(llm: Cancellable) -> Iterator[None]:
    """Within this block, Ctrl-C cancels `llm` and raises KeyboardInterrupt. A second Ctrl-C has its usual effect.

    A C call can take seconds, and Python runs no signal handler during the call. So the interpreter writes the number
    of each signal into a socket at once, and a thread reads the socket.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    pressed = threading.Event()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch() -> None:
        while number := ours.recv(1):
            if number[0] == signal.SIGINT:
                llm.cancel()

    def stop(number: int, frame: Any) -> None:
        # Don't raise here: inside llama.cpp's logging callback, an exception would be lost.
        pressed.set()
        llm.cancel()
        signal.signal(signal.SIGINT, before)

    watcher = threading.Thread(target=watch, daemon=True)
    wakeup = signal.set_wakeup_fd(theirs.fileno())
    signal.signal(signal.SIGINT, stop)
    watcher.start()
    try:
        yield
    except GenerationCancelled:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup)
        theirs.close()
        watcher.join()
        ours.close()
    if pressed.is_set():
        raise KeyboardInterrupt


class Stoppable(Protocol):
    stopped: Stopped


@contextlib.contextmanager
def ends_early(report: Stoppable, has_results: Callable[[], object]) -> Iterator[None]:
    """End the block on Ctrl-C, or on a `SwaaError` if there are results. `report.stopped` gets the reason."""
    try:
        yield
    except KeyboardInterrupt:
        report.stopped = "interrupted"
    except SwaaError as error:
        if not has_results():
            raise
        report.stopped = error
