"""`examples/quickstart.ipynb` runs, and its stored outputs are those of such a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="reads the notebook")
nbclient = pytest.importorskip("nbclient", reason="runs the notebook")
pytest.importorskip("ipykernel", reason="runs the notebook")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def printed(notebook: Any) -> list[str]:
    """Return the text that each code cell printed, with # for every number, paths and spaces removed."""
    texts = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [re.sub(r"[-+]?\d[\d.e-]*|\s+", "#", text).strip("#") for text in texts]


def test_stored_outputs_are_complete_and_labelled_simulated() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert "simulated" in notebook.cells[0].source
    assert "simulated" in "".join(output.get("text", "") for output in cells[-1].outputs)


def test_quickstart_notebook_runs_with_stored_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    executed = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(executed, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed(executed) == printed(stored)
    assert (tmp_path / "quickstart" / "drn.onnx").is_file()
