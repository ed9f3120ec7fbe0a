"""The solutions of lesson 06 against the package's data set and runs, and in real processes."""

import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cnnlab import Measurement, Recipe, data, run
from cnnlab.events import Finished, Progress

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TASKS = runpy.run_path(str(NOTEBOOKS / "solutions" / "06_feeding_the_model.py"))["TASKS"]
LOADING = runpy.run_path(str(NOTEBOOKS / "programs" / "loading.py"))


def solve(task_id, *arguments):
    return TASKS[task_id].reference(*arguments)


def measurement(*rates):
    return Measurement(name="a", recipe=Recipe(), images_per_s=rates)


@pytest.fixture(scope="module")
def files():
    return sorted(data.photo_folder(48).glob("*/*.jpg"))[:6]


def batch(files, size=64):
    return solve("06.2", [(solve("06.1", path, size), n % 2) for n, path in enumerate(files)])


def test_a_prepared_batch_is_that_of_the_packaged_data_set(files):
    images, labels = batch(files)
    zeros = torch.zeros(6, dtype=torch.int64)
    prepared = solve("06.3", images, zeros, zeros, zeros.bool(), 64)
    packaged = data.PhotoDataset(files, 64)
    torch.testing.assert_close(prepared, torch.stack([packaged[n][0] for n in range(6)]))
    assert images.dtype == torch.uint8 and labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_workers_that_send_floats_crop_and_mirror_as_the_device_does(files):
    samples = [(solve("06.1", files[0], 72), 0)]
    torch.manual_seed(0)
    floats, _ = LOADING["collate_floats"](samples)
    torch.manual_seed(0)
    top, left = torch.randint(9, (2,)).tolist()
    choices = torch.tensor([top]), torch.tensor([left]), torch.rand(1) < 0.5
    prepared = solve("06.3", solve("06.2", samples)[0], *choices, 64)
    torch.testing.assert_close(floats, prepared)


def test_prefetched_batches_are_those_of_the_loader(files):
    loader = DataLoader(range(20), batch_size=4)
    expected = [numbers.tolist() for numbers in loader]
    assert [numbers.tolist() for numbers in solve("06.4", loader)] == expected


def test_the_share_of_waiting_is_that_of_a_run():
    recipe = Recipe(data="photos", images=64, batch_size=8, steps=6, threads=1, evaluate=False)
    assert recipe.warmup_steps == 2  # `spans` has the other four steps
    events = list(run(recipe))
    finished = next(event for event in events if isinstance(event, Finished))
    spans = [event for event in events if isinstance(event, Progress)][-1].spans
    share = solve("06.5", spans, 0)
    assert share == pytest.approx(finished.waiting_s / finished.step_s, abs=0.01)


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_a_step_is_never_shorter_than_its_limits_and_workers_needed_is_the_smallest(cores):
    load, compute = 0.05, 0.02
    times = [solve("06.6", load, compute, n, cores) for n in range(20)]
    assert times[0] == pytest.approx(load + compute)
    assert min(times) == pytest.approx(max(compute, (load + compute) / cores))
    needed = solve("06.7", load, compute, cores)
    assert times[needed] <= 1.001 * min(times) < min([np.inf, *times[:needed]])


def test_a_draft_differs_little_from_all_pixels(files):
    full, small = solve("06.1", files[0], 64), solve("06.9", files[0], 64)
    assert 0 < np.abs(full.astype(float) - small).mean() < 15


def test_the_recommendation_prefers_fewer_workers_within_the_spread():
    slow, fast, faster = (
        measurement(50, 51, 50),
        measurement(98, 100, 101),
        measurement(99, 101, 100),
    )
    assert solve("06.10", {0: slow, 2: fast, 4: faster}) == 2
    assert solve("06.10", {0: fast, 2: slow}) == 0


def test_a_new_process_gets_a_function_with_its_code_and_needs_no_torch(files):
    sys.path.insert(0, str(NOTEBOOKS / "programs"))
    try:
        from loading import ByValue

        sent = pickle.dumps((ByValue(TASKS["06.1"].reference), files[0]))
    finally:
        sys.path.remove(str(NOTEBOOKS / "programs"))
    program = (
        "import pickle, sys\n"
        "function, path = pickle.loads(sys.stdin.buffer.read())\n"
        "print(function(path, 8).sum(), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=sent,
        capture_output=True,
        env={"PYTHONPATH": str(NOTEBOOKS / "programs")},
        timeout=120,
    )
    assert done.stdout.split() == [b"%d" % solve("06.1", files[0], 8).sum(), b"False"], done.stderr


def test_published_speedups_are_relative_to_no_workers():
    for points in LOADING["PUBLISHED"].values():
        assert points[0] == 1 and max(points.values()) > 1.4
