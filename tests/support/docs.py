"""The Python examples of the documentation, run as printed.

output = run_example("docs/calibrate.md", 0, tmp_path)
"""

import os
import re
import subprocess
import sys

from support import ROOT


def run_example(page, number, folder):
    """Run the Python block `number` of `page` in `folder`; return what it prints."""
    text = (ROOT / page).read_text(encoding="utf-8")
    example = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)[number]
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
