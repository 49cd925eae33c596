"""Images: which ones, how they are prepared, and by what name a model gets them."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from lrconvert.errors import LrconvertError, UsageError
from lrconvert.network import open_network
from lrconvert.samples import read_samples
from lrconvert.training.data import Loader, open_dataset

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Pooled(torch.nn.Module):
    """Takes images of any size, of three channels unless told otherwise."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def network_for(channels, size):
    return open_network(Pooled(channels), input_shape=(channels, size, size))


def images_of(samples):
    return torch.cat([call.args[0] for call in samples.calls])


def test_images_are_those_that_are_trained_on_and_not_augmented():
    pytest.importorskip("sklearn")
    samples = read_samples("digits", network_for(1, 8), count=2000, batch_size=100)
    want, _ = zip(*Loader(open_dataset("digits").train, batch_size=100, seed=0).once(), strict=True)
    # Neither validation nor test images are among them; as sets, since the order is random.
    assert sorted(images_of(samples).flatten(1).tolist()) == sorted(torch.cat(want).flatten(1).tolist())
    assert samples.notes[0] == "1,294 images of digits, out of 1,294"
    some = images_of(read_samples("digits", network_for(1, 8), count=50))
    assert torch.equal(some, images_of(samples)[:50])


def test_settings_of_a_dataset_are_those_of_the_trainer():
    pytest.importorskip("sklearn")
    plain = images_of(read_samples("digits", network_for(1, 8), count=30))
    normalized = images_of(read_samples("digits", network_for(1, 8), count=30, mean=[0.5], std=[0.25]))
    assert torch.allclose(normalized, (plain - 0.5) / 0.25, atol=1e-6)
    assert read_samples("digits", network_for(1, 8), count=5, img_size=16).calls[0].args[0].shape == (5, 1, 16, 16)


def test_fashion_mnist_itself():
    folder = Path(os.environ.get("LRCONVERT_TEST_DATA", DEBIAN))
    if not any(
        path.is_file() for place in (folder, folder / "FashionMNIST/raw") for path in place.glob("t10k-labels*")
    ):
        pytest.skip("set LRCONVERT_TEST_DATA to a folder with Fashion-MNIST, or install dataset-fashion-mnist")
    samples = read_samples("fashion-mnist", network_for(1, 28), data_dir=folder, download=False)
    images = images_of(samples)
    assert images.shape == (256, 1, 28, 28)
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1
    assert samples.notes == ("256 images of fashion-mnist, out of 54,000",)


def paint(folder, count, size=(40, 30)):
    """`count` images one after the other in nested folders, image i of the grey (i, i, i)."""
    for number in range(count):
        inside = folder / ["", "a", "a/b"][number % 3]
        inside.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number,) * 3).save(inside / f"{number:03}.{'png' if number % 2 else 'BMP'}")


def greys(images):
    """The numbers that `paint` painted; every pixel of an image has to agree."""
    values = (images * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)) * 255
    whole = values.round()
    assert (values - whole).abs().max() < 1e-3
    assert torch.equal(whole.amax((1, 2, 3)), whole.amin((1, 2, 3)))
    return sorted(whole[:, 0, 0, 0].int().tolist())


def test_a_folder_of_any_depth_without_classes(tmp_path):
    paint(tmp_path / "photos", 50)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    network = network_for(3, 32)
    samples = read_samples(str(tmp_path / "photos"), network, batch_size=20)
    assert [call.args[0].shape for call in samples.calls] == [(20, 3, 32, 32), (20, 3, 32, 32), (10, 3, 32, 32)]
    assert greys(images_of(samples)) == list(range(50))
    halves = [images_of(read_samples(str(tmp_path / "photos"), network, count=25, skip=skip)) for skip in (0, 25)]
    assert sorted(greys(halves[0]) + greys(halves[1])) == list(range(50))


def test_images_of_a_folder_are_resized_and_cut_out_as_the_trainer_does(tmp_path):
    left, right = Image.new("RGB", (100, 50), "black"), Image.new("RGB", (20, 50), "white")
    left.paste(right, (0, 0))
    for name in "xy":
        (tmp_path / name).mkdir()
        for number in range(10):
            left.save(tmp_path / name / f"{number}.png")
    want = next(Loader(open_dataset("folder", data_dir=tmp_path, img_size=28).train, batch_size=9, seed=0).once())[0]
    got = images_of(read_samples(str(tmp_path), network_for(3, 32), count=9, img_size=28))
    assert torch.equal(got, want)
    # 28 of a side that became 32 are cut from the middle of 64: what was white, from 0 to 12.8, is out of it.
    assert got.amax() < 0


def test_the_size_is_the_networks_or_the_folders_usual_one(tmp_path):
    paint(tmp_path, 2)
    assert read_samples(str(tmp_path), network_for(3, 48)).calls[0].args[0].shape == (2, 3, 48, 48)
    unknown = open_network(Pooled())
    assert read_samples(str(tmp_path), unknown).calls[0].args[0].shape == (2, 3, 224, 224)


def test_what_is_wrong_with_a_folder_or_its_images(tmp_path):
    network = network_for(3, 16)

    def fails(match, error=LrconvertError, **settings):
        with pytest.raises(error, match=match) as caught:
            read_samples(str(tmp_path), network, **settings)
        assert "\n" not in str(caught.value)

    fails("no images, here or in folders in it; .jpg")
    paint(tmp_path, 3)
    fails("img_size must be positive, not 0", UsageError, img_size=0)
    fails("std must be positive", UsageError, std=[0.0])
    (tmp_path / "003.png").write_bytes(b"not an image")
    fails("003.png: cannot be read as an image")


def test_images_that_the_model_cannot_take(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(UsageError, match=r"takes \(examples, 3, 8, 8\), and not x .*; give images of 3 channels, or"):
        read_samples("digits", network_for(3, 8))
    flat = open_network(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4)), input_shape=(1, 16, 16))
    with pytest.raises(UsageError, match=r"takes \(examples, 1, 16, 16\), and .*; set img_size, for images of 16×16$"):
        read_samples("digits", flat)
    assert read_samples("digits", flat, img_size=16, count=3).size == 3


def test_a_model_of_transformers_gets_images_by_name(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    paint(tmp_path / "photos", 4)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config)
    (call,) = read_samples(str(tmp_path / "photos"), open_network(model)).calls
    assert {name: tensor.shape for name, tensor in call.kwargs.items()} == {"pixel_values": (4, 3, 32, 32)}
    assert call.run(model).last_hidden_state.shape == (4, 17, 32)
    # Its folder has keys that only transformers makes the model's of.
    model.save_pretrained(tmp_path / "vit")
    (again,) = read_samples(str(tmp_path / "photos"), open_network(tmp_path / "vit")).calls
    assert torch.equal(again.kwargs["pixel_values"], call.kwargs["pixel_values"])
    with pytest.raises(UsageError, match=r"the model takes pixel_values \(examples, 3, 32, 32\), and not pixel_values"):
        read_samples(str(tmp_path / "photos"), open_network(model), img_size=40)
