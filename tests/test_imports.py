"""The package's files import each other without a cycle, in the order of its layers, and stay short."""

from __future__ import annotations

import ast
from pathlib import Path

import grimp
import pytest

import feedbackhook

ROOT = Path(feedbackhook.__file__).parent
FILE_LINES = 400
FUNCTION_LINES = 60

LAYERS = [
    ["torch_internals", "memory", "operations", "parts", "angles"],
    ["discovery", "rng", "learning", "feedback", "projection", "layer"],
    ["state"],
    ["errors", "audit", "weights", "steps", "by_hand", "redraws", "learners", "signals", "edge", "guard"],
    ["marks", "mode", "sites", "coverage", "calls", "interception"],
    ["rules", "selection"],
    ["measurement", "monitor"],
    ["handle", "patching"],
]
"""The layers of the core, as the docstring of `feedbackhook.core` lists them: a file imports only what is
listed before it."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Imports under `if TYPE_CHECKING` count too."""
    return grimp.build_graph("feedbackhook", cache_dir=None)


FILES = {
    source.relative_to(ROOT).as_posix(): source.read_text(encoding="utf-8")
    for source in sorted(ROOT.rglob("*.py"))
}


def components(graph: grimp.ImportGraph) -> list[set[str]]:
    """The sets of modules that import each other in a circle."""
    reachable = {
        module: graph.find_upstream_modules(module) for module in graph.modules if module != "feedbackhook"
    }
    circles = [
        {other for other in found if module in reachable.get(other, ())} | {module}
        for module, found in reachable.items()
        if any(module in reachable.get(other, ()) for other in found)
    ]
    return [set(circle) for circle in {frozenset(circle) for circle in circles}]


def test_no_import_cycle(graph):
    assert components(graph) == []


def test_a_cycle_is_found():
    graph = grimp.ImportGraph()
    for importer, imported in ("ab", "bc", "ca", "cd"):
        graph.add_import(importer=importer, imported=imported)
    assert components(graph) == [{"a", "b", "c"}]


def test_the_core_imports_only_from_lower_layers(graph):
    order = [name for layer in LAYERS for name in layer]

    def place(module: str) -> int | None:
        parts = module.removeprefix("feedbackhook.").split(".")
        name = parts[1] if parts[0] == "core" and len(parts) > 1 else parts[0]
        return order.index(name) if name in order else None

    files = {module: place(module) for module in graph.modules if place(module) is not None}
    in_core = {module.rpartition(".")[2] for module in graph.find_descendants("feedbackhook.core")}
    assert in_core <= set(order), "a file of the core has no layer"
    upward = [
        f"{module} imports {imported}"
        for module, at in files.items()
        for imported in graph.find_modules_directly_imported_by(module)
        if imported in files and files[imported] > at
    ]
    assert upward == []


def test_layers_are_those_of_the_docstring():
    import feedbackhook.core

    for layer in LAYERS:
        listed = ", ".join(layer)
        text = feedbackhook.core.__doc__.replace("feedbackhook.", "")
        assert any(line.strip().startswith(listed) for line in text.splitlines()), listed


@pytest.mark.parametrize("path", FILES)
def test_no_long_file_and_no_long_function(path):
    text = FILES[path]
    assert len(text.splitlines()) <= FILE_LINES
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    }
    assert long == {}


PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}
"""Documented names that begin with an underscore: those of named tuples, and `os._exit`."""

OTHERS = {
    "experiments/data/torchvision_sets.py: constructor._file_dict",  # checksums that a dataset publishes
    "experiments/models/build.py: nn.modules.batchnorm._BatchNorm",  # the base class of all BatchNorms
    "experiments/training/torchrun.py: kind._shared_state",  # Accelerate's singletons, put back afterwards
}
"""Private names of libraries that the experiments need, and that have no public equivalent."""


def test_private_names_are_known_and_those_of_torch_in_one_file():
    """`tests/core/test_torch_internals.py` tests each of torch's."""
    private = {
        f"{path}: {ast.unparse(node)}"
        for path, text in FILES.items()
        if path != "core/torch_internals.py"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in PUBLIC
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    assert private == OTHERS
