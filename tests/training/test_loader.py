"""Batches: every draw depends on seed, epoch and sample alone, and cropping and flipping do what they say."""

import pytest
import torch
from helpers import assert_close
from torchvision.transforms.v2 import functional

from lrconvert.errors import UsageError
from lrconvert.training.data import Augment, Loader
from lrconvert.training.data.augment import Framing, Normalization, image_transform
from lrconvert.training.data.image_source import ImageSource
from lrconvert.training.data.images import TensorImages
from lrconvert.training.data.source import MemorySource

NORMALIZATION = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
PLAIN = Normalization((0.0,) * 3, (1 / 255,) * 3)
OWN_SIZE = Framing()


def noise(n, side=8):
    """Images of which no two pixels need be alike, labelled by their number."""
    return TensorImages(torch.randint(1, 256, (n, 3, side, side), dtype=torch.uint8), torch.arange(n))


def one_by_one(images, augment, framing=OWN_SIZE, size=(8, 8)):
    change = [image_transform(each, framing, NORMALIZATION, size) for each in (augment, None)]
    return ImageSource(images, *change)


SOURCES = {
    "in memory": lambda images: MemorySource(images, Augment(2, 0.5), OWN_SIZE, NORMALIZATION),
    "one by one": lambda images: one_by_one(images, Augment(2, 0.5, (0.3, 1), aa="rand-m9-mstd0.5-inc1", reprob=0.3)),
}


@pytest.fixture(params=SOURCES)
def source(request):
    return SOURCES[request.param](noise(100))


def joined(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(got, want):
    assert want[0].any()
    return torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (2, 2), (4, 3)])
def test_processes_and_accumulation_share_out_the_batches_of_one_process(source, world, accumulate):
    whole = list(Loader(source, batch_size=24, seed=3).epoch(5))
    ranks = [
        list(Loader(source, batch_size=24, seed=3, rank=rank, world=world, accumulate=accumulate).epoch(5))
        for rank in range(world)
    ]
    assert len(whole) == 4
    for step, want in enumerate(whole):
        parts = [ranks[rank][step * accumulate + a] for a in range(accumulate) for rank in range(world)]
        assert {len(labels) for _, labels in parts} == {24 // world // accumulate}
        assert same(joined(parts), want)


def test_what_happens_to_a_sample_does_not_depend_on_its_batch(source):
    small, large = (joined(Loader(source, batch_size=size, seed=3).epoch(1)) for size in (10, 50))
    assert same(small, large)


def test_an_epoch_goes_on_from_any_step(source):
    whole = list(Loader(source, batch_size=20, seed=0, accumulate=2).epoch(2))
    rest = list(Loader(source, batch_size=20, seed=0, accumulate=2).epoch(2, first_step=3))
    assert len(rest) == 4
    assert same(joined(rest), joined(whole[6:]))
    assert list(Loader(source, batch_size=20, seed=0).epoch(2, first_step=5)) == []


def test_epochs_and_seeds_differ_and_repeat(source):
    def labels_and_looks(seed, epoch):
        images, labels = joined(Loader(source, batch_size=100, seed=seed).epoch(epoch))
        return labels, images[labels.argsort()]

    drawn = {key: labels_and_looks(*key) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    for key, (labels, looks) in drawn.items():
        assert labels.sort().values.equal(torch.arange(100))
        again = labels_and_looks(*key)
        assert labels.equal(again[0])
        assert looks.equal(again[1])
        for other, (other_labels, other_looks) in drawn.items():
            assert key == other or not (labels.equal(other_labels) or looks.equal(other_looks))


@pytest.mark.parametrize("kind", SOURCES)
def test_equal_images_are_changed_differently(kind):
    one = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    source = SOURCES[kind](TensorImages(one.repeat(40, 1, 1, 1), torch.zeros(40).long()))
    images, _ = next(Loader(source, batch_size=40, seed=0).epoch(0))
    assert len(images.flatten(1).unique(dim=0)) > 20


def test_the_callers_generator_is_left_alone(source):
    torch.manual_seed(7)
    want = torch.rand(3)
    for workers in (0, 1):
        loader = Loader(source, batch_size=25, seed=0, workers=workers)
        torch.manual_seed(7)
        next(loader.epoch(0))
        list(loader.once())
        assert torch.rand(3).equal(want)


def test_workers_change_nothing_and_are_used_again():
    source = SOURCES["one by one"](noise(40))
    here, there = (Loader(source, batch_size=8, seed=0, workers=workers) for workers in (0, 2))
    want = joined(here.epoch(0))
    assert same(joined(there.epoch(0)), want)
    next(there.epoch(3))  # left in the middle
    assert same(joined(there.epoch(0)), want)
    assert same(joined(there.once()), joined(here.once()))


@pytest.mark.parametrize(("n", "world"), [(100, 3), (97, 3), (2, 3), (12, 1)])
def test_evaluation_counts_every_sample_once_and_in_order(n, world):
    source = SOURCES["in memory"](noise(n))
    ranks = [list(Loader(source, batch_size=12, seed=0, rank=rank, world=world).once()) for rank in range(world)]
    images, labels = joined([batch for batches in ranks for batch in batches])
    assert labels.equal(torch.arange(n))
    assert_close(images, functional.normalize(source.images.pixels / 255, NORMALIZATION.mean, NORMALIZATION.std))
    assert max(len(batches) for batches in ranks) - min(len(batches) for batches in ranks) <= 1


def test_every_crop_and_flip_is_one_that_torchvision_can_make_and_all_are_as_likely():
    n, padding, hflip = 4000, 2, 0.3
    images = noise(n, side=5)
    source = MemorySource(images, Augment(padding, hflip), OWN_SIZE, PLAIN)
    got, labels = joined(Loader(source, batch_size=500, seed=0).epoch(0))
    padded = functional.pad(images.pixels[labels], [padding])
    counts = torch.zeros(5, 5, 2)
    for top in range(5):
        for left in range(5):
            crop = functional.crop(padded, top, left, 5, 5)
            for flip, candidate in enumerate((crop, functional.horizontal_flip(crop))):
                counts[top, left, flip] = (got.round() == candidate).flatten(1).all(1).sum()
    assert counts.sum() == n
    # Five standard deviations of a binomial count.
    for count, share in [(counts[..., 0], 0.7 / 25), (counts[..., 1], 0.3 / 25)]:
        assert ((count - n * share).abs() < 5 * (n * share * (1 - share)) ** 0.5).all()


@pytest.mark.parametrize("framing", [OWN_SIZE, Framing(12), Framing(6, crop=True)], ids=["own", "resized", "cut out"])
def test_in_batches_equals_one_by_one(framing):
    images = noise(30)
    size = (framing.size or 8,) * 2
    fast = MemorySource(images, Augment(), framing, NORMALIZATION)
    slow = one_by_one(images, Augment(), framing, size=size)
    got, want = (joined(Loader(source, batch_size=7, seed=0).once()) for source in (fast, slow))
    assert got[0].shape == (30, 3, *size)
    # Resizing rounds to whole bytes: two ways to sum may land on either side of one half.
    assert_close(got[0], want[0], 1e-6 if framing.size is None else 5e-3)


def test_batches_that_cannot_be_divided_are_refused_with_one_that_can():
    source = SOURCES["in memory"](noise(50))
    with pytest.raises(UsageError, match="among 2 processes × 3 accumulation steps: take 66"):
        Loader(source, batch_size=64, seed=0, world=2, accumulate=3)
    with pytest.raises(UsageError, match=r"take 4$"):
        Loader(source, batch_size=1, seed=0, world=4)
    with pytest.raises(UsageError, match="batch size 64 is more than the 50 images to train on: take at most 48"):
        Loader(source, batch_size=64, seed=0, world=4).epoch(0)
    with pytest.raises(UsageError, match="each of 64 micro-batches needs an image"):
        _ = Loader(source, batch_size=64, seed=0, world=64).steps
