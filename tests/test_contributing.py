"""The worked example in CONTRIBUTING.md is a method that passes verification as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


@pytest.mark.slow
def test_the_example_method_passes_the_documented_verification(tmp_path: Path) -> None:
    """Saved under the name that the guide gives it, the example passes the guide's own command."""
    guide = GUIDE.read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"^cpbench (verify .*)$", guide, re.MULTILINE)
    (file,) = re.findall(r"--plugin (\S+)", command)
    (tmp_path / file).write_text(example, encoding="utf-8")

    ended = subprocess.run(
        [sys.executable, "-m", "cpbench", *shlex.split(command)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"gather-kv\W+pass\W+5 of 5", ended.stdout), ended.stdout
