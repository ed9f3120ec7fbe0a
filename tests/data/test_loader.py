"""The order of the images, the shares of the ranks, and the random shifts."""

import os
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cnnlab.data.loader import random_shifts, shift_images, system_limit_error, train_loader
from cnnlab.launch import launcher
from cnnlab.recipe import CnnlabError, Recipe


def batches_of(loader, epochs=3):
    return [labels.tolist() for _ in range(epochs) for _, labels in loader]


@pytest.fixture(scope="module")
def numbered():
    """100 images whose labels are their numbers."""
    images = torch.arange(100.0).reshape(-1, 1, 1, 1).expand(100, 1, 4, 4)
    return TensorDataset(images, torch.arange(100))


@pytest.mark.parametrize(
    "options",
    [{}, {"loader": "batch"}, {"loader_workers": 2}, {"loader": "batch", "loader_workers": 2}],
    ids=str,
)
def test_the_order_is_that_of_a_plain_shuffled_dataloader(numbered, options):
    generator = torch.Generator().manual_seed(7)
    plain = DataLoader(numbered, 32, shuffle=True, drop_last=True, generator=generator)
    ours = train_loader(Recipe(batch_size=32, seed=7, **options), numbered)
    assert len(ours) == len(plain) == 3
    assert batches_of(ours) == batches_of(plain)


@pytest.mark.parametrize("loader", ["sample", "batch", "device"])
def test_images_come_with_their_own_labels(numbered, loader):
    for images, labels in train_loader(Recipe(batch_size=32, loader=loader), numbered):
        assert images.shape == (32, 1, 4, 4) and torch.equal(images[:, 0, 0, 0].long(), labels)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("loader", ["sample", "batch"])
def test_the_shares_of_all_ranks_add_up_to_each_batch(numbered, world, loader):
    recipe = Recipe(batch_size=24 if world == 3 else 32, replicas=world, loader=loader)
    whole = batches_of(train_loader(recipe, numbered))
    shares = [batches_of(train_loader(recipe, numbered, rank, world)) for rank in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part) for part in parts} == {recipe.batch_size // world}
        assert sorted(sum(parts, [])) == sorted(batch)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("first", [0, 2, 3, 7])
def test_a_resumed_run_sees_the_remaining_batches(numbered, first, workers):
    """An epoch has 3 batches; the run ends after 8."""
    recipe = Recipe(batch_size=32, loader_workers=workers)
    whole = batches_of(train_loader(recipe, numbered))
    assert batches_of(train_loader(recipe, numbered, first=first, steps=8)) == whole[first:8]


def test_another_seed_gives_another_order(numbered):
    first, second = (
        batches_of(train_loader(Recipe(batch_size=32, seed=seed), numbered)) for seed in (1, 2)
    )
    assert first != second


def test_all_shifts_of_up_to_two_pixels_occur_and_no_others():
    images = torch.rand(2, 1, 8, 8)
    seen = set()
    for shift in islice(random_shifts(seed=0), 200):
        moved = shift_images(images, shift)
        seen |= {
            (y, x)
            for y in range(-4, 4)
            for x in range(-4, 4)
            if torch.equal(moved, images.roll((y, x), (2, 3)))
        }
    assert seen == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_a_resumed_run_continues_the_shifts():
    assert list(islice(random_shifts(3), 5, 9)) == list(islice(random_shifts(3), 9))[5:]
    assert list(islice(random_shifts(3), 9)) != list(islice(random_shifts(4), 9))


def train_with_few_open_files(rank, world, recipe):
    import resource

    few = len(os.listdir("/proc/self/fd")) + 3
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
    yield from launcher.train_rank(rank, world, recipe, None)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_too_few_open_files_are_reported_with_a_fix():
    recipe = Recipe(threads=1, steps=3, loader_workers=2, evaluate=False)
    with pytest.raises(CnnlabError, match="Too many open files.*ulimit -n"):
        list(launcher.stream(train_with_few_open_files, (recipe,), 1))


def test_a_full_shared_memory_is_reported_with_a_fix():
    text = "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory"
    assert "loader_workers=0" in str(system_limit_error(RuntimeError(text)))
    assert system_limit_error(RuntimeError("shapes differ")) is None
