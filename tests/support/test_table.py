"""Tables, by their exact text."""

from swaa_edge.support.table import table


def test_the_first_column_is_left_and_the_others_are_right():
    rows = [["config", "tok/s", "note"], ["full", "1,234.5", ""], None, ["a", "9", "yes"]]
    assert table(rows) == "config    tok/s  note\nfull    1,234.5\n\na             9   yes"
    assert table(rows, left=0) == "config    tok/s  note\n  full  1,234.5\n\n     a        9   yes"
    assert table(iter([["a", "b"], ["ccc", "ddd"]]), left=2) == "a    b\nccc  ddd"
    assert table([]) == ""
