"""`make planted-bugs`: known bugs are put into a copy of the tree, to see whether anything notices.

How to think about it. Tests that pass say little; tests that are known to fail for the right reason
say much. So:

1. A bug is a small patch that a programmer could have written, in `tests/planted_bugs/*.toml`: its
   name, what it breaks, and per file a text that must occur exactly once and what stands in its
   place. A patch that no longer applies is an error, not a bug that was found.
2. The layers of the test programme are run over the patched copy, first those that are about the
   patched file, then all others, from the cheapest to the dearest, each until its first failure,
   and the first layer that fails has found the bug. A layer that does not end within its time has
   found it too, by hanging. A layer that runs nothing of the patched file is left out: it cannot
   see the bug.
3. First of all the copy without any patch must pass every layer: otherwise a failure says nothing.
4. A test that failed is run again alone. If it passes then, it failed by chance, as on a machine
   that is too busy for it: it has found nothing, and its layer is run anew without it.
5. Each bug has a copy of its own. What is imported there is checked to be that copy, and not the
   installed package.
6. Random layers run with a fixed seed (`--seed`), so that the same tree gives the same table.

Reports go to standard error while it runs; then a table and, as the last line, one JSON object on
standard output. What the finding layer printed is kept in `build/planted-bugs/`. Exit codes: 0 all
were found; 1 some were not, or the control failed; 2 usage, or a patch that does not apply; 130
interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
BUGS: Final = Path("tests/planted_bugs")
LOGS: Final = Path("build/planted-bugs")

COPIED: Final = (
    "participants",
    "runtime",
    "tests",
    "scripts",
    "deploy",
    "docs",
    "protos",
    "pyproject.toml",
    "Makefile",
    "README.md",
)
"""What the layers need of the tree, the pages whose programs they run among it."""

PACKAGES: Final = {"amends": "participants", "shop": "participants", "amends_runtime": "runtime"}

PYTEST_FAILED: Final = 1
"""pytest's exit code when tests ran and failed; every other one but 0 is no finding of theirs."""


class CannotRun(Exception):
    """The run itself is at fault: a patch does not apply, a layer cannot be run."""


# -- bugs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One place of a patch. `old` must occur exactly once in `file`."""

    file: str
    old: str
    new: str

    def applied_to(self, text: str) -> str:
        """Give the file's text with the bug in it. Raises `CannotRun`."""
        found = text.count(self.old)
        if found != 1:
            raise CannotRun(f"{self.file} has the old text {found} times, and 1 is needed")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Bug:
    """A patch with a name, and what it breaks in words."""

    name: str
    breaks: str
    edits: tuple[Edit, ...]

    def patched(self, root: Path) -> dict[Path, str]:
        """Give the changed files of the tree below `root`. Raises `CannotRun`, naming the bug."""
        texts: dict[Path, str] = {}
        for edit in self.edits:
            path = root / edit.file
            try:
                before = texts.get(path) or path.read_text(encoding="utf-8")
                texts[path] = edit.applied_to(before)
            except (OSError, CannotRun) as error:
                raise CannotRun(
                    f"planted bug {self.name!r} does not apply: {error}; write its patch anew in"
                    f" {BUGS}"
                ) from error
        return texts


def read_bugs(root: Path = ROOT) -> list[Bug]:
    """Read all planted bugs, in the order of their files. Raises `CannotRun`."""
    bugs: list[Bug] = []
    for path in sorted((root / BUGS).glob("*.toml")):
        try:
            entries = tomllib.loads(path.read_text(encoding="utf-8"))["bug"]
            for entry in entries:
                places = [entry, *entry.get("and", ())]
                edits = tuple(Edit(place["file"], place["old"], place["new"]) for place in places)
                bugs.append(Bug(entry["name"], entry["breaks"], edits))
        except (tomllib.TOMLDecodeError, KeyError) as error:
            raise CannotRun(f"{path} cannot be read: {error!r}") from error
    twice = [name for name, count in Counter(bug.name for bug in bugs).items() if count > 1]
    if twice:
        raise CannotRun(f"names must be unique: {', '.join(twice)}")
    return bugs


# -- layers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Something that may find a bug. `limit_s` is how long it may take before it has hung.

    Of the command's arguments `{seed}` is replaced. Of `tests`, which pytest is given, one that has
    a `*` stands for all files that match. `runs` says what of the program it runs, by the
    beginnings of paths, and `about` what it is about: where it will most likely find a bug.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    runs: tuple[str, ...]
    about: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()

    def sees(self, bug: Bug) -> bool:
        """Whether the bug lies in something that this layer runs."""
        return any(edit.file.startswith(self.runs) for edit in bug.edits)

    def is_about(self, bug: Bug) -> bool:
        """Whether the bug lies in what this layer is there for."""
        return any(edit.file.startswith(self.about) for edit in bug.edits)

    def arguments(self, tree: Path, seed: int) -> list[str]:
        """Give Python's arguments, for a run in this copy of the tree."""
        arguments = [part.format(seed=seed) for part in self.command]
        for test in self.tests:
            if test.startswith("tests/") and "*" in test and "::" not in test:
                arguments += sorted(str(path.relative_to(tree)) for path in tree.glob(test))
            else:
                arguments.append(test)
        return arguments


LIMIT_S: Final = 600.0
"""Far beyond what a layer takes on a slow machine with other work."""

ALL: Final = ("participants/", "runtime/")


def pytest(
    name: str,
    *what: str,
    hung_s: float = 60.0,
    runs: tuple[str, ...] = ALL,
    about: tuple[str, ...] = (),
) -> Layer:
    """Make a layer of tests. `hung_s` is how long one test may take before it has hung."""
    options = ("-x", "-v", "--no-header", "--tb=short", "-rfE", "-p", "no:cacheprovider")
    hung = ("-o", f"faulthandler_timeout={hung_s:g}", "-o", "faulthandler_exit_on_timeout=true")
    command = ("-m", "pytest", *options, *hung, "--hypothesis-seed={seed}")
    return Layer(name, command, LIMIT_S, runs, about, what)


CORE: Final = "runtime/amends_runtime/core/"
ACTORS: Final = "runtime/amends_runtime/actors/"
STORAGE: Final = "runtime/amends_runtime/storage/"
DISPATCH: Final = "runtime/amends_runtime/dispatch/"
WIRE: Final = "runtime/amends_runtime/wire/"
SDK: Final = "participants/amends/"
BARRIER: Final = "participants/amends/barrier/"
TELEMETRY: Final = "runtime/amends_runtime/telemetry/"
TRACING: Final = "runtime/amends_runtime/core/tracing.py"
API: Final = "runtime/amends_runtime/api/"


LAYERS: Final = (
    pytest(
        "transcripts",
        "tests/core/test_transcripts.py",
        "tests/core/test_*evolve.py",
        "tests/core/test_transitions.py",
        "tests/core/test_backoff.py",
        "tests/core/test_breaker.py",
        runs=(CORE,),
    ),
    pytest("verdict", "tests/participants/test_verdict*.py", runs=(SDK,)),
    pytest("dispatch", "tests/dispatch", runs=(CORE, DISPATCH, WIRE)),
    pytest("store contract", "tests/storage", "--ignore-glob=*test_sqlite*", runs=(CORE, STORAGE)),
    pytest("wire", "tests/test_wire.py", runs=(CORE, WIRE)),
    pytest(
        "SDK's stream",
        "tests/participants/test_exchange*.py",
        runs=(SDK,),
        about=(f"{SDK}exchange.py",),
    ),
    pytest(
        "SDK",
        "tests/participants/test_addressee.py",
        "tests/participants/test_call.py",
        "tests/participants/test_deadlines.py",
        "tests/participants/test_heuristic.py",
        "tests/participants/test_malformed_calls.py",
        "tests/participants/test_registration.py",
        "tests/participants/test_server.py",
        "tests/participants/test_tracing.py",
        runs=(SDK,),
    ),
    pytest("properties", "tests/core/test_*properties.py", runs=(CORE,)),
    pytest(
        "traces and metrics",
        "tests/core/test_tracing.py",
        "tests/telemetry/test_encoding.py",
        "tests/telemetry/test_metrics.py",
        "tests/telemetry/test_observers.py",
        "tests/telemetry/test_projection.py",
        "tests/telemetry/test_sending.py",
        "tests/telemetry/test_traces.py",
        runs=(TRACING, TELEMETRY),
        about=(TRACING, TELEMETRY),
    ),
    pytest("telemetry", "tests/telemetry", runs=(TRACING, TELEMETRY), about=(TRACING, TELEMETRY)),
    pytest(
        "barrier",
        "tests/participants/test_barrier*.py",
        "tests/participants/test_transactions.py",
        "tests/participants/test_crashes.py",
        "tests/participants/test_concurrency.py",
        "tests/participants/test_purge.py",
        "tests/participants/test_shared_*.py",
        runs=(SDK,),
        about=(f"{BARRIER}sqlite",),
    ),
    pytest(
        "reservations",
        "tests/participants/test_reservations*.py",
        "tests/participants/test_in_doubt.py",
        runs=(SDK,),
        about=(f"{BARRIER}holds.py", f"{SDK}reservations.py", f"{SDK}resolver.py"),
    ),
    pytest(
        "PostgreSQL",
        "tests/participants/test_postgres_*.py",
        "tests/participants/test_prepared*.py",
        runs=(SDK,),
        about=(f"{BARRIER}postgres", f"{BARRIER}prepared"),
    ),
    pytest("actors", "tests/actors", about=(ACTORS,)),
    pytest("state search", "tests/core/test_*search.py", hung_s=240.0, runs=(CORE,)),
    pytest("storage failures", "tests/storage/test_sqlite*.py", runs=(CORE, STORAGE)),
    pytest("crash points", "tests/simulation/test_crash_points.py"),
    pytest(
        "client",
        "tests/participants/test_client*.py",
        about=(f"{SDK}client.py", f"{SDK}starting.py", f"{SDK}awaiting.py"),
    ),
    pytest("API", "tests/api", about=(API,)),
    pytest("simulator", "tests/simulation/test_simulator.py", hung_s=300.0),
    pytest("stream cuts", "tests/acceptance/test_stream_cuts.py"),
    pytest(
        "acceptance",
        "tests/acceptance",
        "--ignore=tests/acceptance/test_soak.py",
        "--ignore=tests/acceptance/test_stream_cuts.py",
        hung_s=120.0,
    ),
    Layer(
        "soak",
        ("scripts/soak.py", "--sagas=200", "--kills=12", "--seed={seed}"),
        limit_s=LIMIT_S,
        runs=ALL,
    ),
)


@dataclass(frozen=True)
class Finding:
    """What one layer said of one tree. `seconds` until it ended, with the start of its process.

    `by` says in words what has found it, and `test` is that test's name, if it is one.
    """

    layer: str
    found: bool
    seconds: float
    by: str = ""
    test: str = ""


@dataclass
class Result:
    """What all layers that were run said of one bug, in their order."""

    bug: Bug
    findings: list[Finding] = field(default_factory=list)

    @property
    def first(self) -> Finding | None:
        """The cheapest layer's finding, if there is one."""
        return next((finding for finding in self.findings if finding.found), None)


class Runner:
    """Runs layers in copies of the tree; `stop` ends what is running."""

    def __init__(self, layers: Sequence[Layer], folder: Path, logs: Path, seed: int) -> None:
        self._layers = layers
        self._folder = folder
        self._logs = logs
        self._seed = seed
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self.pristine = folder / "pristine"

    def copy_tree(self) -> None:
        """Make the copy that all others are made of."""
        self._folder.chmod(0o755)  # some tests, run by root, let another user look at their files
        self.pristine.mkdir()
        for name in COPIED:
            source, target = ROOT / name, self.pristine / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)
        self._check_imports(self.pristine)

    def run_control(self, layer: Layer) -> Finding:
        """Run one layer over the tree without a bug."""
        return self._confirmed(layer, self.pristine, f"control.{layer.name}")

    def run_bug(self, bug: Bug, *, all_layers: bool, said: Callable[[str], None]) -> Result:
        """Plant one bug in a copy of its own and run the layers over it."""
        copy = self._folder / bug.name
        shutil.copytree(self.pristine, copy)
        for path, text in bug.patched(copy).items():
            path.write_text(text, encoding="utf-8")
            # Bytecode is told from its source by size and second; a patch could keep both.
            shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
        self._check_imports(copy)
        result = Result(bug)
        for layer in sorted(self._layers, key=lambda layer: not layer.is_about(bug)):
            if not layer.sees(bug):
                continue
            finding = self._confirmed(layer, copy, bug.name)
            result.findings.append(finding)
            if finding.found and not all_layers:
                break
        shutil.rmtree(copy)
        first = result.first
        said(
            f"{bug.name}: NOT FOUND by any layer"
            if first is None
            else f"{bug.name}: {first.layer}, {first.seconds:.1f} s: {first.by}"
        )
        return result

    def stop(self) -> None:
        """End everything that was started here, and start nothing more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process)

    def _environment(self, copy: Path) -> dict[str, str]:
        roots = dict.fromkeys(str(copy / folder) for folder in PACKAGES.values())
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(roots),
            "TMPDIR": str(self._folder),
        }

    def _check_imports(self, copy: Path) -> None:
        """What a layer would import is the copy: asked in the same folder and environment."""
        ask = (
            "import importlib.util, json;"
            f"print(json.dumps([importlib.util.find_spec(n).origin for n in {list(PACKAGES)}]))"
        )
        answer = subprocess.run(
            [sys.executable, "-c", ask],
            cwd=copy,
            env=self._environment(copy),
            stdout=subprocess.PIPE,
            check=True,
        )
        for (name, folder), origin in zip(PACKAGES.items(), json.loads(answer.stdout), strict=True):
            if Path(origin) != copy / folder / name / "__init__.py":
                raise CannotRun(f"{name} would be imported from {origin} instead of {copy}")

    def _confirmed(self, layer: Layer, copy: Path, name: str) -> Finding:
        """Run a layer until it passes or a test of it fails twice; see rule 4."""
        without: list[str] = []
        while True:
            finding = self._run(layer, copy, name, without)
            if not finding.test:
                return finding
            alone = dataclasses.replace(layer, tests=(finding.test,))
            if self._code(alone, copy, f"{name}.again", ()) != 0:
                return finding
            _say(f"{name}: {finding.test} failed by chance")
            without.append(finding.test)

    def _run(self, layer: Layer, copy: Path, name: str, without: Sequence[str]) -> Finding:
        began_s = time.monotonic()
        code = self._code(layer, copy, name, without)
        seconds = time.monotonic() - began_s
        if code == 0:
            return Finding(layer.name, found=False, seconds=seconds)
        said = (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        if code is None:
            by = f"hung for {layer.limit_s:g} s"
            return Finding(layer.name, found=True, seconds=seconds, by=by)
        if code != PYTEST_FAILED or self._stopped:
            last = said.strip().splitlines()[-1:] or [""]
            raise CannotRun(f"{name}: layer {layer.name!r} ended with code {code}: {last[0]}")
        test, by = _named(said)
        return Finding(layer.name, found=True, seconds=seconds, by=by, test=test)

    def _code(self, layer: Layer, copy: Path, name: str, without: Sequence[str]) -> int | None:
        """Run a layer and give its exit code; none if it did not end in time."""
        left_out = [f"--deselect={test}" for test in without]
        with (self._logs / f"{name}.log").open("wb") as output:
            with self._lock:
                if self._stopped:
                    raise CannotRun("stopped")
                process = subprocess.Popen(
                    [sys.executable, *layer.arguments(copy, self._seed), *left_out],
                    cwd=copy,
                    env=self._environment(copy),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that what it has started ends with it
                )
                self._running.add(process)
            try:
                return process.wait(layer.limit_s)
            except subprocess.TimeoutExpired:
                _kill(process)
                process.wait()
                return None
            finally:
                with self._lock:
                    self._running.discard(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a layer with all that it has started: it is the leader of a group of its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _named(said: str) -> tuple[str, str]:
    """What of a layer failed, by its output: the test, if it is one, and what to call it."""
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", said, re.MULTILINE)
    if failed is not None:
        return failed[1], failed[1].removeprefix("tests/")
    begun = re.findall(r"^tests/\S+::.+", said, re.MULTILINE)
    if begun and "Timeout (" in said:
        hung = begun[-1].partition("Timeout (")[0].strip()
        return hung, f"{hung.removeprefix('tests/')} hung"
    lines = [line for line in said.splitlines() if "violation" in line.lower()]
    return "", (lines or said.splitlines() or [""])[0].strip()[:120]


# -- the run ---------------------------------------------------------------------------------------


def main() -> int:
    """Run it as the arguments say; give the exit code."""
    arguments = _arguments()
    # A shell starts background jobs deaf to interrupts, which some tests send to what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        bugs = _chosen(read_bugs(), arguments.only)
        for bug in bugs:
            bug.patched(ROOT)
        if arguments.list:
            for bug in bugs:
                print(f"{bug.name:42} {bug.breaks}")
            return 0
        return _run_all(bugs, arguments)
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plant known bugs and see which layer finds them.")
    parser.add_argument("--list", action="store_true", help="name the bugs and end")
    parser.add_argument("--only", action="append", metavar="NAME", help="this bug; repeatable")
    parser.add_argument(
        "--all-layers", action="store_true", help="do not stop at the first layer that finds a bug"
    )
    parser.add_argument(
        "--layer", action="append", metavar="NAME", help="only this layer; repeatable"
    )
    parser.add_argument("--jobs", type=int, default=2, help="bugs at a time (default 2)")
    parser.add_argument("--seed", type=int, default=1, help="of the random layers (default 1)")
    parser.add_argument(
        "--skip-control", action="store_true", help="believe that the tree passes every layer"
    )
    return parser.parse_args()


def _chosen(bugs: list[Bug], names: list[str] | None) -> list[Bug]:
    unknown = set(names or ()) - {bug.name for bug in bugs}
    if unknown:
        raise CannotRun(f"no such bug: {', '.join(sorted(unknown))}; --list names them")
    return [bug for bug in bugs if names is None or bug.name in names]


def _run_all(bugs: list[Bug], arguments: argparse.Namespace) -> int:
    layers = [one for one in LAYERS if arguments.layer is None or one.name in arguments.layer]
    if not layers:
        raise CannotRun(f"no such layer; there are: {', '.join(one.name for one in LAYERS)}")
    logs = ROOT / LOGS
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="amends-bugs-") as folder:
        runner = Runner(layers, Path(folder), logs, arguments.seed)
        runner.copy_tree()
        with ThreadPoolExecutor(arguments.jobs) as pool:
            try:
                control = _control(runner, layers, pool, skipped=arguments.skip_control)
                failing = [finding.layer for finding in control if finding.found]
                if failing:
                    print(json.dumps({"control": "failed", "layers": failing}))
                    return 1
                results = _plant(runner, bugs, pool, all_layers=arguments.all_layers)
            except KeyboardInterrupt:
                runner.stop()
                pool.shutdown(cancel_futures=True)
                _say("interrupted")
                return 130
            except CannotRun:
                runner.stop()
                pool.shutdown(cancel_futures=True)
                raise
    return _report(layers, control, results, time.monotonic() - began_s, arguments)


def _control(
    runner: Runner, layers: Sequence[Layer], pool: ThreadPoolExecutor, *, skipped: bool
) -> list[Finding]:
    if skipped:
        _say("control skipped: that a layer fails proves nothing now")
        return []
    control = []
    for finding in pool.map(runner.run_control, layers):
        control.append(finding)
        failed = f"FAILS without any bug: {finding.by}" if finding.found else "passes"
        _say(f"control: {finding.layer} {failed} ({finding.seconds:.1f} s)")
    return control


def _plant(
    runner: Runner, bugs: Sequence[Bug], pool: ThreadPoolExecutor, *, all_layers: bool
) -> list[Result]:
    done = 0
    lock = threading.Lock()

    def said(text: str) -> None:
        nonlocal done
        with lock:
            done += 1
            _say(f"[{done}/{len(bugs)}] {text}")

    def run(bug: Bug) -> Result:
        return runner.run_bug(bug, all_layers=all_layers, said=said)

    return list(pool.map(run, bugs))


def _report(
    layers: Sequence[Layer],
    control: Sequence[Finding],
    results: Sequence[Result],
    took_s: float,
    arguments: argparse.Namespace,
) -> int:
    """Print the table, what was missed, and the JSON line; give the exit code."""
    if arguments.all_layers:
        _print_matrix(layers, results)
    else:
        print(f"{'planted bug':42} {'found by':17} {'after':>7}  by what")
        for result in results:
            first = result.first
            where, after, what = (
                (first.layer, f"{first.seconds:.1f} s", first.by)
                if first is not None
                else ("NOT FOUND", "", result.bug.breaks)
            )
            print(f"{result.bug.name:42} {where:17} {after:>7}  {what}")
    missed = [result.bug for result in results if result.first is None]
    by_layer = Counter(result.first.layer for result in results if result.first is not None)
    print()
    for bug in missed:
        print(f"MISSED: {bug.name}: {bug.breaks}")
    print(
        f"{len(results) - len(missed)} of {len(results)} planted bugs found in {took_s:.0f} s; by"
        f" layer: {', '.join(f'{name} {count}' for name, count in by_layer.most_common())}"
    )
    summary: dict[str, Any] = {
        "planted": len(results),
        "found": len(results) - len(missed),
        "missed": [bug.name for bug in missed],
        "by_layer": dict(by_layer),
        "control": "passed" if control else "skipped",
        "seconds": round(took_s, 1),
        "seed": arguments.seed,
        "jobs": arguments.jobs,
        "bugs": {
            result.bug.name: {
                finding.layer: {"found": finding.found, "seconds": round(finding.seconds, 1)}
                for finding in result.findings
            }
            for result in results
        },
    }
    print(json.dumps(summary))
    return 1 if missed else 0


def _print_matrix(layers: Sequence[Layer], results: Sequence[Result]) -> None:
    print("x found, . not found, empty: the layer runs nothing of the file")
    for number, layer in enumerate(layers, 1):
        print(f"{number:3} {layer.name}")
    print(f"\n{'planted bug':42}" + "".join(f"{number:4}" for number in range(1, len(layers) + 1)))
    for result in results:
        marks = {finding.layer: "x" if finding.found else "." for finding in result.findings}
        row = "".join(f"{marks.get(layer.name, ''):>4}" for layer in layers)
        print(f"{result.bug.name:42}{row}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
