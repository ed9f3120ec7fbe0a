"""The solutions of lesson 03 against NumPy, SciPy, PyTorch and the package."""

import runpy
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from cnnlab import Measurement, Recipe, speedup
from cnnlab.measure import compare, peaks

FILE = Path(__file__).parents[2] / "notebooks" / "solutions" / "03_measuring_speed.py"
SOLUTIONS = runpy.run_path(str(FILE))
TASKS = SOLUTIONS["TASKS"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def test_the_timer_agrees_with_the_packaged_one_on_an_asynchronous_device(monkeypatch):
    device = SOLUTIONS["Device"]()
    program = SOLUTIONS["Program"](device, "A", [0.2])

    def synchronized_clock():
        device.synchronize()
        return device.clock()

    monkeypatch.setattr(peaks, "timer", synchronized_clock)
    monkeypatch.setattr(peaks, "default_timer", device.clock)
    seconds = TASKS["03.1"].reference(program, device.synchronize, device.clock, 1, 3)
    _, finished = peaks.time_call(program)
    assert seconds == pytest.approx([finished] * 3)


def test_the_order_is_that_of_the_package(monkeypatch):
    recipes = {"A": Recipe(), "B": Recipe(threads=2)}
    ran = []
    monkeypatch.setattr("cnnlab.launch.launcher.run", lambda recipe, *_: ran.append(recipe) or [])
    monkeypatch.setattr(compare, "slowest_rank", lambda *_: "finished")
    monkeypatch.setattr(Measurement, "add", lambda measurement, _: measurement)
    list(compare.measure_interleaved(recipes, repeats=4))
    packaged = "".join("A" if recipe.threads == recipes["A"].threads else "B" for recipe in ran)
    numbers = count()
    programs = {"A": lambda: next(numbers), "B": lambda: next(numbers)}
    results = TASKS["03.2"].reference(programs, 4)
    assert packaged == "".join("A" if n in results["A"] else "B" for n in range(8)) == "ABBAABBA"


def test_the_interval_is_that_of_the_paired_t_test_and_of_the_package():
    a, b = SOLUTIONS["pairs_that_meet_the_same_conditions"](7)
    value, low, high = TASKS["03.3"].reference(a, b)
    interval = stats.ttest_rel(np.log(b), np.log(a)).confidence_interval()
    assert (low, high) == pytest.approx((np.exp(interval.low), np.exp(interval.high)))
    one, two = (
        Measurement(name=name, recipe=Recipe(), images_per_s=tuple(rates))
        for name, rates in (("A", a), ("B", b))
    )
    packaged = speedup(one, two)
    assert (packaged.value, packaged.low, packaged.high) == pytest.approx((value, low, high))


def test_one_a_a_test_in_twenty_finds_a_difference():
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(2000):
        a, b = np.exp(generator.normal(0, 0.1, (2, 6)))
        _, low, high = TASKS["03.3"].reference(a, b)
        found += not low <= 1 <= high
    assert found / 2000 == pytest.approx(0.05, abs=0.015)


def test_flops_and_bytes_are_those_of_a_real_convolution():
    conv = torch.nn.Conv2d(3, 8, 5, padding=2, bias=False)
    images = torch.randn(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        output = conv(images)
    moved = images.nbytes + conv.weight.nbytes + output.nbytes
    assert TASKS["03.4"].reference(2, 3, 8, 16, 5) == (counter.get_total_flops(), moved)


def test_the_roofline_bends_where_the_intensity_is_peak_over_bandwidth():
    limit = TASKS["03.5"].reference
    assert limit(5.0, 1.0, 100.0, 10.0) == (50.0, "memory")
    assert limit(10.0, 1.0, 100.0, 10.0) == (100.0, "compute")
    assert limit(50.0, 1.0, 100.0, 10.0) == (100.0, "compute")


def test_self_times_are_those_of_the_profiler():
    layer = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(torch.randn(8, 1, 16, 16))
    events = profiler.events()
    spans = [(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events]
    own = TASKS["03.6"].reference(sorted(spans, key=lambda span: (span[1], -span[2])))
    expected = {e.key: e.self_cpu_time_total / 1e6 for e in profiler.key_averages()}
    assert own == pytest.approx(expected, abs=1e-6)


def test_throughput_is_that_of_the_whole_run():
    assert TASKS["03.7"].reference([100, 10], [1.0, 1.0]) == 55


def test_the_repaired_benchmark_finds_the_times_of_the_programs():
    task = TASKS["03.8"]
    found = task.run(task.reference, 0.02, 0.03, 4)
    launch = SOLUTIONS["LAUNCH"]
    assert found["seconds"]["A"] == pytest.approx([0.02 + launch] * 4)
    assert found["seconds"]["B"] == pytest.approx([0.03 + launch] * 4)


def test_the_decisions():
    task = TASKS["03.9"]
    decisions = [task.reference(*rates) for rates in task.inputs()]
    assert decisions == ["faster", "not significant", "slower", "unreliable", "not significant"]
