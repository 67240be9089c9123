"""Definition files: one meaning in every format, and the place of what is wrong."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import amends
from amends.definition_source import MAX_FILE_BYTES
from amends.formats import Unreadable
from amends.formats import json as json_format
from amends.formats import toml as toml_format
from amends_runtime.core.definition import content_hash
from amends_runtime.wire import definition_from_proto

# -- one meaning -----------------------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,47}", fullmatch=True) | st.sampled_from(
    ["y", "n", "on", "off", "yes", "no", "true", "false", "null", "inf", "nan", "e1", "x1f"]
)
ACTIONS = st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0xFFFF), min_size=1)
SECONDS = st.integers(1, 10**10).map(lambda milliseconds: milliseconds / 1000)


@st.composite
def retries(draw: st.DrawFn) -> amends.Retry | None:
    """A retry policy with any of its fields, or none."""
    if draw(st.booleans()):
        return None
    return amends.Retry(
        first_s=draw(st.none() | SECONDS),
        factor=draw(st.none() | st.floats(1, 1e300) | st.integers(1, 100)),
        max_s=draw(st.none() | SECONDS),
        give_up_after_s=draw(st.none() | SECONDS),
    )


@st.composite
def definitions(draw: st.DrawFn) -> amends.Definition:
    """Whatever the builder can build, also what a runtime would refuse."""
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    is_two_phase = draw(st.booleans())
    definition = amends.Definition(
        draw(NAMES),
        mode=amends.Mode.TWO_PHASE_COMMIT if is_two_phase else amends.Mode.SAGA,
        deadline_s=draw(st.none() | SECONDS),
        retention_s=draw(st.none() | SECONDS),
        ordered=is_two_phase and draw(st.booleans()),
        locked_retries=draw(st.integers(0, 100)) if is_two_phase else 0,
    )
    for name in names:
        others = [each for each in names if each != name]
        few = st.none() | st.lists(st.sampled_from(others) if others else st.nothing())
        kinds = ["step", "pivot", "retriable", "read_only"]
        if is_two_phase:  # whose steps have neither kind nor order
            few, kinds = st.none(), ["step"]
        add = getattr(definition, draw(st.sampled_from(kinds)))
        options: dict[str, Any] = {
            "after": draw(few),
            "uses": draw(few),
            "timeout_s": draw(st.none() | SECONDS),
            "retry": draw(retries()),
        }
        if add == definition.step:
            options["compensation_retry"] = draw(retries())
        definition = add(name, draw(NAMES), draw(ACTIONS), **options)
    return definition


def in_toml(content: dict[str, Any]) -> str:
    """Write a definition as TOML, its steps as tables of their own."""
    lines = [f"{key} = {toml_value(value)}" for key, value in content.items() if key != "steps"]
    if not content["steps"]:
        lines.append("steps = []")
    for step in content["steps"]:
        lines.append("\n[[steps]]")
        lines += [f"{key} = {toml_value(value)}" for key, value in step.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """Write a value on one line: TOML's texts and lists are JSON's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value)


def in_file(folder: Path, suffix: str, text: str) -> amends.Definition:
    """Read a definition from a file of this text."""
    file = folder / f"order{suffix}"
    file.write_bytes(text.encode())
    return amends.Definition.from_file(file)


class Quoting(yaml.SafeDumper):
    """Quotes what we read as a number, such as 0e0, and it does not."""


def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Write a text."""
    style = '"' if re.match(r"[-+.0-9]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


Quoting.add_representer(str, represent_text)


@given(definition=definitions(), style=st.sampled_from(["flow", "block", "mixed"]))
def test_all_formats_and_the_builder_make_one_message(
    tmp_path_factory: pytest.TempPathFactory, definition: amends.Definition, style: str
) -> None:
    """The same definition is the same bytes on the wire and has the same hash."""
    folder = tmp_path_factory.getbasetemp()
    content = definition.to_dict()
    is_flow = {"flow": True, "block": False}.get(style)
    in_yaml = yaml.dump(content, Dumper=Quoting, default_flow_style=is_flow, allow_unicode=True)
    read = [
        in_file(folder, ".json", json.dumps(content)),
        in_file(folder, ".json", json.dumps(content, indent=2, ensure_ascii=False)),
        in_file(folder, ".toml", in_toml(content)),
        in_file(folder, ".yaml", in_yaml),
        in_file(folder, ".yml", json.dumps(content)),  # JSON is YAML
        amends.Definition.from_yaml(in_yaml),
        amends.Definition.from_dict(content),
    ]
    wanted = definition.to_proto().SerializeToString(deterministic=True)
    hash_ = content_hash(definition_from_proto(definition.to_proto()))
    for each in read:
        assert each == definition
        assert each.to_proto().SerializeToString(deterministic=True) == wanted
        assert content_hash(definition_from_proto(each.to_proto())) == hash_


# -- places ----------------------------------------------------------------------------------------

PLACES = {
    ".yaml": """\
# an order
name: order
dedline_s: 60
steps:
  - name: place
    participant: orders
    action: place
    retry: {factor: 0,
            first: 1}

  - name: charge
    partcipant: payments
    action: charge
    after:
      - place
      - plac
  - ship
""",
    ".toml": """\
# an order
name = "order"
dedline_s = 60
[[steps]]
name = "place"
participant = "orders"
action = "place"
retry.factor = 0
retry.first = 1
[[steps]]
name = "charge"
partcipant = "payments"
action = "charge"
after = [
    "place",  # first
    "plac",
]
""",
    ".json": """\
{
  "name": "order",
  "dedline_s": 60,
  "steps": [
    {
      "name": "place", "participant": "orders",
      "action": "place",
      "retry": {"factor": 0,
                "first": 1}
    },
    {
      "name": "charge",
      "partcipant": "payments",
      "action": "charge",
      "after": ["place",
                "plac"]
    },
    "ship"
  ]
}
""",
}
FAULTS = {
    "dedline_s: is not a known key": {".yaml": (3, 1), ".toml": (3, 1), ".json": (3, 3)},
    "step 'place': retry.factor: must be": {".yaml": (8, 13), ".toml": (8, 7), ".json": (8, 17)},
    "step 'place': retry.first: is not": {".yaml": (9, 13), ".toml": (9, 7), ".json": (9, 17)},
    "step 'charge': participant: is missing": {
        ".yaml": (11, 5),
        ".toml": (10, 1),
        ".json": (11, 5),
    },
    "step 'charge': partcipant: is not a known": {
        ".yaml": (12, 5),
        ".toml": (12, 1),
        ".json": (13, 7),
    },
    "step 'charge': after[1]: there is no": {".yaml": (16, 9), ".toml": (16, 5), ".json": (16, 17)},
    "steps[2]: must be a table of keys": {".yaml": (17, 5), ".json": (18, 5)},
}


def refused(file: Path) -> list[amends.DefinitionProblem]:
    """Read what must not be read, and give what was said."""
    with pytest.raises(amends.InvalidDefinition) as caught:
        amends.Definition.from_file(file)
    return list(caught.value.details)


@pytest.mark.parametrize("suffix", PLACES)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no BOM", "BOM"])
def test_each_fault_has_its_line_and_column(
    tmp_path: Path, suffix: str, line_end: str, mark: str
) -> None:
    """In the order of the text; a key that is missing is said of the table that lacks it."""
    file = tmp_path / f"order{suffix}"
    file.write_bytes((mark + PLACES[suffix].replace("\n", line_end)).encode())
    said = [str(each) for each in refused(file)]
    wanted = [(places[suffix], text) for text, places in FAULTS.items() if suffix in places]
    assert len(said) == len(wanted)
    for line, ((number, column), text) in zip(said, wanted, strict=True):
        assert line.startswith(f"{file}:{number}:{column}: {text}")


def test_a_text_without_a_file_has_lines_too() -> None:
    """They are said in words, since nothing can jump to them."""
    with pytest.raises(amends.InvalidDefinition) as caught:
        amends.Definition.from_yaml("name: order\nsteps:\n  - name: a\n    action: x\n")
    assert caught.value.problems == ("line 3, column 5: step 'a': participant: is missing: add it",)


ODD_TOML = """\
"name" = 'order' # = "not this"
# [[steps]]
note = \"\"\"
[[steps]]
name = "no \\" step\"\"\"\"
plain = '''
[fake]''\'''
day = 1979-05-27 07:32:00
 list = [ [1, 2], # [
  { a = "]", "b.c" = 2 }, ]
[ outer . "in.ner" ] # ]
x.y . z = +1
x.y."w" = { v.u = 1 }
[[steps]]
[[steps.items]]
deep = 1
[[steps.items]]
deep = 2
[steps.retry]
first_s = 3
[[steps]]
[[steps.items]]
deep = 4
[outer]
late = true
"""
PLACES_OF_ODD_TOML = {
    (): (1, 1),
    ("name",): (1, 1),
    ("note",): (3, 1),
    ("plain",): (6, 1),
    ("day",): (8, 1),
    ("list",): (9, 2),
    ("list", 0): (9, 11),
    ("list", 0, 0): (9, 12),
    ("list", 0, 1): (9, 15),
    ("list", 1): (10, 3),
    ("list", 1, "a"): (10, 5),
    ("list", 1, "b.c"): (10, 14),
    ("outer",): (24, 1),
    ("outer", "in.ner"): (11, 1),
    ("outer", "in.ner", "x"): (12, 1),
    ("outer", "in.ner", "x", "y"): (12, 3),
    ("outer", "in.ner", "x", "y", "z"): (12, 7),
    ("outer", "in.ner", "x", "y", "w"): (13, 5),
    ("outer", "in.ner", "x", "y", "w", "v"): (13, 13),
    ("outer", "in.ner", "x", "y", "w", "v", "u"): (13, 15),
    ("steps",): (14, 1),
    ("steps", 0): (14, 1),
    ("steps", 0, "items"): (15, 1),
    ("steps", 0, "items", 0): (15, 1),
    ("steps", 0, "items", 0, "deep"): (16, 1),
    ("steps", 0, "items", 1): (17, 1),
    ("steps", 0, "items", 1, "deep"): (18, 1),
    ("steps", 0, "retry"): (19, 1),
    ("steps", 0, "retry", "first_s"): (20, 1),
    ("steps", 1): (21, 1),
    ("steps", 1, "items"): (22, 1),
    ("steps", 1, "items", 0): (22, 1),
    ("steps", 1, "items", 0, "deep"): (23, 1),
    ("outer", "late"): (25, 1),
}


def test_odd_toml_is_located() -> None:
    """Dotted and quoted keys, tables in lists in tables, texts that look like headers."""
    assert toml_format.read(ODD_TOML).places == PLACES_OF_ODD_TOML


TOML_KEYS = st.sampled_from(["a", "b-1", "_", "7", '"q.u"', "'l #'", '"\\u0041="', '""'])
TOML_SCALARS = st.sampled_from(
    [
        *("1", "-0.5e3", "true", "0xFF", "1_000", "1979-05-27T07:32:00Z", "07:32:00", "inf"),
        *('"x"', "'y'", '"\\"]\\n"', "'#'", '""', "''", '"é😀"'),
        *('"""\n[t]\nk = 1"""', "'''\n[[t]]\n'''", '""""q""""', "'''''l'''''", '"""\\\n  x"""'),
    ]
)
NOISE = st.sampled_from(["", " ", "# [x]\n", "\n", '\t# k = 1 "\n\n'])


@st.composite
def toml_values(draw: st.DrawFn, depth: int = 2) -> str:
    """A value in any notation."""
    kind = draw(st.sampled_from(["scalar", "list", "table"])) if depth else "scalar"
    inner = st.deferred(lambda: toml_values(depth=depth - 1))
    if kind == "list":
        items = [draw(NOISE) + draw(inner) + draw(NOISE) for _ in range(draw(st.integers(0, 3)))]
        return "[" + ",".join(items) + (draw(NOISE) if items else "") + "]"
    if kind == "table":
        keys = draw(st.lists(TOML_KEYS, unique=True, max_size=3))
        return "{ " + ", ".join(f"{key} = {draw(inner)}" for key in keys) + " }"
    return draw(TOML_SCALARS)


@st.composite
def toml_texts(draw: st.DrawFn) -> str:
    """A text of headers and entries; some are no TOML, since keys meet."""
    text = ""
    for _ in range(draw(st.integers(1, 8))):
        dot = draw(st.sampled_from([".", " . "]))
        key = dot.join(draw(st.lists(TOML_KEYS, min_size=1, max_size=3)))
        match draw(st.sampled_from(["entry", "entry", "[", "[["])):
            case "entry":
                text += f"{key} = {draw(toml_values())}"
            case "[":
                text += f"[ {key} ]"
            case _:
                text += f"[[{key}]]"
        text += " # c = [\n" if draw(st.booleans()) else "\n"
        text += draw(NOISE).lstrip(" \t") if draw(st.booleans()) else ""
    return text


KEY_AT = re.compile(r"""\s*\.?\s*("(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)""")


@given(toml_texts())
def test_whatever_toml_is_located_at_its_key(text: str) -> None:
    """Everything that the library reads has a place, and there stands its key or its header."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        with pytest.raises(Unreadable) as caught:
            toml_format.read(text)
        assert caught.value.place is not None
        return
    places = toml_format.read(text).places
    paths = list(paths_in(content))
    assert set(places) == set(paths)
    lines = text.split("\n")
    for path in paths[1:]:
        line, column = places[path]
        here = lines[line - 1][column - 1 :]
        if isinstance(path[-1], int):
            if path[-1] > 0:
                assert places[path] > places[*path[:-1], path[-1] - 1]
        elif column == 1 and here.startswith("["):  # a header, which names it or what is in it
            assert path[-1] in keys_in(here.lstrip("[ "))
        else:
            assert keys_in(here)[0] == path[-1]


def keys_in(text: str) -> list[str]:
    """The parts of the key at the beginning of a text."""
    found = []
    while match := KEY_AT.match(text):
        found.append(next(iter(tomllib.loads(f"{match[1]} = 0"))))
        text = text[match.end() :]
        if not text.lstrip().startswith("."):
            break
    return found


def paths_in(value: Any, path: tuple[str | int, ...] = ()) -> Any:
    """Every path in a value, the outer ones first."""
    yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from paths_in(each, (*path, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from paths_in(each, (*path, number))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(JSON_VALUES, st.sampled_from([None, 0, 1, "\t"]))
def test_whatever_json_is_located_at_its_key(value: Any, indent: Any) -> None:
    """Everything in it has a place, and there stands its key, or the item itself."""
    text = json.dumps(value, indent=indent, ensure_ascii=indent is None)
    parsed = json_format.read(text)
    assert parsed.content == value
    assert parsed.problems == []
    paths = list(paths_in(value))
    assert set(parsed.places) == set(paths)
    lines = text.split("\n")
    for path in paths:
        line, column = parsed.places[path]
        here = "\n".join([lines[line - 1][column - 1 :], *lines[line:]])
        found, _ = json.JSONDecoder().raw_decode(here)
        inner = value
        for part in path:
            inner = inner[part]
        assert found == (path[-1] if path and isinstance(path[-1], str) else inner)


# -- YAML ------------------------------------------------------------------------------------------

SHARED = """\
name: order
steps:
  - name: place
    participant: orders
    action: place
    retry: &patient
      first_s: 1
      max_s: 10
    compensation_retry: *patient
  - &second
    name: charge
    participant: payments
    action: charge
    timeout_s: 3
    retry: {<<: *patient, max_s: 20}
  - {<<: *second, name: bill, after: [place]}
"""


def test_yaml_may_say_a_thing_once() -> None:
    """Anchors, aliases and merge keys mean what they say; own keys win."""
    patient = amends.Retry(first_s=1, max_s=10)
    other = amends.Retry(first_s=1, max_s=20)
    assert amends.Definition.from_yaml(SHARED) == amends.Definition("order").step(
        "place", "orders", "place", retry=patient, compensation_retry=patient
    ).step("charge", "payments", "charge", timeout_s=3, retry=other).step(
        "bill", "payments", "charge", timeout_s=3, retry=other, after=["place"]
    )


def test_what_stands_behind_an_alias_is_found_where_it_is_written() -> None:
    """Each step that takes it in is named, with the line that has to be mended."""
    said = said_of_yaml(SHARED.replace("max_s: 10", "max_s: ten"))
    assert said == [
        "line 8, column 7: step 'place': retry.max_s: must be a number of seconds, not 'ten'",
        (
            "line 8, column 7: step 'place': compensation_retry.max_s: must be a number of "
            "seconds, not 'ten'"
        ),
    ]


def test_an_alias_carries_what_is_to_be_written_in_another_way() -> None:
    """Each step that takes it in says the same of it, and nothing further."""
    said = said_of_yaml(SHARED.replace("max_s: 10", "max_s: 010"))
    assert [line.partition(";")[0] for line in said] == [
        f"line 8, column 7: step 'place': {field}.max_s: readers of YAML disagree about the "
        "number 010"
        for field in ("retry", "compensation_retry")
    ]


def said_of_yaml(text: str) -> list[str]:
    """Read what must not be read, and give what was said."""
    with pytest.raises(amends.InvalidDefinition) as caught:
        amends.Definition.from_yaml(text)
    return list(caught.value.problems)


STEP = "name: order\nsteps:\n- name: a\n  participant: p\n  action: x\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("  after: [no]", "3:no is a truth value to some readers"),
        ("  after: off", "off is a truth value to some readers of YAML"),
        ("  timeout_s: Yes", "put it in quotes: 'Yes'"),
        ("  timeout_s: 010", "readers of YAML disagree about the number 010"),
        ("  timeout_s: 0o10", "disagree about the number 0o10"),
        ("  timeout_s: 0x10", "disagree about the number 0x10"),
        ("  timeout_s: 1_000", "disagree about the number 1_000"),
        ("  timeout_s: 1:30", "counts in sixties"),
        ("  after: 2001-12-14", "is a date to readers of YAML"),
        ("  after: 2001-12-14 21:59:43.10 -5", "is a date to readers of YAML"),
        ("  after:", "has no value; leave the key out for the default, [] is no step"),
        ("  timeout_s: .inf", "must be a number of seconds, not inf"),
        ("  timeout_s: -.Inf", "must be a number of seconds, not -inf"),
        ("  timeout_s: .nan", "must be a number of seconds, not nan"),
        ("  timeout_s: 5s", "must be a number of seconds, not '5s'"),
        ("  timeout_s: '5'", "must be a number of seconds, not '5'"),
        ("  timeout_s: !!float 5", "the tag '!!float' is not taken in definitions"),
        ("  timeout_s: !!python/object/apply:os.getcwd []", "the tag '!!python/object/apply"),
        ("  action: y", "stands twice in its table, first in line 5: keep one of them"),
        ("  after: *b", "the alias *b stands for nothing: put &b before it"),
        ("  after: &b [*b]", "the alias *b stands inside what it stands for"),
        ("  <<: 5", "<< takes a table, or a list of tables"),
        ("  ? [after]\n  : b", "a key is a text, not a table or a list"),
        ("\ttimeout_s: 5", "indent with spaces, YAML takes no tabs"),
        ("  after: a: b", "mapping values are not allowed here; is the line indented"),
        ("   timeout_s: 5", "is not YAML: "),
        ("---\nname: other", "a second document begins here: write one definition per file"),
    ],
)
def test_what_readers_of_yaml_disagree_about_is_refused(line: str, words: str) -> None:
    """One line that says where it is and what to write instead; nothing is guessed."""
    [said] = said_of_yaml(f"{STEP}{line}\n")
    place, _, message = said.partition(": ")
    assert re.fullmatch(r"line [67], column \d+", place)
    assert words.removeprefix("3:") in message


def test_what_all_readers_of_yaml_read_alike_is_taken() -> None:
    """Quoted words, decimal numbers, JSON's null, comments, a document's marks."""
    text = (
        "%YAML 1.2\n--- # one\nname: 'no'\ndeadline_s: 1.5e+2\nretention_s: ~\nsteps:\n"
        "- {name: \"on\", participant: y, action: '010', timeout_s: 1., after: null}\n...\n"
    )
    assert amends.Definition.from_yaml(text) == amends.Definition("no", deadline_s=150).step(
        "on", "y", "010", timeout_s=1
    )


LAUGHS = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a: &a0 {k: v}\n" + "".join(
    f"b{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: v}}\n" for n in range(1, 60)
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(LAUGHS, id="aliases of aliases"),
        pytest.param(MERGES, id="merges of merges"),
        pytest.param("steps: " + "[" * 20_000, id="nested in flow"),
        pytest.param("- " * 20_000, id="nested in block"),
        pytest.param("? " * 20_000, id="nested keys"),
        pytest.param("steps: [" + "1," * 200_000 + "]", id="very many values"),
        pytest.param("name: " + "9" * 100_000, id="a huge number"),
        pytest.param("name: a\0b", id="NUL"),
        pytest.param("name: \x1b[2J", id="an escape"),
        pytest.param("name: 'a", id="a text without end"),
        pytest.param("name: {a: b", id="a table without end"),
        pytest.param("%YAML 9.1\n---\nname: a", id="YAML of the future"),
        pytest.param("&a " * 100, id="many anchors"),
        pytest.param("a\n" * 1000 + ": b", id="a key of many lines"),
    ],
)
def test_a_hostile_yaml_text_is_refused_with_its_line(text: str) -> None:
    """One problem with a place, before it costs more than the text itself."""
    [said] = said_of_yaml(text)
    assert re.match(r"line \d+, column \d+: ", said)
    assert len(said) < 300


# -- hostile files ---------------------------------------------------------------------------------

FULL = {
    "name": "order",
    "steps": [
        {
            "name": f"step-with-a-long-name-{number:03}",
            "participant": "payments",
            "action": "charge",
            "kind": "compensatable",
            "after": [f"step-with-a-long-name-{other:03}" for other in range(number)],
            "uses": [f"step-with-a-long-name-{other:03}" for other in range(number)],
            "timeout_s": 5,
            "retry": {"first_s": 1, "factor": 2, "max_s": 10, "give_up_after_s": 100},
            "compensation_retry": {"first_s": 1, "factor": 2, "max_s": 10, "give_up_after_s": 100},
        }
        for number in range(128)
    ],
}


@pytest.mark.parametrize("suffix", [".json", ".toml", ".yaml"])
def test_the_largest_definition_fits(tmp_path: Path, suffix: str) -> None:
    """128 steps with every field filled, each waiting for all before it, are within all limits."""
    text = in_toml(FULL) if suffix == ".toml" else json.dumps(FULL)
    assert len(in_file(tmp_path, suffix, text).steps) == 128


HOSTILE = [
    (".json", b"", "1:1", "is empty; a definition has a name and steps"),
    (".toml", b" \n\n", "1:1", "is empty; a definition has a name and steps"),
    (".yaml", b"# nothing\n", "1:1", "holds nothing; a definition has a name and steps"),
    (".json", b"null", "1:1", "holds nothing"),
    (".json", b"[]", "1:1", "a definition must be a table of keys, not []"),
    (".yaml", b"\n- a\n", "2:1", "a definition must be a table of keys, not ['a']"),
    (".json", b"{\n,", "2:1", "is not JSON: "),
    (".json", b'{"a": 1}}', "1:9", "is not JSON: Extra data"),
    (".json", b'{"name": "a\nb"}', "1:12", "is not JSON: "),
    (".json", b'{"name":\n"a\0"}', "2:3", "is not JSON: "),
    (".json", b"[" * 100_000, "1:17", "is nested more than 16 deep here"),
    (".json", b"\n" + b'"\\' * 400_000, "2:1", "is not JSON: "),
    (".json", b"[" + b"1," * 300_000 + b"1]", "1:131072", "holds more than 65536 keys and values"),
    (".json", b"\n\n" + b"1" * 5000, "3:1", "has a word of more than 512 characters here"),
    (".json", b'{"name": "a", "name": 5, "steps": []}', "1:15", "name: stands twice in its table"),
    (".json", b'{"name": "\xff"}', "1:11", "is not UTF-8 at byte 10; save it as UTF-8"),
    (".toml", b"a = 1\nb = \xe9\n", "2:5", "is not UTF-8 at byte 10; save it as UTF-8"),
    (".yaml", "name: a".encode("utf-16"), "1:1", "is not UTF-8 at byte 0; save it as UTF-8"),
    (".toml", b"a = 1\na = 2\n", "2:6", "is not TOML: Cannot overwrite a value"),
    (".toml", b"a = 1\nb =", "2:4", "is not TOML: Invalid value at the end"),
    (".toml", b"a = '\0'", "1:6", "is not TOML: "),
    (".toml", b"a = 1\rb = 2", "1:6", "is not TOML: "),
    (".toml", b"\na = " + b"[" * 100_000, "2:20", "is nested more than 16 deep here"),
    (".toml", b"\na = " + b"{a=" * 100_000, "2:", "is nested more than 16 deep here"),
    (".toml", b"\n" + b"a." * 200_000 + b"a = 1", "2:33", "is nested more than 16 deep here"),
    (".toml", b"\n[" + b"a." * 200_000 + b"a]", "2:34", "is nested more than 16 deep here"),
    (".toml", b"\na = 0x" + b"f" * 9000, "2:5", "has a word of more than 512 characters"),
    (".toml", b"\na = " + b"9" * 9000, "2:5", "has a word of more than 512 characters"),
    (".toml", b"a = [" + b"1," * 300_000, "1:", "holds more than 65536 keys and values"),
    (".toml", b'a = """' + b"\\\n" * 100_000, "", "is not TOML: "),
]


@pytest.mark.parametrize(
    ("suffix", "content", "place", "words"), HOSTILE, ids=[str(n) for n in range(len(HOSTILE))]
)
def test_a_hostile_file_is_refused_with_its_line(
    tmp_path: Path, suffix: str, content: bytes, place: str, words: str
) -> None:
    """Whatever stands in it, the answer is `InvalidDefinition`, and its first line says where."""
    file = tmp_path / f"order{suffix}"
    file.write_bytes(content)
    first, *_ = refused(file)
    assert str(first).startswith(f"{file}:{place}")
    assert words in str(first)
    assert len(str(first)) < len(str(file)) + 300


def test_what_is_no_file_of_a_definition_is_refused(tmp_path: Path) -> None:
    """Another suffix, and more than a definition can be; what cannot be read is Python's error."""
    (tmp_path / "order.ini").touch()
    assert [str(each) for each in refused(tmp_path / "order.ini")] == [
        f"{tmp_path}/order.ini: is none of .yaml, .yml, .toml and .json; definition files are"
    ]
    (tmp_path / "order.YAML").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    assert "is larger than 1048576 bytes" in str(refused(tmp_path / "order.YAML")[0])
    with pytest.raises(FileNotFoundError):
        amends.Definition.from_file(tmp_path / "nope.toml")
    tmp_path.joinpath("folder.json").mkdir()
    with pytest.raises(IsADirectoryError):
        amends.Definition.from_file(tmp_path / "folder.json")


WRONG = ["{}", "[]", "5", "null", '"x"', "true", "[5]", '{"a": {}}', "1e999"]
TAKEN = {  # null is the default; "x" as a name of a step, or of several, is judged with the others
    "name": {'"x"'},
    "action": {'"x"'},
    "deadline_s": {"5", "null"},
    "timeout_s": {"5", "null"},
    "steps": {"[]"},
    "after": {"[]", "null"},
    "retry": {"{}", "null"},
    "mode": set[str](),
    "ordered": {"true"},
    "locked_retries": {"5"},
    "kind": set[str](),
}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("key", TAKEN)
def test_a_wrong_type_is_said_of_its_field(tmp_path: Path, suffix: str, key: str) -> None:
    """Every field with every type: either it is taken, or its own line says what is wrong."""
    file = tmp_path / f"order{suffix}"
    for value in WRONG:
        step = {"name": '"a"', "participant": '"p"', "action": '"x"'}
        top = {"name": '"order"'}
        if key in {"ordered", "locked_retries"}:
            top["mode"] = '"two_phase_commit"'
        (step if key in {"action", "timeout_s", "after", "retry", "kind"} else top)[key] = value
        in_step = ",\n".join(f'"{name}": {each}' for name, each in step.items())
        top.setdefault("steps", f"[{{\n{in_step}\n}}]")
        text = ",\n".join(f'"{name}": {each}' for name, each in top.items())
        file.write_text(f"{{{text}}}", encoding="utf-8")
        if value in TAKEN[key]:
            amends.Definition.from_file(file)
            continue
        found = refused(file)
        before = text[: text.index(f'"{key}": {value}')]
        assert {each.line for each in found} == {before.count("\n") + 1}
        assert all(key in each.field for each in found)


@pytest.mark.parametrize("word", ["true", "True", "FALSE", "yes", "on", "'true'", "1", "~", ""])
def test_yaml_has_two_words_for_a_truth_value(word: str) -> None:
    """All readers of YAML agree about true and false; of other words nobody can be sure."""
    text = f"name: transfer\nmode: two_phase_commit\nordered: {word}\nsteps: []\n"
    if word.lower() in ("true", "false"):
        assert amends.Definition.from_yaml(text).ordered is (word.lower() == "true")
        return
    with pytest.raises(amends.InvalidDefinition) as caught:
        amends.Definition.from_yaml(text)
    [found] = caught.value.details
    assert (found.line, found.path) == (3, ("ordered",))
