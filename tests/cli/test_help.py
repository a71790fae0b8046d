"""docs/help.md is what the commands print."""

from support import ROOT
from swaa_edge.cli import COMMANDS
from swaa_edge.cli.help import page

PAGE = ROOT / "docs" / "help.md"


def test_the_page_is_up_to_date():
    assert page() == PAGE.read_text(encoding="utf-8"), "stale: python -m swaa_edge.cli.help > docs/help.md"


def test_every_command_has_a_section_with_its_options():
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    assert [text.split("\n")[0] for text in sections] == ["swaa-edge", *(f"swaa-edge {name}" for name in COMMANDS)]
    assert all("--help" in text for text in sections)
    assert max(map(len, PAGE.read_text(encoding="utf-8").splitlines())) <= 120
