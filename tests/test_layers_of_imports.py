"""Imports run one way: from the command line down to the operators, never back."""

import ast
import sys
from pathlib import Path

import pytest

import multilora

ROOT = Path(multilora.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# From the bottom up. A module imports from the lines below its own, and from its own component
# (the first name): metrics cannot import checkpoint. The last line is the application, whose parts
# know each other.
LAYERS = [
    ["_version", "atomic", "checks", "fold", "forward_state", "gradients", "randomness", "walk"],
    ["_C", "_C_cuda"],
    ["ops.common", "ops.dispatch", "ops.native"],
    ["ops.reference", "ops.cpu", "ops.cuda", "ops.hopper", "ops.triton"],
    ["ops"],
    ["parallel", "particle_layer", "losses", "prediction", "log_probabilities", "ranking"],
    ["layers", "copies", "separate", "rows"],
    ["adapters", "experts"],
    ["particle_adamw"],
    ["comparison", "targets", "trunk", "calibration", "diversity", "labels", "optim"],
    ["peft_format", "slots"],
    ["isolation", "embeddings", "peft_tensors"],
    ["run"],
    ["particle_folders"],
    ["soups"],
    ["model"],
    ["robustness"],
    ["attach", "methods", "metrics"],
    ["checkpoint"],
    ["posthoc", "many"],
    ["integrations"],
    ["tools"],
    ["app", "cli", "__main__"],
]


def name_of(file: Path) -> str:
    """multilora/ops/volume.py -> "ops.volume"; a package is named by itself."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The native modules, and the modules that may import each.
NATIVE = {"cpu": "_C", "cuda": "_C_cuda", "hopper": "_C_cuda"}
NAMES = {name_of(file) for file in MODULES} | {*NATIVE.values()}


def layer_of(name: str) -> int:
    """The line of the longest entry that `name` is or lies in; the package itself is on top."""
    if name == "":
        return len(LAYERS)
    entries = {entry: i for i, line in enumerate(LAYERS) for entry in line}
    while name not in entries:
        assert "." in name, f"multilora.{name} has no place in LAYERS: give it one"
        name = name.rpartition(".")[0]
    return entries[name]


def module_level(tree: ast.Module) -> list[ast.stmt]:
    """The statements that run at import: not those in functions or under TYPE_CHECKING."""
    statements, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        statements.append(node)
        todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        todo += [s for child in getattr(node, "handlers", []) for s in child.body]
    return statements


def imports(file: Path) -> list[str]:
    """The full names of what the module imports at import time."""
    return imported_by(module_level(ast.parse(file.read_text())), file)


def deferred_imports(file: Path) -> list[str]:
    """The full names of what functions of the module import."""
    tree = ast.parse(file.read_text())
    at_import = {id(node) for node in module_level(tree)}
    functions = [
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    inside = {id(n): n for function in functions for n in ast.walk(function)}
    return imported_by([node for i, node in inside.items() if i not in at_import], file)


def imported_by(nodes: list[ast.AST], file: Path) -> list[str]:
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("multilora.")
                names.append(f"multilora.{inner}" if inner in NAMES else node.module)
    return names


def test_the_rules_are_applied_to_something():
    assert {"ops.reference", "ops", "layers", "model", "metrics"} <= NAMES
    assert "multilora.ops.dispatch" in imports(ROOT / "ops" / "_library.py")
    assert "torch" in imports(ROOT / "ops" / "volume.py")


@pytest.mark.parametrize("file", [f for f in MODULES if name_of(f)], ids=name_of)
def test_imports_run_one_way(file):
    name = name_of(file)
    for imported in imports(file):
        top, _, inner = imported.partition(".")
        if top != "multilora":
            continue
        same_component = inner.split(".")[0] == name.split(".")[0] and layer_of(inner) <= layer_of(
            name
        )
        application = layer_of(inner) == layer_of(name) == len(LAYERS) - 1
        assert layer_of(inner) < layer_of(name) or same_component or application, (
            f"multilora.{name} must not import {imported}"
        )


# Modules whose functions import some of ours, and why they do.
_DEFERRED = {
    "model": "the old names of `attach`, which imports this module, for one release",
    "app.info": "Triton is optional",
    "tools.kernels.command": "Triton is optional",
}


def test_no_function_imports_our_own_modules():
    found = {}
    for file in MODULES:
        ours = [n for n in deferred_imports(file) if n.split(".")[0] == "multilora"]
        if ours:
            found[name_of(file)] = ours
    assert found.keys() == _DEFERRED.keys(), found


def test_there_is_no_circle():
    waiting = {}
    for file in MODULES:
        ours = {n.partition(".")[2] for n in imports(file) if n.split(".")[0] == "multilora"}
        # A package exports names of its modules; they must not need the package.
        waiting[name_of(file)] = ours & NAMES - {name_of(file)}
    done: set[str] = set(NATIVE.values())
    while waiting:
        ready = {name for name, needed in waiting.items() if needed <= done}
        assert ready, f"modules that import one another: {waiting}"
        done |= ready
        waiting = {name: needed for name, needed in waiting.items() if name not in ready}


@pytest.mark.parametrize(
    "file", [f for f in MODULES if name_of(f).split(".")[0] == "ops"], ids=name_of
)
def test_operators_import_torch_and_nothing_else(file):
    for imported in imports(file):
        top = imported.partition(".")[0]
        allowed = top == "torch" or top in sys.stdlib_module_names
        # Nothing imports the kernels before a backend is chosen.
        allowed |= top == "triton" and name_of(file).startswith("ops.triton")
        package = name_of(file).removeprefix("ops.").split(".")[0]
        allowed |= imported == f"multilora.{NATIVE.get(package)}"
        assert allowed or imported.startswith("multilora.ops"), imported


@pytest.mark.parametrize("file", [f for f in MODULES if name_of(f).startswith("ops.")], ids=name_of)
def test_only_dispatch_knows_the_reference(file):
    # A backend that imports it could fall back silently.
    assert "multilora.ops.reference" not in imports(file)
    names = {alias for node in ast.walk(ast.parse(file.read_text())) for alias in _names(node)}
    assert "reference" not in names


def _names(node: ast.AST) -> list[str]:
    return [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []


def test_the_package_only_passes_names_on():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    docstring, *body = tree.body
    *import_statements, exported = body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) for node in import_statements)
    names = [alias.asname or alias.name for node in import_statements for alias in node.names]
    assert isinstance(exported, ast.Assign) and ast.unparse(exported.targets[0]) == "__all__"
    assert sorted(ast.literal_eval(exported.value)) == sorted(names)
    assert multilora.__all__ == ast.literal_eval(exported.value)


# --- the benchmarks ------------------------------------------------------------------------------

BENCH = ROOT.parent / "bench"
BENCHES = {f"bench.{file.stem}": file for file in sorted(BENCH.glob("*.py"))}


@pytest.mark.skipif(not BENCHES, reason="multilora is installed without its repository")
def test_the_benchmarks_do_not_import_each_other_in_a_circle():
    def needed(file):
        tree = ast.parse(file.read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = set(imported_by(nodes, file))
        # `from bench import record` imports a module, too.
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "bench":
                names |= {f"bench.{alias.name}" for alias in node.names}
        return names & BENCHES.keys()

    # The worker imports its task's modules when its output is redirected.
    waiting = {name: needed(file) - {name} for name, file in BENCHES.items()}
    assert {"bench.case", "bench.roofline"} <= waiting["bench.operators"]
    done: set[str] = set()
    while waiting:
        ready = {name for name, needs in waiting.items() if needs <= done}
        assert ready, f"modules that import one another: {waiting}"
        done |= ready
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}


@pytest.mark.parametrize("file", BENCHES.values(), ids=BENCHES)
def test_the_benchmarks_import_no_application(file):
    """The names of the package, its operators and its tools."""
    tree = ast.parse(file.read_text())
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    for imported in imported_by(nodes, file):
        inner = imported.partition("multilora.")[2].split(".")[0]
        assert inner in ("", "ops", "tools"), imported
