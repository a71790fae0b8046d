"""The English text for training the demo model: the Jargon File (public domain) and Python's own docstrings.

text = training_text()
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

JARGON = "/usr/share/doc/jargon-text/jargon.txt.gz"  # Debian's package jargon-text


def training_text() -> str:
    """Return the training text, which has about three million characters."""
    return jargon() + "\n\n" + docstrings()


def sources() -> list[dict[str, str]]:
    """Return the name, hash and length of each source."""
    texts = {
        "The Jargon File, public domain, Debian's package jargon-text": jargon(),
        f"Docstrings of Python {platform.python_version()}'s standard library": docstrings(),
    }
    return [
        {"source": name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": str(len(text))}
        for name, text in texts.items()
    ]


def jargon() -> str:
    """Return the text of the Jargon File 4.4.7, as packaged by Debian."""
    if not Path(JARGON).is_file():
        sys.exit(f"{JARGON} is missing: apt-get install jargon-text")
    with gzip.open(JARGON, "rt", encoding="utf-8", errors="replace") as file:
        return file.read()


def docstrings() -> str:
    """Return the docstrings of the standard library's modules, classes and functions, sorted by file."""
    found = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    found.append(text)
    return "\n\n".join(found)
