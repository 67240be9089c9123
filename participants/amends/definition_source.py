"""Definition files: one definition each, in YAML, TOML or JSON, with the place of every field.

What is wrong with one is said as ``order.yaml:7:5: step 'charge': timeout_s: …``: file, line and
column. All formats have one meaning: the content of one written in another makes the same message
of the contract, byte for byte.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Final

from amends.definition_problems import DefinitionProblem, FieldPath
from amends.errors import InvalidDefinition
from amends.formats import Parsed, Place, Unreadable

MAX_FILE_BYTES: Final = 1024 * 1024
"""128 steps with every field filled are a fifth of it."""
FORMATS: Final = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".json": "JSON"}
"""By the end of a file's name."""
BYTE_ORDER_MARK: Final = "\ufeff"


@dataclass(frozen=True, slots=True)
class DefinitionSource:
    """What a definition's text holds, and where."""

    file: str
    """The file as it was named; empty if the text came from none."""
    content: Any
    """As `Definition.from_dict` takes it."""
    places: dict[FieldPath, Place]
    """Where each field begins."""
    problems: tuple[DefinitionProblem, ...] = field(default=())
    """What is wrong with the text although it can be read; `placed` names their file."""

    def placed(self, problem: DefinitionProblem) -> DefinitionProblem:
        """Add the place to a problem that has none: its field's, or what is nearest around it."""
        step = problem.step or self._step_at(problem.path)
        if problem.line is not None:
            return replace(problem, file=self.file, step=step)
        path = problem.path
        while path and path not in self.places:
            path = path[:-1]
        line, column = self.places.get(path) or (None, None)
        return replace(problem, file=self.file, step=step, line=line, column=column)

    def _step_at(self, path: FieldPath) -> str:
        match path, self.content:
            case ("steps", int(number), *_), {"steps": [*tables]} if number < len(tables):
                name = tables[number].get("name") if isinstance(tables[number], dict) else None
                return name if isinstance(name, str) else ""
            case _:
                return ""


def read_source(path: str | os.PathLike[str]) -> DefinitionSource:
    """Read a definition file; the end of its name tells the format.

    Raises `InvalidDefinition` if it is none, `OSError` if it cannot be read, and
    `ModuleNotFoundError` for YAML without the extra ``amends[yaml]``.
    """
    file = os.fspath(path)
    suffix = PurePath(file).suffix.lower()
    if suffix not in FORMATS:
        *others, last = FORMATS
        names = f"{', '.join(others)} and {last}"
        raise _refused(file, f"is none of {names}; definition files are")
    with open(file, "rb") as opened:  # noqa: PTH123  # of what was given: a Path would be one more name
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise _refused(file, f"is larger than {MAX_FILE_BYTES} bytes; is it the right file?")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        place = Place(before.count(b"\n") + 1, len(before) - before.rfind(b"\n"))
        raise _refused(
            file, f"is not UTF-8 at byte {error.start}; save it as UTF-8", place
        ) from None
    return parse_source(text, FORMATS[suffix], file)


def parse_source(text: str, format_name: str, file: str = "") -> DefinitionSource:
    """Read a definition's text in ``YAML``, ``TOML`` or ``JSON``.

    Raises `InvalidDefinition` if it is not of that format, and `ModuleNotFoundError` for YAML
    without the extra ``amends[yaml]``.
    """
    text = text.removeprefix(BYTE_ORDER_MARK)  # some editors put it before everything
    if len(text) > MAX_FILE_BYTES:
        raise _refused(file, f"is longer than {MAX_FILE_BYTES} characters; is it the right text?")
    if not text.strip():
        raise _refused(file, "is empty; a definition has a name and steps", Place(1, 1))
    try:
        parsed = _parse(text, format_name)
    except Unreadable as unreadable:
        raise _refused(file, unreadable.message, unreadable.place) from None
    if parsed.content is None:
        raise _refused(file, "holds nothing; a definition has a name and steps", Place(1, 1))
    return DefinitionSource(file, parsed.content, parsed.places, tuple(parsed.problems))


def _parse(text: str, format_name: str) -> Parsed:
    match format_name:
        case "YAML":
            try:
                from amends.formats import yaml  # noqa: PLC0415  # an extra; and 20 ms of import
            except ModuleNotFoundError as missing:
                if missing.name != "yaml":
                    raise
                raise ModuleNotFoundError(
                    "definitions in YAML need PyYAML, which is not installed; run: "
                    "pip install 'amends[yaml]'",
                    name="yaml",
                ) from None
            return yaml.read(text)
        case "TOML":
            from amends.formats import toml  # noqa: PLC0415  # of no use to most programs

            return toml.read(text)
        case "JSON":
            from amends.formats import json  # noqa: PLC0415  # as TOML

            return json.read(text)
        case _:
            raise ValueError(f"{format_name} is no format of definitions: YAML, TOML and JSON are")


def _refused(file: str, message: str, place: Place | None = None) -> InvalidDefinition:
    line, column = place or (None, None)
    return InvalidDefinition([DefinitionProblem((), message, "", file, line, column)])
