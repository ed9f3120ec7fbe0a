"""What a person sees and does in JupyterLab, in a real browser: panels run, follow sliders, stop, and are saved."""

import base64
import io
import time

import psutil
import pytest
from helpers import run_all, run_until, saved_notebook
from PIL import Image


def test_training_runs_live_follows_a_slider_and_stops(lab, open_lesson):
    page, panel = panel_of(
        lab,
        open_lesson,
        "02_training_loop",
        "panel.Training(",
        ("epochs=4 if quick else 20", "epochs=400"),
    )  # long: no race with its end
    first = picture(panel)
    panel.locator(".cnnlab-run").click()
    second = changed(panel, first)
    changed(panel, second)  # it goes on changing while training runs
    status(panel, "step ", "images/s")

    for slider, key, label in (
        ("batch-size", "ArrowLeft", "32"),
        ("learning-rate", "ArrowRight", "0.01"),
    ):
        before = picture(panel)  # a moved slider trains anew, with the new value
        panel.locator(f".cnnlab-{slider} .noUi-handle").press(key)
        assert panel.locator(f".cnnlab-{slider} .widget-readout").inner_text() == label
        changed(panel, before)
        status(panel, "step ")
    began = time.monotonic()
    stop(page, panel)
    assert time.monotonic() - began < 10  # a hang limit; tests/benchmarks/latency.py times it

    saved = saved_notebook(page, lab, "02_training_loop.ipynb")
    images = [
        output["data"]["image/png"]
        for cell in saved["cells"]
        for output in cell.get("outputs", [])
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {})
        and "image/png" in output["data"]
    ]
    assert images, "the panel's cell keeps no picture for pages that cannot run widgets"
    last = Image.open(io.BytesIO(base64.b64decode(images[-1]))).convert("RGB")
    assert len(last.getcolors(1 << 24)) > 50  # curves are in it: not an empty frame


def test_the_ladder_grows_and_stops(lab, open_lesson):
    page = open_lesson("14_whole_ladder.ipynb")
    run_all(page)
    panel = page.locator(".cnnlab-panel")
    panel.scroll_into_view_if_needed()
    for slow in ("torch-compile", "compiled-except-pooling"):
        panel.locator(f".cnnlab-{slow} input").uncheck()
    first = picture(panel)
    panel.locator(".cnnlab-run").click()
    second = changed(panel, first, 60)
    changed(panel, second, 60)
    stop(page, panel)


def test_the_slider_of_ranks_runs_real_ranks_and_the_curve_gains_its_points(lab, open_lesson):
    page, panel = panel_of(
        lab,
        open_lesson,
        "10_data_parallel",
        "panel.Scaling(",
        ("steps=8, threads", "steps=150, threads"),
    )
    handle = panel.locator(".cnnlab-replicas .noUi-handle")
    handle.press("ArrowLeft")  # from 2 to 1; nothing runs before the first Run

    before = picture(panel)
    panel.locator(".cnnlab-run").click()
    status(panel, "1 rank with DDP", "times")
    for key, ranks in (("ArrowRight", 2), ("ArrowRight", 4), ("ArrowLeft", 2), ("ArrowLeft", 1)):
        handle.press(key)  # a moved slider trains anew
        status(panel, f"{ranks} rank", "with DDP", "times")
        after = picture(panel)
        assert after != before, "the curve gained no point"
        before = after
    panel.locator(".cnnlab-run").click()
    status(panel, "step ")
    stop(page, panel)
    panel.locator(".cnnlab-run").click()
    status(panel, "1 rank with DDP", "times")
    assert not ranks_alive()
    nothing_failed(page)


@pytest.mark.parametrize(
    "name, endless, slider, keys",
    [
        (
            "05_parallel_loading",
            ("steps=14 if quick", "steps=4000 if quick"),
            "loader-workers",
            ["ArrowRight", "ArrowRight"],
        ),
        (
            "07_mixed_precision",
            ("else 4, epochs=1 if quick", "else 4000, epochs=1 if quick"),
            "memory-format",
            ["ArrowRight"],
        ),
        (
            "08_operator_fusion",
            ("steps=steps, threads=1", "steps=4000, threads=1"),
            "compiler",
            ["ArrowRight"],
        ),
    ],
)
def test_the_panel_of_a_lesson_runs_follows_its_slider_stops_and_says_why(
    lab, open_lesson, name, endless, slider, keys
):
    page, panel = panel_of(lab, open_lesson, name, "panel.Training(", endless)
    before = picture(panel)
    panel.locator(".cnnlab-run").click()
    status(panel, "step ", "images/s")
    for key in keys:
        before = changed(panel, before)
        panel.locator(f".cnnlab-{slider} .noUi-handle").press(key)  # a moved slider trains anew
        status(panel, "step ", "images/s", seconds=120)  # torch.compile compiles first
    changed(panel, before)
    stop(page, panel)
    if name.startswith("05"):
        panel.locator(".cnnlab-why").click()
        page.wait_for_function(
            "() => document.querySelector('.cnnlab-reason pre')", timeout=120_000
        )
        assert "Most of a step is" in panel.locator(".cnnlab-reason").inner_text()
    nothing_failed(page)


def test_the_race_of_lesson_09_follows_its_slider_and_stops(lab, open_lesson):
    page, panel = panel_of(lab, open_lesson, "09_whole_program", "class Race(")
    before = picture(panel)
    panel.locator(".cnnlab-run").click()
    before = changed(panel, before, 120)
    status(panel, "fastest here", seconds=180)
    panel.locator(".cnnlab-batch .noUi-handle").press("ArrowLeft")
    changed(panel, before, 120)
    panel.locator(".cnnlab-run").click()
    stop(page, panel)
    nothing_failed(page)


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


def panel_of(lab, open_lesson, name, cell, *changes):
    """The lesson in its quick setting, with (old text, new text) changed, run until the cell that shows its panel: (page, panel)."""
    lesson = lab["root"] / f"{name}.ipynb"
    text = lesson.read_text()
    for old, new in (('\\"CNNLAB_QUICK\\" in os.environ', "True"), *changes):
        assert old in text
        text = text.replace(old, new)
    lesson.write_text(text)
    page = open_lesson(lesson.name)
    run_until(page, cell, 240)
    nothing_failed(page)
    panel = page.locator(".cnnlab-panel").last
    panel.scroll_into_view_if_needed()
    return page, panel


def stop(page, panel):
    """Press Stop: the panel says so, the kernel answers, no rank is left."""
    panel.locator(".cnnlab-stop").click()
    status(panel, "Stopped")
    kernel_answers(page)
    assert not ranks_alive()


def nothing_failed(page):
    assert (
        page.locator(
            ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'], .jp-RenderedText[data-mime-type*=error]"
        ).count()
        == 0
    )


def picture(panel):
    """The bytes of the picture that is on the screen."""
    image = panel.locator("img.cnnlab-picture, .cnnlab-picture img").first
    return image.evaluate(
        "async image => { const b = await (await fetch(image.src)).blob(); return b.size + ':' + await b.text(); }"
    )


def changed(panel, before, seconds=30):
    """Wait until the picture is another one, and return it."""
    end = time.monotonic() + seconds
    while (now := picture(panel)) == before:
        assert time.monotonic() < end, "the picture did not change while training ran"
        time.sleep(0.2)
    return now


def status(panel, *words, seconds=60):
    """Wait until the status line has all the words, and return it."""
    end = time.monotonic() + seconds
    while not all(word in (text := panel.locator(".cnnlab-status").inner_text()) for word in words):
        assert time.monotonic() < end, f"the status line says {text!r}, not {words}"
        time.sleep(0.2)
    return text


def kernel_answers(page):
    """The kernel runs a cell: it is not blocked."""
    page.evaluate("""() => { window.answered = false;
        const kernel = window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel;
        kernel.requestExecute({code: '1 + 1'}).done.then(() => { window.answered = true; }); }""")
    page.wait_for_function("() => window.answered", timeout=10_000)


def ranks_alive():
    """Processes of this JupyterLab that are still training: they are the ones that a kernel's fork server has forked."""
    time.sleep(1)
    servers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "multiprocessing.forkserver" in " ".join(process.cmdline())
    ]
    return [child for server in servers for child in server.children()]
