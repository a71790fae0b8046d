"""Lets Ctrl-C stop a model within one ubatch, even during a C call, and keeps the results so far of a stopped run.

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

#: What ended a run: None if it is complete, "interrupted", or an error.
Stopped = SwaaError | Literal["interrupted"] | None


class Cancellable(Protocol):
    def cancel(self) -> None: ...


@contextlib.contextmanager
def interruptible(llm: Cancellable) -> Iterator[None]:
    """Within this block, Ctrl-C cancels `llm` and raises KeyboardInterrupt; a second Ctrl-C has its usual effect.

    During a C call, Python runs no signal handler, and the call can take seconds. So the interpreter is set up to write
    the number of each signal into a socket as soon as the signal arrives, and a thread reads the socket.
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
        # An exception raised here could arise inside llama.cpp's logging callback and be lost.
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
    """End the block on Ctrl-C, or on a `SwaaError` if there are results; `report.stopped` gets the reason."""
    try:
        yield
    except KeyboardInterrupt:
        report.stopped = "interrupted"
    except SwaaError as error:
        if not has_results():
            raise
        report.stopped = error
