"""Imports go to the same or a lower layer, never to a higher one and never in a cycle; imports inside functions included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from swift_mega import LAYERS

ROOT = Path(__file__).parents[1] / "swift_mega"
FILES = sorted(ROOT.rglob("*.py"))


def module_name(file: Path) -> str:
    """swift_mega/parallel/__init__.py -> swift_mega.parallel"""
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """(imported module of ours, line, whether it happens when the module is imported) for every import in the file."""
    tree = ast.parse(source)
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [node.args[0].value] if node.args and isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        for name in names:
            if name.split(".")[0] == "swift_mega":
                yield name, node.lineno, node not in inside


def existing(name: str) -> str:
    """The module that contains an imported name: swift_mega.errors.UserError -> swift_mega.errors."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def layer(module: str) -> int | None:
    """The index of a module's layer: len(LAYERS) for __main__, None for the package itself, which is not checked."""
    name = module.split(".")[1] if "." in module else None
    return None if name is None else len(LAYERS) if name == "__main__" else LAYERS.index(name)


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a higher layer, as 'line: name'."""
    mine = layer(module)
    return [
        f"{line}: {name}"
        for name, line, _ in imports(source, module, is_package)
        if (theirs := layer(existing(name))) is not None and mine is not None and theirs > mine
    ]


def test_every_module_has_a_layer():
    """A new folder or file at the top must be added to LAYERS, which names each once."""
    found = {module.split(".")[1] for module in MODULES if "." in module}
    unknown = found - set(LAYERS) - {"__main__"}
    assert not unknown, f"not in swift_mega.LAYERS: {sorted(unknown)}"
    assert len(set(LAYERS)) == len(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_to_earlier_layers(file):
    wrong = upward(file.read_text(), module_name(file), file.name == "__init__.py")
    assert not wrong, f"{file.relative_to(ROOT.parent)} imports a later layer: {wrong}"


def test_there_is_no_import_cycle():
    """No module reaches itself by imports that happen when modules are imported."""
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        found = imports(file.read_text(), module, file.name == "__init__.py")
        graph[module] = {existing(name) for name, _, at_import in found if at_import} - {module}
    cycle = find_cycle(graph)
    assert not cycle, " -> ".join(cycle)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, with the first one again at the end; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if cycle := visit(other, [*path, module]):
                return cycle
        done.add(module)
        return []

    for module in sorted(graph):
        if cycle := visit(module, []):
            return cycle
    return []


@pytest.mark.parametrize(
    "source",
    [
        "import swift_mega.launch",
        "from swift_mega.launch import torchrun",
        "from swift_mega import launch",
        "def later():\n    from swift_mega.launch.torchrun import run_ranks",
        "from ..launch import torchrun",
        "from .. import launch",
        "import importlib\nimportlib.import_module('swift_mega.launch')",
        "if True:\n    try:\n        import swift_mega.launch.torchrun as t\n    except ImportError:\n        pass",
    ],
)
def test_the_check_sees_every_form_of_import(source):
    assert upward(source, "swift_mega.parallel.layout"), source
    assert not upward(source, "swift_mega.launch.watch"), source


def test_the_check_sees_cycles():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("file", sorted((ROOT / "models" / "families").glob("*.py")), ids=lambda file: file.stem)
def test_a_family_has_one_base_at_most(file: Path):
    """A family is a variation of the common decoder or of one other family, which it imports as a module."""
    families = module_name(file.parent) + "."
    found = {
        name
        for name, _, _ in imports(file.read_text(), module_name(file), file.name == "__init__.py")
        if name.startswith(families)
    }
    assert len(found) <= 1 and found <= MODULES.keys(), found


def test_only_the_registry_knows_the_families():
    """Outside their folder no module imports a family: what several families need is beside the common decoder."""
    families = ROOT / "models" / "families"
    knows = {
        module
        for module, file in MODULES.items()
        for name, _, _ in imports(file.read_text(), module, file.name == "__init__.py")
        if existing(name).startswith("swift_mega.models.families") and families not in file.parents
    }
    assert knows == {"swift_mega.models.family"}
