"""Who may import whom: nothing lower imports something higher, and no two modules import each other.

The imports are read from the source, those inside functions included, so that this holds on every path.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mvmoe_deploy"
FOLDERS = {
    PACKAGE: ROOT / PACKAGE,
    f"{PACKAGE}.models": ROOT / "models",
    f"{PACKAGE}.exporters": ROOT / "exporters",
    f"{PACKAGE}.bench": ROOT / "bench",
    f"{PACKAGE}.runtimes": ROOT / "runtimes",
}
"""Where each part lies before it is installed; pyproject.toml says the same."""

LAYERS = [
    f"{PACKAGE}",
    f"{PACKAGE}.models",
    f"{PACKAGE}.exporters",
    f"{PACKAGE}.bench.results",
    f"{PACKAGE}.bench.candidates",
    f"{PACKAGE}.bench.measure",
    f"{PACKAGE}.bench.report",
    f"{PACKAGE}.bench.devices",
    f"{PACKAGE}.bench.selfcheck",
    f"{PACKAGE}.cli",
]
"""From low to high. A module belongs to the longest of these names that its own begins with."""

STRANGERS = [{f"{PACKAGE}.bench.devices", f"{PACKAGE}.bench.selfcheck"}]
"""Layers of which none may import another, although one is named before it."""


@dataclass(frozen=True)
class Import:
    """One import of a module of this project.

    Attributes:
        importer, imported: names of modules.
        line: of the importer's file.
        when: ``module``, ``function``, or ``types`` (under TYPE_CHECKING, which never runs).
    """

    importer: str
    imported: str
    line: int
    when: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules(folders: dict[str, Path]) -> dict[str, Path]:
    """Every module of the project by name."""
    found = {}
    for package, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [*package.split("."), *file.relative_to(folder).with_suffix("").parts]
            if package == PACKAGE and ".".join(parts[:2]) in folders:
                continue  # a link to a folder beside it, as an installed package has it
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports_of(name: str, source: str, known: set[str]) -> Iterator[Import]:
    """What a module imports of the known ones."""

    def visit(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(name, each.name, child.lineno, when) for each in child.names if each.name in known)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}:{child.lineno}: imports are absolute here"
                for each in child.names:
                    whole = f"{child.module}.{each.name}"
                    if (imported := whole if whole in known else child.module) in known:
                        yield Import(name, str(imported), child.lineno, when)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from visit(child, "function" if when == "module" else when)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from visit(child, "types")
            else:
                yield from visit(child, when)

    yield from visit(ast.parse(source), "module")


def layer(module: str) -> str:
    """The layer that a module belongs to."""
    return max((each for each in LAYERS if module == each or module.startswith(f"{each}.")), key=len)


def faults(imports: list[Import]) -> list[str]:
    """Imports that go up, or from a command to a toolchain before it is needed."""
    found = []
    for each in imports:
        low, high = layer(each.importer), layer(each.imported)
        if each.when != "types" and (LAYERS.index(high) > LAYERS.index(low) or {low, high} in STRANGERS):
            found.append(f"{each}: {low} is below {high}, or has nothing to do with it")
        if low == f"{PACKAGE}.cli" and high not in (PACKAGE, low) and each.when == "module":
            found.append(f"{each}: a command imports this inside a function, so that --help needs no toolchain")
    return found


def circle(imports: list[Import]) -> list[str]:
    """The modules of one import circle, in order; empty if there is none."""
    targets: dict[str, list[str]] = {}
    for each in imports:
        if each.when != "types" and each.imported != each.importer:
            targets.setdefault(each.importer, []).append(each.imported)
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in targets.get(module, []):
            if found := search(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in targets if (found := search(module, []))), [])


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    files = modules(FOLDERS)
    return [each for name, file in files.items() for each in imports_of(name, file.read_text("utf-8"), set(files))]


def test_nothing_lower_imports_something_higher(imports: list[Import]) -> None:
    assert faults(imports) == []


def test_there_is_no_import_circle(imports: list[Import]) -> None:
    assert " → ".join(circle(imports)) == ""


def test_all_modules_are_seen(imports: list[Import]) -> None:
    files = modules(FOLDERS)
    for name in ("mvmoe_deploy", "mvmoe_deploy.runtime", "mvmoe_deploy.models", "mvmoe_deploy.bench.results"):
        assert name in files
    assert {layer(name) for name in files} == set(LAYERS)
    assert any(each.when == "function" for each in imports) and any(each.when == "types" for each in imports)


KNOWN = {"mvmoe_deploy", "mvmoe_deploy.runtime", "mvmoe_deploy.models", "mvmoe_deploy.cli.x", "mvmoe_deploy.bench.results",
         "mvmoe_deploy.bench.devices.a", "mvmoe_deploy.bench.selfcheck.b"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "source", "faulty"),
    [
        ("mvmoe_deploy.runtime", "from mvmoe_deploy import models", True),
        ("mvmoe_deploy.runtime", "def f():\n    import mvmoe_deploy.models", True),
        ("mvmoe_deploy.runtime", "if TYPE_CHECKING:\n    import mvmoe_deploy.models", False),
        ("mvmoe_deploy.models", "from mvmoe_deploy.runtime import load", False),
        ("mvmoe_deploy.models", "from mvmoe_deploy.bench import results", True),
        ("mvmoe_deploy.cli.x", "from mvmoe_deploy.models import build", True),
        ("mvmoe_deploy.cli.x", "class C:\n    def f(self):\n        from mvmoe_deploy.models import build", False),
        ("mvmoe_deploy.bench.devices.a", "import mvmoe_deploy.bench.selfcheck.b", True),
        ("mvmoe_deploy.bench.selfcheck.b", "import mvmoe_deploy.bench.devices.a", True),
    ],
)
def test_known_bad_imports_are_found(name: str, source: str, faulty: bool) -> None:
    assert bool(faults(list(imports_of(name, source, KNOWN)))) == faulty


def test_a_known_circle_is_found() -> None:
    def of(*pairs: str) -> list[Import]:
        return [Import(*pair.split(), 1, "function") for pair in pairs]

    assert circle(of("a b", "b c", "c b", "x a")) == ["b", "c", "b"]
    assert circle(of("a b", "b c", "a c")) == []
