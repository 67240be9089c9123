"""Public means tested: what our packages export is sorted, complete, there, and documented."""

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"amends": "participants", "amends_runtime": "runtime"}  # package: import root


def public_modules() -> list[str]:
    """Name every package below the import roots, and every module that users import by its name."""
    names = []
    for package, root in OURS.items():
        top = ROOT / root / package
        for path in [*top.rglob("__init__.py"), *top.glob("testing.py")]:
            parts = path.relative_to(ROOT / root).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            if not any(part.startswith("_") for part in name.split(".")):
                names.append(name)
    return sorted(names)


every_public_module = pytest.mark.parametrize("name", public_modules())


@every_public_module
def test_public_packages_export_all_that_they_define(name: str) -> None:
    """A public name that a package defines, or takes from our own code, is in its ``__all__``."""
    module = importlib.import_module(name)
    assert public_names(module) - set(exports(module)) == set()


@every_public_module
def test_exports_exist(name: str) -> None:
    """Each name in ``__all__`` is there, once, is not a module, and is ours."""
    module = importlib.import_module(name)
    exported = exports(module)
    assert sorted(set(exported)) == sorted(exported), "a name is exported twice"
    for export in exported:
        assert hasattr(module, export), f"{name}.{export} is exported and does not exist"
        thing = getattr(module, export)
        assert not inspect.ismodule(thing), f"{name}.{export} is a module"
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert thing.__module__.partition(".")[0] in OURS, f"{name}.{export} is not ours"


@every_public_module
def test_exports_are_sorted(name: str) -> None:
    """``__all__`` names constants, then classes, then functions: the order that ruff writes."""
    exported = exports(importlib.import_module(name))
    assert exported == sorted(exported, key=rank)


@every_public_module
def test_exports_are_documented(name: str) -> None:
    """The module, and each class and function that it exports, has a docstring of its own."""
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    undocumented = [
        export for export in exports(module) if is_undocumented(getattr(module, export, None))
    ]
    assert undocumented == []


def exports(module: ModuleType) -> list[str]:
    """Return ``__all__``; a package that has none exports nothing."""
    return list(getattr(module, "__all__", []))


def public_names(module: ModuleType) -> set[str]:
    """Read from its source which public names a module binds that come from our own code.

    Names that it imports from elsewhere are its tools; submodules are found by their path.
    """
    assert module.__file__ is not None
    bound: set[str] = set()
    for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
        match node:
            case ast.ImportFrom(module=source, names=names, level=level):
                if level or (source or "").partition(".")[0] in OURS:
                    bound.update(alias.asname or alias.name for alias in names)
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                bound.add(name)
            case ast.AsyncFunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                bound.add(name)
            case ast.Assign(targets=targets):
                bound.update(target.id for target in targets if isinstance(target, ast.Name))
            case _:
                pass
    return {
        name
        for name in bound
        if not name.startswith("_") and not inspect.ismodule(getattr(module, name, None))
    }


def rank(name: str) -> tuple[int, str]:
    """Order names as ruff's RUF022 does."""
    if len(name) > 1 and name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


def is_undocumented(thing: object) -> bool:
    """Tell whether a class or function has no docstring, or only one that a decorator made up."""
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return False
    return not thing.__doc__ or thing.__doc__.startswith(f"{thing.__name__}(")
