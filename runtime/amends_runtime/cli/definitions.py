"""`amends definitions list`, `get`, `register` and `diff`."""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter

from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.options import COMMON, Common, Flag

__all__ = ["HELP", "diff", "get", "list_", "register"]

HELP: Final = """What sagas consist of: list, show, register and compare definitions.

A definition file is TOML or JSON: name, and for each step name, participant and action."""

Name = Annotated[str, Parameter(name="NAME")]


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
    from amends_runtime.cli.documents import document
    from amends_runtime.cli.tables import print_json, print_table, short_instant

    async with connect(common) as client:
        found = await client.definitions(all_versions=all_versions)
    if common.output == "json":
        print_json({"definitions": document(found)})
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
    from amends_runtime.cli.documents import document, instant
    from amends_runtime.cli.tables import print_facts, print_json, print_line, print_table

    async with connect(common) as client:
        if definition_hash is not None:
            definition_hash = await whole_hash(client, name, definition_hash, "--hash")
        found = await client.definition(name, content_hash=definition_hash)
    if common.output == "json":
        print_json(document(found))
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
    files: Annotated[tuple[Path, ...], Parameter(name="FILE", negative="")],
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

      amends definitions register order.toml
      amends definitions register definitions/*.toml

    Parameters
    ----------
    files:
        TOML or JSON.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.definition_files import problem_line, read_definitions
    from amends_runtime.cli.documents import document
    from amends_runtime.cli.tables import print_json, print_table

    read = read_definitions(files)
    problems: list[str] = []
    async with connect(common) as client:
        for path, definition in zip(files, read, strict=True):
            compared = await client.diff(definition)
            problems += [
                problem_line(path, definition, each.field, each.message)
                for each in compared.violations
            ]
        if problems:
            raise Exit(ExitCode.USAGE, *problems)
        found = [await client.register(definition) for definition in read]
    if common.output == "json":
        print_json({"definitions": document(found)})
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


async def diff(file: Annotated[Path, Parameter(name="FILE")], /, *, common: Common = COMMON) -> int:
    """Compare a definition file with the latest registered version, without registering it.

    The exit code is 0 also where they differ, and 2 if registration would
    refuse the file.

    For example:

      amends definitions diff order.toml

    Parameters
    ----------
    file:
        TOML or JSON.
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.definition_files import in_seconds, problem_line, read_definition
    from amends_runtime.cli.documents import document
    from amends_runtime.cli.tables import print_json, print_line

    definition = read_definition(file)
    async with connect(common) as client:
        found = await client.diff(definition)
    if common.output == "json":
        print_json(document(found))
    elif found.same:
        print_line(f"{definition.name}: the same content is registered")
    else:
        for line in found.differences:
            # The values are the last part of a line; before them may be a step called pay2.
            head, changed, values = line.partition("_ms was ")
            print_line(f"{head}{in_seconds(changed + values)}" if changed else line)
    if found.violations:
        raise Exit(
            ExitCode.USAGE,
            *(
                problem_line(file, definition, each.field, each.message)
                for each in found.violations
            ),
        )
    return ExitCode.OK


def _seconds(duration_s: float | None) -> str:
    return "" if duration_s is None else f"{duration_s:g} s"


def _names(names: tuple[str, ...] | None) -> str:
    return "" if names is None else ", ".join(names)
