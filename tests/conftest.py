"""Fixtures: a real JupyterLab and a real browser, and checks that runs leave nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import (
    CHROMIUM,
    NOTEBOOK_READY,
    REPOSITORY,
    ranks_alive,
    server_answers,
    stop_kernels,
    wait_until,
)

# A shell starts background jobs with SIGINT ignored, and the processes of the tests inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


JUPYTER_FOLDERS = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "IPYTHONDIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, request):
    """The address, token and root folder of a JupyterLab that serves a copy of the lessons.

    A test module with `QUICK = True` has them in quick mode.
    """
    home = tmp_path_factory.mktemp("lab")
    root = home / "notebooks"
    shutil.copytree(REPOSITORY / "notebooks", root)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = "for-the-tests"
    folders = {name: str(home / name.lower()) for name in JUPYTER_FOLDERS}
    environment = {**os.environ, **folders, "JUPYTER_TOKEN": token}
    for name in ("CNNLAB_UNATTENDED", "CNNLAB_QUICK"):  # learners do not set these
        environment.pop(name, None)
    if getattr(request.module, "QUICK", False):
        environment["CNNLAB_QUICK"] = "1"
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"),
        *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
        *(f"--ServerApp.root_dir={root}", "--expose-app-in-browser"),
    ]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(
            lambda: server_answers(f"{address}/api/status?token={token}"),
            f"JupyterLab did not start: see {home / 'log'}",
            60,
        )
        yield {"address": address, "token": token, "root": root}
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, driven by Playwright."""
    paths = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    path = next((path for path in paths if path), None)
    if path is None and not os.environ.get("CI"):
        pytest.skip("Chromium is missing. Install it (apt install chromium) to test in a browser.")
    assert path, "Chromium is missing on CI"
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=path, args=CHROMIUM) as chromium,
    ):
        yield chromium


@pytest.fixture
def open_lesson(lab, browser, request):
    """open_lesson(name) opens a lesson in the browser and returns the page, with the kernel ready.

    With CNNLAB_SCREENSHOTS set to a folder, each page is saved there as a picture at the end.
    """
    contexts = []

    def show(name, width=1366, height=900):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.goto(f"{lab['address']}/doc/tree/{name}?token={lab['token']}&reset")
        page.wait_for_function(NOTEBOOK_READY, timeout=60_000)
        return page

    yield show
    folder = os.environ.get("CNNLAB_SCREENSHOTS")
    for number, context in enumerate(contexts):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            context.pages[0].screenshot(path=f"{folder}/{request.node.name}-{number}.png")
        context.close()
    stop_kernels(lab)


@pytest.fixture(scope="module")
def one_thread():
    """torch computes with one thread, because other tests run at the same time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_is_left(monkeypatch, tmp_path_factory):
    """Fail when the test leaves a rank or a temporary folder behind."""
    from cnnlab.launch import launcher

    launcher.prewarm()
    tmp_path_factory.getbasetemp()  # pytest creates its folders before tempdir changes
    # The prefix is short because the path of a socket has at most 104 characters.
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        wait_until(lambda: not ranks_alive(), "processes are left")
        wait_until(lambda: not list(Path(folder).glob("cnnlab-*")), "folders are left")


@pytest.fixture(scope="session")
def short_run():
    """The events of a real run of two epochs on the digits, trained in this process."""
    from cnnlab.recipe import Recipe
    from cnnlab.training.loop import train

    return list(train(Recipe(batch_size=128, epochs=2, threads=1)))


@pytest.fixture
def ax():
    """Axes that are drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3))
    FigureCanvasAgg(figure)
    return figure.subplots()
