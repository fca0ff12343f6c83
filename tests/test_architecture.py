"""The order of the rooms: what may import what, as docs/architecture.md lists it."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

from tests.repository import ROOT

FACE = "sedd_scale"  # the package itself imports its public functions on first use
PAGE = ROOT / "docs/architecture.md"


def rooms_in_order() -> list[str]:
    """The rooms as the page lists them: each may import only what stands before it."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"<!-- rooms -->\n(.*?)<!-- end of rooms -->", text, re.DOTALL)
    assert found, f"{PAGE} has no list between <!-- rooms --> and <!-- end of rooms -->"
    return re.findall(r"^\* `(\w+)`: ", found[1], re.MULTILINE)


def modules(folder: Path) -> dict[str, Path]:
    """Every module below `folder` by its dotted name."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in known else node.module)
    return found & known


def all_imports(folder: Path) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports."""
    known = modules(folder)
    return {name: imports_of(path, set(known)) - {name} for name, path in known.items()}


def against_the_order(imports: dict[str, set[str]], order: list[str]) -> list[str]:
    """Every import that points to a later room, or past the rooms to the package's face."""

    def place(module: str) -> int:
        room = module.split(".")[1]
        assert room in order, f"{module}: the room {room} is not in the list of {PAGE.name}"
        return order.index(room)

    return [
        f"{module} imports {imported}"
        for module, found in sorted(imports.items())
        if module != FACE
        for imported in sorted(found)
        if imported == FACE or place(imported) > place(module)
    ]


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, if there are any."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


def test_imports_follow_the_order_without_a_circle() -> None:
    imports = all_imports(ROOT / FACE)
    assert against_the_order(imports, rooms_in_order()) == []
    assert circle(imports) is None
    rooms = {module.split(".")[1] for module in imports if module != FACE}
    assert rooms == set(rooms_in_order())


@pytest.mark.parametrize(
    ("planted", "where", "wrong"),
    [
        ("from sedd_scale.training import loop", "diffusion/graphs.py", "order"),
        ("import sedd_scale", "model/head.py", "order"),
        ("def late():\n    from sedd_scale.config.rules import LIMITS", "config/tree.py", "circle"),
    ],
)
def test_a_wrong_import_is_found(planted: str, where: str, wrong: str, tmp_path: Path) -> None:
    for path in modules(ROOT / FACE).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with open(tmp_path / FACE / where, "a", encoding="utf-8") as stream:
        stream.write(f"\n{planted}\n")
    imports = all_imports(tmp_path / FACE)
    backward = against_the_order(imports, rooms_in_order())
    assert len(backward) == (wrong == "order")
    assert (circle(imports) is not None) or wrong == "order"
