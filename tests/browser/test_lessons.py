"""Lessons in a real browser: run all cells, and then use each panel as a learner does.

`make test` does this for each kind of panel, and `make test-panels` for all lessons.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

import playwright.sync_api
import pytest
from helpers import changed_picture, picture, run_all, wait_for_kernel

QUICK = True  # for the fixture `lab`
LESSONS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))
if not os.environ.get("CNNLAB_ALL_PANELS"):
    kinds = ("00", "04", "05", "11", "13", "14", "16")  # the other panels are like that of 00
    LESSONS = [path for path in LESSONS if path.name.startswith(kinds)]

PANEL_CELLS = """() => {
    const cells = window.jupyterapp.shell.currentWidget.content.widgets;
    const widget = 'application/vnd.jupyter.widget-view+json';
    const shows = cell => cell.model.type === 'code'
        && cell.model.outputs.toJSON().some(output => output.data && widget in output.data
            && String(output.data['text/plain']).includes('Panel('));
    return cells.flatMap((cell, number) => shows(cell) ? [number] : []);
}"""

ERRORS = """() => {
    const cells = window.jupyterapp.shell.currentWidget.content.widgets;
    return cells.filter(cell => cell.model.type === 'code')
        .flatMap(cell => cell.model.outputs.toJSON())
        .filter(output => output.output_type === 'error' || output.name === 'stderr')
        .map(output => output.evalue || output.text);
}"""

SCROLL_TO = """async number => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = number;
    await notebook.scrollToItem(number, 'start');
    notebook.widgets[number].node.setAttribute('data-panel', number);
}"""


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_after_all_cells_have_run_each_panel_runs_follows_a_slider_stops_and_explains(
    path, open_lesson
):
    page = open_lesson(path.name)
    run_all(page, 240)
    assert page.evaluate(ERRORS) == []
    panels = page.evaluate(PANEL_CELLS)
    assert panels or "Panel(" not in path.read_text()
    for number in panels:
        page.evaluate(SCROLL_TO, number)
        panel = page.locator(f"[data-panel='{number}'] .cnnlab-panel")
        panel.wait_for(timeout=20_000)
        use(page, panel)
    assert page.evaluate(ERRORS) == []


def use(page, panel):
    run, stop = panel.locator(".cnnlab-run"), panel.locator(".cnnlab-stop")
    before = picture(panel)
    if run.count():  # the panel of a cluster on paper has no Run
        run.click()
    else:
        move_a_slider(panel)
    before = changed_picture(panel, before, 120)
    if not run.count():
        return
    end(page, panel, run, stop)
    if panel.locator(".noUi-handle").count():
        move_a_slider(panel)
        changed_picture(panel, before, 120)
    else:
        run.click()
    time.sleep(0.3)
    end(page, panel, run, stop)
    why = panel.locator(".cnnlab-why")
    if why.count():
        why.click()
        shown = panel.locator(".cnnlab-reason pre").first
        shown.wait_for(timeout=180_000)
        assert "Most of a step is" in shown.inner_text()
        finish(page, panel, run)


def end(page, panel, run, stop):
    with suppress(playwright.sync_api.TimeoutError):  # a quick run may be over
        stop.click(timeout=4000)
    finish(page, panel, run)


def move_a_slider(panel):
    """Move the first slider by one value, down if it is at its upper end."""
    handle = panel.locator(".noUi-handle").first
    readout = panel.locator(".widget-readout").first
    before = readout.inner_text()
    handle.press("ArrowRight")
    if readout.inner_text() == before:
        handle.press("ArrowLeft")
    assert readout.inner_text() != before


def finish(page, panel, run, seconds=180):
    """Wait until the run has ended, without an error, and the kernel answers."""
    end = time.monotonic() + seconds
    while run.is_disabled():
        assert time.monotonic() < end, "the panel still runs"
        time.sleep(0.2)
    status = panel.locator(".cnnlab-status").inner_text()
    assert "failed" not in status and "cannot" not in status, status
    wait_for_kernel(page)
