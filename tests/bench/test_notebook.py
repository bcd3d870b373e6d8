"""``bench/t4.ipynb`` runs from its first cell to its last, on a tiny network and the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradprune.bench.shims import versions

NOTEBOOK = Path(__file__).parents[2] / "bench" / "t4.ipynb"


def test_notebook_runs_and_shows_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    if "not installed" in versions().values():
        pytest.skip(f"of {versions()} one is missing")
    for name, value in {"TABLES_SCALE": "toy", "TABLES": "1", "TABLES_OUTPUT": str(tmp_path / "results")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"tables.json", "tables.md", "tables.png"}
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = {kind for output in shown for kind in output.get("data", ())}
    assert {"text/markdown", "image/png"} <= kinds
    (table,) = (output["data"]["text/markdown"] for output in shown if "text/markdown" in output.get("data", ()))
    assert "## [SB] Table 1: PGD of six libraries" in table
    assert "failed" not in table
