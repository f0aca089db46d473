"""Imports between the rooms of the package point one way, and no two files import each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gralora"
# A room imports only rooms to the right of it. Rooms in one entry do not import each other.
ORDER = [
    {"__main__"},
    {"cli"},
    {"__init__"},
    {"deferred"},
    {"recipe", "report"},
    {"export", "importing"},
    {"pretrained"},
    {"files"},
    {"tuner"},
    {"checks", "optional"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def module_of(file):
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(file): file for file in SOURCE.rglob("*.py")}


def imports_of(file):
    """The modules of the package that `file` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gralora":
            inside = node.module.removeprefix("gralora").removeprefix(".")
            for alias in node.names:
                deeper = f"{inside}.{alias.name}".removeprefix(".")
                found.add(deeper if deeper in MODULES else inside or "__init__")
        found |= {name.removeprefix("gralora.") for name in names if name.startswith("gralora.")}
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_only_rooms_below_its_own(module):
    room = module.split(".")[0]
    for imported in imports_of(MODULES[module]):
        target = imported.split(".")[0]
        assert target == room or LEVEL[target] > LEVEL[room], f"{module} imports {imported}"


def test_no_circle():
    packages = {module for module, file in MODULES.items() if file.name == "__init__.py"}
    graph = {module: imports_of(file) - packages for module, file in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises a CycleError
    assert set(MODULES) - packages <= set(order)


def test_the_mathematics_and_the_configuration_import_nothing_of_ours_but_checks():
    assert imports_of(MODULES["tuner.blocks"]) == set()
    assert imports_of(MODULES["tuner.config"]) == {"checks"}
