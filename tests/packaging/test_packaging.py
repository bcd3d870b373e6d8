"""What is shipped: the file lists of wheel and source distribution, and the two faces of ``passes`` and ``bench``."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("bench", "passes")
"""Top-level folders that are imported as parts of ``gradprune``, through symlinks."""
SHIPPED = ("gradprune", "passes", "pyproject.toml", "README.md", "LICENSE", "tests", "bench")


def settings() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages() -> dict[str, Path]:
    """Every import package of the source tree and its folder; linked folders are listed where they are imported."""
    found = {}
    for top, folder in (("gradprune", ROOT / "gradprune"), *((f"gradprune.{name}", ROOT / name) for name in LINKED)):
        for file in folder.rglob("__init__.py"):
            found[".".join([top, *file.parent.relative_to(folder).parts])] = file.parent
    return found


def test_every_package_is_listed():
    assert sorted(settings()["tool"]["setuptools"]["packages"]) == sorted(packages())


def test_every_folder_of_modules_is_a_package():
    folders = {file.parent for top in ("gradprune", *LINKED) for file in (ROOT / top).rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_are_relative_symlinks(name: str):
    link = ROOT / "gradprune" / name
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", name)


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)


def test_passes_cannot_be_imported_on_its_own():
    done = run("-c", "import passes", folder=ROOT)
    assert done.returncode != 0
    assert "ImportError: import gradprune.passes, not passes" in done.stderr


def test_bench_runs_as_a_module_of_the_repository():
    done = run("-m", "bench", "table", "--help", folder=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage: gradprune bench table" in done.stdout


# --- Distributions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """File names in a wheel and in a source distribution, and the folder that the wheel was unpacked to."""

    wheel: set[str]
    source: set[str]
    unpacked: Path

    def metadata(self, name: str) -> str:
        (file,) = self.unpacked.glob(f"gradprune-*.dist-info/{name}")
        return file.read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built from a copy, which keeps the source tree clean; the wheel is built from the source distribution."""
    pytest.importorskip("build")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignore)
        elif source.is_file():
            shutil.copy(source, tree)
    done = run("-m", "build", "--no-isolation", "--outdir", out, folder=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(unpacked)
    with tarfile.open(archive) as file:
        source_names = {member.name.partition("/")[2] for member in file.getmembers() if not member.isdir()}
    return Built(names, source_names, unpacked)


def test_wheel_has_every_module_and_nothing_else(built: Built):
    expected = {
        f"{name.replace('.', '/')}/{file.name}" for name, folder in packages().items() for file in folder.glob("*.py")
    }
    assert {
        "gradprune/backend.py",
        "gradprune/passes/dce.py",
        "gradprune/passes/rules/registry.py",
        "gradprune/bench/cases.py",
    } <= expected
    data = {
        "gradprune/py.typed",
        "gradprune/emit/fake_cuda.cpp",
        *(f"gradprune/inspect/page/{file.name}" for file in (ROOT / "gradprune/inspect/page").iterdir()),
    }
    assert {name for name in built.wheel if ".dist-info/" not in name} == {*expected, *data}


def test_wheel_has_its_license(built: Built):
    assert any(name.endswith("/licenses/LICENSE") for name in built.wheel)


def test_entry_points(built: Built):
    parser = configparser.ConfigParser()
    parser.read_string(built.metadata("entry_points.txt"))
    assert dict(parser["torch_dynamo_backends"]) == {"gradprune": "gradprune.backend:gradprune"}
    assert dict(parser["console_scripts"]) == {"gradprune": "gradprune.cli.main:main"}


def test_wheel_works_where_it_is_unpacked(built: Built, tmp_path: Path):
    code = f"""
import sys
sys.path.insert(0, {str(built.unpacked)!r})
import gradprune, gradprune.cli.bench, gradprune.passes.pipeline, gradprune.cli.main
from importlib.metadata import entry_points
print(gradprune.passes.__file__)
print(len(gradprune.passes.rules.RULES) > 0)
"""
    done = run("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(built.unpacked / "gradprune" / "passes" / "__init__.py"), "True"]


def test_requirements_of_the_wheel(built: Built):
    metadata = importlib.metadata.Distribution.at(next(built.unpacked.glob("*.dist-info")))
    required = [line for line in metadata.requires or [] if "extra ==" not in line]
    assert sorted(line.replace(" ", "") for line in required) == ["numpy", "torch<2.16,>=2.11"]


def test_source_distribution_can_be_built_from(built: Built):
    needed = {"pyproject.toml", "README.md", "LICENSE", "gradprune/py.typed"}
    for folder in packages().values():
        needed |= {file.relative_to(ROOT).as_posix() for file in folder.glob("*.py")}
    assert needed <= built.source
    assert not [name for name in built.source if name.startswith(("bench/results", "."))]
