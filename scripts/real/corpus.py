"""English texts for measure.py. The texts come with Python and Debian packages, so nothing is downloaded.

    texts = corpus(); tokens = texts["python"]

python: Python's language reference, as `help()` shows it.
docstrings: long docstrings from Python's standard library.
debian: the manuals and README files in /usr/share/doc, if there are any.

The texts can differ between machines. To detect a difference, compare the results of `fingerprints`.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from swaa_edge.support.sample_text import real_text

DEBIAN = Path("/usr/share/doc")
#: Shortest docstring in characters, and shortest file (as stored) in bytes. Anything shorter is skipped.
DOCSTRING, FILE = 300, 8000
_WORD = re.compile(r"\b[a-z]{2,}\b")


def corpus() -> dict[str, str]:
    """Return the texts of this machine by name."""
    texts = {
        "python": real_text(),
        "docstrings": "\n\n".join(docstrings(Path(sysconfig.get_path("stdlib")))),
        "debian": "\n\n".join(manuals(DEBIAN)),
    }
    return {name: text for name, text in texts.items() if text}


def fingerprints(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the sha256 of each text by name."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def docstrings(folder: Path) -> Iterator[str]:
    """Yield the long docstrings of the modules in `folder`, in the order of the file names."""
    for path in sorted(folder.glob("[a-z]*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= DOCSTRING and _is_prose(text):
                    yield inspect.cleandoc(text)


def manuals(folder: Path) -> Iterator[str]:
    """Yield the distinct texts of README*, *.txt and *.txt.gz files of the packages in `folder`."""
    seen: set[str] = set()
    paths = [path for pattern in ("README*", "*.txt", "*.txt.gz") for path in folder.glob(f"*/{pattern}")]
    for path in sorted(paths):
        if not path.is_file() or path.stat().st_size < FILE:
            continue
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")
        if text not in seen and _is_prose(text):
            seen.add(text)
            yield text


def _is_prose(text: str) -> bool:
    """Return whether at least half of the characters belong to lower-case words."""
    return 2 * sum(map(len, _WORD.findall(text))) >= len(text)
