"""A real JupyterLab and a real browser, for the tests that look at what a person sees."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # as in the background of a shell: what the tests start would ignore interrupts too
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent
CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address and token of a JupyterLab that serves a copy of the lessons, with settings of its own."""
    home = tmp_path_factory.mktemp("lab")
    root = home / "notebooks"
    shutil.copytree(REPOSITORY / "notebooks", root)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = "for-the-tests"
    folders = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
                                                           "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    environment = {**os.environ, **folders, "JUPYTER_TOKEN": token}
    for name in ("CNNLAB_UNATTENDED", "CNNLAB_QUICK"):           # as a learner has it
        environment.pop(name, None)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}", "--expose-app-in-browser"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        _until(lambda: _answers(f"{address}/api/status?token={token}"), 60, f"JupyterLab did not start: {(home / 'log').read_text()}")
        yield {"address": address, "token": token, "root": root}
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    """Debian's or the user's Chromium."""
    path = next((found for found in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if found), None)
    if path is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here: install it (apt install chromium) to test what a person sees")
    assert path, "CI has no Chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=path, args=CHROMIUM) as chromium:
            yield chromium


@pytest.fixture
def open_lesson(lab, browser, request):
    """open_lesson(name) shows a lesson in the browser, kernel ready, and returns the page; `.run_all()` follows."""
    contexts = []

    def show(name, width=1366, height=900):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.goto(f"{lab['address']}/doc/tree/{name}?token={lab['token']}&reset")
        page.wait_for_function(_READY, timeout=60_000)
        return page

    yield show
    folder = os.environ.get("CNNLAB_SCREENSHOTS")
    for number, context in enumerate(contexts):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            context.pages[0].screenshot(path=f"{folder}/{request.node.name}-{number}.png")
        context.close()
    _stop_kernels(lab)


_READY = """() => {
    const session = window.jupyterapp?.shell.currentWidget?.context?.sessionContext;
    const kernel = session?.session?.kernel;
    return session?.isReady && kernel?.connectionStatus === 'connected' && kernel?.status === 'idle';
}"""


def run_all(page, timeout=120):
    """Run every cell, and wait until the kernel is idle and all code cells have run."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function("""() => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        const code = notebook.widgets.filter(cell => cell.model.type === 'code' && cell.model.sharedModel.getSource().trim());
        return code.every(cell => cell.model.executionCount) && window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.status === 'idle';
    }""", timeout=timeout * 1000)


def run_until(page, words, timeout=120):
    """Run all cells up to the first whose source has these words, and that one too."""
    page.evaluate("""async words => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        window.reached = notebook.widgets.findIndex(cell => cell.model.type === 'code' && cell.model.sharedModel.getSource().includes(words));
        notebook.activeCellIndex = window.reached + 1;
        window.jupyterapp.commands.execute('notebook:run-all-above');
    }""", words)
    page.wait_for_function("""() => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        return window.reached >= 0 && notebook.widgets[window.reached].model.executionCount
            && window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.status === 'idle';
    }""", timeout=timeout * 1000)


def saved_notebook(page, lab, name):
    """The notebook as JupyterLab saves it."""
    page.evaluate("() => { window.saved = false; window.jupyterapp.commands.execute('docmanager:save').then(() => { window.saved = true; }); }")
    page.wait_for_function("() => window.saved", timeout=20_000)
    return json.loads((lab["root"] / name).read_text())


def _stop_kernels(lab):
    query = f"?token={lab['token']}"
    for kernel in json.load(urllib.request.urlopen(f"{lab['address']}/api/kernels{query}", timeout=10)):
        call = urllib.request.Request(f"{lab['address']}/api/kernels/{kernel['id']}{query}", method="DELETE")
        urllib.request.urlopen(call, timeout=20)


def _answers(address):
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False


def _until(condition, seconds, message):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.1)


def until(condition, complaint, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.02)


def ranks_alive():
    """Processes below this one that are neither the fork server nor multiprocessing's resource tracker."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.parent().pid != os.getpid() or not any("forkserver" in word or "resource_tracker" in word for word in process.cmdline()):
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
    """`launch.train_rank`, but in step `step` of each attempt rank `victim` does `what()`."""
    from cnnlab import train

    build, forwards = train.build, []

    def interrupted(*args):
        network = build(*args)
        network.register_forward_pre_hook(lambda module, _: forwards.append(1) if module.training else None)
        network.register_forward_pre_hook(lambda *_: what() if len(forwards) == step and rank == victim else None)
        return network

    train.build = interrupted
    yield from train.train(recipe, rank, world, checkpoints)


@pytest.fixture(scope="module")
def one_thread():
    """torch computes with one thread: tests run beside others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ordered(figures):
    """Are these the figures of something timed more than once?"""
    return 0 < figures["q1"] <= figures["median"] <= figures["q3"] and figures["n"] >= 2 and 0 < figures["returned_s"] and 0 < figures["first_s"]


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


@pytest.fixture
def nothing_is_left(monkeypatch, tmp_path_factory):
    """After the test: no rank, and no folder in a temporary folder of its own (a short one: a socket's path has at most 104 characters)."""
    from cnnlab import launch

    launch.prewarm(), tmp_path_factory.getbasetemp()        # whose folders stay
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        until(lambda: not ranks_alive(), "processes are left")
        until(lambda: not [name for name in os.listdir(folder) if name.startswith("cnnlab-")], "folders are left")


@pytest.fixture(scope="session")
def short_run():
    """The events of a real training run of two epochs of digits, in this process."""
    from cnnlab.recipe import Recipe
    from cnnlab.train import train

    return list(train(Recipe(batch_size=128, epochs=2, threads=1)))
