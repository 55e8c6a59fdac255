"""The shape of the source: imports point one way, files stay short, and what is public says its shapes."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fdkernels as fdk

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fdkernels"
LONGEST_FILE = 400
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")

# What a room may import of the package besides itself. A room is a folder of fdkernels or a module of its
# top level.
COMMON = {"checks", "conventions", "transforms", "_C", "_version"}
THE_OP = {*COMMON, "op", "exchange", "classes"}
THE_LOSS = {
    *THE_OP,
    "geometry",
    "backend",
    "taps",
    "settings",
    "inputs",
    "layer_losses",
    "loss",
    "alpha",
    "copies",
    "criterion",
    "norms",
}
ALLOWED = {
    "_version": set(),
    "_C": set(),
    "transforms": set(),
    "checks": {"transforms"},
    "geometry": {"checks"},
    "alpha": {"checks", "transforms"},
    "conventions": {"checks"},
    "exchange": {"checks", "transforms"},
    "classes": {"checks", "transforms"},
    "op": {*COMMON, "exchange", "classes"},
    "backend": {*COMMON, "op"},
    "taps": {*COMMON, "op", "geometry", "backend"},
    "norms": {*THE_OP, "backend", "taps"},
    "settings": {*THE_OP, "geometry", "backend"},
    "inputs": {*THE_OP, "geometry", "backend", "taps", "settings"},
    "layer_losses": {*THE_OP, "taps", "settings", "inputs"},
    "loss": {*THE_OP, "taps", "settings", "inputs", "layer_losses"},
    "copies": {*THE_OP, "settings"},
    "criterion": {*THE_OP, "taps", "settings", "inputs", "layer_losses", "alpha", "copies"},
    "models": {"checks"},
    "integrations": {"taps", "criterion", "settings"},
    "build_info": {"_C", "_version"},
    "info": {"_C", "_version", "backend", "build_info"},
    "segmentation": {*THE_LOSS, "models", "info", "build_info", "fdkernels"},
    "commands": {*THE_LOSS, "models", "info", "build_info", "segmentation", "fdkernels"},
    "cli": {*THE_LOSS, "models", "info", "build_info", "segmentation", "commands", "fdkernels"},
    "__main__": {"cli", "commands", "info", "_version", "segmentation", "fdkernels"},
    "fdkernels": {*THE_LOSS, "models", "build_info"},  # __init__.py
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, in functions and under TYPE_CHECKING as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} imports relatively"
            # `from package import name` is the module of that name if there is one.
            whole = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names = [
                full if full in MODULES or full == "fdkernels._C" else node.module for full in whole.values()
            ]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == "fdkernels"}
    return found


def room_of(module: str) -> str:
    """The room of a module; fdkernels/__init__.py is one by itself."""
    return module if module == "fdkernels" else module.split(".")[1]


def arrows() -> dict[str, set[str]]:
    """From each module to those that it imports."""
    return {name: imports_of(path) - {name} for name, path in MODULES.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [["b", "c"]]


def test_no_files_import_each_other_in_a_circle():
    assert circles(arrows()) == []


def test_no_rooms_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for module, others in arrows().items():
        room = room_of(module)
        graph.setdefault(room, set()).update({room_of(other) for other in others} - {room})
    assert circles(graph) == []


def folder_of(module: str) -> str:
    """The folder of a module. The op and its Triton kernels, which kernels.py lists, are one."""
    folder = str(MODULES[module].parent.relative_to(PACKAGE))
    return "op" if folder == "op/triton" else folder


def test_no_folders_import_each_other_in_a_circle():
    # The package's own folder holds what the others build on and what builds on them: rooms split it.
    graph: dict[str, set[str]] = {}
    for module, others in arrows().items():
        targets = {folder_of(other) for other in others if other in MODULES}
        if folder_of(module) != ".":
            graph.setdefault(folder_of(module), set()).update(targets - {folder_of(module), "."})
    assert circles(graph) == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    room = room_of(module)
    assert room in ALLOWED, f"say in ALLOWED what {room} may import"
    upward = {other for other in imports_of(MODULES[module]) if room_of(other) not in ALLOWED[room] | {room}}
    assert upward == set()


def test_every_room_of_the_list_exists():
    assert {room_of(module) for module in MODULES} | {"_C"} == set(ALLOWED)


def source_files() -> Iterator[Path]:
    for folder in (PACKAGE, ROOT / "csrc"):
        yield from (path for path in folder.rglob("*") if path.suffix in SOURCES)


def test_no_file_is_longer_than_a_reader_can_hold():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in source_files()
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


# A shape in brackets, such as [N, C, *S], [2, N, ΣC], [L] or [], or in words.
SHAPE = re.compile(r"\[(?:\]|\.\.\.|…|\*|\d|[A-ZΣ])|\b[Ss]calar|\bany shape")
WITH_SHAPES = [
    name
    for name in MODULES
    if name.startswith(("fdkernels.op", "fdkernels.segmentation", "fdkernels.integrations"))
    or name in {f"fdkernels.{part}" for part in ("geometry", "loss", "criterion", "taps", "exchange")}
]


def functions_of(path: Path) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Public functions and methods by name, with the docstring of the class or module function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node, ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            of_class = ast.get_docstring(node) or ""
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield f"{node.name}.{method.name}", method, of_class


def is_kernel(node: ast.FunctionDef) -> bool:
    """Whether Triton compiles the function: its arguments have no Python type."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def takes_tensors(node: ast.FunctionDef) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra is not None]
    annotations = [argument.annotation for argument in arguments] + [node.returns]
    texts = [ast.unparse(annotation) for annotation in annotations if annotation is not None]
    # The tensors of a state dict have every shape.
    return any(re.search(r"\bTensor\b", re.sub(r"\w+\[str, Tensor\]", "", text)) for text in texts)


def public_functions() -> list[tuple[str, ast.FunctionDef, str]]:
    found = []
    for module in WITH_SHAPES:
        for name, node, of_class in functions_of(MODULES[module]):
            if not name.split(".")[-1].startswith("_") and takes_tensors(node) and not is_kernel(node):
                found.append((f"{module}.{name}", node, of_class))
    return found


PUBLIC = public_functions()


@pytest.mark.parametrize(("name", "node", "of_class"), PUBLIC, ids=[name for name, _, _ in PUBLIC])
def test_a_public_function_of_tensors_names_their_shapes(name, node, of_class):
    docstring = ast.get_docstring(node) or ""
    if name.endswith(".forward") and "nn.Module" in of_class:
        docstring += of_class
    assert docstring, f"{name} is not documented"
    referred = re.search(r"`Kernels\.\w+`", docstring)  # the contract names them
    assert referred or SHAPE.search(docstring), f"{name} names no shape: {docstring.splitlines()[0]}"


@pytest.mark.parametrize("name", fdk.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(fdk, name)
    if name == "models":
        value = importlib.import_module("fdkernels.models")
    if not isinstance(value, str | dict):
        assert (value.__doc__ or "").strip()


def test_one_function_makes_the_console():
    """A console of rich's own takes brackets in names for its markup."""
    made = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("Console", "rich.print", "rich.console.Console")
    }
    assert made == {"fdkernels.segmentation.terminal"}
