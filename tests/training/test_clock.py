"""The clock counts training time only, and tells waiting, computation and communication apart."""

import time
from unittest.mock import MagicMock

import pytest
import torch

from cnnlab.training.clock import Clock, peak_memory_mib

CPU = torch.device("cpu")


class FakeGpu:
    """A processor with a clock, and a GPU that executes its queue meanwhile."""

    def __init__(self):
        self.time = 100.0  # of the processor
        self.free_at = 0.0  # when the GPU has executed its queue

    def work(self, seconds):
        """Keep the processor busy."""
        self.time += seconds

    def launch(self, seconds):
        """Put a kernel that takes so long into the queue."""
        self.free_at = max(self.time, self.free_at) + seconds

    def synchronize(self, device):
        self.time = max(self.time, self.free_at)

    def event(self, device, enable_timing):
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu
        self.at = None

    def record(self, stream):
        assert stream == "the current stream of cuda:0"
        self.at = max(self.gpu.time, self.gpu.free_at)

    def elapsed_time(self, other):
        assert other.at <= self.gpu.time, "the GPU has not reached this event"
        return 1000 * (other.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr("torch.Event", gpu.event)
    monkeypatch.setattr("torch.accelerator.synchronize", gpu.synchronize)
    monkeypatch.setattr("torch.accelerator.current_stream", "the current stream of {}".format)
    monkeypatch.setattr("time.perf_counter", lambda: gpu.time)
    return gpu


def train_on(gpu, load_s, kernels, steps=3):
    """A clock after `steps` steps of one kernel per phase, which are launched in 1 ms each."""

    def loader():
        for _ in range(steps):
            gpu.work(load_s)
            yield 1

    clock = Clock(torch.device("cuda", 0))
    clock.resume()
    for _ in clock.iterate(loader()):
        for phase, seconds in kernels.items():
            gpu.work(0.001)
            gpu.launch(seconds)
            clock.mark(phase)
    clock.pause()
    return clock


def test_the_phases_of_a_gpu_are_those_of_its_kernels_not_of_their_launches(gpu):
    clock = train_on(gpu, 0.010, {"forward": 0.100, "backward": 0.200, "update": 0.050})
    lengths = {}
    for phase, begin, end in clock.timeline():
        lengths.setdefault(phase, []).append(end - begin)
    assert lengths["forward"] == pytest.approx([0.101, 0.100, 0.100], abs=1e-5)
    assert lengths["backward"] == pytest.approx([0.200] * 3, abs=1e-5)
    assert lengths["update"] == pytest.approx([0.050] * 3, abs=1e-5)
    assert clock.seconds == pytest.approx(0.011 + 3 * 0.350)


def test_loading_while_a_gpu_has_kernels_in_its_queue_is_not_waiting(gpu):
    kernels = {"forward": 0.100, "backward": 0.200}
    assert train_on(gpu, 0.050, kernels).waiting == pytest.approx(0.050)  # for the first batch
    # Three times 1 s for a batch; 0.299 s of the last two are hidden behind the kernels.
    assert train_on(gpu, 1.000, kernels).waiting == pytest.approx(3.0 - 2 * 0.299)


def test_communication_of_a_gpu_is_exposed_where_its_queue_waits_for_it(gpu):
    clock = Clock(torch.device("cuda", 0))
    clock.resume()
    for _ in clock.iterate([1, 2]):
        gpu.launch(0.100)
        clock.mark("forward")
        clock.timed_communication(gpu.launch, 0.030)
        gpu.launch(0.200)
        began_at = clock.now()
        gpu.launch(0.040)
        clock.record_communication(began_at)
        clock.mark("backward")
    clock.pause()
    assert clock.exposed == pytest.approx(2 * 0.030)
    clock.resume()
    for _ in clock.iterate([1]):
        gpu.launch(0.200)
        began_at = clock.now()
        gpu.launch(0.040)  # of another stream, while the last kernels of backward run
        clock.record_communication(began_at)
        gpu.launch(0.010)
        clock.mark("backward")
    clock.pause()
    assert clock.exposed == pytest.approx(2 * 0.030 + 0.040)
    assert len([1 for phase, _, _ in clock.timeline() if phase == "communication"]) == 5


def test_the_time_of_a_pause_is_not_counted():
    clock = Clock(CPU)
    clock.resume()
    clock.pause()
    first = clock.seconds
    time.sleep(0.5)
    clock.resume()
    clock.pause()
    assert first <= clock.seconds < 0.25


def test_the_clock_runs_between_resume_and_pause():
    clock = Clock(CPU)
    clock.resume()
    time.sleep(0.1)
    assert clock.elapsed() >= 0.1
    clock.pause()
    assert clock.seconds >= 0.1


def test_seconds_accumulate_over_pauses():
    clock = Clock(CPU)
    for _ in range(3):
        clock.resume()
        time.sleep(0.1)
        clock.pause()
    assert clock.seconds >= 0.3


def test_waiting_counts_the_loader_but_not_the_work():
    def loader():
        for number in range(3):
            time.sleep(0.1)
            yield number

    clock, seen = Clock(CPU), []
    for number in clock.iterate(loader()):
        seen.append(number)
        time.sleep(0.5)
    clock.pause()
    assert seen == [0, 1, 2]
    assert 0.3 <= clock.waiting < 1.0


def test_only_communication_that_does_not_overlap_with_computation_is_exposed():
    """Two transfers in backward: the first overlaps with it, the second comes after it."""
    clock = Clock(CPU)
    for _ in clock.iterate([1]):
        time.sleep(0.02)
        clock.mark("forward")
        began_at = time.perf_counter()
        time.sleep(0.1)  # backward, and the first transfer
        clock.record_communication(began_at)
        clock.timed_communication(time.sleep, 0.05)
        clock.mark("backward")
        clock.timed_communication(time.sleep, 0.03)
        clock.mark("update")
    clock.pause()
    assert 0.08 <= clock.exposed < 0.15
    spans = clock.timeline()
    length = {phase: 0.0 for phase, _, _ in spans}
    for phase, begin, end in spans:
        length[phase] += end - begin
    assert length["exposed"] == pytest.approx(clock.exposed, abs=1e-4)
    assert length["communication"] >= 0.18
    assert length["forward"] >= 0.02
    assert 0.1 <= length["backward"] < 0.15
    assert length["update"] < 0.05
    assert abs(max(end for _, _, end in spans) - time.time()) < 5  # wall clock time


def test_all_blocking_communication_of_a_phase_is_exposed():
    clock = Clock(CPU)
    for _ in clock.iterate([1]):
        for _ in range(3):
            time.sleep(0.02)
            clock.timed_communication(time.sleep, 0.03)
        clock.mark("forward")
        clock.mark("backward")
    clock.pause()
    phases = [phase for phase, _, _ in clock.timeline()]
    assert phases[:8] == ["waiting", *["forward", "exposed"] * 3, "forward"]
    assert phases[8:] == ["backward", *["communication"] * 3]
    assert clock.exposed >= 0.09


def test_communication_between_epochs_is_not_part_of_a_step():
    clock = Clock(CPU)
    for _ in range(2):
        for _ in clock.iterate([1]):
            clock.mark("forward")
        clock.timed_communication(time.sleep, 0.03)  # the evaluation
    clock.pause()
    assert clock.exposed == 0


def test_peak_memory_is_in_mib_and_never_falls():
    before = peak_memory_mib(CPU)
    ballast = torch.ones(400 * 2**20 // 4)
    after = peak_memory_mib(CPU)
    del ballast
    assert before > 50  # torch alone takes more
    assert before <= after < before + 600
    assert peak_memory_mib(CPU) >= after


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_pause_waits_for_the_gpu_of_the_run(device, monkeypatch):
    """With a torch that claims to have such a GPU; nothing runs on it."""
    waited_for = []
    monkeypatch.setattr("torch.accelerator.synchronize", waited_for.append)
    monkeypatch.setattr("torch.accelerator.max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr("torch.Event", MagicMock())
    monkeypatch.setattr("torch.accelerator.current_stream", lambda device: None)
    gpu = torch.device(device, 0)
    clock = Clock(gpu)
    clock.resume()
    clock.pause()
    assert waited_for == [gpu] and peak_memory_mib(gpu) == 3.0
