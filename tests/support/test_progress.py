"""The progress line, by its exact text."""

import io
import itertools

import pytest

from swaa_edge.support.progress import PrefillProgress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, reports, **options):
    """What the reports (seconds, done, total) print into `stream`."""
    times = iter([seconds for seconds, _, _ in reports])
    progress = PrefillProgress(stream, clock=lambda: next(times), **options)
    for _, done, total in reports:
        progress(done, total)
    return stream.getvalue()


REPORTS = [(10.0, 0, 2000), (10.5, 500, 2000), (12.0, 1000, 2000), (14.0, 2000, 2000)]


def test_a_log_gets_a_line_per_report():
    assert shown(io.StringIO(), REPORTS) == (
        "prefill 0/2,000 tokens\n"
        "prefill 500/2,000 tokens, 1,000 tok/s, 2 s left\n"
        "prefill 1,000/2,000 tokens, 500 tok/s, 2 s left\n"
        "prefill 2,000 tokens in 4.0 s (500 tok/s)\n"
    )


def test_a_terminal_gets_one_line_rewritten():
    written = shown(Terminal(), REPORTS)
    assert written.count("\n") == 1 and written.endswith("\n")
    lines = written.rstrip("\n").split("\r")[1:]
    assert [line.rstrip() for line in lines] == shown(io.StringIO(), REPORTS).splitlines()
    # Each line covers the one before.
    assert all(len(line) >= len(before.rstrip()) for before, line in itertools.pairwise(lines))


def test_a_transient_line_leaves_nothing_behind():
    written = shown(Terminal(), REPORTS, transient=True)
    assert "\n" not in written and written.endswith(" \r")
    *_, last, empty = written.split("\r")
    assert not last.strip() and not empty


def test_the_speed_is_that_of_the_last_reports():
    # Full attention slows down: 100 tokens a second at first, 10 in the end.
    reports = [(float(i), i * 100, 10_000) for i in range(10)]
    reports += [(9.0 + i * 10, 900 + i * 100, 10_000) for i in range(1, 9)]
    last = shown(io.StringIO(), reports).splitlines()[-1]
    assert last == "prefill 1,700/10,000 tokens, 10 tok/s, 13 min 50 s left"


def test_an_interrupted_line_is_ended():
    stream = Terminal()
    progress = PrefillProgress(stream, clock=lambda: 0.0)
    progress(0, 100)
    progress.close()
    progress.close()
    assert stream.getvalue() == "\rprefill 0/100 tokens\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
