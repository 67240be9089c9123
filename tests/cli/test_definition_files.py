"""Definition files at the command line: checked without a runtime, registered, compared, served."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import amends
from amends_runtime.cli.app import run
from amends_runtime.cli.definition_files import check_files, find_definitions
from amends_runtime.core.definition import content_hash
from amends_runtime.wire import definition_from_proto

PAGE = Path(__file__).parents[2] / "docs" / "definitions.md"


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No AMENDS_* of the machine, and files named without their folder."""
    for name in [name for name in os.environ if name.startswith("AMENDS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, target: str) -> str:
    """A real runtime, where commands find it."""
    monkeypatch.setenv("AMENDS_TARGET", target)
    return target


def written(name: str, content: str | bytes | dict[str, Any]) -> str:
    """A file in the current folder."""
    text = json.dumps(content) if isinstance(content, dict) else content
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


class Ended:
    """What a command printed, and how it ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code = run(arguments)
        self.out, err = capsys.readouterr()
        self.lines = [line.removeprefix("amends: ") for line in err.splitlines()]


STEP = {"name": "pay", "participant": "bank", "action": "x"}
RIGHT = """\
name: order
steps:
  - name: pay
    participant: bank
    action: x
"""
WRONG = """\
name: order
dedline_s: 60
steps:
  - name: place
    participant: orders
    action: place
    timeout_s: 100000
    retry:
      factor: 1000
  - name: charge
    participant: payments
    action: a charge
    retry: {max_s: 0.05}
"""


# -- check -----------------------------------------------------------------------------------------


def test_right_files_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    """With name, number of steps and hash, whatever the format; exit code 0, no runtime asked."""
    files = [
        written("a.yaml", RIGHT),
        written("b.json", {"name": "second", "steps": [STEP, {**STEP, "name": "b"}]}),
        written("c.toml", 'name = "third"\nsteps = [{name="a", participant="p", action="x"}]'),
    ]
    checked = Ended(capsys, "definitions", "check", *files)
    assert (checked.code, checked.lines) == (0, [])
    header, *rows = [line.split() for line in checked.out.splitlines()]
    assert header == ["FILE", "NAME", "STEPS", "HASH"]
    assert [row[:3] for row in rows] == [
        ["a.yaml", "order", "1"],
        ["b.json", "second", "2"],
        ["c.toml", "third", "1"],
    ]
    wanted = content_hash(definition_from_proto(amends.Definition.from_yaml(RIGHT).to_proto()))
    assert rows[0][3] == wanted[:12]


def test_what_two_judges_find_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys, which the SDK judges, and ranges, which the runtime does, in the order of the text."""
    checked = Ended(capsys, "definitions", "check", written("order.yaml", WRONG))
    assert (checked.code, checked.out) == (2, "")
    assert checked.lines == [
        "order.yaml:2:1: dedline_s: is not a known key; did you mean 'deadline_s'?",
        "order.yaml:7:5: step 'place': timeout_s: 100000 is out of range: 0.001 to 86400 s",
        "order.yaml:9:7: step 'place': retry.factor: 1000.0 is out of range: 1 to 100",
        (
            "order.yaml:12:5: step 'charge': action: 'a charge' is not an action name: use a "
            "letter, then up to 63 of A-Z a-z 0-9 _ . -"
        ),
        "order.yaml:13:13: step 'charge': retry.max_s: 0.05 is below first_s, which is 0.1",
    ]


def test_programs_get_file_line_column_field_and_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As one document, or one a line; what is right is in it, too; lines for people stay."""
    files = [written("order.yaml", WRONG), written("right.yaml", RIGHT.replace("order", "other"))]
    checked = Ended(capsys, "definitions", "check", *files, "-o", "json")
    assert checked.code == 2
    told = json.loads(checked.out)
    assert told["problems"][0] == {
        "file": "order.yaml",
        "line": 2,
        "column": 1,
        "step": None,
        "field": "dedline_s",
        "message": "is not a known key; did you mean 'deadline_s'?",
    }
    assert [each["field"] for each in told["problems"]][1:3] == [
        "steps[0].timeout_s",
        "steps[0].retry.factor",
    ]
    [right] = told["definitions"]
    assert (right["file"], right["name"], right["steps"]) == ("right.yaml", "other", 1)
    assert re.fullmatch("[0-9a-f]{64}", right["content_hash"])
    assert len(checked.lines) == len(told["problems"])
    lines = Ended(capsys, "definitions", "check", *files, "-o", "jsonl").out.splitlines()
    assert list(map(json.loads, lines)) == [right, *told["problems"]]


def test_participants_are_judged_if_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Which there are only a runtime knows, or who asks."""
    file = written("order.yaml", RIGHT)
    check = ("definitions", "check", file, "--participant")
    assert Ended(capsys, *check, "post", "--participant", "bank").code == 0
    assert Ended(capsys, *check, "bank=127.0.0.1:7001").code == 0
    checked = Ended(capsys, *check, "bunk")
    assert checked.code == 2
    [line] = checked.lines
    assert line.startswith(
        "order.yaml:4:5: step 'pay': participant: participant 'bank' is not registered; did you "
        "mean 'bunk'?"
    )


def steps(*given: dict[str, Any]) -> dict[str, Any]:
    """A definition of these steps, each with a participant and an action."""
    return {"name": "order", "steps": [{**STEP, **each} for each in given]}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        pytest.param(
            steps({"name": "a", "after": ["b"]}, {"name": "b", "after": ["a"]}),
            [("steps[0].after", "steps wait for each other: a -> b -> a")],
            id="a cycle",
        ),
        pytest.param(
            steps(*({"name": f"s{n}"} for n in range(129))),
            [("steps", "129 steps, and 128 are the most: split it into several sagas")],
            id="129 steps",
        ),
        pytest.param(
            steps(*({"name": f"s{n}", "after": []} for n in range(65))),
            [("steps", "up to 65 steps could run at once; at most 64")],
            id="65 steps at once",
        ),
        pytest.param({"name": "order", "steps": []}, [("steps", "at least one step")], id="none"),
        pytest.param(
            {
                **steps({"kind": "pivot"}, {"name": "b", "after": []}, {"name": "c", "uses": []}),
                "mode": "two_phase_commit",
                "ordered": True,
                "locked_retries": 101,
            },
            [
                ("steps[0].kind", "pivot has a meaning only in mode SAGA: leave it out"),
                ("steps[1].after", "or with `ordered` in the order of the list: leave `after` out"),
                ("steps[2].uses", "leave `uses` out"),
                ("locked_retries", "101 is out of range: 0 to 100"),
            ],
            id="what a two-phase commit does not have",
        ),
        *(
            pytest.param(
                {"mode": "two_phase_commit", **steps(*({"name": f"s{n}"} for n in range(count)))},
                [("steps", f"{count} branches; a two-phase commit has at most 64, for all are")],
                id=f"{count} branches",
            )
            for count in (65, 128, 129, 200)
        ),
        pytest.param(
            {
                "mode": "two_phase_commit",
                **steps(
                    {"timeout_s": "x"},
                    {"name": "b", "kind": "pivot", "uses": ["pay"]},
                    {"name": "c", "timeout_s": 100_000},
                ),
                "deadline_s": 1e9,
            },
            [
                ("steps[0].timeout_s", "must be a number of seconds, not 'x'"),
                ("steps[1].kind", "pivot has a meaning only in mode SAGA: leave it out"),
                ("steps[1].uses", "leave `uses` out"),
                ("steps[2].timeout_s", "is out of range"),
                ("deadline_s", "is out of range: 0.001 to 315360000 s; leave it out for the def"),
            ],
            id="a two-phase commit that is wrong in both ways",
        ),
        pytest.param(
            {
                "mode": "two_phase_commit",
                **steps(
                    *({"name": f"s{n}"} for n in range(64)),
                    {"kind": "pivot"},
                    {"name": "z", "timeout_s": 100_000},
                ),
            },
            [
                ("steps", "66 branches; a two-phase commit has at most 64"),
                ("steps[64].kind", "pivot has a meaning only in mode SAGA: leave it out"),
                ("steps[65].timeout_s", "is out of range"),
            ],
            id="too many branches, and wrong ones",
        ),
        pytest.param(
            {"ordered": True, **steps({"timeout_s": 1e9}), "locked_retries": 2},
            [
                ("ordered", "it has a meaning only with mode TWO_PHASE_COMMIT"),
                ("steps[0].timeout_s", "is out of range"),
                ("locked_retries", "it has a meaning only with mode TWO_PHASE_COMMIT"),
            ],
            id="settings of a two-phase commit",
        ),
        pytest.param(
            {"mode": "two_phase", "ordered": True, **steps({"after": []}, {"name": "b"})},
            [("mode", "did you mean 'two_phase_commit'?")],
            id="a mode that there is not",
        ),
        pytest.param(
            {
                "deadline_s": 1e9,
                **steps({"kind": "pivot"}, {"name": "b", "kind": "compensatable"}),
            },
            [("deadline_s", "is out of range"), ("steps[1].kind", "put it before the pivot")],
            id="after the pivot",
        ),
        pytest.param(
            steps({"uses": ["b"]}, {"name": "b"}),
            [("steps[0].uses", "but does not come after it")],
            id="uses what comes later",
        ),
        pytest.param(
            steps({}, {}),
            [("steps[1].name", "a step before it has the same name")],
            id="a name twice",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_what_registration_would_refuse_is_found(
    capsys: pytest.CaptureFixture[str],
    content: dict[str, Any],
    wanted: list[tuple[str, str]],
    suffix: str,
) -> None:
    """The runtime's own rules, without one; each with the line of what it is about."""
    file = written(f"order.{suffix}", json.dumps(content, indent=1))
    checked = Ended(capsys, "definitions", "check", file, "-o", "json")
    assert checked.code == 2
    found = json.loads(checked.out)["problems"]
    assert [each["field"] for each in found] == [field for field, _ in wanted]
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    for each, (field, words) in zip(found, wanted, strict=True):
        assert words in each["message"]
        assert f'"{field.rpartition(".")[2]}"' in lines[each["line"] - 1]


def test_the_graph_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    """A step whose `after` is misspelt has no known place, so nothing is said of its place."""
    content = steps({"kind": "pivot"}, {"name": "b", "aftr": [], "timeout_s": 100_000})
    checked = Ended(capsys, "definitions", "check", written("order.json", content))
    fields = [re.sub(r"^\S+ step 'b': (\w+): .*", r"\1", line) for line in checked.lines]
    assert fields == ["aftr", "timeout_s"]


def test_two_files_of_one_definition_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Which of them would be the latest would depend on their names; the same file twice is one."""
    written("a.yaml", RIGHT)
    written("b.yaml", RIGHT)
    said = "b.yaml:1:1: name: order is also defined in a.yaml; keep one of them"
    assert Ended(capsys, "definitions", "check", "a.yaml", "b.yaml").lines == [said]
    serve = ("serve", "--definition", "*.yaml", "--participant", "bank=127.0.0.1:1")
    served = Ended(capsys, *serve)
    assert (served.code, served.lines) == (2, [said])
    assert Ended(capsys, "definitions", "check", "a.yaml", "a.yaml").code == 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.toml", b"name = ", "a.toml:1:7: is not TOML: Invalid value at the end"),
        ("a.toml", b"a = 1\nb = 'x\n", "a.toml:2:7: is not TOML: "),
        ("a.json", b"{", "a.json:1:2: is not JSON: "),
        ("a.json", b"\xff", "a.json:1:1: is not UTF-8 at byte 0; save it as UTF-8"),
        ("a.json", b"[" * 100_000, "a.json:1:17: is nested more than 16 deep here"),
        ("a.json", b'"order"', "a.json:1:1: a definition must be a table of keys, not 'order'"),
        ("a.yaml", b"", "a.yaml:1:1: is empty; a definition has a name and steps"),
        ("a.yaml", b"a: 1\n\tb: 2\n", "a.yaml:2:1: is not YAML: "),
        ("a.yaml", b"a: 1\n---\nb: 2\n", "a.yaml:2:1: a second document begins here"),
        ("a.yaml", b"a: \0", "a.yaml:1:4: is not YAML: the character U+0000 may not stand in it"),
        ("a.yaml", b"#" * 1_048_577, "a.yaml: is larger than 1048576 bytes; is it the right file?"),
        ("a.yaml", None, "a.yaml: there is no such file; check the path"),
        ("folder.yaml", None, "folder.yaml: cannot be read: Is a directory"),
    ],
)
def test_what_is_no_definition_file_is_one_line(
    capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, said: str
) -> None:
    """By every command that takes files, with the line in it, and never a traceback."""
    Path("folder.yaml").mkdir()
    if content is not None:
        written(name, content)
    for command in (
        ("definitions", "check"),
        ("definitions", "register"),
        ("definitions", "diff"),
        ("serve", "--definition"),
    ):
        ended = Ended(capsys, *command, name)
        assert (ended.code, ended.out) == (2, "")
        [line] = ended.lines
        assert line.startswith(said)


def test_every_command_names_everything_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per problem, also of what the runtime would refuse, before anything is sent."""
    wanted = Ended(capsys, "definitions", "check", written("order.yaml", WRONG)).lines
    for command in (("definitions", "register"), ("definitions", "diff")):
        assert Ended(capsys, *command, "order.yaml").lines == wanted
    known = ("--participant", "orders=127.0.0.1:1", "--participant", "payments=127.0.0.1:1")
    assert Ended(capsys, "serve", "--definition", "*.yaml", *known).lines == wanted


def test_a_participant_that_is_not_configured_is_said_at_the_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the line that names it and the two ways to configure it."""
    written("order.yaml", RIGHT)
    serve = ("serve", "--definition", "order.yaml", "--participant", "post=127.0.0.1:1")
    [line] = Ended(capsys, *serve).lines
    assert line.startswith("order.yaml:4:5: step 'pay': participant: participant 'bank' is not")
    assert "--participant bank=HOST:PORT" in line
    assert "[participants.bank]" in line


def test_a_pattern_finds_files_of_all_formats() -> None:
    """As a configuration names them: what the engine gets is what the SDK would send."""
    written("a.yaml", RIGHT)
    written("b.json", {**steps({}), "name": "second"})
    written("c.toml", 'name = "third"\nsteps = [{name="pay", participant="bank", action="x"}]')
    found = find_definitions(["*.yaml", "[bc].*"])
    assert [each.name for each in found] == ["order", "second", "third"]
    sent = definition_from_proto(amends.Definition.from_yaml(RIGHT).to_proto())
    assert found[0] == sent
    assert {each.steps for each in found} == {sent.steps}


def test_a_pattern_is_checked_as_serve_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Quoted, or where a shell leaves it; a file is meant even if its name looks like a pattern."""
    written("a.yaml", RIGHT)
    written("b[1].json", {**steps({}), "name": "second"})
    checked = Ended(capsys, "definitions", "check", "*.yaml", "b[1].json", "a.yaml", "-o", "json")
    assert checked.code == 0
    assert [each["file"] for each in json.loads(checked.out)["definitions"]] == [
        "a.yaml",
        "b[1].json",
    ]
    assert Ended(capsys, "definitions", "check", "*.toml").lines == [
        "*.toml: no file matches; check the pattern, or leave it out"
    ]


@pytest.mark.parametrize("command", ["check", "register", "diff"])
def test_standard_input_is_no_definition_file(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """The line says why, and what to do."""
    ended = Ended(capsys, "definitions", command, "-")
    assert ended.code == 2
    [line] = ended.lines
    assert line.startswith("-: definitions are not read from standard input")
    assert "write it into a .yaml, .toml or .json file" in line


def test_kinds_are_written_as_in_files(capsys: pytest.CaptureFixture[str]) -> None:
    """`retriable`, where the runtime's own word is RETRIABLE."""
    content = steps({"kind": "pivot"}, {"name": "b"})
    checked = Ended(capsys, "definitions", "check", written("order.json", content))
    assert checked.code == 2
    text = " ".join(checked.lines)
    assert "retriable" in text
    assert not re.search("RETRIABLE|COMPENSATABLE", text)


def test_a_list_of_problems_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """A hostile file gets a hundred lines and a count."""
    content = {"name": "order", "steps": [{"x": 1}] * 128}
    checked = Ended(capsys, "definitions", "check", written("order.json", content))
    assert len(checked.lines) == 101
    assert checked.lines[-1] == "order.json: and 412 more problems; mend these first"


def test_yaml_without_its_extra_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the command line and in the SDK; the other formats go on working."""
    monkeypatch.setitem(sys.modules, "yaml", None)  # what Python takes for "cannot be imported"
    monkeypatch.delitem(sys.modules, "amends.formats.yaml", raising=False)
    monkeypatch.delattr(amends.formats, "yaml", raising=False)
    checked = Ended(capsys, "definitions", "check", written("order.yaml", RIGHT))
    assert (checked.code, checked.lines) == (
        2,
        [
            (
                "order.yaml: definitions in YAML need PyYAML, which is not installed; run: pip "
                "install 'amends[yaml]'"
            )
        ],
    )
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'amends[yaml]'")):
        amends.Definition.from_yaml(RIGHT)
    assert Ended(capsys, "definitions", "check", written("a.json", steps({}))).code == 0


def test_the_sdk_stays_light() -> None:
    """Importing it imports no reader of files; YAML comes with the first YAML text."""
    program = (
        "import sys, amends\n"
        "assert not {'yaml', 'tomllib', 'amends.formats.json'} & set(sys.modules)\n"
        "amends.Definition.from_yaml('{name: a, steps: []}')\n"
        "assert 'yaml' in sys.modules and 'tomllib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "b", "é", ""]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = [
    *("name", "participant", "action", "kind", "after", "uses", "timeout_s", "retry"),
    *("compensation_retry", "x"),
]
TABLES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5).map(
    lambda drawn: {**STEP, **drawn}
)
CONTENTS = st.fixed_dictionaries(
    {"name": st.just("order") | VALUES, "steps": st.lists(TABLES, max_size=4) | VALUES},
    optional={
        "mode": st.sampled_from(["saga", "two_phase_commit"]) | VALUES,
        "ordered": st.booleans() | VALUES,
        "locked_retries": st.integers(0, 200) | VALUES,
        "deadline_s": VALUES,
        "y": VALUES,
    },
)


@given(CONTENTS)
def test_whatever_stands_in_a_file_is_judged(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]
) -> None:
    """Either it is right, or everything that is wrong has a line; no two lines are the same."""
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    found, problems = check_files([file], ["bank"])
    assert bool(found) != bool(problems)
    assert all(each.line is not None for each in problems)
    assert len(set(problems)) == len(problems)


# -- with a runtime --------------------------------------------------------------------------------

PARCEL = """\
name: parcel-in-yaml
steps:
  # who pays
  - name: pay
    participant: payments
    action: charge
"""


def test_yaml_is_registered_and_compared(capsys: pytest.CaptureFixture[str], runtime: str) -> None:
    """The same content in another format is the same definition; --exit-code tells a script."""
    file = written("parcel.yaml", PARCEL)
    diff = ("definitions", "diff", "--exit-code")
    new = Ended(capsys, *diff, file)
    assert (new.code, new.out) == (4, "definition 'parcel-in-yaml' is new\n")
    registered = Ended(capsys, "definitions", "register", file, "-o", "json")
    [first] = json.loads(registered.out)["definitions"]
    checked = Ended(capsys, "definitions", "check", file, "-o", "json")
    assert json.loads(checked.out)["definitions"][0]["content_hash"] == first["content_hash"]
    same = Ended(capsys, *diff, file)
    assert (same.code, same.out) == (0, "parcel-in-yaml: the same content is registered\n")
    pay = {"name": "pay", "participant": "payments", "action": "charge"}
    twin = written("parcel.json", {"name": "parcel-in-yaml", "steps": [pay]})
    again = Ended(capsys, "definitions", "register", twin, "-o", "jsonl")
    assert json.loads(again.out)["existed"] is True
    other = written("other.yaml", PARCEL + "    timeout_s: 3\n")
    assert Ended(capsys, "definitions", "diff", other).code == 0
    changed = Ended(capsys, *diff, other)
    assert (changed.code, changed.out) == (4, "step 'pay': timeout_s was 10, becomes 3\n")


def test_what_a_runtime_refuses_has_its_line(
    capsys: pytest.CaptureFixture[str], runtime: str
) -> None:
    """Its participants are known only there; none of the files is registered."""
    bad = written("bad.yaml", PARCEL.replace("payments", "nobody").replace("parcel", "bad"))
    good = written("good.yaml", PARCEL.replace("parcel", "good"))
    for command in (("register", good, bad), ("diff", bad)):
        refused = Ended(capsys, "definitions", *command)
        assert refused.code == 2
        [line] = refused.lines
        assert line.startswith("bad.yaml:5:5: step 'pay': participant: participant 'nobody' is")
    assert Ended(capsys, "definitions", "get", "good-in-yaml").code == 3


# -- the page --------------------------------------------------------------------------------------


def blocks_of_page(language: str) -> list[str]:
    """The code blocks of docs/definitions.md."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(("number", "name"), [(0, "order"), (1, "transfer")])
def test_all_formats_of_the_page_are_one_definition(
    capsys: pytest.CaptureFixture[str], number: int, name: str
) -> None:
    """The page shows an order and a transfer three times each; all forms are right and equal."""
    built: dict[str, Any] = {}
    exec(blocks_of_page("python")[number], built)  # noqa: S102  # the page's own code
    wanted = content_hash(definition_from_proto(built[name].to_proto()))
    for language in ("yaml", "toml"):
        text = blocks_of_page(language)[number]
        checked = Ended(
            capsys, "definitions", "check", written(f"{name}.{language}", text), "-o", "json"
        )
        assert checked.code == 0
        assert json.loads(checked.out)["definitions"][0]["content_hash"] == wanted


def test_the_check_of_the_page_says_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The wrong file that it shows has the faults that it shows."""
    _, _, wrong, shared = blocks_of_page("yaml")
    checked = Ended(capsys, "definitions", "check", written("order.yaml", wrong))
    (shown,) = blocks_of_page("console")
    command, *lines = shown.splitlines()
    assert command == "$ amends definitions check order.yaml"
    assert [f"amends: {line}" for line in checked.lines] == lines
    assert checked.code == 2
    assert amends.Definition.from_yaml(f"name: order\n{shared}").steps
