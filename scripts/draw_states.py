"""Draw the states of sagas into the documents, or check that the drawings are current.

    draw_states.py           write the diagrams between the markers of their pages
    draw_states.py --check   compare, write nothing

The diagrams are Mermaid, generated from the tables `TRANSITIONS` of `amends_runtime.core`: that of
`saga` into the README, that of `two_phase` into docs/two-phase-commit.md. They replace what stands
between these two lines, each by itself:

    <!-- states:begin -->
    <!-- states:end -->

Exit codes: 0 written, or current; 1 one is not current, a page is missing, or has no markers in it;
2 usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from amends_runtime.core import saga, two_phase
from amends_runtime.core.records import SagaState

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- states:begin -->\n"
END = "<!-- states:end -->\n"

Table = Mapping[SagaState, Sequence[SagaState]]

PAGES: Mapping[str, Table] = {
    "README.md": saga.TRANSITIONS,
    "docs/two-phase-commit.md": two_phase.TRANSITIONS,
}
"""The pages with a diagram, by their path in the repository."""


def main() -> int:
    """Draw or check, as the arguments say, and return the exit code."""
    parser = argparse.ArgumentParser(description="Draw the states of sagas into the documents.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a diagram is not current"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with the documents")
    arguments = parser.parse_args()
    root: Path = arguments.root
    done = [keep(root, name, PAGES[name], check=arguments.check) for name in PAGES]
    return 0 if all(done) else 1


def keep(root: Path, name: str, transitions: Table, *, check: bool) -> bool:
    """Draw or check one page, and say what came of it. False: it is not as it should be."""
    page = root / name
    try:
        current = page.read_text(encoding="utf-8")
        wanted = insert(current, draw(transitions))
    except FileNotFoundError:
        print(f"there is no {page}: write it, with the markers in it", file=sys.stderr)
        return False
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    if current == wanted:
        if not check:
            print(f"the diagram in {name} was current")
        return True
    if check:
        print(
            f"the diagram in {name} is not current: run `python scripts/draw_states.py`",
            file=sys.stderr,
        )
        return False
    page.write_text(wanted, encoding="utf-8")
    print(f"wrote the diagram into {name}")
    return True


def draw(transitions: Table) -> str:
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
