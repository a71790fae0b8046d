"""The program that child.py starts. Calls one function and writes the outcome to a file.

The parent process passes the package's path, so that both processes import the same copy. This script's folder
and the current folder stay off the module path, since files there could shadow other modules.

    python child_main.py swaa_edge/__init__.py swaa_edge.convert.lora_merge:merge '{"base": ...}' report.json
"""

import errno
import importlib
import importlib.util
import json
import logging
import os
import re
import sys

# numpy and Rust libraries report a failed write only in the error's text.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class _LastError(logging.Handler):
    """Remembers the last logged error. Upstream's programs log an error, then exit with just a code."""

    text = ""

    def emit(self, record):
        self.text = record.getMessage()


def main(package, task, request, report):
    sys.path.pop(0)
    # Send the task's output to stderr. stdout belongs to the command.
    os.dup2(2, 1)
    last = _LastError(logging.ERROR)
    verbose = "SWAA_EDGE_VERBOSE" in os.environ
    # With a handler in place, upstream's logging.basicConfig has no effect.
    logging.basicConfig(handlers=[last, *([logging.StreamHandler()] if verbose else [])], format="%(message)s")
    logging.getLogger().setLevel(logging.INFO if verbose else logging.ERROR)
    try:
        _import_package(package)
        module, function = task.split(":")
        outcome = {"result": getattr(importlib.import_module(module), function)(**json.loads(request))}
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        if verbose:
            logging.exception("%s failed", task)
        outcome = _described(error, last.text)
    with open(report, "w", encoding="utf-8") as file:
        json.dump(outcome, file)
    return 0


def _import_package(path):
    spec = importlib.util.spec_from_file_location("swaa_edge", path, submodule_search_locations=[os.path.dirname(path)])
    sys.modules["swaa_edge"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def _described(error, logged):
    """Describe an exception as a dict.

    "reason": one line of text.
    "ours": the class name, only for a `SwaaError`.
    "errno": the error number, only for a failed write.
    """
    text = " ".join(str(error).split())
    if type(error).__module__ == "swaa_edge.errors":
        return {"ours": type(error).__name__, "reason": text}
    code = errno.ENOSPC if _SHORT_WRITE.search(text) else getattr(error, "errno", None)
    if found := _OS_ERROR.search(text):
        code = int(found[1])
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return {"errno": code, "reason": os.strerror(code)}
    if isinstance(error, ModuleNotFoundError) and error.name:
        return {"reason": f"it needs the Python package {error.name}, which is not installed"}
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return {"reason": "out of memory"}
    if isinstance(error, SystemExit):
        return {"result": None} if error.code in (None, 0) else {"reason": " ".join(logged.split()) or text}
    return {"reason": f"{type(error).__name__}: {text}" if text else type(error).__name__}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
