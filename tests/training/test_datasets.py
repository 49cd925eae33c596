"""Datasets by name: what is read, what is held out, and what is said when the files are not there."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from reading import everything, fails
from torchvision import datasets as torchvision_datasets

from lrconvert.errors import LrconvertError, UnknownNameError, UsageError
from lrconvert.training.data import DATASETS, Augment, Loader, open_dataset
from lrconvert.training.data.images import TensorImages, UserImages, hold_out

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IDX_NAMES = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("there is no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


# Splits


def test_digits_are_split_into_three_that_make_up_the_whole():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    found = open_dataset("digits")
    parts = [everything(source) for source in (found.train, found.validation, found.test)]
    assert [len(labels) for _, labels in parts] == [1294, 144, 359]
    assert found.notes == (
        "1,294 images to train on",
        "144 to validate on, held out of the training images",
        "359 to test on",
    )
    assert (found.num_classes, found.input_shape) == (10, (1, 8, 8))
    data = load_digits()
    want = np.concatenate([data.data, data.target[:, None]], 1).astype(int).tolist()
    got = torch.cat([torch.cat([images.flatten(1) * 16, labels[:, None]], 1) for images, labels in parts])
    assert sorted(got.round().int().tolist()) == sorted(want)


def test_held_out_images_are_a_share_of_every_class_and_never_trained_on():
    labels = torch.arange(1000) % 7
    images = TensorImages(torch.arange(1000).view(-1, 1, 1, 1), labels)
    rest, held = hold_out(images, 0.13, seed=0)
    numbers = torch.cat([rest.pixels, held.pixels]).flatten()
    assert len(held) == 130
    assert numbers.sort().values.equal(torch.arange(1000))
    share = held.labels.bincount() - labels.bincount() * 0.13
    assert share.abs().max() <= 1
    again, other = (hold_out(images, 0.13, seed)[1] for seed in (0, 1))
    assert again.pixels.equal(held.pixels)
    assert not other.pixels.equal(held.pixels)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_a_share_that_is_none_is_refused(share):
    fails("above 0 and below 1", "digits", validation=share, error=UsageError)


def test_unlabelled_samples_are_held_out_too_but_not_all():
    rest, held = hold_out(UserImages(list(range(10)), range(10)), 0.01, seed=0)
    assert sorted([*rest.chosen, *held.chosen]) == list(range(10))
    assert len(held) == 1
    with pytest.raises(UsageError, match=r"validation 0\.5 of 1 images leaves none to train on"):
        hold_out(UserImages([0], range(1)), 0.5, seed=0)


# MNIST's format


def write_idx(folder, name, values, packed=True):
    data = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path = folder / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(data) if packed else data)


def write_small_mnist(folder, packed=True):
    """Twenty images to train on and ten to test on, the pixels of each equal to its number."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 20), ("t10k", 10)):
        numbers = np.arange(n, dtype=np.uint8)
        write_idx(folder, f"{part}-images-idx3-ubyte", numbers[:, None, None].repeat(28, 1).repeat(28, 2), packed)
        write_idx(folder, f"{part}-labels-idx1-ubyte", numbers % 10, packed)


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw", "MNIST/raw"])
def test_files_of_mnists_format_are_read_where_they_lie(tmp_path, packed, place):
    write_small_mnist(tmp_path / place, packed)
    before = sorted(tmp_path.rglob("*"))
    name = "mnist" if place.startswith("MNIST") else "fashion-mnist"
    found = open_dataset(name, data_dir=tmp_path, mean=[0.0], std=[1.0])
    assert sorted(tmp_path.rglob("*")) == before
    images, labels = everything(found.test)
    assert (images * 255).round().flatten(1).int().equal(torch.arange(10).int()[:, None].expand(-1, 784))
    assert labels.equal(torch.arange(10))
    assert (len(found.train), len(found.validation)) == (18, 2)


def test_damaged_files_of_mnists_format_are_named(tmp_path):
    write_small_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:40], b"not gzip", gzip.compress(b"\0\0\x08\x03" + bytes(20)), gzip.compress(b"")):
        path.write_bytes(damaged)
        fails("t10k-images-idx3-ubyte.gz: not a file of MNIST's format, or damaged", "fashion-mnist", data_dir=tmp_path)
    write_idx(tmp_path, "t10k-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8))
    fails("3 images of t10k, but 10 labels", "fashion-mnist", data_dir=tmp_path)


def test_fashion_mnist_itself():
    folder = Path(os.environ.get("LRCONVERT_TEST_DATA", DEBIAN))
    if not any(
        path.is_file() for place in (folder, folder / "FashionMNIST/raw") for path in place.glob("t10k-labels*")
    ):
        pytest.skip("set LRCONVERT_TEST_DATA to a folder with Fashion-MNIST, or install dataset-fashion-mnist")
    found = open_dataset("fashion-mnist", data_dir=folder, download=False)
    assert [len(source) for source in (found.train, found.validation, found.test)] == [54000, 6000, 10000]
    assert (found.num_classes, found.input_shape) == (10, (1, 28, 28))
    assert found.validation.images.labels.bincount().tolist() == [600] * 10
    images, labels = everything(found.test)
    assert labels.bincount().tolist() == [1000] * 10
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01


# torchvision's other sets, from files made here


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """Six batches of ten images, and their folder; torchvision is told their checksums."""
    kind = torchvision_datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    content = {}

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        content[name] = value
        return [name, md5(folder / name)]

    def batch():
        return {"data": generator.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}

    monkeypatch.setattr(kind, "train_list", [write(name, batch()) for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [write(name, batch()) for name, _ in kind.test_list])
    meta = write(kind.meta["filename"], {"label_names": [str(number) for number in range(10)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta[1]})
    return folder, content


def test_cifar_is_read_in_its_own_layout(small_cifar):
    folder, content = small_cifar
    found = open_dataset("cifar10", data_dir=folder.parent, download=False, mean=[0.0], std=[1.0])
    images, labels = everything(found.test)
    # Each row holds the red plane, then the green and the blue one.
    want = torch.from_numpy(content["test_batch"]["data"]).view(-1, 3, 32, 32)
    assert (images * 255).round().to(torch.uint8).equal(want)
    assert labels.equal(torch.arange(10))
    assert (len(found.train), len(found.validation), found.input_shape) == (45, 5, (3, 32, 32))


def test_cifar_with_another_checksum_is_not_unpickled(small_cifar):
    folder, _ = small_cifar
    (folder / "test_batch").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    fails("CIFAR10 is not in .*, and downloading is off", "cifar10", data_dir=folder.parent, download=False)


def test_svhn_calls_the_digit_nought_nought(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    generator = np.random.default_rng(0)
    splits = dict(torchvision_datasets.SVHN.split_list)
    pixels = {}
    for split in ("train", "test"):
        pixels[split] = generator.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        path = tmp_path / splits[split][1]
        savemat(path, {"X": pixels[split], "y": np.arange(20, dtype=np.uint8)[:, None] % 10 + 1})
        splits[split] = [splits[split][0], splits[split][1], md5(path)]
    monkeypatch.setattr(torchvision_datasets.SVHN, "split_list", splits)
    found = open_dataset("svhn", data_dir=tmp_path, mean=[0.0], std=[1.0])
    images, labels = everything(found.test)
    assert (images * 255).round().to(torch.uint8).equal(torch.from_numpy(pixels["test"]).permute(3, 2, 0, 1))
    assert labels.equal((torch.arange(20) % 10 + 1) % 10)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar10", "data_batch_1.*test_batch, batches.meta in .*cifar-10-batches-py"),
        ("cifar100", "to have train, test, meta in .*cifar-100-python"),
        ("svhn", "put train_32x32.mat and test_32x32.mat there"),
        ("mnist", "put train-images-idx3-ubyte, .*or as .gz, there or in .*MNIST/raw"),
        ("fashion-mnist", "put train-images-idx3-ubyte, .*or as .gz, there or in .*FashionMNIST/raw"),
    ],
)
def test_missing_files_are_named_in_one_line(tmp_path, name, files):
    fails(f"downloading it failed .*there is no network.*: .*{files}", name, data_dir=tmp_path)
    fails(f"and downloading is off: .*{files}", name, data_dir=tmp_path, download=False)


# Images in folders


def write_images(folder, count, **classes):
    """`count` images a class in PNG, 40 × 30 or more, of one colour each."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40 + number, 30), colour).save(folder / name / f"{number}.png")


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def colours_match(source, workers=0):
    """Whether red has label 0, green 1 and blue 2."""
    images, labels = everything(source, workers)
    return torch.equal(images.mean((2, 3)).argmax(1), labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenets_layout(tmp_path, workers):
    write_images(tmp_path / "train", 25, n01=RED, n02=GREEN, n03=BLUE)
    write_images(tmp_path / "val", 3, n01=RED, n03=BLUE)  # without the second class, the third keeps its number
    found = open_dataset("imagenet", data_dir=tmp_path, img_size=20, augment=Augment(scale=(0.1, 1.0), hflip=0.5))
    assert [len(source) for source in (found.train, found.validation, found.test)] == [73, 2, 6]
    assert (found.num_classes, found.input_shape) == (3, (3, 20, 20))
    assert all(colours_match(source, workers) for source in (found.train, found.validation, found.test))
    images, labels = next(Loader(found.train, batch_size=30, seed=0, workers=workers).epoch(0))
    assert images.shape == (30, 3, 20, 20)
    assert images.mean((2, 3)).argmax(1).equal(labels)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(images.amax((0, 2, 3)), white)


def test_folders_keep_the_splits_that_they_have(tmp_path):
    write_images(tmp_path / "a" / "train", 4, red=RED, unred=BLUE)
    write_images(tmp_path / "a" / "val", 2, red=RED, unred=BLUE)
    write_images(tmp_path / "a" / "test", 1, red=RED, unred=BLUE)
    found = open_dataset("folder", data_dir=tmp_path / "a", img_size=8)
    assert [len(source) for source in (found.train, found.validation, found.test)] == [8, 4, 2]
    assert "4 to validate on, that the dataset keeps for it" in found.notes
    write_images(tmp_path / "b", 10, red=RED, unred=BLUE)
    found = open_dataset("folder", data_dir=tmp_path / "b")
    assert (len(found.train), len(found.validation), found.test) == (18, 2, None)
    assert found.input_shape == (3, 224, 224)
    assert found.notes[-1] == "no test images"


def test_grey_images_become_rgb_and_any_size_becomes_one(tmp_path):
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for size in range(5, 15):
            Image.new("L", (size, 12), 100 * number).save(tmp_path / name / f"{size}.png")
    found = open_dataset("folder", data_dir=tmp_path, img_size=8, augment=Augment(crop_padding=1, aa="trivial"))
    images, _ = next(Loader(found.train, batch_size=16, seed=0).epoch(0))
    assert images.shape == (16, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(tmp_path, workers):
    write_images(tmp_path, 10, a=RED, b=BLUE)
    whole = (tmp_path / "a" / "5.png").read_bytes()
    for damaged in (whole[:60], b"not an image", b""):
        (tmp_path / "a" / "5.png").write_bytes(damaged)
        found = open_dataset("folder", data_dir=tmp_path, validation=0.05, img_size=8)
        with pytest.raises(LrconvertError, match=r"a/5\.png: cannot be read as an image: ") as caught:
            [everything(source, workers) for source in (found.train, found.validation)]
        assert "\n" not in str(caught.value)


def test_folders_that_do_not_fit_are_explained(tmp_path):
    fails(r"train is missing: .*train/CLASS/\*\.JPEG and .*val/CLASS/\*\.JPEG", "imagenet", data_dir=tmp_path)
    fails("is missing: give a folder with train/CLASS", "folder", data_dir=tmp_path / "none")
    fails("has no folders: put the images of each class", "folder", data_dir=tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    fails("has one class only, 'a'", "folder", data_dir=tmp_path)
    write_images(tmp_path / "train", 3, b=RED)
    fails("train: Found no valid file for the classes a", "folder", data_dir=tmp_path)
    write_images(tmp_path / "train", 3, c=RED)
    (tmp_path / "train" / "a").rmdir()
    (tmp_path / "test" / "b").mkdir(parents=True)
    fails("test: no images in the folders of the classes", "folder", data_dir=tmp_path)
    write_images(tmp_path / "test", 3, d=RED)
    fails("test/d: there is no class of this name to train on", "folder", data_dir=tmp_path)


# Arguments


def test_names_and_arguments_that_make_no_sense():
    fails("unknown dataset 'cifar': did you mean 'cifar10'?", "cifar", error=UnknownNameError)
    fails("dataset 'digits' takes no arguments", "digits", args={"n": 1}, error=UsageError)
    fails("mean has 2 values, but the images have 1 channels", "digits", mean=(1, 2), error=UsageError)
    fails("std must be positive, not 0", "digits", std=[0.0], error=UsageError)
    fails("img_size must be positive, not -1", "digits", img_size=-1, error=UsageError)


def test_img_size_resizes_small_images_too():
    found = open_dataset("digits", img_size=32, augment=Augment(crop_padding=4, hflip=0.5))
    assert found.input_shape == (1, 32, 32)
    assert next(Loader(found.train, batch_size=8, seed=0).epoch(0))[0].shape == (8, 1, 32, 32)


def test_every_dataset_normalizes_as_many_channels_as_it_has():
    assert {name: len(kind.mean) for name, kind in DATASETS.items()} == {
        **dict.fromkeys(("cifar10", "cifar100", "svhn", "imagenet", "folder"), 3),
        **dict.fromkeys(("mnist", "fashion-mnist", "digits"), 1),
    }
