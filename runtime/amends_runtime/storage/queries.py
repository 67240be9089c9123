"""SQL lives in `.sql` files; this reads them.

A file holds queries, each under a line `-- name: its_name` and a comment that says what it is for.
A query may put another in its place by naming it in braces, `{other_query}`.
"""

from __future__ import annotations

import re
from importlib import resources

__all__ = ["read_queries", "read_script"]

_NAME = re.compile(r"^-- name: (?P<name>[a-z_]+)$", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*$", re.MULTILINE)
_OTHER = re.compile(r"\{(?P<name>[a-z_]+)\}")


def read_script(engine: str, name: str) -> str:
    """One file's text, as it is."""
    return resources.files(__package__).joinpath("sql", engine, name).read_text(encoding="utf-8")


def read_queries(engine: str) -> dict[str, str]:
    """All queries of one engine, by name, without their comments."""
    queries: dict[str, str] = {}
    folder = resources.files(__package__).joinpath("sql", engine)
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".sql"):
            _, *parts = _NAME.split(file.read_text(encoding="utf-8"))
            for name, text in zip(parts[::2], parts[1::2], strict=True):
                assert name not in queries, f"two queries are called {name}"
                queries[name] = _COMMENT.sub("", text).strip()
    return {name: _fill(text, queries) for name, text in queries.items()}


def _fill(text: str, queries: dict[str, str]) -> str:
    def other(match: re.Match[str]) -> str:
        return _fill(queries[match["name"]], queries)

    return _OTHER.sub(other, text)
