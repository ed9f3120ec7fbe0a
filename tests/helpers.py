"""Helpers that several test files share: polling, live processes, and JupyterLab in a browser."""

import json
import os
import signal
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import psutil

REPOSITORY = Path(__file__).parents[1]

CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

NOTEBOOK_READY = """() => {
    const session = window.jupyterapp?.shell.currentWidget?.context?.sessionContext;
    const kernel = session?.session?.kernel;
    return session?.isReady
        && kernel?.connectionStatus === 'connected'
        && kernel?.status === 'idle';
}"""

RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }"

ALL_CELLS_HAVE_RUN = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const code = panel.content.widgets.filter(
        cell => cell.model.type === 'code' && cell.model.sharedModel.getSource().trim());
    return code.every(cell => cell.model.executionCount)
        && panel.context.sessionContext.session.kernel.status === 'idle';
}"""

RUN_UNTIL = """async words => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    window.target = notebook.widgets.findIndex(
        cell => cell.model.type === 'code' && cell.model.sharedModel.getSource().includes(words));
    notebook.activeCellIndex = window.target + 1;
    window.jupyterapp.commands.execute('notebook:run-all-above');
}"""

TARGET_CELL_HAS_RUN = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    return window.target >= 0
        && panel.content.widgets[window.target].model.executionCount
        && panel.context.sessionContext.session.kernel.status === 'idle';
}"""

ERRORS = (
    ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'], "
    ".jp-RenderedText[data-mime-type*=error]"
)

PICTURE_BYTES = """async image => {
    const blob = await (await fetch(image.src)).blob();
    return blob.size + ':' + await blob.text();
}"""

ASK_KERNEL = """() => {
    window.answered = false;
    const kernel = window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel;
    kernel.requestExecute({code: '1 + 1'}).done.then(() => { window.answered = true; });
}"""

SAVE = """() => {
    window.saved = false;
    window.jupyterapp.commands.execute('docmanager:save').then(() => { window.saved = true; });
}"""


def run_all(page, timeout=120):
    """Run every cell, and wait until all code cells have run and the kernel is idle."""
    page.evaluate(RUN_ALL)
    page.wait_for_function(ALL_CELLS_HAVE_RUN, timeout=timeout * 1000)


def run_until(page, words, timeout=120):
    """Run all cells up to and including the first code cell whose source contains `words`."""
    page.evaluate(RUN_UNTIL, words)
    page.wait_for_function(TARGET_CELL_HAS_RUN, timeout=timeout * 1000)


def wait_for_kernel(page):
    """Wait until the kernel answers a request."""
    page.evaluate(ASK_KERNEL)
    page.wait_for_function("() => window.answered", timeout=10_000)


def picture(panel):
    """The bytes of the panel's picture on the screen."""
    image = panel.locator("img.cnnlab-picture, .cnnlab-picture img").first
    return image.evaluate(PICTURE_BYTES)


def changed_picture(panel, before, seconds=30):
    """Wait for a picture that differs from `before`, and return it."""
    end = time.monotonic() + seconds
    while (now := picture(panel)) == before:
        assert time.monotonic() < end, "the picture did not change while the panel worked"
        time.sleep(0.2)
    return now


def saved_notebook(page, lab, name):
    """Save the notebook in JupyterLab, and return the JSON that it wrote."""
    page.evaluate(SAVE)
    page.wait_for_function("() => window.saved", timeout=20_000)
    return json.loads((lab["root"] / name).read_text())


def stop_kernels(lab):
    kernels = f"{lab['address']}/api/kernels"
    query = f"?token={lab['token']}"
    for kernel in json.load(urllib.request.urlopen(kernels + query, timeout=10)):
        address = f"{kernels}/{kernel['id']}{query}"
        urllib.request.urlopen(urllib.request.Request(address, method="DELETE"), timeout=20)


def server_answers(address):
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False


def wait_until(condition, message, seconds=5):
    """Poll until `condition()` is true, or fail with `message` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.02)


def ranks_alive():
    """All live descendants except the fork server and multiprocessing's resource tracker."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.parent().pid != os.getpid() or not is_multiprocessing_service(process):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return alive(found)


def is_multiprocessing_service(process):
    return any("forkserver" in word or "resource_tracker" in word for word in process.cmdline())


def alive(processes):
    """The processes that still run. Zombies do not count."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def interrupted_train(rank, world, recipe, checkpoints, step, victim, what):
    """`launcher.train_rank`, except that rank `victim` calls `what()` in one step of each attempt.

    `step`: the number of that step. The first step of an attempt is 1.
    """
    from cnnlab.launch import worker
    from cnnlab.training import loop

    build = loop.build
    forward_passes = 0

    def before_forward(module, _):
        nonlocal forward_passes
        if module.training:
            forward_passes += 1
        if forward_passes == step and rank == victim:
            what()

    def build_interrupted(*args):
        network = build(*args)
        network.register_forward_pre_hook(before_forward)
        return network

    loop.build = build_interrupted
    yield from worker.train_rank(rank, world, recipe, checkpoints)


def train_float64(rank, world, recipe, checkpoints=None):
    """`launcher.train_rank` in float64, in which rounding does not hide a mistake."""
    import torch

    from cnnlab.data import datasets
    from cnnlab.launch import worker

    load = datasets.load

    def load_float64(recipe):
        splits = load(recipe)
        for part in (splits.train, splits.test):
            images, labels = part.tensors
            part.tensors = (images.double(), labels)
        return splits

    datasets.load = load_float64
    torch.set_default_dtype(torch.float64)
    yield from worker.train_rank(rank, world, recipe, checkpoints)


def ordered(figures):
    """True for the statistics of something that was timed at least twice."""
    return (
        0 < figures["q1"] <= figures["median"] <= figures["q3"]
        and figures["n"] >= 2
        and figures["returned_s"] > 0
        and figures["first_s"] > 0
    )


def loop_for_ever():
    while True:
        pass


def kill_myself(marks, times=1):
    """Kill this process with SIGKILL, at most `times` times. The file `marks` counts them."""
    with open(marks, "a+") as file:
        file.seek(0)
        if len(file.read()) < times:
            file.write("x")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def render(ax):
    """The pixels of the figure. Warnings while drawing are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba()).copy()


def points(line):
    return list(line.get_xdata()), list(line.get_ydata())


def texts(ax):
    shown = [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels(), ax.title]
    if ax.get_legend():
        shown += ax.get_legend().get_texts()
    return " ".join(text.get_text() for text in shown)
