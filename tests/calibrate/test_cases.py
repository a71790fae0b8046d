"""Cases of a calibration: windows of a text."""

import pytest

from swaa_edge.calibrate.cases import from_text
from swaa_edge.errors import ConfigError


def test_windows_of_a_text():
    cases, apart = from_text(range(100, 200), head=[1], length=11, answer=3, count=2)
    assert [(case.id, case.prompt, case.answer) for case in cases] == [
        ("text/0", (1, *range(100, 107)), (107, 108, 109)),
        ("text/50", (1, *range(150, 157)), (157, 158, 159)),
    ]
    assert apart == []
    cases, apart = from_text(range(100, 135), length=10, answer=3, count=9, held_out=True)
    assert [case.id for case in cases] == ["text/0"] and [case.id for case in apart] == ["text/10"]
    cases, apart = from_text(range(1000), length=10, answer=3, count=3, held_out=True)
    starts = [int(case.id.removeprefix("text/")) for case in [*cases, *apart]]
    assert len(cases) == len(apart) == 3 and len(set(starts)) == 6 and all(s % 10 == 0 for s in starts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 51}, "the text has 50 tokens, too few for 1 window of 51; give a longer text or shorter windows"),
        ({"length": 26, "held_out": True}, "the text has 50 tokens, too few for 2 windows of 26; give a longer"),
        ({"length": 20, "answer": 20}, "answer_tokens = 20 must be from 1 to 19 in windows of 20"),
        ({"length": 20, "answer": 0}, "answer_tokens = 0 must be from 1 to 19 in windows of 20"),
    ],
)
def test_a_text_that_is_too_short(arguments, message):
    with pytest.raises(ConfigError, match=message):
        from_text(range(50), **{"answer": 5, "count": 4} | arguments)
