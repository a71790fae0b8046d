"""Text that a user names by file, as one UTF-8 string.

text = read_text("report.txt")
"""

import os
import sys
from pathlib import Path

from swaa_edge.errors import ConfigError


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of the file at `path`; "-" is stdin.

    Raises `ConfigError` if the file is missing, empty or not UTF-8.
    """
    where = "stdin" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {where}: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not text.strip():
        raise ConfigError(f"{where} is empty; give a file with text")
    return text
