"""What somebody is told who has the SDK alone."""

from __future__ import annotations

import subprocess
import sys


def test_an_install_without_the_runtime_says_how_to_get_it() -> None:
    """`pip install amends` has this package, but not what it needs; as the command line does."""
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['msgspec'] = None; import amends_runtime.testing",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: amends_runtime.testing needs msgspec, which is not installed; run: "
        "pip install 'amends[runtime]'"
    )
