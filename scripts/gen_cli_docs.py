"""Write docs/cli.md and docs/configuration.md from the code that they describe, or check them.

    gen_cli_docs.py           write both
    gen_cli_docs.py --check   write nothing; fail if one of them is not current

Both are made from what the program itself shows: the commands' help, the docstrings beside the
configuration's keys, the dataclasses whose fields `-o json` prints.

Exit codes: 0 written, or current; 1 not current; 2 usage.
"""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import amends.sagas
from amends_runtime.cli import exits
from amends_runtime.cli.app import build_app
from amends_runtime.cli.doubts import Branch
from amends_runtime.config import Breaker, Config, Limits, Participant, Server, Telemetry

ROOT = Path(__file__).resolve().parent.parent
MADE_BY = "<!-- Made by scripts/gen_cli_docs.py; edit the code that it names, not this file. -->"

CLI_INTRODUCTION = """\
`amends` and `python -m amends_runtime` are the same command. In a clone `make setup` puts it into
`.venv` (`. .venv/bin/activate`); into an environment of your own it comes with
`pip install '/path/to/clone[runtime]'`. `amends dev` is the way to begin: it runs a runtime
with a participant and a saga to look at, and names the commands to try next.

Commands talk to a running runtime, unless they say otherwise: the one that `--target` names, else
the one that `AMENDS_TARGET` names, else the one at 127.0.0.1:7233; over TLS if there is a
`--tls-ca` or `AMENDS_TLS_CA` (see [tls.md](tls.md)). `--target`, `--tls-*`, `-o` and `--debug` may
also stand before the command.

## What they print

Answers go to standard output; errors, notes and logs to standard error. An error is one line (a
file with several faults: one line each) that says what happened and what to try next. Tracebacks
are shown with `--debug` or `AMENDS_DEBUG=1` only.

On a terminal tables wrap and states have colours; `NO_COLOR=1` turns the colours off. In a pipe or
a file each row is one line, columns are separated by at least two spaces, and there are no escape
sequences. Control characters in text that others wrote are written out, so that they cannot drive
your terminal.

`-o json` prints one JSON document, in a form that only grows: see [below](#json). Contents of
inputs and results are left out, because what is printed ends up in build logs and chat rooms;
`--payloads` adds them.

`-o jsonl` prints a JSON document a line, for programs that read lines: `list`, `history`, `watch`
and whatever else lists print each thing as soon as they have it, all other commands their one
document. A reader may leave early, as in `amends list -o jsonl | head -1`.

## Completion

`amends completion bash`, `zsh` or `fish` prints a script for the shell, which completes commands,
options and their values, and asks the runtime for ids, definitions and participants. Nothing of
yours is edited; put it where your shell looks for it, and open a new shell:

```sh
echo 'source <(amends completion bash)' >> ~/.bashrc
amends completion zsh > "${fpath[1]}/_cyclopts_amends"
amends completion fish > ~/.config/fish/completions/amends.fish
```
"""

JSON_INTRODUCTION = """\
## JSON

Fields have the names of the SDK's dataclasses. All of them are always there; what there is not is
`null`. An instant is there twice: `started_at_ms` in UTC milliseconds, `started_at` in ISO 8601. A
payload is `{"content_type", "size"}`, with `--payloads` also `json`, or `base64` if it is not JSON;
an empty one is `null`. New fields may come; none changes its meaning.

With `-o jsonl` a document that is a list in the table below is one line for each of its members.

| command | document |
| --- | --- |
| `start`, `get`, `wait`, `retry` | a Saga |
| `list` | `{"sagas": [Saga], "more": bool}`; a Saga in lists is shorter, see below |
| `history` | `{"saga_id", "records": [Record]}`; a Record has the fields of its kind only |
| `cancel` | a CancelResult |
| `abandon` | an Abandoned |
| `in-doubt` | `{"branches": [Branch], "waited_for": [], …}`, see below |
| `decision` | `{"saga_id", "round", "store_id", "incarnation", "decision", …}`, see below |
| `confirm-restore` | `{"incarnation", "confirmed": bool}`; false: there was nothing to do |
| `watch` | with `-o jsonl` only: WatchEvents, whose `saga` is as in lists; with an id, Records |
| `definitions list`, `register` | `{"definitions": [RegisteredDefinition]}` |
| `definitions get` | a RegisteredDefinition |
| `definitions diff` | a DefinitionDiff |
| `definitions check` | `{"definitions": [], "problems": []}`, see [definitions](definitions.md) |
| `participants`, `participants list` | `{"participants": [ParticipantInfo]}` |
| `participants add` | a ParticipantInfo |
| `participants remove` | `{"name", "participant"}`: a ParticipantInfo, or null if it is gone |
| `breakers` | `{"breakers": [BreakerInfo]}` |
| `runtime` | a RuntimeInfo |

In lists a Saga has no `steps`, `input`, `turn`, `decision` and `round`.

`in-doubt` has besides its branches, the oldest first: `sagas`, in how many they are;
`oldest_since_ms`; `not_looked_at`, how many unfinished sagas were left out; `restored`: the store
is from a backup that nobody has confirmed, and may not know of all. `waited_for` names each
`participant` that somebody waits for, with `since_ms`, `sagas` (how many), `last_error`, and
`holds_up`: who else holds something because of that, with the number of branches.

`decision` has what was asked, with the store and the incarnation in whose name; the `decision`;
`known`: this runtime has the saga, or what is left of it; and `restored` as above. For a saga that
is not here, and no vote's own identity, there is none: the exit code is 3.
"""

DOCUMENTED = (
    "Saga",
    "Step",
    "Turn",
    "Failure",
    "Record",
    "Timing",
    "CancelResult",
    "Abandoned",
    "WatchEvent",
    "RegisteredDefinition",
    "DefinitionDiff",
    "Violation",
    "ParticipantInfo",
    "BreakerInfo",
    "RuntimeInfo",
)

CONFIGURATION_INTRODUCTION = """\
# Configuration

`amends serve` is told what to do by four layers. The upper one wins, key by key:

1. flags of `amends serve` (see [cli.md](cli.md));
2. environment variables, `AMENDS_SECTION__KEY` with a double underscore before the key, for example
   `AMENDS_SERVER__LISTEN=unix:/run/amends.sock`, `AMENDS_LOG_LEVEL=debug` or
   `AMENDS_PARTICIPANTS__PAYMENTS__ADDRESS=payments:7001`. An empty variable is not set. Lists are
   written as in `PATH`;
3. a TOML file, named by `--config` or `AMENDS_CONFIG`. No file is read that nobody named;
4. the defaults below.

`--participant` and `--definition` add to what the layers below name.

Durations are seconds (`*_s`), sizes bytes. A relative path in the file starts at the file's folder,
in a flag or a variable at the current one. An address is `host:port` or `unix:path`.

Everything that is wrong is said at once, a line each, with the file, variable or flag, the key, and
what to write instead; the exit code is 2 and nothing has been opened. A key or variable that is
misspelt is an error, since it would silently do nothing.

```toml
definitions = ["definitions/*.toml"]

[server]
listen = "127.0.0.1:7233"
database = "/var/lib/amends/amends.db"

[participants.payments]
address = "127.0.0.1:7001"

[participants.shipping]
address = "unix:/run/shipping.sock"
concurrency = 32
```
"""

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("[server]", Server),
    ("[participants.NAME]", Participant),
    ("[limits]", Limits),
    ("[breaker]", Breaker),
    ("[telemetry]", Telemetry),
)


def main() -> int:
    """Write or check, as the arguments say, and return the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/cli.md and docs/configuration.md.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a file is not current"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder to write to")
    arguments = parser.parse_args()
    wanted = {"cli.md": cli_page(), "configuration.md": configuration_page()}
    stale = [
        name
        for name, text in wanted.items()
        if not (arguments.out / name).is_file()
        or (arguments.out / name).read_text(encoding="utf-8") != text
    ]
    if not arguments.check:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name in stale:
            (arguments.out / name).write_text(wanted[name], encoding="utf-8")
            print(f"wrote docs/{name}")
    elif stale:
        names = ", ".join(f"docs/{name}" for name in stale)
        print(f"not current: {names}; run scripts/gen_cli_docs.py", file=sys.stderr)
        return 1
    return 0


# -- the command line ------------------------------------------------------------------------------


def cli_page() -> str:
    """Write the reference of the commands."""
    title, _, rest = build_app().generate_docs().partition("\n")
    assert title == "# amends", title
    without_contents = re.sub(r"(?s)## Table of Contents\n.*?(?=\n\*\*)", "", rest)
    commands = fenced_examples(re.sub(r"(?m)^(#+) ", r"#\1 ", without_contents).strip())
    parts = [
        "# The command line",
        MADE_BY,
        CLI_INTRODUCTION,
        "## Exit codes",
        exit_codes(),
        "## Commands",
        commands,
        JSON_INTRODUCTION,
        "\n\n".join(fields_of(getattr(amends, name)) for name in DOCUMENTED),
        fields_of(Branch),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def fenced_examples(text: str) -> str:
    """Put the indented lines after "For example:" between fences."""
    return re.sub(
        r"(?m)^For example:\n\n((?:  .*\n?)+)",
        lambda found: "```sh\n" + inspect.cleandoc(found[1]) + "\n```\n",
        text,
    )


def exit_codes() -> str:
    """Take the table of exit codes from where they are defined."""
    lines = inspect.cleandoc(exits.__doc__ or "").splitlines()
    rows: list[list[str]] = []
    for line in lines:
        found = re.fullmatch(r"    (\d+) +(.+)", line)
        if found:
            rows.append([found[1], found[2]])
        elif line.startswith("     ") and rows:
            rows[-1][1] += " " + line.strip()
    assert len(rows) == len(exits.ExitCode), "each exit code has a line in the docstring"
    return table("code", "meaning", rows)


def fields_of(described: type) -> str:
    """Write the fields of a dataclass, with the docstrings beside them."""
    rows = [
        [f"`{field}`", one_paragraph(text)] for field, text in docstrings_beside(described).items()
    ]
    said = one_paragraph(described.__doc__ or "")
    return f"### {described.__name__}\n\n{said}\n\n{table('field', 'meaning', rows)}"


def docstrings_beside(described: type) -> dict[str, str]:
    """Take the docstrings beside a class's fields out of its source."""
    tree = ast.parse(Path(inspect.getfile(described)).read_text(encoding="utf-8"))
    [found] = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == described.__name__
    ]
    texts: dict[str, str] = {}
    for field, following in zip(found.body, found.body[1:], strict=False):
        match field, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                texts[name] = text
            case _:
                pass
    return texts


# -- the configuration -----------------------------------------------------------------------------


def configuration_page() -> str:
    """Write the reference of the configuration."""
    parts = [CONFIGURATION_INTRODUCTION, "## At the top of the file", keys_of(Config)]
    for heading, section in SECTIONS:
        parts += [f"## `{heading}`", one_paragraph(section.__doc__ or ""), keys_of(section)]
    title, _, rest = "\n\n".join(part.strip() for part in parts).partition("\n")
    return f"{title}\n\n{MADE_BY}\n{rest}\n"


def keys_of(section: type[BaseModel]) -> str:
    """Write a section's keys, each with its default, its bounds and its reason."""
    rows = [
        [f"`{name}`", default_of(field), one_paragraph(text) + bounds_of(field)]
        for name, text in docstrings_beside(section).items()  # sections have their own headings
        for field in [section.model_fields[name]]
    ]
    return table("key", "default", "meaning, and why", rows)


def default_of(field: FieldInfo) -> str:
    """Write a default as TOML has it."""
    if field.is_required():
        return "required"
    match field.default:
        case None:
            return "none"
        case tuple():
            return "`[]`"
        case str(text):
            return f'`"{text}"`'
        case bool(flag):
            return f"`{str(flag).lower()}`"
        case other:
            return f"`{other}`"


def bounds_of(field: FieldInfo) -> str:
    """Write between which values a number may be."""
    bounds = {
        sign: getattr(each, name)
        for each in field.metadata
        for name, sign in (("ge", "at least"), ("gt", "more than"), ("le", "at most"))
        if getattr(each, name, None) is not None
    }
    said = ", ".join(f"{sign} {bound:,}" for sign, bound in bounds.items())
    return f" ({said})" if said else ""


# -- words -----------------------------------------------------------------------------------------


def one_paragraph(text: str | None) -> str:
    """Undo line breaks, and the doubled backquotes of docstrings."""
    return " ".join((text or "").split()).replace("``", "`")


def table(*cells: Any) -> str:
    """Write a table: its columns' names, then the list of its rows."""
    *names, rows = cells
    return "\n".join(lines_of(names, rows))


def lines_of(names: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Write the lines of a table."""
    yield f"| {' | '.join(names)} |"
    yield f"|{' --- |' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


if __name__ == "__main__":
    sys.exit(main())
