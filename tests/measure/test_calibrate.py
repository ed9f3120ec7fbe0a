"""Calibrating the predictor on this machine. A real run: `predict --here` in tests/test_cli.py."""

import numpy as np
import pytest

from cnnlab import predict
from cnnlab.measure import calibrate
from cnnlab.parallel.simulated_network import all_reduce_seconds
from cnnlab.recipe import Recipe


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("latency_s, bytes_per_s", [(1e-4, 1e9), (0.0, 1e10), (1e-3, 1e8)])
def test_the_link_behind_the_times_of_a_ring_is_found(count, latency_s, bytes_per_s):
    seconds = [
        all_reduce_seconds(bytes, count, latency_s, bytes_per_s) for bytes in calibrate.SWEEP_BYTES
    ]
    found = calibrate.fit_link(np.array(seconds), count)
    assert found == pytest.approx((latency_s, bytes_per_s), rel=1e-6, abs=1e-9)


def test_times_that_fall_with_the_size_give_an_allowed_link():
    latency_s, bytes_per_s = calibrate.fit_link(np.linspace(2, 1, len(calibrate.SWEEP_BYTES)), 2)
    assert latency_s > 0 and 0 < bytes_per_s < 1e20


def test_no_latency_is_below_zero():
    sizes = np.array(calibrate.SWEEP_BYTES)
    latency_s, bytes_per_s = calibrate.fit_link(1e-9 * sizes - 1e-5, 2)
    assert latency_s == 0 and bytes_per_s == pytest.approx(1e9)


@pytest.fixture
def two_cores(monkeypatch):
    """Two cores that slow each other to 90%, and links of 1 ms and 1 GB/s."""

    def fastest(function, count):
        if function is calibrate.time_convolution:
            assert count <= 2  # oversubscription is computed
            return np.array([0.9 if count == 1 else 1.0])
        return np.array(
            [all_reduce_seconds(bytes, count, 1e-3, 1e9) for bytes in calibrate.SWEEP_BYTES]
        )

    monkeypatch.setattr(calibrate, "fastest", fastest)
    monkeypatch.setattr(calibrate.machine, "cores", lambda: 2)


@pytest.mark.parametrize("count, compute_s", [(2, 1 / 0.9), (4, 2 / 0.9)])
def test_ranks_share_cores_and_do_not_overlap(two_cores, count, compute_s):
    spec = calibrate.spec_here(count, Recipe(batch_size=32), 32.0, 250_000)
    assert spec["device"] == {"images_per_s": 32.0, "batch": 32}
    [row] = predict({**spec, "jitter": 0})["predictions"]
    assert row["compute_s"] == pytest.approx(compute_s)
    communication_s = all_reduce_seconds(1_000_000, count, 1e-3, 1e9)
    assert row["exposed_communication_s"] == pytest.approx(communication_s)


def test_two_ranks_on_one_core_take_turns(two_cores, monkeypatch):
    monkeypatch.setattr(calibrate.machine, "cores", lambda: 1)
    spec = calibrate.spec_here(2, Recipe(batch_size=32), 32.0, 250_000)
    assert spec["stack_efficiency"] == 0.5
