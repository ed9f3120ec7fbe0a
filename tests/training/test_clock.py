"""The clock counts training time only, and tells waiting, computation and communication apart."""

import time

import pytest
import torch

from cnnlab.training.clock import Clock, peak_memory_mib

CPU = torch.device("cpu")


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
    gpu = torch.device(device, 0)
    clock = Clock(gpu)
    clock.resume()
    clock.pause()
    assert waited_for == [gpu] and peak_memory_mib(gpu) == 3.0
