"""Photographs as files: a folder of JPEGs made once on disk, and the data set that decodes them one by one."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from cnnlab.recipe import CnnlabError

PHOTO_CLASSES = ("china", "flower")  # scikit-learn's two, and the two classes


TEST_EVERY = (
    8  # every 8th file; from the right quarter of the photograph, which training never sees
)


class PhotoDataset(Dataset):
    """JPEG files, decoded whenever they are asked for: (float32 (3, size, size), about -2 to 2; label int).

    `files`: paths whose folders name the class. `augment`: a random part of at least half the side, mirrored half of the time, enlarged
    or shrunk to `size`; else the whole picture. Random numbers are torch's, so they differ with the number of loader workers.
    """

    def __init__(self, files, size, augment=False):
        self.files, self.size, self.augment = list(files), size, augment

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        from PIL import Image

        path = self.files[index]
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except OSError as error:
            raise CnnlabError(
                f"the photograph {path} cannot be read ({error}). Delete its folder {path.parents[1]}, and it will be made again."
            ) from None
        picture = picture.resize(
            (self.size, self.size),
            Image.Resampling.BILINEAR,
            box=random_crop_box(picture.size) if self.augment else None,
        )
        if self.augment and torch.rand(()) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return (pixels.float() / 255 - 0.5) / 0.25, PHOTO_CLASSES.index(path.parent.name)


def random_crop_box(size):
    """(left, top, right, bottom) of a random square with half the shorter side at least."""
    width, height = size
    side = int(min(size) * (0.5 + 0.5 * torch.rand(()).item()))
    left, top = (int(torch.randint(0, room - side + 1, ())) for room in (width, height))
    return left, top, left + side, top + side


def photo_datasets(images, size, augment):
    """(training `PhotoDataset`, held-out `PhotoDataset`) of a folder of `images` files."""
    folder = photo_folder(images)
    files = sorted(folder.glob("*/*.jpg"), key=lambda path: path.name)
    if len(files) != images:
        raise CnnlabError(
            f"the folder {folder} has {len(files)} photographs instead of {images}. Delete it, and it will be made again."
        )
    return (
        PhotoDataset(
            [path for number, path in enumerate(files) if number % TEST_EVERY], size, augment
        ),
        PhotoDataset(files[::TEST_EVERY], size),
    )


def photo_folder(images, size=256):
    """A folder with so many JPEG files of size x size pixels, half of them in `china`, half in `flower`; made once, in the data folder.

    Each is a random part of the photograph, enlarged. Several processes may ask at once. Raises `CnnlabError` when it cannot be written.
    """
    cache = cache_folder()
    folder = cache / f"photos-{images}-{size}"
    if folder.exists():
        return folder
    making = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=folder.name + "-", dir=cache))
        _write_photos(making, images, size)
        making.rename(folder)  # whole or not at all
    except OSError as error:
        if not folder.exists():  # else another process was first
            raise CnnlabError(
                f"cannot write photographs to {cache} ({error.strerror or error}). Free some room, or set CNNLAB_DATA to a folder "
                f"that you may write to."
            ) from None
    finally:
        if making:
            shutil.rmtree(making, ignore_errors=True)
    return folder


def cache_folder():
    """Where downloads and photographs are kept: CNNLAB_DATA, or the user's cache folder."""
    import pooch

    return Path(os.environ.get("CNNLAB_DATA") or pooch.os_cache("cnnlab"))


def _write_photos(folder, images, size):
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from tqdm.auto import tqdm

    sources = [Image.fromarray(load_sample_image(f"{name}.jpg")) for name in PHOTO_CLASSES]
    for name in PHOTO_CLASSES:
        (folder / name).mkdir()
    random = np.random.default_rng(0)
    for number in tqdm(range(images), desc="making photographs", leave=False):
        source = sources[number % 2]
        border = int(0.75 * source.width)
        left, right = (border, source.width) if number % TEST_EVERY == 0 else (0, border)
        side = int(random.integers(96, min(right - left, source.height) + 1))
        x, y = random.integers(left, right - side + 1), random.integers(0, source.height - side + 1)
        picture = source.resize(
            (size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)
        )
        picture.save(folder / PHOTO_CLASSES[number % 2] / f"{number:06}.jpg", quality=90)
