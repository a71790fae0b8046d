"""Scorers: which replies are right, one by one."""

from array import array

import pytest

from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.scoring import SCORERS, final


def right(scorer, answers, reply):
    return SCORERS[scorer](Sample("a/1", "a", array("i"), tuple(answers)), reply)


@pytest.mark.parametrize(
    "answers, reply, found",
    [
        (["47"], " 47.", True),
        (["47"], "The code of fox is 47", True),
        (["47"], "It is 147.", False),
        (["47"], "It is 470.", False),
        (["47"], "fox47", False),
        (["47"], "(47)", True),
        (["47"], "", False),
        (["47"], "forty-seven", False),
        (["Ann Lee"], "it was ANN\n lee!", True),
        (["Ann Lee"], "it was Ann-Lee", False),
        (["Straße"], "die STRASSE", True),
        (["a.c"], "abc", False),
        (["C++"], "in C++, of course", True),
        (["47"], "答案是47。", True),
        (["北京"], "他住在北京市", True),
        (["서울"], "서울은 크다", True),
        (["kind"], "Kindergarten", False),
        (["été"], "un été", True),
        (["t"], "été", False),
    ],
)
def test_contains(answers, reply, found):
    assert right("contains", answers, reply) is found
    assert right("in-order", answers, reply) is found


@pytest.mark.parametrize(
    "reply, any_order, ordered",
    [
        ("47 and 31", True, True),
        ("31 and 47", True, False),
        ("31, 47 and 31", True, True),
        ("47", False, False),
        ("4731", False, False),
    ],
)
def test_several_answers(reply, any_order, ordered):
    assert right("contains", ["47", "31"], reply) is any_order
    assert right("in-order", ["47", "31"], reply) is ordered


def test_in_order_wants_an_answer_for_each():
    assert not right("in-order", ["47", "47"], "both are 47") and right("in-order", ["47", "47"], "47 and 47")


@pytest.mark.parametrize(
    "answers, reply, found",
    [
        (["47"], " 47.\n", True),
        (["47"], "It is 47", False),
        (["Ann", "Bob"], "BOB", True),
        (["Ann", "Bob"], "Ann Bob", False),
        (["St. Paul."], "st.  paul", True),
        (["47"], "<think>31?</think>\n47", True),
    ],
)
def test_exact(answers, reply, found):
    assert right("exact", answers, reply) is found


@pytest.mark.parametrize(
    "answers, reply, found",
    [
        ([r"\d{2}"], "it is 47", True),
        ([r"^\d{2}$"], "it is 47", False),
        ([r"^\d{2}$"], " 47\n", True),
        ([r"fox|owl", r"\d"], "owl 4", True),
        ([r"fox|owl", r"\d"], "owl", False),
        (["FOX"], "fox", False),
        (["(?i)FOX"], "fox", True),
    ],
)
def test_regex(answers, reply, found):
    assert right("regex", answers, reply) is found


def test_thinking_is_no_answer():
    assert final("<think>47? No.</think>\n\n 31 ") == "31"
    assert final("47?</think>a</think>b") == "b" and final(" 31\n") == "31"
    for scorer in SCORERS:
        assert not right(scorer, ["47"], "<think>It is 47.</think>It is 31.")
