"""Ranks that fail for real: which rank is reported, why, and where it was."""

import ctypes
import os
import signal
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import interrupted_train, loop_for_ever, ranks_alive, wait_until

from cnnlab.events import Failed, Started
from cnnlab.launch import launcher, worker
from cnnlab.launch.failures import Message, RankError, is_idle, root_cause
from cnnlab.launch.launcher import ranks
from cnnlab.parallel.async_sgd import SharedParameters
from cnnlab.recipe import Recipe

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ENDLESS = Recipe(data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False)
SLACK = 6  # seconds that a busy machine may take in addition


def failure_of(function, args, world):
    """The `Failed` event of a run that must fail, after checking it against the exception."""
    events = []
    with pytest.raises(RankError) as caught:
        for event in launcher.stream(function, args, world):
            events.append(event)
    *earlier, failed = events
    assert isinstance(failed, Failed)
    assert not any(isinstance(event, Failed) for event in earlier)
    error = caught.value
    assert (failed.rank, failed.error) == (error.rank, error.error)
    assert failed.traceback == error.traceback
    assert f"rank {failed.rank} failed" in str(error)
    return failed


# Generator functions for the ranks


def count(rank, world):
    yield rank


def fail(rank, world, culprit):
    yield rank
    if rank == culprit:
        raise LookupError("no such star")
    time.sleep(60)


def fail_before_a_collective(rank, world, culprit):
    yield rank
    if rank == culprit:
        raise LookupError("no such star")
    dist.all_reduce(torch.ones(1))  # Fails too, because the culprit is gone.


def kill_itself(rank, world, victim):
    yield rank
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def meet_forever(rank, world):
    while True:
        dist.barrier()
        yield rank, os.getpid()


# Exceptions


@pytest.mark.parametrize("function", [fail, fail_before_a_collective])
@pytest.mark.parametrize("world, culprit", [(2, 0), (2, 1), (4, 2)])
def test_the_rank_that_raised_is_named_with_its_traceback(function, world, culprit):
    failed = failure_of(function, (culprit,), world)
    assert failed.rank == culprit
    assert failed.error == "LookupError: no such star"
    assert 'raise LookupError("no such star")' in failed.traceback
    assert "test_failures.py" in failed.traceback


def test_a_single_rank_that_raised_is_named():
    assert failure_of(fail, (0,), 1).error == "LookupError: no such star"


def test_an_exception_in_a_closure_is_named():
    def function(rank, world):
        yield rank
        if rank == 1:
            {}["no such key"]
        time.sleep(60)

    failed = failure_of(function, (), 2)
    assert (failed.rank, failed.error) == (1, "KeyError: 'no such key'")


def test_one_rank_that_raises_ends_the_call_at_once():
    def function():
        if dist.get_rank() == 1:
            raise LookupError("no such star")
        time.sleep(600)

    ranks(int, 3)  # warm-up
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks(function, 3)
    assert time.monotonic() - began < 2 + SLACK
    assert caught.value.rank == 1
    assert "LookupError: no such star" in str(caught.value)
    assert 'raise LookupError("no such star")' in caught.value.traceback
    wait_until(lambda: not ranks_alive(), "a rank is left", seconds=2)


def test_a_value_that_cannot_be_pickled_is_an_error_of_its_rank():
    with pytest.raises(RankError, match="rank 0 failed: TypeError: cannot pickle"):
        ranks(threading.Lock, 1)


def test_an_error_while_unpickling_the_job_is_named():
    class Unwilling:
        def __reduce__(self):
            return eval, ("1 / 0",)

    def function(rank, world, unwilling):
        yield

    assert "ZeroDivisionError" in failure_of(function, (Unwilling(),), 1).error


def test_a_run_after_a_failure_works():
    for function in (fail, kill_itself):
        failure_of(function, (1,), 2)
        assert sorted(launcher.stream(count, (), 2)) == [0, 1]


def test_the_primary_error_is_preferred_to_secondary_ones_and_to_less_informative_ones():
    secondary = Message(0, "error", error="RuntimeError", traceback="[gloo] Connection closed")
    primary = Message(1, "error", error="LookupError", traceback="no such star")
    killed, late = Message(2, "killed"), Message(3, "late")
    assert root_cause([secondary, late, killed, primary]) is primary
    assert root_cause([secondary, late, killed]) is killed
    assert root_cause([secondary, late]) is late
    assert root_cause([secondary]) is secondary


def test_among_secondary_errors_a_timeout_is_preferred():
    closed = Message(0, "error", error="RuntimeError", traceback="[gloo] Connection closed")
    timeout = Message(1, "error", error="RuntimeError", traceback="[gloo] Timed out")
    assert root_cause([closed, timeout]) is timeout


# Killed and stopped ranks


@pytest.mark.parametrize("world, victim", [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_a_killed_rank_is_named(world, victim):
    failed = failure_of(kill_itself, (victim,), world)
    assert (failed.rank, failed.error) == (victim, "the process was killed")


def test_a_rank_killed_from_outside_while_training_is_named():
    pids = {}
    with pytest.raises(RankError) as caught:
        for event in launcher.run(ENDLESS.replace(replicas=2)):
            if isinstance(event, Started):
                pids[event.rank] = event.pid
                if len(pids) == 2:
                    os.kill(pids[1], signal.SIGKILL)
    assert caught.value.rank == 1
    assert "killed" in caught.value.error


def test_a_rank_killed_with_loader_workers_is_named():
    """Loader workers survive for seconds, and have inherited the connection to the notebook."""
    killed_at = None
    with pytest.raises(RankError) as caught:
        for event in launcher.run(ENDLESS.replace(loader_workers=2)):
            if isinstance(event, Started):
                pid = event.pid
            elif not killed_at:
                killed_at = time.monotonic()
                os.kill(pid, signal.SIGKILL)
    assert caught.value.rank == 0
    assert caught.value.error == "the process was killed"
    assert time.monotonic() - killed_at < 2 + SLACK


def test_a_rank_that_exits_without_an_error_is_named():
    def function(rank, world):
        yield rank
        if rank == 1:
            os._exit(0)
        time.sleep(60)

    failed = failure_of(function, (), 2)
    assert (failed.rank, failed.error) == (1, "the process ended with exit code 0")


def test_a_crash_in_native_code_is_named():
    failed = failure_of(lambda rank, world: iter([ctypes.string_at(0)]), (), 1)
    assert failed.error == "the process crashed in native code (SIGSEGV)"


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot stop a process")
@pytest.mark.parametrize("world, victim", [(1, 0), (2, 1)])
def test_a_stopped_rank_is_named(world, victim):
    pids = {}
    stopped_at = None
    with pytest.raises(RankError) as caught:
        for event in launcher.stream(meet_forever, (), world):
            if not isinstance(event, Failed):
                rank, pid = event
                pids[rank] = pid
            if len(pids) == world and not stopped_at:
                stopped_at = time.monotonic()
                os.kill(pids[victim], signal.SIGSTOP)
    assert caught.value.rank == victim
    assert "stopped (SIGSTOP)" in caught.value.error
    assert str(pids[victim]) in caught.value.traceback
    assert time.monotonic() - stopped_at < 4 + SLACK


# Hangs


@pytest.mark.parametrize(
    "change",
    [{}, {"strategy": "ring"}, {"strategy": "async", "staleness": 1}, {"latency_ms": 0.1}],
    ids=str,
)
def test_a_rank_that_never_reaches_a_collective_is_named_with_its_stack(monkeypatch, change):
    monkeypatch.setattr(worker, "COLLECTIVE_TIMEOUT_S", 3)
    stuck = partial(interrupted_train, step=4, victim=2, what=loop_for_ever)
    recipe = Recipe(batch_size=60, steps=9, threads=1, replicas=3, **change)
    with pytest.raises(RankError) as caught:
        list(launcher.stream(stuck, (recipe, None), 3))
    assert caught.value.rank == 2
    assert caught.value.error == "it did not reach a collective within 3 s"
    assert "in loop_for_ever" in caught.value.traceback


def spin():
    if dist.get_rank() == 2:
        while True:
            pass
    if dist.get_rank() == 1:
        dist.barrier()
    ahead = SimpleNamespace(rank=0, steps=[9], bound=0, timeout=600)
    SharedParameters._wait_for(ahead, torch.zeros(3))


def test_a_timeout_names_the_rank_that_hangs_and_its_line_not_the_ranks_that_wait():
    ranks(int, 3)  # warm-up
    with pytest.raises(RankError) as caught:
        ranks(spin, 3, timeout=2)
    assert caught.value.rank == 2
    assert caught.value.error == "it did not finish within 2 s"
    stack = caught.value.traceback
    loop = spin.__code__.co_firstlineno + 2
    places = [f'test_failures.py", line {line} in spin' for line in (loop, loop + 1)]
    assert any(place in stack for place in places)
    assert "cnnlab" not in stack.splitlines()[2]


def test_a_timeout_while_the_rank_starts_or_ends_is_reported_as_such():
    with pytest.raises(RankError, match="rank 0 failed: it did not finish within 1e-06 s"):
        ranks(int, 1, timeout=1e-6)


def test_a_call_that_finishes_in_time_is_not_affected_by_its_timeout():
    assert ranks(lambda: 1, 2, timeout=60) == [1, 1]


# A rank that has returned


def skip_a_barrier(rank, world):
    if rank == 1:
        dist.barrier()
    yield rank


def train_on_fewer_batches(rank, world):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    for _ in range(2 + rank):
        model(torch.ones(1, 2)).sum().backward()
    yield rank


def wait_for_an_asynchronous_collective(rank, world):
    if rank == 1:
        work = dist.all_reduce(torch.ones(1), async_op=True)
        work.wait()
    yield rank


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system cannot dump stacks")
@pytest.mark.parametrize(
    "function",
    [skip_a_barrier, train_on_fewer_batches, wait_for_an_asynchronous_collective],
)
def test_a_rank_that_has_returned_is_named_with_the_line_where_another_waits(function):
    began = time.monotonic()
    failed = failure_of(function, (), 2)
    assert failed.rank == 0
    assert failed.error == "it has returned, but other ranks wait for it in a collective"
    assert "rank 1 is here:" in failed.traceback
    assert f" in {function.__name__}" in failed.traceback
    assert time.monotonic() - began < 4 + SLACK


def test_after_a_collective_timeout_the_rank_that_has_returned_is_named(monkeypatch):
    monkeypatch.setattr(worker, "COLLECTIVE_TIMEOUT_S", 0.5)
    failed = failure_of(skip_a_barrier, (), 2)
    assert (failed.rank, "rank 1 was here" in failed.traceback) == (0, True)


def test_a_rank_that_waits_for_many_messages_is_not_idle_however_little_time_it_gets():
    assert is_idle((1.0, 100), (1.01, 102))
    assert not is_idle((1.0, 100), (1.01, 200))
    assert not is_idle((1.0, 100), (1.5, 101))
    assert not is_idle(None, (1.0, 100))


def test_ranks_may_go_on_without_a_rank_that_has_returned():
    def function(rank, world):
        group = dist.new_group([1, 2])
        if rank > 0:
            time.sleep(4)
            for _ in range(1000):
                dist.all_reduce(torch.ones(1), group=group)
        yield rank

    assert sorted(launcher.stream(function, (), 3)) == [0, 1, 2]


def test_a_rank_that_exits_successfully_has_returned_none():
    assert ranks(sys.exit, 2, 0) == [None, None]
    with pytest.raises(RankError, match="SystemExit: 3"):
        ranks(sys.exit, 1, 3)


# NCCL, whose watchdog prints a line in each waiting rank, and ends the process a minute later.
# The ranks imitate it.


def synchronize():
    """Wait for the GPU."""
    time.sleep(60)


def wait_for_nccl(rank):
    """What happens in a rank that waits for a collective of NCCL."""
    text = "[rank{0}]:[E1125 ProcessGroupNCCL.cpp:683] [Rank {0}] Watchdog caught collective "
    text += "operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE) ran for 60001 milliseconds"
    os.write(2, (text.format(rank) + "\n").encode())
    synchronize()


def hang_under_nccl(rank, world, culprit):
    yield rank
    if rank == culprit:
        loop_for_ever()
    time.sleep(0.5 * rank)  # The watchdogs of the ranks do not look at the same time.
    wait_for_nccl(rank)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_never_reaches_a_collective_of_nccl_is_named(culprit):
    failed = failure_of(hang_under_nccl, (culprit,), 3)
    assert failed.rank == culprit
    assert failed.error == "it did not reach a collective within 60 s"
    assert "in loop_for_ever" in failed.traceback


def test_a_rank_that_nccl_aborts_is_not_taken_for_the_cause():
    def function(rank, world):
        yield rank
        if rank == 1:
            loop_for_ever()
        signal.signal(signal.SIGALRM, lambda *_: os.abort())
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        wait_for_nccl(rank)

    assert failure_of(function, (), 2).rank == 1


def test_if_all_ranks_wait_for_nccl_or_their_gpu_none_is_said_to_be_late():
    def function(rank, world):
        yield rank
        if rank == 0:
            synchronize()
        wait_for_nccl(rank)

    failed = failure_of(function, (), 2)
    assert failed.rank == 1
    assert "a collective did not finish in time. All ranks must make the same" in failed.error
    assert "OpType=ALLREDUCE" in failed.traceback
    assert "rank 0 is here" in failed.traceback
    assert failure_of(hang_under_nccl, (None,), 2).error == failed.error


def test_a_rank_that_has_returned_is_named_when_nccl_times_out():
    def function(rank, world):
        if rank == 1:
            time.sleep(1)
            wait_for_nccl(rank)
        yield rank

    failed = failure_of(function, (), 2)
    assert failed.rank == 0
    assert failed.error == "it has returned, but other ranks wait for it in a collective"


def test_with_a_timeout_a_rank_that_waits_for_its_gpu_is_not_taken_for_the_cause():
    def function():
        if dist.get_rank() == 1:
            loop_for_ever()
        synchronize()

    with pytest.raises(RankError) as caught:
        ranks(function, 2, timeout=2)
    assert caught.value.rank == 1
