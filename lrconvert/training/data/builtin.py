"""The well-known sets of small images: torchvision's, which it can download, and scikit-learn's digits."""

import gzip
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file

from lrconvert.errors import LrconvertError
from lrconvert.training.data.images import Splits, TensorImages


def cifar10(folder: Path, download: bool) -> Splits:
    """CIFAR-10: 50,000 images of 3×32×32 to train on and 10,000 to test, 10 classes."""
    return _cifar(datasets.CIFAR10, folder, download, 10)


def cifar100(folder: Path, download: bool) -> Splits:
    """CIFAR-100: 50,000 images of 3×32×32 to train on and 10,000 to test, 100 classes."""
    return _cifar(datasets.CIFAR100, folder, download, 100)


def _cifar(kind: Any, folder: Path, download: bool, num_classes: int) -> Splits:
    files = [name for name, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
    wanted = f"unpack {kind.filename} there, to have {', '.join(files)} in {folder / kind.base_folder}"

    # These files are pickles. torchvision compares the MD5 sum of each with the published one before it reads them.
    def read(train: bool) -> TensorImages:
        found = _torchvision(kind.__name__, partial(kind, folder, train), folder, download, wanted)
        return TensorImages(torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets))

    return Splits(read(True), None, read(False), num_classes)


def svhn(folder: Path, download: bool) -> Splits:
    """Street View House Numbers: 73,257 images of 3×32×32 to train on, without the extra ones, and 26,032 to test."""
    files = {split: datasets.SVHN.split_list[split][1] for split in ("train", "test")}
    wanted = f"put {files['train']} and {files['test']} there"

    def read(split: str) -> TensorImages:
        found = _torchvision("SVHN", partial(datasets.SVHN, folder, split), folder, download, wanted)
        return TensorImages(torch.from_numpy(found.data).contiguous(), torch.from_numpy(found.labels))

    return Splits(read("train"), None, read("test"), 10)


def mnist(folder: Path, download: bool) -> Splits:
    """MNIST: 60,000 images of 1×28×28 to train on and 10,000 to test, 10 classes."""
    return _idx(datasets.MNIST, folder, download)


def fashion_mnist(folder: Path, download: bool) -> Splits:
    """Fashion-MNIST: 60,000 images of 1×28×28 to train on and 10,000 to test, 10 classes."""
    return _idx(datasets.FashionMNIST, folder, download)


def _idx(kind: Any, folder: Path, download: bool) -> Splits:
    """MNIST or a set in its format, read here, since torchvision takes neither other folders nor compressed files."""
    names = [name.removesuffix(".gz") for name, _ in kind.resources]
    raw = folder / kind.__name__ / "raw"
    paths = _find(names, (raw, folder))
    if paths is None:
        wanted = f"put {', '.join(names)}, as they are or as .gz, there or in {raw}"
        _torchvision(kind.__name__, partial(kind, folder), folder, download, wanted)
        paths = {name: raw / name for name in names}

    def read(part: str) -> TensorImages:
        images = _read_idx(paths[f"{part}-images-idx3-ubyte"], read_image_file)
        labels = _read_idx(paths[f"{part}-labels-idx1-ubyte"], read_label_file)
        if len(images) != len(labels):
            raise LrconvertError(f"{folder}: {len(images)} images of {part}, but {len(labels)} labels")
        return TensorImages(images[:, None], labels)

    return Splits(read("train"), None, read("t10k"), 10)


def _find(names: list[str], folders: tuple[Path, ...]) -> dict[str, Path] | None:
    """Name to path in the first folder that has all of them, each plain or compressed; None if no folder has."""
    for folder in folders:
        found = {name: path for name in names for path in (folder / f"{name}.gz", folder / name) if path.is_file()}
        if len(found) == len(names):
            return found
    return None


def _read_idx(path: Path, read: Callable[[str], Tensor]) -> Tensor:
    """A tensor from a file in MNIST's format, unpacked to a temporary one first if it is compressed."""
    try:
        if path.suffix != ".gz":
            return read(str(path))
        with tempfile.NamedTemporaryFile() as plain, gzip.open(path) as packed:
            shutil.copyfileobj(packed, plain)
            plain.flush()
            return read(plain.name)
    except (AssertionError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError, zlib.error) as error:
        raise LrconvertError(
            f"{path}: not a file of MNIST's format, or damaged: {error or type(error).__name__}"
        ) from error


def _torchvision(name: str, make: Callable[..., Any], folder: Path, download: bool, wanted: str) -> Any:
    """What `make` returns; torchvision's ways to fail in one line, which ends with the files that it wants."""
    try:
        with warnings.catch_warnings():
            # CIFAR's pickles are from 2009; numpy 2.4 warns about how they spell a dtype.
            warnings.simplefilter("ignore")
            return make(download=download)
    except ImportError as error:
        raise LrconvertError(f"{name} needs {error.name}: pip install {error.name}") from None
    except (OSError, RuntimeError) as error:
        # MNIST's message has a paragraph for every mirror.
        reason = " ".join(str(error).split("got:")[-1].split()).rstrip(".")
        tried = f"downloading it failed ({reason})" if download else "downloading is off"
        raise LrconvertError(f"{name} is not in {folder}, and {tried}: {wanted}") from error


def digits(folder: Path, download: bool) -> Splits:
    """The 1,797 digits of 1×8×8 that scikit-learn ships, a fifth of them to test, always the same ones; 10 classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise LrconvertError("digits needs scikit-learn: pip install 'lrconvert[demo]'") from None
    data = load_digits()
    # They are shades from 0 to 16.
    pixels = torch.from_numpy(data.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    images = TensorImages(pixels, torch.from_numpy(data.target).long())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    fifth = len(images) // 5
    return Splits(images.part(order[fifth:]), None, images.part(order[:fifth]), 10)
