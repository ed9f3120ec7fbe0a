"""The measured peaks of this machine: ordered quartiles, and no side effects."""

import dataclasses

import pytest
import torch
from torch.utils import benchmark

from cnnlab.measure import peaks


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_peak_flops_gives_ordered_quartiles(precision):
    median, low, high = peaks.peak_flops(precision, size=128, threads=1)
    assert 0 < low <= median <= high


def test_the_quartiles_of_two_times_are_ordered(monkeypatch):
    """On a slow machine, the timer fits only two runs into its time."""

    class Timer(benchmark.Timer):
        def blocked_autorange(self, **options):
            return dataclasses.replace(
                super().blocked_autorange(min_run_time=1e-6), number_per_run=1, raw_times=[1.0, 3.0]
            )

    monkeypatch.setattr(benchmark, "Timer", Timer)
    median, low, high = peaks.peak_flops(size=8, threads=1)
    assert low < median < high


def test_copy_bandwidth_gives_ordered_quartiles():
    median, low, high = peaks.copy_bandwidth(mib=4, threads=1)
    assert 0 < low <= median <= high


def test_measuring_restores_the_settings_of_torch():
    before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    peaks.peak_flops(size=32, threads=1)
    assert (torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32) == before


def test_peaks_has_every_precision_and_the_copy():
    measured = peaks.peaks()
    assert set(measured) == {"fp32", "bf16", "fp16", "copy"}
    assert all(value > 0 for value in measured.values())
