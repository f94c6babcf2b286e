"""The notebooks run from top to bottom, and hold the outputs of such a run."""

import itertools
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def kinds(cell):
    """Return the kinds of a cell's outputs; a stream may come in any number of parts."""
    found = [output.output_type for output in cell.outputs if output.get("name") != "stderr"]
    return [kind for kind, _ in itertools.groupby(found)]


def test_there_are_two():
    assert NAMES == ["quickstart.ipynb", "steer-a-model.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_its_outputs_are_stored(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = nbformat.read(FOLDER / name, 4)
    nbformat.validate(stored)
    fresh = nbformat.read(FOLDER / name, 4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(fresh, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    for before, after in zip(stored.cells, fresh.cells, strict=True):
        if before.cell_type == "code":
            assert kinds(before) == kinds(after), before.source
            assert before.execution_count == after.execution_count
