"""What a person sees and does in JupyterLab: panels run, follow their sliders, stop, are saved."""

import base64
import io
import time

import nbformat
import psutil
from helpers import (
    ERRORS,
    changed_picture,
    picture,
    run_all,
    run_until,
    saved_notebook,
    wait_for_kernel,
)
from PIL import Image

CLUSTER = """from many_machines.cluster import ClusterPanel

ClusterPanel("ResNet-50, 4 x 8 V100")"""


def test_training_runs_live_follows_a_slider_and_stops(lab, open_lesson):
    # Many epochs, so that the run does not end by itself during the test.
    endless = ("epochs=full_or_quick(20, 1)", "epochs=400")
    page, panel = open_panel(
        lab, open_lesson, "02_training_loop", "widgets.TrainingPanel(", endless
    )
    first = picture(panel)
    panel.locator(".cnnlab-run").click()
    second = changed_picture(panel, first)
    changed_picture(panel, second)  # it keeps changing while training runs
    wait_for_status(panel, "step ", "images/s")

    for slider, key, label in (
        ("batch-size", "ArrowLeft", "32"),
        ("learning-rate", "ArrowRight", "0.01"),
    ):
        before = picture(panel)
        panel.locator(f".cnnlab-{slider} .noUi-handle").press(key)
        assert panel.locator(f".cnnlab-{slider} .widget-readout").inner_text() == label
        changed_picture(panel, before)  # it trains again, with the new value
        wait_for_status(panel, "step ")
    began = time.monotonic()
    stop(page, panel)
    assert time.monotonic() - began < 10  # detects hangs; tests/benchmarks/latency.py measures

    colors = saved_picture(page, lab, "02_training_loop.ipynb").getcolors(1 << 24)
    assert len(colors) > 50  # an empty frame has fewer colors than one with curves


def test_the_slider_of_ranks_runs_real_ranks_and_the_curve_gains_points(lab, open_lesson):
    longer = ("full_or_quick(20, 8)", "150")
    page, panel = open_panel(lab, open_lesson, "12_data_parallel", "widgets.ScalingPanel(", longer)
    handle = panel.locator(".cnnlab-replicas .noUi-handle")
    handle.press("ArrowLeft")  # from 2 to 1; nothing runs before the first Run

    before = picture(panel)
    panel.locator(".cnnlab-run").click()
    wait_for_status(panel, "1 rank with DDP", "speedup")
    for key, ranks in (("ArrowRight", 2), ("ArrowRight", 4), ("ArrowLeft", 2), ("ArrowLeft", 1)):
        handle.press(key)
        wait_for_status(panel, f"{ranks} rank", "with DDP", "speedup")
        after = picture(panel)
        assert after != before, "the curve gained no point"
        before = after
    panel.locator(".cnnlab-run").click()
    wait_for_status(panel, "step ")
    stop(page, panel)
    panel.locator(".cnnlab-run").click()
    wait_for_status(panel, "1 rank with DDP", "speedup")
    assert not forked_ranks()
    assert_no_errors(page)


def test_a_cluster_on_paper_follows_its_controls(lab, open_lesson):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CLUSTER)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, lab["root"] / "cluster.ipynb")
    page = open_lesson("cluster.ipynb")
    run_all(page)
    panel = page.locator(".cnnlab-panel")
    wait_for_status(panel, "1,024 devices", "speedup")
    before = picture(panel)
    panel.locator(".cnnlab-network .noUi-handle").press("ArrowRight")  # 1 Gbit/s
    before = changed_picture(panel, before)
    wait_for_status(panel, "Bound by network bandwidth")
    panel.locator(".cnnlab-devices .noUi-handle").press("ArrowRight")
    changed_picture(panel, before)
    wait_for_status(panel, "2,048 devices")
    assert_no_errors(page)


def test_a_prediction_is_kept_and_cannot_be_changed(open_lesson):
    page = open_lesson("00_start_here.ipynb")
    run_all(page)
    prediction = page.locator(".cnnlab-prediction")
    prediction.locator("input").fill("3.5")
    prediction.locator("input").press("Tab")
    prediction.locator("button").click()
    prediction.get_by_text("Your prediction").wait_for(timeout=10_000)
    assert prediction.locator("input").is_disabled()
    assert "3.5" in prediction.inner_text()


def open_panel(lab, open_lesson, name, cell, *changes):
    """Open the quick version of a lesson and run it up to the cell that shows its panel.

    `cell`: text that is in that cell and in no earlier one. `changes`: pairs of old and new text
    in the lesson's file. Returns the page and the panel.
    """
    lesson = lab["root"] / f"{name}.ipynb"
    text = lesson.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    notebook = nbformat.reads(text, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = f'import os\nos.environ["CNNLAB_QUICK"] = "1"\n{first.source}'
    nbformat.write(notebook, lesson)
    page = open_lesson(lesson.name)
    run_until(page, cell, 240)
    assert_no_errors(page)
    panel = page.locator(".cnnlab-panel").last
    panel.scroll_into_view_if_needed()
    return page, panel


def stop(page, panel):
    """Press Stop: the panel says so, the kernel answers, and no rank is left."""
    panel.locator(".cnnlab-stop").click()
    wait_for_status(panel, "Stopped")
    wait_for_kernel(page)
    assert not forked_ranks()


def assert_no_errors(page):
    assert page.locator(ERRORS).count() == 0


def saved_picture(page, lab, name):
    """The picture that the saved notebook has for pages that cannot run widgets."""
    images = [
        output["data"]["image/png"]
        for cell in saved_notebook(page, lab, name)["cells"]
        for output in cell.get("outputs", [])
        if {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(output.get("data", {}))
    ]
    assert images, "the saved notebook has no picture of the panel"
    return Image.open(io.BytesIO(base64.b64decode(images[-1]))).convert("RGB")


def wait_for_status(panel, *words, seconds=60):
    """Wait until the status line contains all the words."""
    end = time.monotonic() + seconds
    while not all(word in (text := panel.locator(".cnnlab-status").inner_text()) for word in words):
        assert time.monotonic() < end, f"the status line is {text!r}, without one of {words}"
        time.sleep(0.2)


def forked_ranks():
    """The children of the kernels' fork servers, after one second in which they may end."""
    time.sleep(1)
    servers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "multiprocessing.forkserver" in " ".join(process.cmdline())
    ]
    return [child for server in servers for child in server.children()]
