"""notebooks/quickstart.ipynb runs from top to bottom, with a few steps of training."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
nbclient = pytest.importorskip("nbclient", reason='nbclient is missing: pip install -e ".[dev]"')
pytest.importorskip("ipykernel", reason='ipykernel is missing: pip install -e ".[dev]"')


@pytest.mark.timeout(1800)
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, shallow_language_model):
    import nbformat

    book = nbformat.read(ROOT / "notebooks/quickstart.ipynb", as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)  # committed without outputs
    monkeypatch.setenv("MINIGPT4_NOTEBOOK_FAST", "1")
    (tmp_path / "mini_world/data/mini").mkdir(parents=True)
    (tmp_path / "mini_world/data/mini/smollm2-135m-instruct").symlink_to(shallow_language_model)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    pictures = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]
    by_word = {
        word: n
        for n, cell in enumerate(cells)
        for word in ("caption(tests, ", "stream(", "look(")
        if word in cell.source
    }
    assert pictures[by_word["caption(tests, "]] == 4
    assert pictures[by_word["look("]] == 2
    assert len(said[by_word["caption(tests, "]].split()) > 4
    assert said[by_word["stream("]]
    assert len(list(tmp_path.glob("mini_world/output/stage?/*/checkpoint_0.pth"))) == 2
    assert (tmp_path / "mini_world/look.html").is_file()
