"""Ranks in widgets' callbacks: moved quickly, nested, interrupted, next to a panel that trains."""

import os
import signal
import threading
import time

import ipywidgets
import pytest
from helpers import ranks_alive, wait_until

from cnnlab import widgets
from cnnlab.launch.launcher import ranks
from cnnlab.recipe import Recipe

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_a_slider_of_interact_may_be_moved_quickly():
    found = []

    def function(n):
        found.append(ranks(lambda: 7, n))

    slider = ipywidgets.IntSlider(value=1, min=1, max=4)
    ipywidgets.interactive(function, n=slider)
    for n in (2, 4, 3, 1):
        slider.value = n
    assert [len(values) for values in found][-4:] == [2, 4, 3, 1]


def test_ranks_may_be_called_while_ranks_print():
    inner = []

    def say(line):
        inner.append(ranks(os.getpid, 2))

    assert ranks(print, 2, "word", say=say) == [None, None]
    assert len(inner) == 2


@pytest.mark.skipif(os.name != "posix", reason="this system cannot interrupt one process")
@pytest.mark.parametrize("after_s", [0.03, 0.1, 0.5])
def test_an_interrupted_call_ends_its_ranks_and_the_next_one_works(after_s):
    for _ in range(2):
        interrupt = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            interrupt.start()
            ranks(time.sleep, 2, 60)
        wait_until(lambda: not ranks_alive(), "a rank is left", seconds=5)
    assert ranks(int, 2) == [0, 0]


def test_ranks_run_while_a_panel_trains():
    panel = widgets.TrainingPanel(Recipe(epochs=1_000_000, threads=1, evaluate=False), {})
    panel.run()
    try:
        wait_until(lambda: "step" in panel.status.value, "no step was reported", 30)
        assert ranks(lambda: 7, 2) == [7, 7]
        assert panel.thread.is_alive()
    finally:
        panel.stop()
        panel.wait()
    assert panel.status.value.startswith("Stopped. step")
