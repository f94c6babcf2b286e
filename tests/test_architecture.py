"""The rooms of the package: no circle between files, no import against the arrows, no room or file too large."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("agents", "cli", "envs", "explorer", "models", "rewards", "serve", "tasks")

# From the bottom up: a module may import from its own layer and from those below it, never from one above. A module
# belongs to the longest prefix of its name that is listed.
LAYERS = [
    ["errors"],
    ["checks", "columns", "deprecated", "files", "locks", "logprobs", "processes"],
    ["models"],
    ["rewards"],
    ["envs"],
    ["tasks"],
    ["agents.search"],
    ["agents.heuristics", "agents.trackers"],
    ["agents.planning"],
    ["agents.distributed"],
    ["agents.learning"],
    ["agents.evaluation"],
    ["agents.training"],
    ["agents", "agents.exports", "agents.interop"],
    ["serve", "explorer"],
    ["cli"],
]
MOST_MODULES = 10
MOST_LINES = 450


def module_of(path, root):
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root):
    """Return the package's files, stubs included, by module; a package's stub counts with its __init__."""
    files = [*root.glob("*.py"), *(f for room in ROOMS for f in (root / room).rglob("*.py*") if f.suffix != ".pyc")]
    found = {}
    for path in files:
        found.setdefault(module_of(path, root), []).append(path)
    return found


def imports(path, module, known):
    """Yield the modules of the package that a file imports, lazily and for type checking too."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package else []
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qstar_decoding":
            base = ".".join(node.module.split(".")[1:])
        elif isinstance(node, ast.Import):
            yield from (
                name for alias in node.names if (name := alias.name.removeprefix("qstar_decoding.")) in known and name
            )
            continue
        else:
            continue
        for alias in node.names:
            name = f"{base}.{alias.name}".strip(".")
            target = name if name in known else base
            # A name of a façade comes from the module that the façade's stub names.
            yield facade_home(known, target, alias.name) or target


def facade_home(known, package, name):
    for path in known.get(package, []):
        if path.suffix == ".pyi":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ImportFrom) and name in {a.asname or a.name for a in node.names}:
                    return f"{package}.{node.module}"
    return None


def graph(root):
    known = sources(root)
    edges = {}
    for module, paths in known.items():
        # A façade only passes names on, so what it lists is no dependency of its own.
        found = {t for p in paths if p.suffix == ".py" for t in imports(p, module, known)}
        edges[module] = sorted(target for target in found if target in known and target != module)
    return edges


def circle(edges):
    """Return a chain of modules that ends where it begins, or None."""
    state = dict.fromkeys(edges, 0)

    def visit(module, chain):
        state[module] = 1
        for target in edges[module]:
            if state[target] == 1:
                return [*chain[chain.index(target) :], target]
            if state[target] == 0 and (found := visit(target, [*chain, target])):
                return found
        state[module] = 2
        return None

    return next((found for module in edges if state[module] == 0 and (found := visit(module, [module]))), None)


def layer(module):
    prefixes = {prefix: i for i, layer in enumerate(LAYERS) for prefix in layer}
    best = max((p for p in prefixes if module == p or module.startswith(f"{p}.")), key=len, default=None)
    return None if best is None else prefixes[best]


def forbidden(edges):
    """Return the imports that go against the arrows."""
    wrong = []
    for module, targets in edges.items():
        # The root and the rooms' façades may name anything below; the root is imported by nobody but for its version.
        if module == "":
            continue
        wrong += [f"{module} -> {target}" for target in targets if target and layer(target) > layer(module)]
    return wrong


@pytest.fixture(scope="module")
def edges():
    return graph(ROOT)


def test_every_module_has_a_layer(edges):
    assert [module for module in edges if module and layer(module) is None] == []


def test_no_circle_between_files(edges):
    found = circle(edges)
    assert found is None, " -> ".join(found)


def test_no_import_against_the_arrows(edges):
    assert forbidden(edges) == []


def planted(tmp_path, **files):
    for name, text in files.items():
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return graph(tmp_path)


@pytest.mark.parametrize(
    "lazy",
    [
        "from .b import y",
        "def f():\n    from .b import y",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import y",
        "from . import b",
        "import qstar_decoding.models.b",
    ],
)
def test_a_planted_circle_is_found(tmp_path, lazy):
    edges = planted(tmp_path, **{"models.a": lazy, "models.b": "from qstar_decoding.models.a import x"})
    assert circle(edges) in (["models.a", "models.b", "models.a"], ["models.b", "models.a", "models.b"])


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("models.a", "from ..envs.b import x"),
        ("agents.search.a", "def f():\n    from ..planning.b import x"),
        ("rewards.a", "from .. import agents"),
        ("errors", "from .checks import x"),
        ("agents.learning.a", "from ..evaluation.b import x"),
        ("tasks.a", "import qstar_decoding.cli.b"),
    ],
)
def test_a_planted_forbidden_arrow_is_found(tmp_path, module, text):
    targets = ("envs.b", "agents.planning.b", "agents.evaluation.b", "cli.b", "checks", "agents.__init__")
    edges = planted(tmp_path, **dict.fromkeys(targets, "x = 1"), **{module: text})
    assert len(forbidden(edges)) == 1, forbidden(edges)


def test_no_room_has_more_than_ten_modules():
    for folder in {path.parent for paths in sources(ROOT).values() for path in paths}:
        modules = [path.name for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= MOST_MODULES, f"{folder.relative_to(ROOT)}: {sorted(modules)}"


def test_a_long_module_says_why():
    for module, paths in sources(ROOT).items():
        for path in paths:
            text = path.read_text(encoding="utf-8")
            if len(text.splitlines()) > MOST_LINES:
                assert "one file because" in (ast.get_docstring(ast.parse(text)) or "").lower(), module
