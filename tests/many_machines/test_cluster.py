"""The panel of a cluster on paper predicts what its controls say."""

import numpy as np
import pytest
from many_machines.cluster import DEVICES, ClusterPanel, change_spec, gains, time_to_accuracy
from many_machines.published import TABLES

from cnnlab import predict


@pytest.fixture(scope="module")
def panel():
    return ClusterPanel("ResNet-50, 4 x 8 V100")


def efficiency(panel):
    return panel.result["predictions"][-1]["efficiency"]


def test_a_slower_network_lowers_the_efficiency_and_changes_the_picture(panel):
    before, picture = efficiency(panel), panel.image.value
    panel.network.value = 1
    assert efficiency(panel) < before / 2
    assert panel.image.value != picture
    assert "Bound by network bandwidth" in panel.status.value
    panel.network.value = "published"
    assert efficiency(panel) == before


def test_a_larger_batch_and_micro_batches_hide_communication(panel):
    panel.network.value = 10
    slow = efficiency(panel)
    panel.batch.value = 512
    assert efficiency(panel) > slow
    panel.batch.value = "published"
    panel.accumulate.value = 4
    assert efficiency(panel) > slow
    panel.accumulate.value = 1
    panel.network.value = "published"


def test_published_clusters_can_be_chosen(panel):
    assert len(panel.tables) == len(TABLES)
    for name, table in list(panel.tables.items())[::9]:
        panel.cluster.value = name
        assert panel.table is table
        assert [row["devices"] for row in panel.result["predictions"]] == DEVICES
    panel.cluster.value = next(iter(panel.tables))


def test_a_faster_network_pays_only_where_the_network_is_the_limit():
    [table] = [table for table in TABLES if table.stack == "PyTorch DDP" and "8 V100" in table.name]
    slow = change_spec(table.spec, network__bandwidth_gbps=0.1)
    fast = change_spec(table.spec, network__bandwidth_gbps=400)
    assert gains(slow, 512)["network\nbandwidth x 2"] == pytest.approx(2, rel=0.1)
    assert gains(fast, 512)["network\nbandwidth x 2"] == pytest.approx(1, abs=0.01)
    assert gains(slow, 512)["device\nspeed x 2"] < 1.1
    assert table.spec["network"]["bandwidth_gbps"] == 100  # unchanged


def test_time_to_accuracy_saturates_at_the_critical_batch_size():
    rows = predict({**TABLES[0].spec, "devices": DEVICES})["predictions"]
    speedups = time_to_accuracy(rows, batch=64, critical_batch=5000)
    throughput = np.array([row["speedup"] for row in rows])
    assert speedups[0] == 1
    assert (speedups[1:] < throughput[1:]).all()
    assert speedups.max() < 1 + 5000 / 64
    huge = time_to_accuracy(rows, batch=64, critical_batch=1e9)
    assert huge == pytest.approx(throughput, rel=0.01)
