"""Definition files: found by path or pattern, read with the SDK, judged by the runtime's own rules.

Two judge a file. The SDK says what a definition cannot be made of: wrong keys, types and names. The
core says what the runtime would refuse: ranges, and the rules of the graph. A person hears of both
at once, in the words of the file (seconds, names of steps) and with line and column; so where the
SDK refuses, the core is asked about what is left. The graph is judged only if all that belongs to
it could be read: a step whose `after` is misspelt has no known place in it.
"""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import amends
from amends.definition import MAX_STEPS_IN_FILE, definition_of, place_of
from amends.definition_problems import MAX_PROBLEMS, DefinitionProblem, FieldPath
from amends.definition_source import DefinitionSource, read_source
from amends.errors import InvalidDefinition
from amends_runtime import wire
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.core.definition import Definition, violations
from amends_runtime.errors import InvalidRequest

__all__ = [
    "ReadFile",
    "check_files",
    "find_definitions",
    "in_seconds",
    "matching_paths",
    "problem_line",
    "read_definition",
    "read_definitions",
    "strangers",
]


@dataclass(frozen=True, slots=True)
class ReadFile:
    """A definition file that holds a definition."""

    path: Path
    source: DefinitionSource
    definition: amends.Definition


def find_definitions(patterns: Iterable[str]) -> list[Definition]:
    """The definitions in all files that match, as the engine takes them.

    Their steps may name any participant; see `strangers`. Ends the command with a line for each
    thing that is wrong in any of them.
    """
    found, problems = check_files(matching_paths(patterns), None)
    if problems:
        raise Exit(ExitCode.USAGE, *map(str, problems))
    return [wire.definition_from_proto(each.definition.to_proto()) for each in found]


def strangers(patterns: Iterable[str], participants: Collection[str]) -> list[str]:
    """A line for each step in the files that names none of these participants.

    They may be registered all the same, by an operator: that stands in the database.
    """
    return [str(problem) for problem in check_files(matching_paths(patterns), participants)[1]]


def matching_paths(patterns: Iterable[str]) -> list[Path]:
    """The files that paths and patterns name, each once.

    Ends the command if a pattern matches none. A file whose own name looks like a pattern is meant.
    """
    return list(dict.fromkeys(path for pattern in patterns for path in _matching(pattern)))


def _matching(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern) or Path(pattern).is_file():
        return [Path(pattern)]
    # Not Path.glob, which takes no absolute patterns.
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))  # noqa: PTH207
    if not paths:
        raise Exit(
            ExitCode.USAGE, f"{pattern}: no file matches; check the pattern, or leave it out"
        )
    return paths


def check_files(
    paths: Iterable[Path], participants: Collection[str] | None
) -> tuple[list[ReadFile], list[DefinitionProblem]]:
    """Read and judge files: those that are right, and everything that is wrong in the others.

    With `participants` their steps may name these only; None: whichever they like.
    """
    found: dict[str, ReadFile] = {}
    problems: list[DefinitionProblem] = []
    for path in paths:
        read, wrong = _judge(path, participants)
        problems += wrong
        if read is None or wrong:
            continue
        other = found.setdefault(read.definition.name, read)
        if other.path != path:
            message = f"{read.definition.name} is also defined in {other.path}; keep one of them"
            problems.append(read.source.placed(DefinitionProblem(("name",), message)))
    return list(found.values()), problems


def read_definitions(paths: Iterable[Path]) -> list[ReadFile]:
    """The definitions in these files. Ends the command with everything that is wrong in any.

    Where one can be made, what is wrong with it is left to the runtime, which may be a newer one.
    """
    found: list[ReadFile] = []
    problems: list[DefinitionProblem] = []
    for path in paths:
        read, wrong = _judge(path, None)
        if read is None:
            problems += wrong
        else:
            found.append(read)
    if problems:
        raise Exit(ExitCode.USAGE, *map(str, problems))
    return found


def read_definition(path: Path) -> ReadFile:
    """The definition in one file. Ends the command with everything that is wrong in it."""
    (found,) = read_definitions([path])
    return found


def problem_line(read: ReadFile, violation: amends.Violation) -> str:
    """A violation that the runtime found, in the words of the file and with its place there."""
    found = _in_words_of_file(violation.field, violation.message, read.definition)
    return str(read.source.placed(found))


def in_seconds(text: str) -> str:
    """Milliseconds of the API, in a text about nothing else, as the seconds of definition files."""
    text = re.sub(r"-?\d+", lambda number: f"{int(number[0]) / 1000:.15g}", text)
    return text.replace(" ms", " s").replace("_ms", "_s")


# -- one file ----------------------------------------------------------------------------------


def _judge(
    path: Path, participants: Collection[str] | None
) -> tuple[ReadFile | None, list[DefinitionProblem]]:
    """The file, if a definition can be made of it, and everything that is wrong in it."""
    try:
        source = _source(path)
    except InvalidDefinition as invalid:
        return None, list(invalid.details)
    try:
        definition = definition_of(source)
    except InvalidDefinition as invalid:
        problems = list(invalid.details)
        if len(problems) <= MAX_PROBLEMS:  # else there are too many to read already
            problems += map(source.placed, _refusals_of_rest(source, problems, participants))
            problems.sort(key=place_of)
        return None, problems
    refused = map(source.placed, _refusals(definition, participants))
    return ReadFile(path, source, definition), sorted(refused, key=place_of)


def _source(path: Path) -> DefinitionSource:
    try:
        return read_source(path)
    except FileNotFoundError:
        what = "there is no such file; check the path"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    except ModuleNotFoundError as missing:
        what = str(missing)
    raise InvalidDefinition([DefinitionProblem((), what, file=str(path))])


def _refusals(
    definition: amends.Definition, participants: Collection[str] | None
) -> list[DefinitionProblem]:
    """What the runtime would refuse."""
    try:
        core = wire.definition_from_proto(definition.to_proto())
    except InvalidRequest as invalid:
        found = [(each.field, each.message) for each in invalid.violations]
    else:
        found = [(each.field, each.message) for each in violations(core, participants)]
    return [_in_words_of_file(*each, definition) for each in found]


# -- what is left of a file that the SDK refuses -----------------------------------------------

FIELDS: Final = frozenset(field.name for field in dataclasses.fields(amends.StepDefinition))
IN_GRAPH: Final = frozenset({"name", "kind", "after", "uses"})
"""What says where a step stands in the graph, and what may stand there."""
STAND_INS: Final = {"participant": "unnamed", "action": "unnamed"}


def _refusals_of_rest(
    source: DefinitionSource,
    problems: Sequence[DefinitionProblem],
    participants: Collection[str] | None,
) -> list[DefinitionProblem]:
    """What the runtime would refuse of a file beside these problems, as far as can be said."""
    content = source.content
    tables = content.get("steps") if isinstance(content, Mapping) else None
    if not isinstance(tables, list) or len(tables) > MAX_STEPS_IN_FILE:
        return []
    if not all(isinstance(table, Mapping) for table in tables):
        return []
    wrong = {each.path[:3] if each.path[:1] == ("steps",) else each.path for each in problems}
    of_steps = {path for path in wrong if path[:1] == ("steps",)}
    mode_is_known = not wrong & {("mode",), ("steps",)}  # ("steps",): too many for this mode
    order_is_known = mode_is_known and ("ordered",) not in wrong
    graph_is_known = order_is_known and all(
        len(path) == 3 and path[2] in FIELDS and path[2] not in IN_GRAPH for path in of_steps
    )
    rest = {
        "name": "unnamed",
        **{
            key: content[key]
            for key in (TOP if mode_is_known else OF_ANY_MODE)
            if key in content and (key,) not in wrong
        },
        "steps": [
            _rest_of_step(number, table, wrong, graph_is_known=graph_is_known)
            for number, table in enumerate(tables)
        ],
    }
    try:
        definition = amends.Definition.from_dict(rest)
    except InvalidDefinition as invalid:  # it says what a mode forbids only where all else is right
        of_mode = [each for each in invalid.details if each.path[:3] not in wrong]
        if not of_mode:
            return []
        return [*of_mode, *_refusals_of_rest(source, [*problems, *of_mode], participants)]
    found = []
    for refusal in _refusals(definition, participants):
        path = refusal.path
        if path[:3] in wrong or path == ("name",):
            continue
        if graph_is_known or path[:1] != ("steps",):
            found.append(refusal)
        elif len(path) > 2 and path[2] not in IN_GRAPH and isinstance(path[1], int):
            name = tables[path[1]].get("name")  # the step was judged under another one
            found.append(replace(refusal, step=name if isinstance(name, str) else ""))
    return found


OF_ANY_MODE: Final = ("name", "deadline_s", "retention_s")
TOP: Final = (*OF_ANY_MODE, "mode", "ordered", "locked_retries")


def _rest_of_step(
    number: int, table: Mapping[str, Any], wrong: Collection[FieldPath], *, graph_is_known: bool
) -> dict[str, Any]:
    """What is right in a step's table, and stand-ins for what it must have."""
    rest = {
        key: value
        for key, value in table.items()
        if key in FIELDS and ("steps", number, key) not in wrong
    }
    if not graph_is_known:
        rest = {key: value for key, value in rest.items() if key not in IN_GRAPH}
        rest["name"] = f"step-{number}"
    return {**STAND_INS, **rest}


# -- words -------------------------------------------------------------------------------------

KIND: Final = re.compile(rf"\b({'|'.join(amends.StepKind.__members__)})\b")
PART: Final = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def _in_words_of_file(field: str, message: str, definition: amends.Definition) -> DefinitionProblem:
    """What the runtime says of a field, with the field's place in a file and its words."""
    message = KIND.sub(lambda kind: kind[0].lower(), message)
    message = message.replace("two_phase.ordered", "`ordered`")
    field = field.removeprefix("definition.").removeprefix("two_phase.")  # of no table in a file
    path: list[str | int] = [
        int(number) if number else word for word, number in PART.findall(field)
    ]
    is_duration = field.endswith("_ms")
    if is_duration:
        message = in_seconds(message)
        path[-1] = str(path[-1]).removesuffix("_ms") + "_s"
    match path:
        case ["steps", int(number), *inside] if number < len(definition.steps):
            step = definition.steps[number]
            inside = inside[1:] if inside[:1] == ["call"] else inside
            if inside == ["participant"] and "is not registered" in message:
                message = message.partition("; to register it: ")[0]  # a runtime's own words for it
                message = (
                    f"{message.removesuffix('; there are none')}; give it to amends serve as "
                    f"--participant {step.participant}=HOST:PORT, as "
                    f"[participants.{step.participant}] in its configuration, or while it runs "
                    f"with amends participants add {step.participant}=HOST:PORT"
                )
            return DefinitionProblem(("steps", number, *inside), message, step.name)
        case _:
            return DefinitionProblem(tuple(path), message)
