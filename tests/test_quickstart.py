"""`examples/quickstart.ipynb` runs, and its stored outputs are those of such a run."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.training.narrow import narrow_backbone

nbformat = pytest.importorskip("nbformat", reason="reads the notebook")

__all__ = ["narrow_backbone"]

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def cells() -> list[Any]:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def without_numbers(text: str) -> str:
    """Return a text with # for every number, path and space."""
    return re.sub(r"[-+]?\d[\d.e-]*|\s+", "#", text).strip("#")


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Collect what a cell prints and warns of, as a Jupyter kernel does."""
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("drn")
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield stream
    finally:
        logger.removeHandler(handler)


def test_stored_outputs_are_complete_and_labelled_simulated() -> None:
    stored = cells()
    assert [cell.execution_count for cell in stored] == list(range(1, len(stored) + 1))
    assert all(cell.outputs for cell in stored)
    assert "simulated" in nbformat.read(NOTEBOOK, as_version=4).cells[0].source
    assert "simulated" in printed(stored[-1])


def test_notebook_cells_print_the_stored_outputs(tmp_path: Path) -> None:
    """Run the cells with a narrow backbone in this process; a kernel would import torch and trace anew."""
    values: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        for cell in cells():
            with captured() as stream:
                exec(compile(cell.source, NOTEBOOK.name, "exec"), values)
            assert without_numbers(stream.getvalue()) == without_numbers(printed(cell)), cell.source
    assert (tmp_path / "quickstart" / "drn.onnx").is_file()
