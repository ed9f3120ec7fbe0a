"""The timer and the measured peaks of this machine: ordered quartiles, no side effects."""

from itertools import count, cycle

import pytest
import torch

from cnnlab.measure import peaks


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_peak_flops_gives_ordered_quartiles(precision):
    median, low, high = peaks.peak_flops(precision, size=128, threads=1)
    assert 0 < low <= median <= high


def test_the_quartiles_of_two_times_are_ordered(monkeypatch):
    """On a slow machine, only two repeats fit into the time; here one takes 1 s, the other 3 s."""
    times, clock = cycle([1.0, 3.0]), count()
    monkeypatch.setattr(peaks, "time_call", lambda function, calls=1: (0.0, next(times)))
    monkeypatch.setattr(peaks, "default_timer", lambda: next(clock))
    median, low, high = peaks.copy_bandwidth(mib=1)
    moved = 2 * 2**20
    assert (median, low, high) == pytest.approx((moved / 2, moved / 2.5, moved / 1.5))


def test_copy_bandwidth_gives_ordered_quartiles():
    median, low, high = peaks.copy_bandwidth(mib=4, threads=1)
    assert 0 < low <= median <= high


def test_measuring_uses_the_threads_and_restores_the_settings_of_torch(monkeypatch):
    threads = []
    multiply = torch.mm

    def recording_mm(a, b):
        threads.append(torch.get_num_threads())
        return multiply(a, b)

    monkeypatch.setattr(torch, "mm", recording_mm)
    before = torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision
    peaks.peak_flops(size=32, threads=1)
    assert set(threads) == {1}
    assert (torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision) == before


def test_an_operation_that_fails_raises(monkeypatch):
    def out_of_memory(a, b):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "mm", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        peaks.peak_flops(size=32, threads=1)


def test_peaks_has_every_precision_and_the_copy():
    measured = peaks.peaks()
    assert set(measured) == {"fp32", "bf16", "fp16", "copy"}
    assert all(value > 0 for value in measured.values())


def test_a_call_has_returned_before_the_device_has_finished(monkeypatch):
    """On a synthetic clock: the call takes 2 s, and the device needs 10 s more."""
    now = 0.0

    def call():
        nonlocal now
        now += 2.0

    def synchronized_clock():
        nonlocal now
        now += 10.0
        return now

    monkeypatch.setattr(peaks, "timer", synchronized_clock)
    monkeypatch.setattr(peaks, "default_timer", lambda: now)
    assert peaks.time_call(call, calls=4) == (8.0 / 4, 18.0 / 4)
