"""The scaling laws at points that can be computed by hand."""

import pytest

from cnnlab.measure.scaling import amdahl, fit_serial_fraction, gustafson
from cnnlab.parallel.simulated_network import all_reduce_seconds
from cnnlab.recipe import CnnlabError


@pytest.mark.parametrize(
    "workers, serial, expected",
    [(1, 0.3, 1), (8, 0, 8), (8, 1, 1), (2, 0.5, 4 / 3), (4, 0.25, 16 / 7), (1e12, 0.1, 10)],
)
def test_amdahl(workers, serial, expected):
    assert amdahl(workers, serial) == pytest.approx(expected)


@pytest.mark.parametrize(
    "workers, serial, expected", [(1, 0.3, 1), (8, 0, 8), (8, 1, 1), (2, 0.5, 1.5), (4, 0.25, 3.25)]
)
def test_gustafson(workers, serial, expected):
    assert gustafson(workers, serial) == pytest.approx(expected)


def test_the_laws_accept_lists_of_workers():
    assert amdahl([1, 2], 0.5).tolist() == pytest.approx([1, 4 / 3])
    assert gustafson([1, 2], 0.5).tolist() == [1, 1.5]


@pytest.mark.parametrize("law", [amdahl, gustafson])
@pytest.mark.parametrize("serial", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_0_to_1_is_rejected(law, serial):
    with pytest.raises(CnnlabError, match=f"serial={serial}.*0 to 1"):
        law(2, serial)


@pytest.mark.parametrize("serial", [0.0, 0.1, 0.5, 1.0])
def test_the_fit_recovers_the_fraction_behind_the_points(serial):
    workers = [1, 2, 4, 8]
    assert fit_serial_fraction(workers, amdahl(workers, serial)) == pytest.approx(serial, abs=1e-9)


@pytest.mark.parametrize(
    "bytes, ranks, latency_s, bytes_per_s, expected",
    [
        (1e6, 1, 0.1, 1e6, 0),  # no other rank
        (1e6, 2, 0.1, 1e6, 2 * (0.1 + 0.5)),  # each half is sent, and its sum comes back
        (1e6, 4, 0.0, 1e6, 1.5),
        (1e6, 1000, 0.0, 1e6, 1.998),  # approaches twice the bytes over the bandwidth
        (0, 4, 0.1, 1e6, 0.6),
        (1e6, 3, 0.0, float("inf"), 0),
    ],
)
def test_a_ring_all_reduce(bytes, ranks, latency_s, bytes_per_s, expected):
    assert all_reduce_seconds(bytes, ranks, latency_s, bytes_per_s) == pytest.approx(expected)


def test_the_fit_stays_between_0_and_1():
    assert fit_serial_fraction([1, 2], [1, 3]) == 0  # faster than ideal
    assert fit_serial_fraction([1, 2], [1, 0.5]) == 1  # slower than one worker


def test_a_fit_to_one_worker_is_rejected():
    with pytest.raises(CnnlabError, match="more than one worker"):
        fit_serial_fraction([1, 1], [1, 1])
