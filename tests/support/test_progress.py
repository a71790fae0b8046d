"""Progress, by the exact text of a log and by what stands on a terminal."""

import contextlib
import io
import os
import re
import sys
import types

import pytest

from swaa_edge.support import progress as module
from swaa_edge.support.progress import PrefillProgress, Progress, byte_bar, duration, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds, that both tqdm and this package see; a test moves it."""
    import tqdm.std

    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr(tqdm.std.tqdm, "monitor_interval", 0)
    return now


@pytest.fixture
def terminal(monkeypatch, clock):
    # The module's own sys: pytest replaces the real stderr between a fixture and its test.
    stream = Terminal()
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stream))
    return stream


def lines(stream):
    """What a terminal showed, one after the other; bars without their blocks."""
    return [re.sub(r"\|.*\|", "|", line).rstrip() for line in re.split(r"[\r\n]+", stream.getvalue()) if line.strip()]


def test_a_log_gets_a_line_whenever_the_text_changes(monkeypatch):
    monkeypatch.setattr(module.sys, "stderr", io.StringIO())
    with progress_bar(True) as show:
        for at, text in enumerate(["full", "full", "quality", "full"]):
            show(Progress(at, 4, text))
    assert module.sys.stderr.getvalue() == "full\nquality\nfull\n"


@pytest.mark.parametrize(("wanted", "stream"), [(None, io.StringIO()), (False, Terminal())])
def test_progress_that_nobody_sees_is_off(monkeypatch, wanted, stream):
    monkeypatch.setattr(module.sys, "stderr", stream)
    with progress_bar(wanted) as show:
        assert show is None
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_time_left(terminal, clock):
    with progress_bar(None) as show:
        show(Progress(0, 4, "full"))
        clock[0] += 10
        show(Progress(1, 4, "full"))
        clock[0] += 10
        show(Progress(2, 4, "quality"))
    seen = lines(terminal)
    assert seen[0] == "full   0%| ? left" and "full  25%| 00:30 left" in seen
    assert seen[-1] == "quality  50%| 00:20 left"
    assert terminal.getvalue().endswith("\r")  # nothing of it stays


def test_the_time_left_is_that_of_this_run_s_work(terminal, clock):
    with progress_bar(None) as show:
        show(Progress(90, 100, "a"))
        clock[0] += 10
        show(Progress(91, 111, "a"))
    assert lines(terminal)[-1] == "a  82%| 03:20 left"


def test_a_total_may_shrink_and_done_may_fall(terminal, clock):
    with progress_bar(None) as show:
        for done, total in [(0, 10), (5, 10), (4, 8), (8, 8)]:
            clock[0] += 1
            show(Progress(done, total, "a"))
    assert [line.split("|")[0] for line in lines(terminal)] == ["a   0%", "a  50%", "a 100%"]


def test_bytes_have_a_bar_on_a_terminal_only(terminal, clock, monkeypatch):
    with byte_bar("Writing") as show:
        show(0, 4_000_000)
        clock[0] += 2
        show(3_000_000, 4_000_000)
    assert lines(terminal)[-1].startswith("Writing:  75%| 3.00M/4.00M [00:02<00:00, ")
    monkeypatch.setattr(module.sys, "stderr", io.StringIO())
    with byte_bar("Writing") as show:
        assert show is None


def prefill(stream, clock, **options):
    progress = PrefillProgress(stream, **options)
    for seconds, done in [(0, 0), (0.5, 500), (1.5, 1000), (2, 2000)]:
        clock[0] += seconds
        progress(done, 2000)
    return stream.getvalue()


def test_a_log_gets_a_line_per_ubatch_of_a_prefill(clock):
    assert prefill(io.StringIO(), clock) == (
        "prefill 0/2,000 tokens\n"
        "prefill 500/2,000 tokens\n"
        "prefill 1,000/2,000 tokens\n"
        "prefill 2,000 tokens in 4.0 s (500 tok/s)\n"
    )


def test_a_terminal_gets_a_bar_and_then_the_total(clock):
    stream = Terminal()
    assert prefill(stream, clock).endswith("\rprefill 2,000 tokens in 4.0 s (500 tok/s)\n")
    assert any("1000/2000" in line for line in stream.getvalue().split("\r"))


def test_a_transient_bar_leaves_nothing_behind(clock):
    written = prefill(Terminal(), clock, transient=True)
    assert "\n" not in written and "1000/2000" in written and written.endswith("\r")
    assert not written.split("\r")[-2].strip()


@pytest.mark.parametrize(("columns", "width"), [(0, 79), (40, 39)])
def test_a_bar_fits_its_terminal_even_if_the_size_is_unknown(clock, monkeypatch, columns, width):
    stream = Terminal()
    stream.fileno = lambda: 2
    monkeypatch.setattr(module.os, "get_terminal_size", lambda fd: module.os.terminal_size((columns, 24)))
    progress = PrefillProgress(stream)
    progress(0, 100)
    assert len(stream.getvalue().strip("\r")) == width
    progress.close()


def test_a_terminal_without_a_size_shows_the_bar():
    pty = pytest.importorskip("pty")
    child, end = pty.fork()
    if child == 0:
        code = "import sys; from swaa_edge.support.progress import PrefillProgress; PrefillProgress(sys.stderr)(0, 7)"
        os.execv(sys.executable, [sys.executable, "-c", code])
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the end of the child so
        while part := os.read(end, 4096):
            shown += part
    os.waitpid(child, 0)
    os.close(end)
    assert b"0/7" in shown


def test_an_interrupted_bar_is_removed(clock):
    stream = Terminal()
    progress = PrefillProgress(stream)
    progress(0, 100)
    progress.close()
    progress.close()
    assert not stream.getvalue().split("\r")[-2].strip()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
