"""Scorers: which responses are correct, one by one."""

from array import array

import pytest

from swaa_edge.evaluate.samples import Sample
from swaa_edge.evaluate.scoring import SCORERS, final


def correct(scorer, answers, response):
    return SCORERS[scorer](Sample("a/1", "a", array("i"), tuple(answers)), response)


@pytest.mark.parametrize(
    "answers, response, found",
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
def test_contains(answers, response, found):
    assert correct("contains", answers, response) is found
    assert correct("in-order", answers, response) is found


@pytest.mark.parametrize(
    "response, any_order, ordered",
    [
        ("47 and 31", True, True),
        ("31 and 47", True, False),
        ("31, 47 and 31", True, True),
        ("47", False, False),
        ("4731", False, False),
    ],
)
def test_several_answers(response, any_order, ordered):
    assert correct("contains", ["47", "31"], response) is any_order
    assert correct("in-order", ["47", "31"], response) is ordered


def test_in_order_requires_an_answer_for_each():
    assert not correct("in-order", ["47", "47"], "both are 47") and correct("in-order", ["47", "47"], "47 and 47")


@pytest.mark.parametrize(
    "answers, response, found",
    [
        (["47"], " 47.\n", True),
        (["47"], "It is 47", False),
        (["Ann", "Bob"], "BOB", True),
        (["Ann", "Bob"], "Ann Bob", False),
        (["St. Paul."], "st.  paul", True),
        (["47"], "<think>31?</think>\n47", True),
    ],
)
def test_exact(answers, response, found):
    assert correct("exact", answers, response) is found


@pytest.mark.parametrize(
    "answers, response, found",
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
def test_regex(answers, response, found):
    assert correct("regex", answers, response) is found


def test_reasoning_is_not_part_of_the_response():
    assert final("<think>47? No.</think>\n\n 31 ") == "31"
    assert final("47?</think>a</think>b") == "b" and final(" 31\n") == "31"
    for scorer in SCORERS:
        assert not correct(scorer, ["47"], "<think>It is 47.</think>It is 31.")
