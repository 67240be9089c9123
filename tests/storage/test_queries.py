"""SQL lives in files: each query named, described and used."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest

from amends_runtime import storage
from amends_runtime.storage.migrations import MIGRATIONS
from amends_runtime.storage.queries import read_queries, read_script

FOLDER = Path(storage.__file__).parent
QUERIES = read_queries("sqlite")
FILES = sorted((FOLDER / "sql" / "sqlite").glob("*.sql"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_query_has_a_name_and_a_description(file: Path) -> None:
    """A name, then at least one line that says what it is for; nothing before the first name."""
    before, *parts = re.split(r"^-- name: ([a-z_]+)$", file.read_text(), flags=re.MULTILINE)
    assert not before.strip()
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        assert re.match(r"\n-- \S.{10,}", text), f"{name} is not described"


def test_each_query_is_used() -> None:
    """What nobody asks for is taken out."""
    code = "".join(path.read_text() for path in FOLDER.glob("*.py"))
    texts = "".join(path.read_text() for path in FILES)
    unused = [name for name in QUERIES if f'"{name}"' not in code and f"{{{name}}}" not in texts]
    assert unused == []


def test_queries_are_filled_in() -> None:
    """Nothing is left to fill; no comment is sent to the database."""
    for text in QUERIES.values():
        assert not re.findall(r"\{\w+\}", text)
        assert "--" not in text


def test_migrations_are_numbered_and_all_there() -> None:
    """In order, without a gap, and each file is one that runs."""
    numbers = [int(name.partition("_")[0]) for name in MIGRATIONS]
    assert numbers == list(range(1, len(MIGRATIONS) + 1))
    files = {path.name for path in (FOLDER / "sql" / "sqlite" / "migrations").glob("*.sql")}
    assert files == set(MIGRATIONS)
    assert all(read_script("sqlite", f"migrations/{name}") for name in MIGRATIONS)


PAGED = (
    *("open_sagas", "resting_sagas", "list_sagas", "list_sagas_in_state", "list_sagas_with_label"),
    "saga_numbers",
)


@pytest.mark.parametrize("name", PAGED)
def test_a_page_is_read_from_where_it_begins(name: str) -> None:
    """Each page is a stretch of an index: nothing before it is read, and nothing is sorted."""
    connection = sqlite3.connect(":memory:")
    for migration in MIGRATIONS:
        connection.executescript(read_script("sqlite", f"migrations/{migration}"))
    asked = set(re.findall(r":([a-z_]+)", QUERIES[name]))
    plan = connection.execute(f"EXPLAIN QUERY PLAN {QUERIES[name]}", dict.fromkeys(asked, 1))
    steps = [row[3] for row in plan]
    connection.close()
    assert not any("TEMP B-TREE" in step for step in steps), steps
    of_tables = [step for step in steps if re.match(r"(SCAN|SEARCH) (s|l|sagas|history)\b", step)]
    assert re.search(r"(rowid|saga_no|\(wake_at_ms,state\))[<>]\(?\?", of_tables[0]), steps
