"""Whether a process that somebody else started has ended."""

import os
from pathlib import Path


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, also if nobody has collected its exit code yet."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return True
    return state == "Z"
