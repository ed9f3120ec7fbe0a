"""A panel trains while its tab is closed; the notebook that is opened again shows it."""

import nbformat
from helpers import run_all, saved_notebook

CELL = """from cnnlab import Recipe
from cnnlab.widgets import TrainingPanel

TrainingPanel(Recipe(epochs=1_000_000, threads=1, evaluate=False), {})"""

SHOWN = """image => image.complete && image.naturalWidth > 100"""


def test_a_panel_that_trains_is_there_again_when_its_notebook_is_opened_again(lab, open_lesson):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, lab["root"] / "panel.ipynb")
    page = open_lesson("panel.ipynb")
    run_all(page)
    page.locator(".cnnlab-run").click()
    wait_for_status(page, "step ")
    saved_notebook(page, lab, "panel.ipynb")
    page.close()

    page = open_lesson("panel.ipynb")
    wait_for_status(page, "step ")
    assert page.locator(".cnnlab-picture").first.evaluate(SHOWN)
    assert page.locator(".cnnlab-run").is_disabled()
    page.locator(".cnnlab-stop").click()
    wait_for_status(page, "Stopped. step")


def wait_for_status(page, words):
    status = page.locator(".cnnlab-status").filter(has_text=words)
    status.wait_for(timeout=60_000)
