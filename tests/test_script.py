"""The recipe that runs a notebook without Jupyter: the same cells, the same parameters."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from recipes import script


def notebook(tmp_path, *sources):
    given = new_code_cell("n: int = 2  # how many", metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# Title"), given, *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "01_some.ipynb")
    return tmp_path / "01_some.ipynb"


def test_cells_run_in_order_with_the_parameters_given(tmp_path):
    path = notebook(tmp_path, "squares = [i * i for i in range(n)]", "total = sum(squares)\ndisplay(total)")
    assert script.run(path, {})["total"] == 1
    assert script.run(path, {"n": 4})["total"] == 14


def test_a_parameter_that_the_notebook_lacks_is_refused_before_any_cell(tmp_path):
    path = notebook(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="01_some: expected parameters of the notebook, got m"):
        script.run(path, {"m": 3})
    assert not (tmp_path / "ran").exists()


def test_a_failing_cell_stops_the_run_or_is_passed_over(tmp_path, capsys):
    path = notebook(tmp_path, "1 / 0", "after = n")
    with pytest.raises(ZeroDivisionError):
        script.run(path, {})
    assert script.run(path, {}, on_error="pass")["after"] == 2
    assert "01_some, cell 2" in capsys.readouterr().err
