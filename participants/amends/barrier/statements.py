"""Reads files of named SQL statements."""

from __future__ import annotations

import re
from importlib import resources

_NAME = re.compile(r"^-- name: (\S+)$", re.MULTILINE)


def load_statements(file: str) -> dict[str, str]:
    """Give the statements of a file beside this one by their names.

    A statement begins with ``-- name: x``; the comment lines under it say what it is for.
    """
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    return {
        name: "\n".join(line for line in body.splitlines() if not line.startswith("--")).strip()
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
