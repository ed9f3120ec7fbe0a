"""What several test files use: waiting, processes that are alive, driving a lesson in the browser."""

import json
import os
import signal
import time
import urllib.request
from pathlib import Path

"""A real JupyterLab and a real browser, for the tests that look at what a person sees."""


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
    return session?.isReady && kernel?.connectionStatus === 'connected' && kernel?.status === 'idle';
}"""


def run_all(page, timeout=120):
    """Run every cell, and wait until the kernel is idle and all code cells have run."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(
        """() => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        const code = notebook.widgets.filter(cell => cell.model.type === 'code' && cell.model.sharedModel.getSource().trim());
        return code.every(cell => cell.model.executionCount) && window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.status === 'idle';
    }""",
        timeout=timeout * 1000,
    )


def run_until(page, words, timeout=120):
    """Run all cells up to the first whose source has these words, and that one too."""
    page.evaluate(
        """async words => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        window.reached = notebook.widgets.findIndex(cell => cell.model.type === 'code' && cell.model.sharedModel.getSource().includes(words));
        notebook.activeCellIndex = window.reached + 1;
        window.jupyterapp.commands.execute('notebook:run-all-above');
    }""",
        words,
    )
    page.wait_for_function(
        """() => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        return window.reached >= 0 && notebook.widgets[window.reached].model.executionCount
            && window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.status === 'idle';
    }""",
        timeout=timeout * 1000,
    )


def saved_notebook(page, lab, name):
    """The notebook as JupyterLab saves it."""
    page.evaluate(
        "() => { window.saved = false; window.jupyterapp.commands.execute('docmanager:save').then(() => { window.saved = true; }); }"
    )
    page.wait_for_function("() => window.saved", timeout=20_000)
    return json.loads((lab["root"] / name).read_text())


def stop_kernels(lab):
    query = f"?token={lab['token']}"
    for kernel in json.load(
        urllib.request.urlopen(f"{lab['address']}/api/kernels{query}", timeout=10)
    ):
        call = urllib.request.Request(
            f"{lab['address']}/api/kernels/{kernel['id']}{query}", method="DELETE"
        )
        urllib.request.urlopen(call, timeout=20)


def server_answers(address):
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False


def wait_until(condition, message, seconds=5):
    """Poll until `condition()` holds; fail with the message after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.02)


def ranks_alive():
    """Processes below this one that are neither the fork server nor multiprocessing's resource tracker."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.parent().pid != os.getpid() or not any(
                "forkserver" in word or "resource_tracker" in word for word in process.cmdline()
            ):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return alive(found)


def alive(processes):
    """Those that still run: a zombie only waits to be counted."""
    import psutil

    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def interrupted_train(rank, world, recipe, checkpoints, step, victim, what):
    """`launcher.train_rank`, but in step `step` of each attempt rank `victim` does `what()`."""
    from cnnlab.training import loop

    build, forwards = loop.build, []

    def interrupted(*args):
        network = build(*args)
        network.register_forward_pre_hook(
            lambda module, _: forwards.append(1) if module.training else None
        )
        network.register_forward_pre_hook(
            lambda *_: what() if len(forwards) == step and rank == victim else None
        )
        return network

    loop.build = interrupted
    yield from loop.train(recipe, rank, world, checkpoints)


def ordered(figures):
    """Are these the figures of something timed more than once?"""
    return (
        0 < figures["q1"] <= figures["median"] <= figures["q3"]
        and figures["n"] >= 2
        and 0 < figures["returned_s"]
        and 0 < figures["first_s"]
    )


def loop_for_ever():
    while True:
        pass


def kill_myself(marks, times=1):
    """SIGKILL, but only so many times; the file `marks` counts them."""
    with open(marks, "a+") as file:
        file.seek(0)
        if len(file.read()) < times:
            file.write("x")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
