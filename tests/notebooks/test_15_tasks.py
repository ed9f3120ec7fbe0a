"""The solutions of lesson 15 against the package and the formulas, and how it starts hosts."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from many_machines.hosts import Hosts, Line, find_steps, mean_losses

import cnnlab
from cnnlab.measure import cost_models
from cnnlab.measure.cost_models import Cluster

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TASKS = runpy.run_path(str(NOTEBOOKS / "solutions" / "15_many_machines.py"))["TASKS"]


def solution(task_id):
    return TASKS[task_id].reference


def test_ranks_are_numbered_without_gaps():
    ranks_per_node = [4, 1, 3]
    found = [
        solution("15.1")(node, local_rank, ranks_per_node)
        for node, count in enumerate(ranks_per_node)
        for local_rank in range(count)
    ]
    assert found == [(rank, 8) for rank in range(8)]


def test_the_command_is_that_of_the_slurm_script():
    script = (NOTEBOOKS / "many_machines" / "train.sbatch").read_text()
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    command = solution("15.2")(slurm, ["node7", "node9"])
    for word in command[1:]:
        assert word.partition("=")[0] + "=" in script
    assert "--rdzv-endpoint=node7:22345" in command
    assert "20000 + SLURM_JOB_ID % 10000" in script


def test_an_epoch_has_each_image_once_also_if_the_number_of_ranks_changes():
    seen = []
    for step in range(6, 12):  # the second epoch
        world = 2 if step < 9 else 3
        seen += [solution("15.3")(step, 6, 40, rank, world) for rank in range(world)]
    assert len(torch.cat(seen).unique()) == len(torch.cat(seen)) == 36


def test_a_saved_checkpoint_is_found_and_loaded(tmp_path):
    for step in (95, 100):
        solution("15.4")(tmp_path / f"step-{step}.pt", {"step": step, "weights": torch.ones(3)})
    (tmp_path / "step-105.part").touch()
    path = solution("15.5")(tmp_path)
    assert path.name == "step-100.pt"
    assert torch.load(path)["step"] == 100
    assert [found.name for found in tmp_path.glob("*.part")] == ["step-105.part"]


@pytest.mark.parametrize("nodes, per_node", [(1, 8), (4, 8), (16, 4)])
def test_the_hierarchical_all_reduce_takes_as_long_as_in_the_package(nodes, per_node):
    cluster = Cluster(
        devices_per_node=per_node,
        node_bandwidth=1e11,
        node_latency=5e-6,
        network_bandwidth=1e9,
        network_latency=2e-5,
    )
    costs = cost_models.hierarchical(np.array([float(nodes * per_node)]), cluster)[:, 0]
    packaged = costs[:2].sum() + 1e8 * costs[2:].sum()
    built = solution("15.6")(1e8, nodes, per_node, (5e-6, 1e11), (2e-5, 1e9))
    assert built == pytest.approx(packaged)


@pytest.mark.parametrize("gbps", [1, 10, 100])
def test_the_efficiency_is_that_of_the_predictor_without_its_other_losses(gbps):
    inside, between = (0.0, 1200e9 / 8), (0.0, gbps * 1e9 / 8)
    spec = {
        "model": {"parameters": 25e6, "bytes_per_parameter": 4},
        "device": {"images_per_s": 354, "batch": 128},
        "node": {"devices": 8, "bandwidth_gbps": 1200, "latency_us": 0},
        "network": {"bandwidth_gbps": gbps, "latency_us": 0, "efficiency": 1},
        "overlap_efficiency": 1,
        "jitter": 0,
        "stack_efficiency": 1,
        "algorithm": "hierarchical",
        "bucket_mb": 0.1,  # Small buckets: the overlap is complete.
        "devices": [32],
    }
    seconds = solution("15.6")(1e8, 4, 8, inside, between)
    [row] = cnnlab.predict(spec)["predictions"]
    assert solution("15.7")(128, 354, seconds) == pytest.approx(row["efficiency"], abs=0.005)


def test_the_interval_between_checkpoints_loses_the_least_time():
    cost_s, mtbf_s = 30.0, 1e8 / 1000
    best = solution("15.9")(cost_s, 1e8, 1000)

    def lost(interval):
        return cost_s / interval + interval / (2 * mtbf_s)

    assert lost(best) < min(lost(0.9 * best), lost(1.1 * best))


# The hosts of the lesson


def test_hosts_that_do_not_end_in_time_are_stopped():
    hosts = Hosts(virtual=False, limited=False, reason="")
    sleep = "import time; print('up', flush=True); time.sleep(100)"
    lines = hosts.run(["python", "-c", sleep], timeout=5)
    assert lines[-1].text == "stopped after 5 seconds"
    assert lines[-1].seconds < 60


def test_after_a_restart_the_repeated_steps_count():
    output = [
        "step 1 of rank 0: 1.00 ms, loss 4.0",
        "step 1 of rank 1: 1.00 ms, loss 2.0",
        "step 2 of rank 1: 1.00 ms, loss 9.0",
        "rank 0 of 1 continues after 0 steps",
        "step 1 of rank 0: 1.00 ms, loss 3.0",
        "step 2 of rank 0: 1.00 ms, loss 1.5",
    ]
    steps = find_steps(Line(0.0, 0, text) for text in output)
    assert len(steps) == 5
    assert mean_losses(steps) == {1: 3.0, 2: 1.5}
