"""A real Jupyter server, without a browser: a panel trains while nobody is connected."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid

import pytest
from helpers import server_answers, wait_until
from tornado.websocket import websocket_connect

TOKEN = "for-the-tests"
IDLE_S = 3  # after which the server ends an idle kernel

TRAIN = """
import threading

from cnnlab import Recipe
from cnnlab.widgets import TrainingPanel, board

board.STAY_ACTIVE_EVERY = 1  # as the time after which the server ends kernels is short, too
panel = TrainingPanel(Recipe(epochs=1_000_000, threads=1, evaluate=False), {})
display(panel)
panel.run()
timer = threading.Timer({seconds}, panel.stop)
timer.start()
"""

SILENT = """
import threading
import time

from cnnlab.widgets import Panel, board
from cnnlab.widgets.picture import Picture


def work(values, stop):
    stop.wait({seconds})
    yield "done"


board.STAY_ACTIVE_EVERY = 1
panel = Panel({}, work, lambda event: (1.0, event), lambda axes: None, Picture())
display(panel)
panel.run()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a Jupyter server that ends kernels that are idle for `IDLE_S`."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {**os.environ, **{name: str(home / name) for name in names}}
    environment.pop("CNNLAB_UNATTENDED", None)
    command = [
        *(sys.executable, "-m", "jupyter", "server", "--no-browser", "--allow-root"),
        *("--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={TOKEN}"),
        f"--ServerApp.root_dir={home}",
        f"--MappingKernelManager.cull_idle_timeout={IDLE_S}",
        "--MappingKernelManager.cull_interval=1",
    ]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"127.0.0.1:{port}"
    try:
        status = f"http://{address}/api/status?token={TOKEN}"
        wait_until(lambda: server_answers(status), (home / "log").read_text, 60)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def request(address, path, method="GET"):
    url = f"http://{address}/api/{path}?token={TOKEN}"
    data = b"{}" if method == "POST" else None
    with urllib.request.urlopen(
        urllib.request.Request(url, data, method=method), timeout=30
    ) as answer:
        return json.loads(answer.read() or "null")


async def execute(address, kernel, code):
    """Run a cell and disconnect."""
    url = f"ws://{address}/api/kernels/{kernel}/channels?token={TOKEN}"
    connection = await websocket_connect(url)
    header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "session": "test"}
    header |= {"username": "test", "version": "5.3", "date": "2026-01-01T00:00:00Z"}
    content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
    await connection.write_message(json.dumps({**message, "channel": "shell"}))
    while True:
        data = await asyncio.wait_for(connection.read_message(), 120)
        if isinstance(data, bytes):  # A picture.
            continue
        reply = json.loads(data)
        if reply["msg_type"] == "execute_reply":
            break
    connection.close()
    assert reply["content"]["status"] == "ok", reply["content"]


def exists(address, kernel):
    try:
        return bool(request(address, f"kernels/{kernel}"))
    except urllib.error.HTTPError:
        return False


@pytest.mark.parametrize("code", [TRAIN, SILENT], ids=["training", "silent work"])
def test_a_kernel_is_not_idle_while_a_panel_works_and_nobody_is_connected(server, code):
    kernel = request(server, "kernels", "POST")["id"]
    seconds = 3 * IDLE_S
    asyncio.run(execute(server, kernel, code.replace("{seconds}", str(seconds))))
    end = time.monotonic() + seconds - 1
    while time.monotonic() < end:
        assert exists(server, kernel), "the server has ended the kernel"
        time.sleep(0.5)
    # Then it is: the server does end idle kernels.
    wait_until(lambda: not exists(server, kernel), "the kernel stays", 10 * IDLE_S)
