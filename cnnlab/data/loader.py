"""The images: where they come from, how they reach memory, and how each rank gets its share of every batch."""

from itertools import islice

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from cnnlab.data.photos import PhotoDataset


class RankBatchSampler(torch.utils.data.Sampler):
    """Shuffled global batches, of which this rank gets every `world`-th image. Each iteration is an epoch.

    All ranks draw the same order from the same seed, so that N ranks together see exactly the batches that one
    process would see. The last, short batch is left out: every step has the same number of images. The first `first`
    batches are passed over, and after `steps` there are no more. With `deal` (`SharedParameters.deal`) the ranks' parts
    go to whichever rank asks first.
    """

    def __init__(
        self, dataset, batch_size, generator, rank=0, world=1, first=0, steps=None, deal=None
    ):
        self.batches = BatchSampler(
            RandomSampler(dataset, generator=generator), batch_size, drop_last=True
        )
        self.generator, self.rank, self.world, self.first, self.steps, self.deal, self.step = (
            generator,
            rank,
            world,
            first,
            steps,
            deal,
            0,
        )

    def __iter__(self):
        torch.empty((), dtype=torch.int64).random_(
            generator=self.generator
        )  # drawn by a plain DataLoader too, for its loader workers
        before = self.step
        batches = self.batches if self.steps is None else islice(self.batches, self.steps - before)
        if self.deal:
            batches = list(batches)
            self.step += len(batches)
            yield from (
                batches[ticket // self.world][ticket % self.world :: self.world]
                for ticket in self.deal(len(batches) * self.world)
            )
            return
        for self.step, batch in enumerate(batches, start=before + 1):
            if self.step > self.first:
                yield batch[self.rank :: self.world]

    def __len__(self):
        return len(self.batches)


def train_loader(recipe, dataset, rank=0, world=1, **limits):
    """Training batches of (images, labels), in the order that `DataLoader(shuffle=True, generator=seed)` gives.

    `limits`: `first`, `steps`, `deal` of `RankBatchSampler`.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = RankBatchSampler(dataset, recipe.batch_size, generator, rank, world, **limits)
    own = torch.Generator().manual_seed(
        recipe.seed
    )  # loader workers that persist would draw once, others once an epoch
    common = dict(
        num_workers=recipe.loader_workers,
        generator=own,
        pin_memory=recipe.device == "cuda",
        persistent_workers=recipe.loader_workers > 0,
    )
    if recipe.loader == "batch" and not isinstance(
        dataset, PhotoDataset
    ):  # the list of indices goes to the tensors as one index; files come one by one
        return DataLoader(_BatchIndexed(dataset), sampler=batches, batch_size=None, **common)
    return DataLoader(dataset, batch_sampler=batches, **common)


def random_shifts(seed, most=2):
    """Yield a move of up to `most` pixels along each axis for every step, the same in all ranks."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(-most, most + 1, (2,), generator=generator).tolist()


def shift_images(images, shift):
    """The batch moved by `shift` pixels along each axis, around the edge: a digit stays a digit when it moves."""
    return images.roll(shift, dims=(2, 3))


class _BatchIndexed(Dataset):
    """Lets one index stand for a whole batch: dataset[[3, 1, 4]] is three images and three labels."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, indices):
        return self.dataset[torch.as_tensor(indices)]
