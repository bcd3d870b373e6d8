"""What may import what: the picture in CONTRIBUTING.md, read from the imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURE = re.compile(r"```text\n(errors .*?)```", re.DOTALL)


def modules() -> dict[str, Path]:
    """Every module and its file; linked folders are named as they are imported."""
    found = {}
    for top, prefix in (("gradprune", ""), ("passes", "gradprune."), ("bench", "gradprune.")):
        for file in (ROOT / top).rglob("*.py"):
            name = prefix + ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    # The package itself imports nothing until it is asked; ``python -m`` begins at the top.
    return {name: file for name, file in found.items() if name != "gradprune" and not name.endswith("__main__")}


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of gradprune that a module imports, anywhere in it, for whatever reason."""
    file, found = MODULES[name], set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*parents, node.module or ""]).strip(".") if node.level else node.module or ""
            for alias in node.names:
                found.add(f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in MODULES else origin)
    return found & MODULES.keys()


def room(name: str) -> str:
    """The folder of a module, or the file itself if it stands at the top."""
    return name.split(".")[1]


def picture() -> list[list[str]]:
    """The rooms as CONTRIBUTING.md has them, floor by floor, from the ground up."""
    found = PICTURE.search((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert found is not None
    return [line.split("  ")[0].split() for line in found[1].splitlines()]


FLOORS = {name: floor for floor, names in enumerate(picture()) for name in names}


def test_every_room_is_in_the_picture():
    assert {room(name) for name in MODULES} == set(FLOORS)


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_arrows_run_down_only(name: str):
    up = {
        f"{module} -> {target}"
        for module in MODULES
        if room(module) == name
        for target in imports(module)
        if room(target) != name and FLOORS[room(target)] >= FLOORS[name]
    }
    assert up == set()


def circle(name: str, path: tuple[str, ...], done: set[str]) -> Iterator[tuple[str, ...]]:
    """Circles that can be reached from a module; ``path`` leads to it."""
    if name in path:
        yield (*path[path.index(name) :], name)
    elif name not in done:
        for target in sorted(imports(name)):
            yield from circle(target, (*path, name), done)
        done.add(name)


def test_no_circle_of_files():
    done: set[str] = set()
    assert [found for name in sorted(MODULES) for found in circle(name, (), done)] == []


def test_only_torch_compat_imports_private_torch():
    allowed = {"torch_compat", "errors"}  # errors are raised by a torch that is too old for the rest as well
    private = re.compile(r"^\s*(?:from|import) torch\S*\._(?!pytree\b)", re.MULTILINE)
    found = {name for name, file in MODULES.items() if private.search(file.read_text(encoding="utf-8"))}
    assert {name for name in found if room(name) not in allowed} == set()
