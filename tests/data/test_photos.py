"""Photographs as files: created once, decoded correctly, and used in training."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnnlab import plots
from cnnlab.data import datasets, photos
from cnnlab.events import Finished
from cnnlab.launch.launcher import ranks, run
from cnnlab.recipe import CnnlabError, Recipe

FEW = Recipe(data="photos", images=96, image_size=32, batch_size=12, epochs=2, threads=1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One data folder for all tests, so that most photographs are created once."""
    folder = tmp_path_factory.getbasetemp() / "photographs"
    monkeypatch.setenv("CNNLAB_DATA", str(folder))
    return folder


def losses(recipe):
    return plots.loss_curve(list(run(recipe)))[1]


def test_the_folder_has_the_requested_jpegs_in_two_classes():
    folder = photos.photo_folder(24, size=64)
    files = sorted(folder.glob("*/*.jpg"))
    assert len(files) == 24 and {path.parent.name for path in files} == {"china", "flower"}
    for path in files:
        with Image.open(path) as picture:
            assert (picture.format, picture.size, picture.mode) == ("JPEG", (64, 64), "RGB")


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.jpg")}


def test_concurrent_requests_create_one_folder(cache):
    with ThreadPoolExecutor(4) as pool:
        created = list(pool.map(lambda _: photos.photo_folder(16, size=32), range(4)))
    [folder] = set(created)
    times = modification_times(folder)
    assert len(times) == 16
    leftovers = [path for path in cache.iterdir() if path.name.startswith("photos-16-32-")]
    assert not leftovers
    assert photos.photo_folder(16, size=32) == folder
    assert modification_times(folder) == times


def test_a_photograph_is_decoded_to_a_normalized_tensor_with_its_class():
    train, test = photos.photo_datasets(96, 32, False)
    assert (len(train), len(test)) == (84, 12)
    assert not set(train.files) & set(test.files)
    for dataset in (train, test):
        image, label = dataset[3]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        with Image.open(dataset.files[3]) as picture:
            pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
        assert np.allclose(image.permute(1, 2, 0), (pixels / 255 - 0.5) / 0.25, atol=1e-6)
        assert photos.PHOTO_CLASSES[label] == dataset.files[3].parent.name


def test_only_augmented_photographs_differ_between_accesses():
    plain, _ = photos.photo_datasets(96, 32, augment=False)
    augmented, _ = photos.photo_datasets(96, 32, augment=True)
    assert torch.equal(plain[0][0], plain[0][0])
    assert not torch.equal(augmented[0][0], augmented[0][0])


def test_random_crops_are_squares_of_all_sizes_within_the_image():
    torch.manual_seed(1)
    boxes = [photos.random_crop_box((300, 200)) for _ in range(500)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 300
        assert 0 <= top < bottom <= 200
        assert right - left == bottom - top >= 100
    assert len({left for left, *_ in boxes}) > 100
    assert max(right - left for left, _, right, _ in boxes) > 190


def test_the_recipe_decides_whether_photographs_are_cropped():
    assert datasets.load(FEW.replace(augment="crop")).train.augment
    assert not datasets.load(FEW).train.augment


@pytest.mark.parametrize(
    "options",
    [
        {"loader_workers": 2},
        {"loader": "batch"},
        {"loader": "batch", "loader_workers": 1},
        {"replicas": 2},
    ],
    ids=str,
)
def test_the_losses_do_not_depend_on_the_loader(options):
    assert np.allclose(losses(FEW.replace(**options)), losses(FEW), rtol=0, atol=1e-4)


def test_training_learns_the_two_classes():
    events = list(run(FEW.replace(epochs=8, augment="crop")))
    [finished] = [event for event in events if isinstance(event, Finished)]
    assert finished.accuracy >= 0.8
    assert finished.waiting_s > 0


def test_crops_of_other_data_are_rejected():
    with pytest.raises(CnnlabError, match="augment='crop' needs data='photos'"):
        Recipe(augment="crop")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_photograph_is_named_with_a_fix(workers):
    folder = photos.photo_folder(48)
    damaged = folder / "flower" / "000001.jpg"  # a training image: every 8th is held out
    content = damaged.read_bytes()
    recipe = FEW.replace(images=48, loader_workers=workers, evaluate=False)
    try:
        damaged.write_bytes(content[:200])
        with pytest.raises(CnnlabError, match="000001.jpg cannot be read.*Delete its folder"):
            list(run(recipe))
    finally:
        damaged.write_bytes(content)


def test_missing_photographs_are_counted():
    folder = photos.photo_folder(40)
    next(folder.glob("*/*.jpg")).unlink()
    with pytest.raises(CnnlabError, match="has 39 photographs instead of 40. Delete it"):
        datasets.load(FEW.replace(images=40))


def test_an_unwritable_folder_is_reported(tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path / "a file"))
    with pytest.raises(CnnlabError, match="cannot write .*CNNLAB_DATA"):
        photos.photo_folder(8)


@pytest.mark.parametrize("place", [None, "~/data"])
def test_a_user_without_a_home_folder_is_told_what_to_set(tmp_path, monkeypatch, place):
    """As in a container whose user id has no name."""

    def no_user(uid):
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", no_user)
    for name in ("HOME", "XDG_CACHE_HOME", "CNNLAB_DATA"):
        monkeypatch.delenv(name, raising=False)
    if place:
        monkeypatch.setenv("CNNLAB_DATA", place)
    with pytest.raises(CnnlabError, match="home directory.*set CNNLAB_DATA"):
        photos.photo_folder(8)
    assert not Path("~").exists()


def test_the_command_line_trains_on_photographs(cache):
    options = "--data photos --images 96 --batch-size 12 --augment crop --loader-workers 1"
    command = [sys.executable, "-m", "cnnlab", "train", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "84 images to train on, 12 held out" in done.stdout


def test_ranks_use_the_current_data_folder(tmp_path, monkeypatch):
    """The process that they are forked from was started with an earlier environment."""
    list(run(Recipe(batch_size=64, steps=3)))
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    [folder] = ranks(lambda: str(photos.photo_folder(8, size=32)), 1)
    assert folder == str(tmp_path / "photos-8-32")
