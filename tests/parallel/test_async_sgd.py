"""Shared parameters: no update is lost, every batch is claimed once, no rank runs too far ahead."""

import os
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from helpers import kill_myself

from cnnlab.data import datasets, loader
from cnnlab.launch.launcher import RankError, ranks
from cnnlab.parallel.async_sgd import NO_STEPS_LEFT, SharedParameters

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_every_share_of_every_batch_goes_to_one_rank():
    def claimed_shares():
        shared = SharedParameters(torch.nn.Linear(1, 1), None)
        batches = loader.RankBatchSampler(
            datasets.digits().train,
            60,
            torch.Generator().manual_seed(0),
            dist.get_rank(),
            3,
            steps=30,
            claim_batches=shared.claim_batches,
        )
        return [[tuple(share) for share in batches] for epoch in range(2)]

    claimed = ranks(claimed_shares, 3)
    for epoch, steps in enumerate((23, 7)):  # 1437 images are 23 batches; `steps` ends epoch 2
        shares = [share for epochs in claimed for share in epochs[epoch]]
        images = [image for share in shares for image in share]
        assert len(shares) == 3 * steps
        assert len(set(images)) == len(images) == 60 * steps


def test_updates_of_all_ranks_add_up_and_are_counted():
    def update():
        model = torch.nn.Linear(64, 64)
        torch.nn.init.zeros_(model.weight)
        shared = SharedParameters(model, None)
        for _ in range(1000):
            with torch.no_grad():
                model.weight += dist.get_rank() + 1
            shared.push_pull(model)
        dist.barrier()
        shared.pull(model)
        weights = model.weight.min().item(), model.weight.max().item()
        return *weights, int(shared.updates), shared.own

    expected = pytest.approx(1000 * (1 + 2 + 3) / 3, rel=1e-4)
    assert ranks(update, 3) == [(expected, expected, 3000, 1000)] * 3


def test_ranks_killed_while_they_set_up_leave_no_file():
    def killed_at_the_first_barrier():
        mkstemp = tempfile.mkstemp

        def print_path(**options):
            file = mkstemp(**options)
            print(file[1])
            return file

        tempfile.mkstemp = print_path
        dist.barrier = lambda: kill_myself(os.devnull)
        SharedParameters(torch.nn.Linear(1, 1), None)

    said = []
    with pytest.raises(RankError):
        ranks(killed_at_the_first_barrier, 2, say=said.append)
    [path] = [line.split("] ")[1] for line in said]
    assert os.path.isabs(path)
    assert not os.path.exists(path)


def test_no_rank_is_further_ahead_than_the_bound_allows():
    def largest_lead():
        torch.manual_seed(0)
        model, leads = torch.nn.Linear(4, 4), []
        shared = SharedParameters(model, 2)
        for _ in shared.claim_batches(40):
            time.sleep(0.01 * dist.get_rank())
            if int(shared.steps.max()) < NO_STEPS_LEFT:
                leads.append(int(shared.steps.max() - shared.steps.min()))
            shared.push_pull(model)
        return max(leads)

    assert max(ranks(largest_lead, 2)) == 3  # 2, and the step in which the fast rank then waits
