"""Generate the Python code of the contract, or check that the generated code is current.

    gen_protos.py           write participants/amends/v1/*_pb2*
    gen_protos.py --check   generate into a temporary folder, compare, write nothing

Run it through ``make protos``, with the interpreter of the environment that holds the pinned
generator (the dependency group ``protos``): another version writes other code. protoc builds
Python's imports from the path below ``-I``; since proto package, proto path and Python package
are the same words, what it writes is used as it is.

Exit codes: 0 written, or current; 1 not current, or the generator reported an error; 2 usage.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = "*_pb2*.py*"  # what the generator writes; all else in the folder is written by hand


def main() -> int:
    """Generate or check, as the arguments say, and return the exit code."""
    parser = argparse.ArgumentParser(description="Generate the Python code of the contract.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the code is not current"
    )
    parser.add_argument("--protos", type=Path, default=ROOT / "protos", help="root of the protos")
    parser.add_argument("--out", type=Path, default=ROOT / "participants", help="import root")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="amends-protos-") as scratch:
        wanted = generate(arguments.protos, Path(scratch))
    if wanted is None:
        return 1
    current = read_generated(arguments.out, packages={path.parts[0] for path in wanted})
    if arguments.check:
        return report(current, wanted)
    write(arguments.out, current, wanted)
    return 0


def generate(protos: Path, scratch: Path) -> dict[Path, bytes] | None:
    """Run the generator into `scratch`; return its files by their path below the import root.

    Returns None if it failed; protoc has then printed what is wrong, with file and line.
    """
    sources = sorted(path.relative_to(protos).as_posix() for path in protos.rglob("*.proto"))
    if not sources:
        print(f"no .proto file below {protos}", file=sys.stderr)
        return None
    plugins = Path(sys.executable).parent
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}"),
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        *(f"--python_out={scratch}", f"--grpc_python_out={scratch}"),
        *(f"--mypy_out=quiet:{scratch}", f"--mypy_grpc_out=quiet:{scratch}"),
        *sources,
    ]
    if subprocess.run(command, check=False).returncode != 0:
        print("the generator failed; is this the environment of `make protos`?", file=sys.stderr)
        return None
    return read_generated(scratch, packages={path.name for path in scratch.iterdir()})


def read_generated(root: Path, packages: set[str]) -> dict[Path, bytes]:
    """Read the generated files of these top-level packages, by their path below `root`."""
    return {
        path.relative_to(root): path.read_bytes()
        for package in packages
        for path in (root / package).rglob(GENERATED)
        if path.parent.name != "__pycache__"
    }


def report(current: dict[Path, bytes], wanted: dict[Path, bytes]) -> int:
    """Name each file that differs; return 1 if there is one."""
    stale = False
    for path in sorted(current.keys() | wanted.keys()):
        if current.get(path) == wanted.get(path):
            continue
        stale = True
        if path not in current:
            reason = "is missing"
        elif path not in wanted:
            reason = "has no .proto file any more"
        else:
            reason = "differs from its .proto file"
        print(f"{path} {reason}", file=sys.stderr)
    if stale:
        print("the generated code is not current: run `make protos`", file=sys.stderr)
        return 1
    return 0


def write(out: Path, current: dict[Path, bytes], wanted: dict[Path, bytes]) -> None:
    """Bring the generated files below `out` to what is wanted, and say what changed."""
    changed = sorted(path for path, content in wanted.items() if current.get(path) != content)
    gone = sorted(current.keys() - wanted.keys())
    for path in changed:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(wanted[path])
        print(f"wrote {path}")
    for path in gone:
        (out / path).unlink()
        print(f"removed {path}")
    if not changed and not gone:
        print("the generated code was current")


if __name__ == "__main__":
    sys.exit(main())
