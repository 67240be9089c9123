"""`amends definitions list`, `get`, `register`, `diff` and `check`."""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from amends_runtime.cli import candidates
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.options import COMMON, SHARED, Common, Debug, Flag

if TYPE_CHECKING:
    import amends

__all__ = ["HELP", "check", "diff", "get", "list_", "register"]

HELP: Final = """What sagas consist of: list, show, register, compare and check definitions.

A definition file is YAML, TOML or JSON: name, and for each step name, participant and
action."""

Output = Annotated[
    Literal["table", "json", "jsonl"],
    Parameter(
        name=("--output", "-o"),
        group=SHARED,
        help="A table for people, one JSON document, or a JSON document a line.",
    ),
]
"""`-o` of a command that talks to no runtime."""

Name = Annotated[str, Parameter(name="NAME", completer=candidates.definitions)]


async def list_(*, all_versions: Flag = False, common: Common = COMMON) -> None:
    """List registered definitions by name.

    For example:

      amends definitions list
      amends definitions list --all-versions -o json

    Parameters
    ----------
    all_versions:
        Also older versions.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.documents import print_list
    from amends_runtime.cli.tables import print_table, short_instant

    async with connect(common) as client:
        found = await client.definitions(all_versions=all_versions)
    if common.output != "table":
        print_list("definitions", found, common.output)
        return
    print_table(
        ("NAME", "VERSION", "LATEST", "STEPS", "REGISTERED", "HASH"),
        (
            (
                each.name,
                str(each.version),
                "yes" if each.latest else "",
                str(len(each.definition.steps)) if each.definition else "?",
                short_instant(each.registered_at_ms),
                each.content_hash[:12],
            )
            for each in found
        ),
    )


async def get(
    name: Name,
    /,
    *,
    definition_hash: Annotated[str | None, Parameter(name="--hash")] = None,
    common: Common = COMMON,
) -> None:
    """Show one definition, by default its latest version.

    For example:

      amends definitions get order
      amends definitions get order -o json | jq .definition > order.json

    Parameters
    ----------
    name:
        The definition's name.
    definition_hash:
        Content hash of the version wanted, or its first 8 or more characters.
    """
    from amends_runtime.cli.client import connect, whole_hash
    from amends_runtime.cli.documents import document, instant, print_document
    from amends_runtime.cli.tables import print_facts, print_line, print_table

    async with connect(common) as client:
        if definition_hash is not None:
            definition_hash = await whole_hash(client, name, definition_hash, "--hash")
        found = await client.definition(name, content_hash=definition_hash)
    if common.output != "table":
        print_document(document(found), common.output)
        return
    definition = found.definition
    print_facts(
        [
            ("definition", found.name),
            ("version", f"{found.version}{' (latest)' if found.latest else ''}"),
            ("hash", found.content_hash),
            ("registered", instant(found.registered_at_ms)),
            ("mode", str(definition.mode) if definition else ""),
            ("deadline", _seconds(definition.deadline_s) if definition else ""),
            ("retention", _seconds(definition.retention_s) if definition else ""),
            *(_of_two_phase(definition) if definition else ()),
        ]
    )
    if definition is None:
        raise Exit(
            ExitCode.UNAVAILABLE,
            f"{name}: its content is of a newer version of amends; update this one to see it",
        )
    print_line()
    print_table(
        ("STEP", "KIND", "PARTICIPANT", "ACTION", "AFTER", "USES", "TIMEOUT"),
        (
            (
                step.name,
                step.kind,
                step.participant,
                step.action,
                _names(step.after),
                _names(step.uses),
                _seconds(step.timeout_s),
            )
            for step in definition.steps
        ),
    )


async def register(
    files: Annotated[tuple[str, ...], Parameter(name="FILE", negative="")],
    /,
    *,
    common: Common = COMMON,
) -> None:
    """Register definition files.

    The same content again changes nothing; other content under the same name is
    a new version, and sagas under way keep the version that they started with.
    All files are checked before the first is registered: if one is refused, none
    is registered.

    For example:

      amends definitions register order.yaml
      amends definitions register definitions/*.yaml

    Parameters
    ----------
    files:
        YAML, TOML or JSON, or a pattern of such; one definition each.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.definition_files import matching_paths, problem_line, read_definitions
    from amends_runtime.cli.documents import print_list
    from amends_runtime.cli.tables import print_table

    read = read_definitions(matching_paths(files))
    problems: list[str] = []
    async with connect(common) as client:
        for each in read:
            compared = await client.diff(each.definition)
            problems += [problem_line(each, violation) for violation in compared.violations]
        if problems:
            raise Exit(ExitCode.USAGE, *problems)
        found = [await client.register(each.definition) for each in read]
    if common.output != "table":
        print_list("definitions", found, common.output)
        return
    print_table(
        ("NAME", "VERSION", "HASH", ""),
        (
            (
                each.name,
                str(each.version),
                each.content_hash[:12],
                "was registered before" if each.existed else "registered",
            )
            for each in found
        ),
    )


async def diff(
    file: Annotated[Path, Parameter(name="FILE")],
    /,
    *,
    exit_code: Flag = False,
    common: Common = COMMON,
) -> int:
    """Compare a definition file with the latest registered version, without registering it.

    The exit code is 0 also where they differ (with --exit-code it is 4 then), and 2 if
    registration would refuse the file.

    For example:

      amends definitions diff order.yaml
      amends definitions diff order.yaml --exit-code && echo up to date

    Parameters
    ----------
    file:
        YAML, TOML or JSON.
    exit_code:
        End with exit code 4 if they differ, or nothing of that name is registered.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.definition_files import in_seconds, problem_line, read_definition
    from amends_runtime.cli.documents import document, print_document
    from amends_runtime.cli.tables import print_line

    read = read_definition(file)
    async with connect(common) as client:
        found = await client.diff(read.definition)
    if common.output != "table":
        print_document(document(found), common.output)
    elif found.same:
        print_line(f"{read.definition.name}: the same content is registered")
    else:
        for line in found.differences:
            # The values are the last part of a line; before them may be a step called pay2.
            head, changed, values = line.partition("_ms was ")
            said = f"{head}{in_seconds(changed + values)}" if changed else line
            print_line(said.removeprefix("two_phase."))  # of no table in a file
    if found.violations:
        raise Exit(ExitCode.USAGE, *(problem_line(read, each) for each in found.violations))
    return ExitCode.CONFLICT if exit_code and not found.same else ExitCode.OK


def check(
    files: Annotated[tuple[str, ...], Parameter(name="FILE", negative="")],
    /,
    *,
    participant: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    output: Output = "table",
    debug: Debug = False,
) -> int:
    """Say everything that is wrong in definition files, with file and line.

    No runtime is asked. Named is what registration would refuse, except
    participants that are not registered: which there are only a runtime knows,
    or --participant. Two files of one definition are wrong, too, as in the
    configuration of a runtime. The exit code is 2 if anything is wrong.

    For example:

      amends definitions check definitions/*.yaml
      amends definitions check order.yaml --participant payments

    Parameters
    ----------
    files:
        YAML, TOML or JSON, or a pattern of such; one definition each.
    participant:
        A participant that there is; may be repeated. With it every step must name one of them.
    """
    from amends_runtime import wire
    from amends_runtime.cli.definition_files import check_files, matching_paths
    from amends_runtime.cli.documents import print_document, print_each
    from amends_runtime.cli.tables import print_table
    from amends_runtime.core.definition import content_hash

    # NAME=ADDRESS is what amends serve takes: whoever has that at hand may give it here.
    names = [each.partition("=")[0] for each in participant]
    found, problems = check_files(matching_paths(files), names or None)
    right = [
        {
            "file": str(each.path),
            "name": each.definition.name,
            "steps": len(each.definition.steps),
            "content_hash": content_hash(wire.definition_from_proto(each.definition.to_proto())),
        }
        for each in found
    ]
    wrong = [
        {
            "file": each.file,
            "line": each.line,
            "column": each.column,
            "step": each.step or None,
            "field": each.field,
            "message": each.message,
        }
        for each in problems
    ]
    if output == "json":
        print_document({"definitions": right, "problems": wrong}, output)
    elif output == "jsonl":
        for each in (*right, *wrong):
            print_each(each)
    elif right:
        print_table(
            ("FILE", "NAME", "STEPS", "HASH"),
            (
                (
                    str(each["file"]),
                    str(each["name"]),
                    str(each["steps"]),
                    str(each["content_hash"])[:12],
                )
                for each in right
            ),
        )
    if problems:
        raise Exit(ExitCode.USAGE, *map(str, problems))
    return ExitCode.OK


def _of_two_phase(definition: amends.Definition) -> list[tuple[str, str]]:
    if definition.mode != "TWO_PHASE_COMMIT":
        return []
    votes = "one after the other, in the order below" if definition.ordered else "all at once"
    return [("votes", votes), ("locked retries", str(definition.locked_retries))]


def _seconds(duration_s: float | None) -> str:
    return "" if duration_s is None else f"{duration_s:g} s"


def _names(names: tuple[str, ...] | None) -> str:
    return "" if names is None else ", ".join(names)
