"""Photographs as files: a folder of JPEGs that is created once, and the data set that reads it."""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cnnlab.recipe import CnnlabError
from cnnlab.record import cannot_write

PHOTO_CLASSES = ("china", "flower")  # scikit-learn's two sample images

# Every 8th file is held out. It shows the right quarter of the image, which training never sees.
TEST_EVERY = 8

CACHE_FIX = "Free some space, or set CNNLAB_DATA to a folder that you can write to."


def photo_datasets(images: int, size: int, augment: bool) -> tuple["PhotoDataset", "PhotoDataset"]:
    """(training photographs, held-out photographs) of a folder with `images` files."""
    folder = photo_folder(images)
    files = sorted(folder.glob("*/*.jpg"), key=lambda path: path.name)
    if len(files) != images:
        raise CnnlabError(
            f"the folder {folder} has {len(files)} photographs instead of {images}. "
            "Delete it to create it again."
        )
    train = [path for number, path in enumerate(files) if number % TEST_EVERY]
    return PhotoDataset(train, size, augment), PhotoDataset(files[::TEST_EVERY], size)


def photo_folder(images: int, size: int = 256) -> Path:
    """A folder with `images` JPEGs of size x size pixels, half in `china` and half in `flower`.

    It is created once in the cache folder, also if several processes ask for it. Raises
    `CnnlabError` if it cannot be written.
    """
    cache = cache_folder()
    folder = cache / f"photos-{images}-{size}"
    if folder.exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed when complete; removed if that fails.
        with TemporaryDirectory(prefix=f"{folder.name}-", dir=cache) as part:
            _write_photos(Path(part), images, size)
            Path(part).rename(folder)
    except OSError as error:
        if not folder.exists():  # otherwise another process was faster
            raise cannot_write(cache, error, CACHE_FIX) from None
    return folder


def cache_folder() -> Path:
    """Where downloads and photographs are kept: CNNLAB_DATA, or the user's cache folder."""
    import pooch

    try:
        return Path(os.environ.get("CNNLAB_DATA") or pooch.os_cache("cnnlab")).expanduser()
    except RuntimeError as error:  # in a container whose user has neither a name nor HOME
        raise CnnlabError(f"no cache folder: {error}. {CACHE_FIX}") from None


def random_crop_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random square, at least half as long as the shorter side."""
    width, height = size
    side = int(min(size) * (0.5 + 0.5 * torch.rand(()).item()))
    left = int(torch.randint(0, width - side + 1, ()))
    top = int(torch.randint(0, height - side + 1, ()))
    return left, top, left + side, top + side


def _write_photos(folder: Path, images: int, size: int) -> None:
    """Write random square crops of the two sample images, scaled to size x size."""
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from tqdm.auto import tqdm

    for name in PHOTO_CLASSES:
        (folder / name).mkdir()
    sources = [Image.fromarray(load_sample_image(f"{name}.jpg")) for name in PHOTO_CLASSES]
    random = np.random.default_rng(0)
    for number in tqdm(range(images), desc="creating photographs", leave=False):
        label = number % 2
        source = sources[label]
        border = int(0.75 * source.width)
        held_out = number % TEST_EVERY == 0
        left, right = (border, source.width) if held_out else (0, border)
        side = int(random.integers(96, min(right - left, source.height) + 1))
        x = random.integers(left, right - side + 1)
        y = random.integers(0, source.height - side + 1)
        box = (x, y, x + side, y + side)
        picture = source.resize((size, size), Image.Resampling.BICUBIC, box=box)
        picture.save(folder / PHOTO_CLASSES[label] / f"{number:06}.jpg", quality=90)


@dataclass(frozen=True, eq=False)
class PhotoDataset(Dataset):
    """JPEG files, decoded on each access: (float32 (3, size, size) in -2 to 2, int label).

    `files`: paths whose folders name the class. `augment`: take a random square crop and mirror it
    half of the time; otherwise scale the whole picture. Random numbers come from torch's global
    generator, so they depend on the number of loader workers.
    """

    files: list[Path]
    size: int
    augment: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path = self.files[index]
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except OSError as error:
            raise CnnlabError(
                f"the photograph {path} cannot be read ({error}). Delete its folder "
                f"{path.parents[1]} to create it again."
            ) from None
        box = random_crop_box(picture.size) if self.augment else None
        picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if self.augment and torch.rand(()) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return (pixels.float() / 255 - 0.5) / 0.25, PHOTO_CLASSES.index(path.parent.name)
