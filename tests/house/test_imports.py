"""The direction of imports: each room uses only what stands above it in the table of docs/design.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import crdtmerge

PACKAGE = Path(crdtmerge.__file__).parent
ROOMS = (
    ("errors", "limits", "canonical"),
    ("recipe", "keys", "strict_json"),
    ("numerics",),
    ("symmetry",),
    ("strategies",),
    ("weights",),
    ("programs",),
    ("replica",),
    ("resolve",),
    ("store",),
    ("state", "pool"),
    ("gossip",),
    ("train",),
    ("testing",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FORBIDDEN = {
    ("weights", "strategies"),
    ("weights", "recipe"),
    ("replica", "weights"),
    ("replica", "strategies"),
    ("store", "resolve"),
}
ENTRY_POINTS = {"__init__", "__main__"}


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The modules of ours that a file imports, with line numbers."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [node.module or ""]
            if node.module == "crdtmerge":
                names = [f"crdtmerge.{alias.name}" for alias in node.names if alias.name != "__version__"]
        yield from ((name, node.lineno) for name in names if name.startswith("crdtmerge."))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_stands_above_it(path: Path) -> None:
    own = room(path)
    if own in ENTRY_POINTS:
        return
    for name, line in imported(path):
        other = name.split(".")[1]
        same_room = other == own
        above = LEVEL[other] < LEVEL[own] and (own, other) not in FORBIDDEN
        assert same_room or above, f"{path}:{line}: {own} imports {name}, which does not stand above it"
        assert LEVEL[own] > 0, f"{path}:{line}: {own} imports nothing of ours"


def test_code_is_imported_as_crdtmerge_and_not_through_the_links_at_the_root() -> None:
    for folder in (PACKAGE, PACKAGE.parent / "tests", PACKAGE.parent / "benchmarks"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not {module.split(".")[0] for module in modules} & {"strategies", "cli"}, path


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import crdtmerge", {"numpy", "torch", "numba", "typer", "pydantic"}),
        ("import crdtmerge.cli.app", {"numpy", "torch", "numba", "pydantic", "rich", "msgpack"}),
        ("import crdtmerge.strategies.registry", {"torch", "numba", "mpmath"}),
        ("import crdtmerge.resolve.merge", {"torch", "numba", "mpmath", "sklearn"}),
    ],
)
def test_starting_up_imports_little(code: str, absent: set[str]) -> None:
    program = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())
