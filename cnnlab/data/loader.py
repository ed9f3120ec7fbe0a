"""How images reach each rank: shuffled global batches, divided among the ranks."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from cnnlab.data.photos import PhotoDataset
from cnnlab.recipe import CnnlabError, Recipe

Images = TensorDataset | PhotoDataset

# Text in the errors of torch and Python when a limit of the system is reached: what helps.
LIMITS = {
    "shared memory": "Use loader_workers=0, or a container with docker run --shm-size=1g",
    "Too many open files": "Use fewer ranks or loader workers, or run ulimit -n 4096 before",
}


def train_loader(
    recipe: Recipe, dataset: Images, rank: int = 0, world: int = 1, **limits: Any
) -> DataLoader:
    """Training batches (images, labels), shuffled as by `DataLoader(shuffle=True)` with the seed.

    `limits`: `first`, `steps`, and `claim_batches` of `RankBatchSampler`.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = RankBatchSampler(dataset, recipe.batch_size, generator, rank, world, **limits)
    options: dict[str, Any] = {
        "num_workers": recipe.loader_workers,
        # Not the sampler's: how often a loader draws depends on its workers.
        "generator": torch.Generator().manual_seed(recipe.seed),
        # Apple's GPUs share the CPU's memory.
        "pin_memory": recipe.device in ("cuda", "xpu") and recipe.loader != "device",
        "persistent_workers": recipe.loader_workers > 0,
    }
    if recipe.loader != "sample" and not isinstance(dataset, PhotoDataset):
        return DataLoader(_BatchIndexed(dataset), sampler=batches, batch_size=None, **options)
    return DataLoader(dataset, batch_sampler=batches, **options)


def random_shifts(seed: int, most: int = 2) -> Iterator[list[int]]:
    """Endless shifts [y, x] of up to `most` pixels, one per step, the same in all ranks."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(-most, most + 1, (2,), generator=generator).tolist()


def shift_images(images: Tensor, shift: list[int]) -> Tensor:
    """The batch (N, channels, size, size), shifted by [y, x] pixels and wrapped around the edge."""
    return images.roll(shift, dims=(2, 3))


def system_limit_error(error: BaseException) -> CnnlabError | None:
    """What to change if there is no shared memory or open file left for loaders, else None."""
    for text, fix in LIMITS.items():
        if text in str(error):
            reason = str(error).strip().splitlines()[-1]
            return CnnlabError(f"a limit of this system is too low: {reason}. {fix}.")
    return None


@dataclass(eq=False)
class RankBatchSampler:
    """The indices of this rank's share of each shuffled global batch. One iteration is one epoch.

    All ranks shuffle with the same seed and take every `world`-th index, so N ranks together see
    exactly the batches of one process. The last, incomplete batch of an epoch is dropped.
    """

    dataset: Images
    batch_size: int
    generator: torch.Generator
    rank: int = 0
    world: int = 1
    first: int = 0  # batches to skip
    steps: int | None = None  # batches in all epochs together
    # With `SharedParameters.claim_batches`, each share goes to the rank that claims it first.
    claim_batches: Callable[[int], Iterable[int]] | None = None

    def __post_init__(self) -> None:
        shuffled = RandomSampler(self.dataset, generator=self.generator)
        self.batches = BatchSampler(shuffled, self.batch_size, drop_last=True)
        self.step = 0

    def __iter__(self) -> Iterator[list[int]]:
        # A plain DataLoader draws this number from the same generator to seed its workers.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        left = None if self.steps is None else self.steps - self.step
        batches = islice(self.batches, left)
        if self.claim_batches:
            epoch = list(batches)
            self.step += len(epoch)
            for share in self.claim_batches(len(epoch) * self.world):
                number, rank = divmod(share, self.world)
                yield epoch[number][rank :: self.world]
            return
        for batch in batches:
            self.step += 1
            if self.step > self.first:
                yield batch[self.rank :: self.world]

    def __len__(self) -> int:
        return len(self.batches)


class _BatchIndexed(Dataset):
    """A data set that takes a list of indices: dataset[[3, 1, 4]] is (3 images, 3 labels)."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> Any:
        return self.dataset[torch.as_tensor(indices)]
