"""A runtime whose threads have their names in /proc, for benchmarks and profilers.

`bench_runtime.py ARGUMENTS` is `amends ARGUMENTS`. Python 3.11 keeps its threads' names to itself,
and whoever wants to know what each of them costs must be able to tell them apart from outside.
"""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path

from amends_runtime.__main__ import main

UNNAMED = re.compile(r"Thread-\d+ \((.*)\)")  # what threading makes of a function's name


def name_threads() -> None:
    """Lets every Python thread that is started from now on have its name in the kernel."""
    start = threading.Thread.start

    def start_named(self: threading.Thread) -> None:
        start(self)  # returns when it runs, so its number is known
        name = UNNAMED.sub(r"\1", self.name)
        with contextlib.suppress(OSError):  # not Linux, or it has just ended
            # Threads that it starts in C have this name, too, until they choose another.
            Path(f"/proc/self/task/{self.native_id}/comm").write_text(name, encoding="utf-8")

    threading.Thread.start = start_named  # type: ignore[method-assign]  # the only hook there is


if __name__ == "__main__":
    name_threads()
    main()
