"""What a PromQL expression asks for: just enough of the language for dashboards and alerts.

Not a parser: tokens, and the few rules by which names of metrics, labels and functions can be told
apart. What it does not know it refuses, so that nothing goes by unseen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["Asked", "Matcher", "asked"]

TOKEN: Final = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<offset>offset\s+\d+[smhd]\b)
    | (?P<range>\[(?:\d+[smhd]|\$__rate_interval)\])
    | (?P<number>\d+(?:\.\d+)?)
    | (?P<word>[A-Za-z_:][A-Za-z0-9_:]*)
    | (?P<match>=~|!~|!=(?!=)|==|>=|<=|=)
    | (?P<sign>[-+*/%^<>(){},])
    """,
    re.VERBOSE,
)
GROUPINGS: Final = frozenset(("by", "without", "on", "ignoring", "group_left", "group_right"))
OPERATORS: Final = frozenset(("and", "or", "unless", "bool"))
FUNCTIONS: Final = frozenset(
    (
        *("sum", "max", "min", "avg", "count", "rate", "increase", "changes", "absent"),
        *("histogram_quantile", "min_over_time", "max_over_time", "label_values"),
    )
)


class Matcher(NamedTuple):
    """One condition of a selector."""

    label: str
    operator: str
    value: str


class Asked(NamedTuple):
    """A selector: a metric's name, its conditions, and every label that its expression names."""

    name: str
    matchers: tuple[Matcher, ...]


class _Token(NamedTuple):
    kind: str
    text: str


def asked(expression: str) -> tuple[list[Asked], set[str]]:
    """The selectors of an expression, and the labels by which it groups or joins.

    Raises ValueError for what it cannot read.
    """
    tokens = list(_tokens(expression))
    found: list[Asked] = []
    grouped: set[str] = set()
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        following = tokens[at + 1].text if at + 1 < len(tokens) else ""
        at += 1
        if kind != "word" or text in OPERATORS:
            continue
        if text in GROUPINGS:
            end = _closing(tokens, at, "(", ")")
            grouped |= {token.text for token in tokens[at + 1 : end] if token.kind == "word"}
            at = end + 1
        elif text in FUNCTIONS and (following == "(" or following in GROUPINGS):
            continue
        elif following == "(":
            raise ValueError(f"{text} is no function that is known here: {expression}")
        elif following == "{":
            end = _closing(tokens, at, "{", "}")
            found.append(Asked(text, tuple(_matchers(tokens[at + 1 : end]))))
            at = end + 1
        else:
            found.append(Asked(text, ()))
    return found, grouped


def _tokens(expression: str) -> Iterator[_Token]:
    at = 0
    while at < len(expression):
        match = TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"cannot be read from here: {expression[at:]}")
        at = match.end()
        if match.lastgroup != "space":
            assert match.lastgroup is not None
            yield _Token(match.lastgroup, match.group())


def _closing(tokens: list[_Token], at: int, opening: str, closing: str) -> int:
    if at >= len(tokens) or tokens[at].text != opening:
        raise ValueError(f"no {opening} where there must be one")
    for end in range(at + 1, len(tokens)):
        if tokens[end].text == closing:
            return end
    raise ValueError(f"no {closing} at the end")


def _matchers(tokens: list[_Token]) -> Iterator[Matcher]:
    kinds = ["word", "match", "string"]
    for start in range(0, len(tokens), 4):
        part = tokens[start : start + 3]
        if [token.kind for token in part] != kinds:
            raise ValueError(f"no condition: {' '.join(token.text for token in part)}")
        label, operator, value = part
        yield Matcher(label.text, operator.text, value.text[1:-1])
