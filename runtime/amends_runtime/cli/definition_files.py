"""Definition files: found by path or pattern, read with the SDK, checked before all else."""

from __future__ import annotations

import glob
import json
import re
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final

import amends
from amends.errors import InvalidDefinition
from amends_runtime import wire
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.core.definition import Definition, violations
from amends_runtime.errors import InvalidRequest

__all__ = [
    "find_definitions",
    "in_seconds",
    "problem_line",
    "read_definition",
    "read_definitions",
]

MAX_FILE_BYTES: Final = 4 * 1024 * 1024  # 128 steps with every field fill a twentieth of this


def find_definitions(patterns: Iterable[str], participants: Collection[str]) -> list[Definition]:
    """The definitions in all files that match, as the engine takes them.

    Their steps may name these `participants`. Ends the command with a line for each thing that is
    wrong in any of them.
    """
    found: dict[str, tuple[Path, Definition]] = {}
    problems: list[str] = []
    for path in dict.fromkeys(path for pattern in patterns for path in _matching(pattern)):
        try:
            definition = _to_core(path, read_definition(path), participants)
        except Exit as wrong:
            problems += wrong.lines
            continue
        other, _ = found.setdefault(definition.name, (path, definition))
        if other != path:
            problems.append(
                f"{path}: {definition.name} is also defined in {other}; keep one of them"
            )
    if problems:
        raise Exit(ExitCode.USAGE, *problems)
    return [definition for _, definition in found.values()]


def _matching(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern):
        return [Path(pattern)]
    # Not Path.glob, which takes no absolute patterns.
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))  # noqa: PTH207
    if not paths:
        raise Exit(
            ExitCode.USAGE, f"{pattern}: no file matches; check the pattern, or leave it out"
        )
    return paths


def read_definition(path: Path) -> amends.Definition:
    """The definition in one TOML or JSON file. Ends the command if it is none."""
    try:
        return amends.Definition.from_dict(_read_table(path))
    except InvalidDefinition as invalid:
        raise Exit(
            ExitCode.USAGE, *(f"{path}: {problem}" for problem in invalid.problems)
        ) from None


def read_definitions(paths: Iterable[Path]) -> list[amends.Definition]:
    """The definitions in these files. Ends the command with everything that is wrong in any."""
    found: list[amends.Definition] = []
    problems: list[str] = []
    for path in paths:
        try:
            found.append(read_definition(path))
        except Exit as wrong:
            problems += wrong.lines
    if problems:
        raise Exit(ExitCode.USAGE, *problems)
    return found


def problem_line(path: Path, definition: amends.Definition, field: str, message: str) -> str:
    """A violation that the runtime found, in the words of the file: step names, and seconds."""
    field = field.removeprefix("definition.")
    numbered = OF_STEP.fullmatch(field)
    step = ""
    if numbered is not None and int(numbered[1]) < len(definition.steps):
        step = f"step {definition.steps[int(numbered[1])].name!r}: "
        field = numbered[2]
    if field.endswith("_ms"):
        message = in_seconds(message)
    if field == "call.participant" and "is not registered" in message:
        name = definition.steps[int(numbered[1])].participant if numbered else "NAME"
        message = (
            f"{message.removesuffix('; there are none')}; give it to amends serve as "
            f"--participant {name}=HOST:PORT, or as [participants.{name}] in its configuration"
        )
    return f"{path}: {step}{field.removeprefix('call.').replace('_ms', '_s')}: {message}"


def in_seconds(text: str) -> str:
    """Milliseconds of the API, in a text about nothing else, as the seconds of definition files."""
    text = re.sub(r"-?\d+", lambda number: f"{int(number[0]) / 1000:.15g}", text)
    return text.replace(" ms", " s").replace("_ms", "_s")


OF_STEP: Final = re.compile(r"steps\[(\d+)\]\.(.+)")


def _to_core(
    path: Path, definition: amends.Definition, participants: Collection[str]
) -> Definition:
    try:
        core = wire.definition_from_proto(definition.to_proto())
        found = [(each.field, each.message) for each in violations(core, participants)]
    except InvalidRequest as invalid:
        found = [(each.field, each.message) for each in invalid.violations]
    else:
        if not found:
            return core
    raise Exit(ExitCode.USAGE, *(problem_line(path, definition, *each) for each in found))


def _read_table(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise Exit(ExitCode.USAGE, f"{path}: is neither .toml nor .json; definition files are")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise Exit(ExitCode.USAGE, f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise Exit(ExitCode.USAGE, f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise Exit(
            ExitCode.USAGE, f"{path}: is larger than {MAX_FILE_BYTES} bytes; is it the right file?"
        )
    kind = suffix[1:].upper()
    try:
        text = content.decode("utf-8")
        return tomllib.loads(text) if suffix == ".toml" else json.loads(text)
    except UnicodeDecodeError as error:
        raise Exit(
            ExitCode.USAGE, f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from None
    except ValueError as error:
        raise Exit(ExitCode.USAGE, f"{path}: is not {kind}: {error}") from None
    except RecursionError:
        raise Exit(ExitCode.USAGE, f"{path}: is nested too deeply to be a definition") from None
