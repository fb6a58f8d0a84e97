"""Floors: who may import whom, no circles, no import that hides in a function, no name with two meanings."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tp_twoaxis

PACKAGE = Path(tp_twoaxis.__file__).parent
# from the ground up: a folder imports from folders before it, and from itself
FLOORS = (
    {"errors"},
    {"known_names"},
    {"runtime"},
    {"data"},
    {"models"},
    {"statistics"},
    {"training"},
    {"dependency"},
    {"scores"},
    {"reconstruction"},
    {"importance", "repair"},  # side by side: neither imports the other
    {"pruning"},
    {"diagnostics"},
    {"benchmark"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},  # the package's own names, imported when they are used
)
LEVEL = {folder: level for level, folders in enumerate(FLOORS) for folder in folders}
# what Torch-Pruning's graph is made of
GRAPH_NAMES = {"_DG", "_group", "_module2name", "module2node", "get_pruner_of_module", "get_pruning_group"}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def folder_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree):
    """List what a file imports of the package, with the node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tp_twoaxis":
            yield node, node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "tp_twoaxis":
                    yield node, alias.name, []


def inside(tree, kinds):
    """Find all nodes below nodes of some kinds."""
    return {id(child) for node in ast.walk(tree) if isinstance(node, kinds) for child in ast.walk(node)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    tree, own = ast.parse(path.read_text()), folder_of(path)
    for _, module, names in imported(tree):
        targets = [f"{module}.{name}" for name in names] if module == "tp_twoaxis" else [module]
        for target in targets:
            folder = target.split(".")[1]
            if folder in LEVEL and folder != own:
                assert LEVEL[folder] < LEVEL[own], f"{own}/ must not import {target}"


@pytest.mark.parametrize("path", [p for p in FILES if folder_of(p) not in ("cli", "__main__", "__init__")], ids=name_of)
def test_no_import_of_our_own_hides_in_a_function_or_a_type_check(path):
    tree = ast.parse(path.read_text())
    hidden = inside(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
    type_checks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    hidden |= {id(child) for node in type_checks for child in ast.walk(node)}
    assert [module for node, module, _ in imported(tree) if id(node) in hidden] == []


def test_there_are_no_circles():
    graph = {}
    for path in FILES:
        edges = set()
        for _, module, names in imported(ast.parse(path.read_text())):
            for name in names:
                file = PACKAGE.parent / f"{module}.{name}".replace(".", "/")
                edges.add(f"{module}.{name}" if file.with_suffix(".py").exists() else module)
        graph[module_of(path)] = edges - {module_of(path)}
    # leaves are taken away until nothing is left but circles and what leads to them
    while leaves := [module for module, edges in graph.items() if not edges & graph.keys()]:
        for module in leaves:
            del graph[module]
    # a package's own name waits for its files, and they never for it
    assert {module: edges & graph.keys() for module, edges in graph.items()} == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_torch_pruning_is_touched_in_few_places(path):
    tree, own = ast.parse(path.read_text()), folder_of(path)
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    if any(module.split(".")[0] == "torch_pruning" for module in modules):
        assert own in ("dependency", "importance")
    if own != "dependency":
        assert {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}.isdisjoint(GRAPH_NAMES)


def test_no_file_or_class_shares_its_name():
    files = Counter(path.stem for path in FILES if path.stem not in ("__init__", "__main__"))
    classes = Counter(
        node.name for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in (files + classes).items() if count > 1] == []


def test_files_hold_one_idea():
    assert [name_of(path) for path in FILES if len(path.read_text().splitlines()) > 400] == []


def test_the_package_itself_imports_nothing_until_it_is_used():
    code = (
        "import sys, tp_twoaxis\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(tp_twoaxis.__all__) <= set(dir(tp_twoaxis))\n"
        "from tp_twoaxis import *\n"
        "assert calibrate is tp_twoaxis.statistics.calibrate\n"
        "assert tp_twoaxis.importance.LocalImportance is LocalImportance\n"
        "assert not hasattr(tp_twoaxis, 'nonsense')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_import_what_every_pruning_needs_and_no_more():
    """What one function or one table needs comes when that runs: importing us adds little to importing PyTorch."""
    code = (
        "import sys\n"
        "sys.modules['timm'] = None\n"  # Torch-Pruning imports it where it can, and with it what we shall not
        "import torch, torch_pruning\n"
        "before = set(sys.modules)\n"
        "from tp_twoaxis import *\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "print(*sorted(new))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert set(result.stdout.split()) <= {"tp_twoaxis", "torch", "numpy", "safetensors", "tqdm"}
