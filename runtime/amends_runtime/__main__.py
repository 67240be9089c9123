"""The command `amends`, also `python -m amends_runtime`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    try:
        from amends_runtime.cli.app import run  # noqa: PLC0415  # may be missing its packages

        code = run(sys.argv[1:])
    except ModuleNotFoundError as missing:
        # `pip install amends` is the SDK: it brings this command, and not what the command needs.
        sys.stderr.write(
            f"amends: the command line needs {missing.name}, which is not installed; "
            "run: pip install 'amends[runtime]'\n"
        )
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
