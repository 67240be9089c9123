"""Who does something to a saga or a participant, and why: both land in the records."""

from __future__ import annotations

import getpass
import os

from amends_runtime.cli.exits import Exit, ExitCode

__all__ = ["checked_reason", "whoever"]


def checked_reason(reason: str, where: str) -> str:
    """The reason as it was given. Ends the command if it is empty; `where` is what it lands in."""
    if not reason.strip():
        raise Exit(ExitCode.USAGE, f"--reason: is empty; say why, it lands in the {where}")
    return reason


def whoever(author: str | None) -> str:
    """The author that was given, else the user's login name."""
    if author is not None and author.strip():
        return author
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        return f"uid {os.getuid()}"
