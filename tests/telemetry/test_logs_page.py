"""docs/logs.md names every event that the runtime logs, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import amends_runtime
from amends_runtime.telemetry import observers

ROOT = Path(amends_runtime.__file__).parent
PAGE = Path(__file__).parent.parent.parent / "docs" / "logs.md"
LEVELS = {"debug", "info", "warning", "error", "exception"}
NAME = re.compile(r"[a-z]+(_[a-z]+)+|recovering|recovered")


def logged() -> Iterator[str]:
    """The events in the runtime's source: what its loggers are handed first."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=logger, attr=level),
                    args=[ast.Constant(value=str(event)), *_],
                ) if level in LEVELS and ast.unparse(logger).rpartition(".")[2] in {"_log", "log"}:
                    yield event
                case _:
                    pass
    for node in ast.walk(ast.parse(Path(observers.__file__).read_text(encoding="utf-8"))):
        match node:
            case ast.Return(value=ast.Tuple(elts=[_, ast.Constant(value=str(event)), _])):
                yield event
            case _:
                pass


def test_every_event_has_its_line_and_every_line_an_event() -> None:
    """Whoever finds a name in the log finds it on the page; sentences by how they begin."""
    page = PAGE.read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE)
    told = {name for cell in first_cells for name in re.findall(r"`(.*?)`", cell)}
    events = set(logged())
    assert len(events) > 40
    names = {event for event in events if NAME.fullmatch(event)}
    assert names - told == set()
    for sentence in events - names:
        assert any(sentence.startswith(start.rstrip(" …")) for start in told), sentence
    assert {name for name in told if NAME.fullmatch(name)} - names == set()
