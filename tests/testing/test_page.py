"""The page "Test your saga": its tests are run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


def test_the_tests_of_the_page_pass_where_a_reader_puts_them(tmp_path: Path) -> None:
    """All blocks of the page, in one file, pass under pytest with warnings as errors."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    written = len(re.findall(r"^ *def test_", "".join(blocks), re.MULTILINE))
    file = tmp_path / "test_order.py"
    file.write_text("\n\n".join(blocks))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{written} passed" in run.stdout
