"""Logs: one set-up for the whole process.

1. Logs go to standard error, because standard output belongs to what a command answers.
2. `console` is for people; `json` is one object a line; `auto` is console on a terminal and JSON
   elsewhere.
3. Payloads never reach a log: bytes are replaced by their size, whoever passes them, and tracebacks
   show frames without the values of their variables.
4. What a participant or a caller wrote is quoted: a line break or an escape sequence in it cannot
   forge a line or drive a terminal.
5. `saga_context` binds the saga, and the step, to every line that is written inside it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import Processor

from amends_runtime.core.payload import Payload

__all__ = ["configure_logging", "saga_context"]

LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# C0 and C1 controls, and the two that Unicode calls line breaks.
CONTROLS: Final = {
    code: repr(chr(code))[1:-1] for code in [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029]
}

EventDict = MutableMapping[str, Any]


# -- set-up ----------------------------------------------------------------------------------------


def configure_logging(
    log_format: str = "auto", log_level: str = "info", stream: TextIO | None = None
) -> None:
    """Sets up structlog and the standard library's logging, for the whole process.

    `log_format` is auto, console or json; `log_level` debug, info, warning or error. Records of
    other people's libraries come out in the same form, from warning upward whatever the level:
    below that they log what they carry, aiosqlite for one the parameters of every statement.
    `stream` defaults to standard error.
    """
    # All that structlog and logging use of a stream.
    stream = cast("TextIO", _Forgiving(sys.stderr if stream is None else stream))
    level = LEVELS[log_level]
    if log_format == "auto":
        log_format = "console" if stream.isatty() else "json"
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _hide_bytes,
    ]
    last = _json_tail() if log_format == "json" else _console_tail(_may_colour(stream))
    structlog.configure(
        processors=[*before, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,  # else each filtered debug call costs a new logger
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*before, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))


class _Forgiving:
    """A stream whose full disk or closed pipe is nobody's failure: a line is lost, and no saga."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.isatty = stream.isatty

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _may_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _json_tail() -> list[Processor]:
    return [
        structlog.processors.EventRenamer("message"),
        structlog.processors.format_exc_info,
        _main_keys_first,
        structlog.processors.JSONRenderer(default=_shown),
    ]


def _console_tail(colours: bool) -> list[Processor]:  # noqa: FBT001  # one reader, next to it
    renderer = structlog.dev.ConsoleRenderer(
        colors=colours,
        # The default shows local variables where rich is installed, and they may be payloads.
        exception_formatter=structlog.dev.plain_traceback,
    )
    return [_quote_controls, renderer]


def _main_keys_first(_logger: object, _method: str, event: EventDict) -> EventDict:
    first = {key: event.pop(key) for key in ("timestamp", "level", "message") if key in event}
    return {**first, **event}


def _hide_bytes(_logger: object, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, bytes | bytearray | memoryview):
            event[key] = f"<{len(value)} bytes>"
        elif isinstance(value, Payload):
            event[key] = repr(value)
    return event


def _quote_controls(_logger: object, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = value.translate(CONTROLS)
    return event


def _shown(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    return str(value)


@contextlib.contextmanager
def saga_context(saga_id: str, step: str | None = None) -> Iterator[None]:
    """Binds the saga, and the step if there is one, to all lines logged inside, awaits included."""
    bound = {"saga_id": saga_id} if step is None else {"saga_id": saga_id, "step": step}
    with structlog.contextvars.bound_contextvars(**bound):
        yield
