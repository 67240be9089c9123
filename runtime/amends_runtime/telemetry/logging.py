"""Logs: one set-up for the whole process.

1. Logs go to standard error, because standard output belongs to what a command answers.
2. `console` is for people; `json` is one object a line; `auto` is console on a terminal and JSON
   elsewhere.
3. Payloads never reach a log: bytes are replaced by their size, whoever passes them. Of an
   exception there are its type and its frames: its text and the values of its variables may quote
   what must not be shown. Texts of our own errors are shown, and those of the operating system.
4. What a participant or a caller wrote is quoted: a line break or an escape sequence in it cannot
   forge a line or drive a terminal.

Every line about a saga names it, and its trace and its step where they are known: `saga_id`,
`trace_id`, `step`. Nothing is bound to a context for that, because one task speaks of many sagas.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import ExcInfo, Processor

from amends_runtime.core.payload import Payload
from amends_runtime.errors import AmendsError

__all__ = ["configure_logging"]

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
        structlog.processors.ExceptionRenderer(_without_texts),
        _main_keys_first,
        structlog.processors.JSONRenderer(default=_shown),
    ]


def _console_tail(colours: bool) -> list[Processor]:  # noqa: FBT001  # one reader, next to it
    renderer = structlog.dev.ConsoleRenderer(
        colors=colours,
        exception_formatter=_write_without_texts,
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


# -- exceptions ------------------------------------------------------------------------------------

MAX_CHAIN: Final = 10  # causes of causes, and members of groups: what is further down says little


def _without_texts(exc_info: ExcInfo) -> str:
    """A traceback as Python writes it, but with types in the place of texts that others wrote."""
    return "\n".join(_shown_error(exc_info[1], MAX_CHAIN))


def _write_without_texts(stream: TextIO, exc_info: ExcInfo) -> None:
    stream.write("\n" + _without_texts(exc_info))


def _shown_error(error: BaseException, depth: int) -> Iterator[str]:
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and depth:
        yield from _shown_error(before, depth - 1)
        yield "\nand then, out of it:\n" if error.__cause__ else "\nand then, while at it:\n"
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):"
        yield "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    yield f"{name}: {_text(error)}" if _text(error) else name
    if isinstance(error, BaseExceptionGroup) and depth:
        for number, member in enumerate(error.exceptions[:MAX_CHAIN], start=1):
            yield f"\n{number} of {len(error.exceptions)} in it:\n"
            yield from _shown_error(member, depth - 1)


def _text(error: BaseException) -> str:
    """What may be shown of it, on one line."""
    if isinstance(error, AmendsError):
        return str(error).translate(CONTROLS)
    # Not its arguments: whoever raises one may have put anything there.
    return (error.strerror or "") if isinstance(error, OSError) and error.errno else ""
