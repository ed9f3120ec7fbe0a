"""The meter of a training loop: losses, correct predictions and clock readings become events."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnnlab import machine
from cnnlab.data.datasets import ImageSplits
from cnnlab.events import Evaluated, Finished, Progress, Started
from cnnlab.model import count_parameters
from cnnlab.parallel.async_sgd import SharedParameters
from cnnlab.recipe import Recipe
from cnnlab.training.clock import Clock, peak_memory_mib

REPORT_EVERY = 0.25  # seconds of training between two Progress events


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Totals since the start of the run, or what happened between two readings."""

    steps: int  # of this rank
    images: int  # of all ranks together
    seconds: float = 0.0
    waiting: float = 0.0
    exposed: float = 0.0

    def since(self, earlier: "Reading") -> "Reading":
        before = vars(earlier)
        return Reading(**{name: value - before[name] for name, value in vars(self).items()})


@dataclass(eq=False)
class Meter:
    """Accumulates what the loop of one rank does and makes its events.

    Losses and correct predictions stay on the device until a report, because reading them would
    synchronize.
    """

    recipe: Recipe
    rank: int
    world: int
    clock: Clock
    first: int = 0  # steps done by the run whose checkpoint this one resumes
    shared: SharedParameters | None = None  # where ranks take different numbers of steps (async)

    def __post_init__(self) -> None:
        first = self.step = self.first
        self.warmup_end = first + self.recipe.warmup_steps
        self.start = Reading(steps=first, images=first * self.recipe.batch_size)
        self.last = self.warm = self.start  # at the last report, at the end of the warm-up
        self.step_loss: Tensor | float = 0.0
        self.losses: list = []  # of the steps since the last report
        self.correct: Tensor | int = 0  # predictions since the last report
        self.skipped = 0  # steps

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a micro-batch to the current step."""
        self.step_loss += loss.detach()
        self.correct += (logits.argmax(1) == labels).sum()

    def end_step(self, skipped: bool = False) -> None:
        self.skipped += skipped
        self.losses.append(self.step_loss)
        self.step_loss = 0.0
        self.step += 1

    def report_due(self) -> bool:
        return self.clock.elapsed() >= REPORT_EVERY or self.step == self.warmup_end

    def read(self) -> Reading:
        """Pause the clock and return what happened since the last reading."""
        clock = self.clock
        clock.pause()
        images = self.step * self.recipe.batch_size
        if self.shared is not None:  # each update has one rank's share of a batch
            images = int(self.shared.updates) * self.recipe.batch_size // self.recipe.replicas
        before = self.last
        times = {"seconds": clock.seconds, "waiting": clock.waiting, "exposed": clock.exposed}
        self.last = Reading(steps=self.step, images=images, **times)
        return self.last.since(before)

    def started(self, network: nn.Module, splits: ImageSplits, steps: int) -> Started:
        return Started(
            rank=self.rank,
            world=self.world,
            recipe=self.recipe,
            pid=os.getpid(),
            parameters=count_parameters(network),
            train_images=len(splits.train),
            test_images=len(splits.test),
            steps=steps,
            first_step=self.first,
            threads=torch.get_num_threads(),
            cores=machine.cpu_affinity(),
        )

    def progress(self, epoch: int) -> Progress:
        """Pause the clock and report the steps since the last report."""
        new = self.read()
        if self.step == self.warmup_end:
            self.warm = self.last
        losses, self.losses = torch.stack(self.losses).tolist(), []
        correct, self.correct = int(self.correct), 0
        return Progress(
            rank=self.rank,
            epoch=epoch,
            step=self.last.images // self.recipe.batch_size,
            images=self.last.images,
            seconds=self.last.seconds,
            losses=losses,
            accuracy=correct / (new.steps * self.recipe.batch_size // self.recipe.replicas),
            images_per_s=new.images / new.seconds,
            warming_up=self.step <= self.warmup_end,
            spans=self.clock.timeline(),
        )

    def evaluated(self, epoch: int, accuracy: float, loss: float, images: int) -> Evaluated:
        return Evaluated(
            rank=self.rank,
            epoch=epoch,
            step=self.last.images // self.recipe.batch_size,
            seconds=self.last.seconds,
            accuracy=accuracy,
            loss=loss,
            images=images,
        )

    def finished(self, accuracy: float | None) -> Finished:
        """The figures of the steps after the warm-up; of all steps if none came after it."""
        warm = self.warm if self.warm.images < self.last.images else self.start
        timed = self.last.since(warm)
        steps = max(1, timed.steps)  # other ranks may have left an asynchronous one nothing to do
        return Finished(
            rank=self.rank,
            steps=self.step,
            images=self.last.images,
            seconds=self.last.seconds,
            warmup_s=warm.seconds,
            images_per_s=timed.images / timed.seconds if timed.seconds else 0.0,
            step_s=timed.seconds / steps,
            waiting_s=timed.waiting / steps,
            communication_s=timed.exposed / steps,
            compute_s=(timed.seconds - timed.waiting - timed.exposed) / steps,
            peak_memory_mib=peak_memory_mib(self.clock.device),
            accuracy=accuracy,
            staleness=None if self.shared is None else self.shared.mean_staleness(),
            skipped_steps=self.skipped,
        )
