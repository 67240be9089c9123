"""Draw the states of a saga into the README, or check that the drawing is current.

    draw_states.py           write the diagram between the README's markers
    draw_states.py --check   compare, write nothing

The diagram is Mermaid, generated from the table `TRANSITIONS` in `amends_runtime.core.saga`. It
replaces what stands between these two lines, each by itself:

    <!-- states:begin -->
    <!-- states:end -->

Exit codes: 0 written, or current; 1 not current, no README, or no markers in it; 2 usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from amends_runtime.core.records import SagaState
from amends_runtime.core.saga import TRANSITIONS

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- states:begin -->\n"
END = "<!-- states:end -->\n"


def main() -> int:
    """Draw or check, as the arguments say, and return the exit code."""
    parser = argparse.ArgumentParser(description="Draw the states of a saga into the README.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the diagram is not current"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file")
    arguments = parser.parse_args()
    readme: Path = arguments.readme
    try:
        current = readme.read_text(encoding="utf-8")
        wanted = insert(current, draw(TRANSITIONS))
    except FileNotFoundError:
        print(f"there is no {readme}: write it, with the markers in it", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{readme.name}: {error}", file=sys.stderr)
        return 1
    if current == wanted:
        if not arguments.check:
            print(f"the diagram in {readme.name} was current")
        return 0
    if arguments.check:
        print(
            f"the diagram in {readme.name} is not current: run `python scripts/draw_states.py`",
            file=sys.stderr,
        )
        return 1
    readme.write_text(wanted, encoding="utf-8")
    print(f"wrote the diagram into {readme.name}")
    return 0


def draw(transitions: Mapping[SagaState, Sequence[SagaState]]) -> str:
    """Return the diagram as a fenced block; states without a successor are ends."""
    lines = ["stateDiagram-v2", "    [*] --> RUNNING"]
    for before, afters in transitions.items():
        lines += [f"    {before.name} --> {after.name}" for after in afters]
    lines += [f"    {state.name} --> [*]" for state, afters in transitions.items() if not afters]
    return "\n".join(["```mermaid", *lines, "```", ""])


def insert(text: str, diagram: str) -> str:
    """Return the text with the diagram between its markers.

    Raises ValueError unless each marker stands there once, the first before the second.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in head or END in tail:
        raise ValueError(
            f"the lines {BEGIN.strip()} and {END.strip()} must each be there once, in this order"
        )
    return f"{head}{begin}{diagram}{end}{tail}"


if __name__ == "__main__":
    sys.exit(main())
