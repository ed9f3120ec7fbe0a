"""Photographs as files: made once and whole, decoded rightly, in training."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from cnnlab import plots
from cnnlab.data import datasets, photos
from cnnlab.events import Evaluated, Finished
from cnnlab.launch.launcher import ranks, run
from cnnlab.recipe import CnnlabError, Recipe

FEW = Recipe(data="photos", images=96, image_size=32, batch_size=12, epochs=2, threads=1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One data folder for all tests, so that most photographs are made once."""
    folder = tmp_path_factory.getbasetemp() / "photographs"
    monkeypatch.setenv("CNNLAB_DATA", str(folder))
    return folder


def losses(recipe):
    return plots.loss_curve(list(run(recipe)))[1]


def test_the_folder_has_so_many_jpegs_of_that_size_in_two_classes():
    folder = photos.photo_folder(24, size=64)
    files = sorted(folder.glob("*/*.jpg"))
    assert len(files) == 24 and {path.parent.name for path in files} == {"china", "flower"}
    for path in files:
        with Image.open(path) as picture:
            assert (picture.format, picture.size, picture.mode) == ("JPEG", (64, 64), "RGB")


def test_it_is_made_once_even_when_several_ask(cache):
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(photos.photo_folder(16, size=32)))
        for _ in range(4)
    ]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(set(made)) == 1 and len(list(made[0].glob("*/*.jpg"))) == 16
    assert not [
        path for path in cache.iterdir() if path.name.startswith("photos-16-32-")
    ]  # what the slower ones made is gone
    times = {path: path.stat().st_mtime_ns for path in made[0].glob("*/*.jpg")}
    assert photos.photo_folder(16, size=32) == made[0]
    assert times == {path: path.stat().st_mtime_ns for path in made[0].glob("*/*.jpg")}


def test_a_photograph_is_decoded_to_a_normalised_tensor_with_its_class():
    train, test = photos.photo_datasets(96, 32, False)
    assert (len(train), len(test)) == (84, 12) and not set(train.files) & set(test.files)
    for dataset in (train, test):
        image, label = dataset[3]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        with Image.open(dataset.files[3]) as picture:
            pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
        assert np.allclose(image.permute(1, 2, 0), (pixels / 255 - 0.5) / 0.25, atol=1e-6)
        assert photos.PHOTO_CLASSES[label] == dataset.files[3].parent.name


def test_augmented_photographs_differ_each_time_and_plain_ones_never():
    plain, augmented = (photos.photo_datasets(96, 32, augment)[0] for augment in (False, True))
    assert torch.equal(plain[0][0], plain[0][0])
    assert not torch.equal(augmented[0][0], augmented[0][0])
    torch.manual_seed(1)
    boxes = [photos.random_crop_box((300, 200)) for _ in range(500)]
    assert all(
        0 <= left < right <= 300
        and 0 <= top < bottom <= 200
        and right - left == bottom - top >= 100
        for left, top, right, bottom in boxes
    )
    assert (
        len({box[0] for box in boxes}) > 100
        and max(right - left for left, _, right, _ in boxes) > 190
    )


def test_augment_crop_reaches_the_files():
    assert (
        datasets.load(FEW.replace(augment="crop")).train.augment
        and not datasets.load(FEW).train.augment
    )


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
def test_the_losses_are_the_same_however_the_files_are_loaded(options):
    assert np.allclose(losses(FEW.replace(**options)), losses(FEW), rtol=0, atol=1e-4)


def test_training_learns_to_tell_the_photographs_apart():
    events = list(run(FEW.replace(epochs=8, augment="crop")))
    assert [event.accuracy for event in events if isinstance(event, Evaluated)][-1] >= 0.8
    assert [event for event in events if isinstance(event, Finished)][0].waiting_s > 0


def test_crop_elsewhere_is_refused():
    with pytest.raises(CnnlabError, match="augment='crop' needs data='photos'"):
        Recipe(augment="crop")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_photograph_is_named_with_its_mend(workers):
    folder = photos.photo_folder(48)
    victim = sorted(folder.glob("*/*.jpg"))[
        0 if sorted(folder.glob("*/*.jpg"))[0].name != "000000.jpg" else 1
    ]
    whole = victim.read_bytes()
    try:
        victim.write_bytes(whole[:200])
        with pytest.raises(Exception, match=f"{victim.name} cannot be read.*Delete its folder"):
            list(run(FEW.replace(images=48, loader_workers=workers, evaluate=False)))
    finally:
        victim.write_bytes(whole)


def test_missing_photographs_are_counted():
    folder = photos.photo_folder(40)
    next(folder.glob("*/*.jpg")).unlink()
    with pytest.raises(CnnlabError, match="has 39 photographs instead of 40. Delete it"):
        datasets.load(FEW.replace(images=40))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path / "a file"))
    with pytest.raises(CnnlabError, match="cannot write photographs to.*CNNLAB_DATA"):
        photos.photo_folder(8)


def test_the_command_line_trains_on_photographs(cache):
    command = [
        sys.executable,
        "-m",
        "cnnlab",
        "train",
        "--data",
        "photos",
        "--images",
        "96",
        "--batch-size",
        "12",
        "--augment",
        "crop",
        "--loader-workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "84 images to train on, 12 held out" in done.stdout


def test_ranks_read_the_data_folder_that_is_set_now(tmp_path, monkeypatch):
    """The process that they are forked from has been there for long."""
    list(run(Recipe(batch_size=64, steps=3)))
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    assert ranks(lambda: str(photos.photo_folder(8, size=32)), 1) == [str(tmp_path / "photos-8-32")]
