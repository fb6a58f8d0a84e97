"""Image data by name for the command line, the benchmark and the examples."""

from tp_twoaxis.data.array_dataset import ArrayDataset, ArrayLoader
from tp_twoaxis.data.augmentation import crop_and_flip
from tp_twoaxis.data.catalog import DATASETS, Normalisation
from tp_twoaxis.data.image_dataset import ImageDataset
from tp_twoaxis.data.loaders import make_loader, training_batches
from tp_twoaxis.data.opening import digits, has_splits, open_dataset, same_images

__all__ = [
    "DATASETS",
    "ArrayDataset",
    "ArrayLoader",
    "ImageDataset",
    "Normalisation",
    "crop_and_flip",
    "digits",
    "has_splits",
    "make_loader",
    "open_dataset",
    "same_images",
    "training_batches",
]
