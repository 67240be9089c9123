"""The commands, their texts, and the way from arguments to an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Final

from cyclopts import App, Group
from cyclopts.exceptions import (
    CycloptsError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from amends_runtime.cli import (
    completion,
    deciding,
    definitions,
    dev,
    in_doubt,
    observing,
    operating,
    participants,
    sagas,
    serving,
    tracing,
    watching,
)
from amends_runtime.cli.exits import Exit, ExitCode, debug_wanted, report

__all__ = ["build_app", "run"]

HELP: Final = """Sagas that survive crashes: start them, follow them, run what carries them.

For example:

  amends dev                                 try it out
  amends serve --config amends.toml          run a runtime
  amends definitions register order.toml     tell it what an order is
  amends start order --input '{"sku": "A"}' --wait
  amends list --state STUCK
  amends history order-1

Commands talk to the runtime at 127.0.0.1:7233, or where --target or
AMENDS_TARGET says. Every command has its own --help."""

EPILOGUE: Final = """Exit codes: 0 done; 1 internal error; 2 usage; 3 not found; 4 wrong state or
conflict; 5 unavailable or out of time; 6 the saga ended, and not as COMPLETED;
130 Ctrl-C; 143 SIGTERM."""


SHARED_OPTIONS: Final = {  # name: values
    "--target": 1,
    "--tls-ca": 1,
    "--tls-cert": 1,
    "--tls-key": 1,
    "--tls-server-name": 1,
    "--output": 1,
    "-o": 1,
    "--debug": 0,
}


EMPTY_IS_UNSET: Final = (
    "AMENDS_CONFIG",
    "AMENDS_DEBUG",
    "AMENDS_TARGET",
    "AMENDS_TLS_CA",
    "AMENDS_TLS_CERT",
    "AMENDS_TLS_KEY",
    "AMENDS_TLS_SERVER_NAME",
)


def build_app() -> App:
    """The whole command line, as cyclopts knows it."""
    app = App(
        name="amends",
        help=HELP,
        help_format="plaintext",
        help_epilogue=EPILOGUE,
        version=observing.installed_version,
        group_commands=Group("Help", sort_key=9),
        end_of_options_delimiter="--",
    )
    runtime = Group("Runtime", sort_key=1)
    of_sagas = Group("Sagas", sort_key=2)
    operators = Group("Definitions and participants", sort_key=3)

    app.command(dev.dev, group=runtime)
    app.command(serving.serve, group=runtime)
    app.command(observing.runtime, group=runtime)
    app.command(operating.confirm_restore, group=runtime)
    app.command(observing.version, group=runtime)
    app.command(completion.completion, group=runtime)

    app.command(sagas.start, group=of_sagas)
    app.command(sagas.get, group=of_sagas)
    app.command(sagas.list_, name="list", group=of_sagas)
    app.command(sagas.history, group=of_sagas)
    app.command(sagas.wait, group=of_sagas)
    app.command(watching.watch, group=of_sagas)
    of_traces = App(
        name="trace",
        help=tracing.HELP,
        group=of_sagas,
        group_commands=Group("Commands", sort_key=1),
        help_format="plaintext",
    )
    of_traces.command(tracing.show)
    of_traces.command(tracing.export)
    app.command(of_traces)
    app.command(sagas.cancel, group=of_sagas)
    app.command(operating.retry, group=of_sagas)
    app.command(operating.abandon, group=of_sagas)
    app.command(in_doubt.in_doubt, group=of_sagas)
    app.command(deciding.decision, group=of_sagas)

    of_definitions = App(
        name="definitions",
        help=definitions.HELP,
        group=operators,
        group_commands=Group("Commands", sort_key=1),
        help_format="plaintext",
    )
    of_definitions.command(definitions.list_, name="list")
    of_definitions.command(definitions.get)
    of_definitions.command(definitions.register)
    of_definitions.command(definitions.diff)
    of_definitions.command(definitions.check)
    app.command(of_definitions)
    of_participants = App(
        name="participants",
        help=participants.HELP,
        group=operators,
        group_commands=Group("Commands", sort_key=1),
        help_format="plaintext",
    )
    of_participants.default(participants.list_)
    of_participants.command(participants.list_, name="list")
    of_participants.command(participants.add)
    of_participants.command(participants.remove)
    app.command(of_participants)
    app.command(observing.breakers, group=operators)
    return app


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code. What goes wrong is said on standard error."""
    app = build_app()
    arguments = list(arguments)
    for name in EMPTY_IS_UNSET:
        if os.environ.get(name) == "":  # a container's way of leaving a variable unset
            del os.environ[name]
    if not (_runs_a_runtime(app, arguments) or debug_wanted(arguments)):
        # gRPC reads it when it is imported. Of a handshake that fails it would write lines of its
        # own, and what they say is in ours.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a letter is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:  # closed by who called; the answer must not end in a traceback
        return report(
            Exit(ExitCode.INTERNAL, "standard output is closed; open it, or send it to /dev/null"),
            debug=False,
        )
    try:
        _refuse_other_encodings(arguments)
        code = app(
            _shared_options_last(app, arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
            backend="asyncio",
        )
        sys.stdout.flush()
    except CycloptsError as error:
        return report(
            Exit(ExitCode.USAGE, _usage_line(error, app, arguments)), debug=debug_wanted(arguments)
        )
    except ModuleNotFoundError:
        raise  # `main` says how to install what is missing
    except BrokenPipeError:
        _abandon_stdout()  # the reader has seen enough, as in `amends list | head`
        return ExitCode.OK
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return ExitCode.OK  # as above; what prints help turns it into this
    except OSError as error:
        if _runs_a_runtime(app, arguments):
            return report(error, debug=debug_wanted(arguments))
        # Commands look after the files that they open: this is the output.
        _abandon_stdout()
        line = f"the answer cannot be written: {error.strerror}; it is lost, ask again"
        return report(Exit(ExitCode.INTERNAL, line), debug=debug_wanted(arguments))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # no traceback reaches a user
        if isinstance(error, BaseExceptionGroup) and error.split(BrokenPipeError)[1] is None:
            _abandon_stdout()  # as above, out of a task
            return ExitCode.OK
        return report(error, debug=debug_wanted(arguments))
    finally:
        _let_go_of_stderr()
    return ExitCode.OK if code is None else int(code)


def _let_go_of_stderr() -> None:
    """What is left of lines that could not be written would make the exit code 120 at the end."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _runs_a_runtime(app: App, arguments: list[str]) -> bool:
    path = _command_path(app, _shared_options_last(app, arguments))
    return path[:1] in (["serve"], ["dev"])


def _abandon_stdout() -> None:
    # Else the interpreter complains once more when it flushes what is left.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_other_encodings(arguments: list[str]) -> None:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise Exit(
                ExitCode.USAGE, f"{argument!a}: is not UTF-8; amends takes UTF-8 only"
            ) from None


def _shared_options_last(app: App, arguments: list[str]) -> list[str]:
    """`amends --target ADDRESS get ID` as `amends get --target ADDRESS ID`.

    To cyclopts an option belongs to the command that it follows; to a person these belong to all.
    """
    shared: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, _ = rest[0].partition("=")
        if name not in SHARED_OPTIONS:
            break
        size = 1 if equals else 1 + SHARED_OPTIONS[name]
        shared += rest[:size]
        rest = rest[size:]
    path = _command_path(app, rest)
    return [*path, *shared, *rest[len(path) :]] if path else arguments


def _usage_line(error: CycloptsError, app: App, arguments: list[str]) -> str:
    path = _command_path(app, _shared_options_last(app, arguments))
    match error:
        case UnknownOptionError() if path[:1] == ["definitions"] and "-" in arguments:
            return (
                "-: definitions are not read from standard input, because the end of a file's name"
                " tells its format; write it into a .yaml, .toml or .json file"
            )
        case UnusedCliTokensError():
            tokens = " ".join(error.unused_tokens or [])
            what = f"one argument too many: {tokens} (quote a value that has spaces)"
        case UnknownCommandError():
            # Its list of all commands would bury the one that it thinks was meant.
            what = str(error).partition(" Available commands")[0]
        case _:
            what = str(error)
    what = " ".join(what.split()).rstrip(".")
    joint = " See" if what.endswith("?") else "; see"
    return f"{what}{joint} {' '.join(['amends', *path])} --help"


def _command_path(app: App, arguments: list[str]) -> list[str]:
    """The words at the front that name a command, as far as they name one."""
    path: list[str] = []
    for argument in arguments:
        if argument.startswith("-") or argument not in app:
            break
        app = app[argument]
        path.append(argument)
    return path
