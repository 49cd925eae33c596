"""Images to train on: found by name, split, augmented, and cut into batches that a resumed run meets again."""

from lrconvert.training.data.augment import Augment
from lrconvert.training.data.datasets import DATASETS, Dataset, open_dataset, open_images, open_made
from lrconvert.training.data.loader import Loader
from lrconvert.training.data.source import Batch, Source

__all__ = ["DATASETS", "Augment", "Batch", "Dataset", "Loader", "Source", "open_dataset", "open_images", "open_made"]
