"""The catalog: one row makes a data set known, and says what has splits and what is the same."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tp_twoaxis.data import Normalisation, has_splits, open_dataset, same_images
from tp_twoaxis.data.catalog import CATALOG, DATASETS, CatalogEntry, normalisation_of
from tp_twoaxis.data.sources import TorchvisionSource
from tp_twoaxis.errors import TwoAxisError


class Clothes:
    """Grey images as torchvision's FashionMNIST holds them: a tensor without channels."""

    def __init__(self, root, train, download):
        if not train:
            raise RuntimeError("not found")
        self.data = torch.arange(2 * 28 * 28).reshape(2, 28, 28).to(torch.uint8)
        self.targets = torch.tensor([3, 4])


@pytest.fixture
def clothes(monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets, "FashionMNIST", Clothes)
    entry = CatalogEntry(
        Normalisation((0.1,) * 3, (0.2,) * 3),
        by_name=True,
        source=partial(TorchvisionSource, "FashionMNIST"),
        splits=("train", "test"),
    )
    monkeypatch.setitem(CATALOG, "clothes", entry)


def folder_of(root, *splits):
    for split in splits:
        (root / split / "class").mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(root / split / "class" / "0.png")
    return str(root)


def test_a_row_makes_a_data_set_known(clothes, tmp_path):
    data = open_dataset("clothes:/data")
    assert (data.mean, data.std, data.labels.tolist()) == ((0.1,) * 3, (0.2,) * 3, [3, 4])
    assert torch.equal(data.images, Clothes("", True, False).data[:, None].expand(-1, 3, -1, -1))
    assert has_splits("clothes:/data")
    assert not same_images(("clothes:/data", "train"), ("clothes:/data", "test"))
    assert open_dataset(folder_of(tmp_path / "my-clothes", "train")).mean == (0.1,) * 3
    with pytest.raises(TwoAxisError, match="clothes:/data: split: expected one of train, test, got 'val'"):
        open_dataset("clothes:/data", split="val")
    with pytest.raises(TwoAxisError, match=r"expected FashionMNIST in .* there, torchvision says: not found"):
        open_dataset("clothes:/data", split="test")
    with pytest.raises(TwoAxisError, match=r"cifar10:/root or .*clothes:/root, found no"):
        open_dataset(str(tmp_path / "nowhere"))


def test_the_longest_name_decides_the_normalisation():
    for name, expected in (("CIFAR100", "cifar100"), ("cifar10-parquet", "cifar10"), ("digits", "imagenet")):
        assert normalisation_of(name) == DATASETS[expected]


def test_every_data_set_with_a_source_has_splits_and_a_fitting_normalisation():
    for entry in CATALOG.values():
        assert (entry.source is None) == (entry.splits == ())
        assert len(entry.normalisation.mean) == len(entry.normalisation.std)


def test_what_has_splits(tmp_path):
    file = tmp_path / "shards" / "a.parquet"
    file.parent.mkdir()
    file.touch()
    (tmp_path / "flat").mkdir()
    expected = {
        "cifar10:/nowhere": True,
        "cifar100:": True,
        "digits:": False,
        "cifar10": False,
        str(file.parent): True,
        folder_of(tmp_path / "both", "train", "test"): True,
        folder_of(tmp_path / "one", "training", "class"): True,
        folder_of(tmp_path / "classes", "cat", "dog"): False,
        str(tmp_path / "flat"): False,
        str(file): False,
        str(tmp_path / "*.parquet"): False,
        str(tmp_path / "nowhere"): False,
    }
    assert {spec: has_splits(spec) for spec in expected} == expected


def test_same_images(tmp_path):
    both, one = folder_of(tmp_path / "both", "train", "test"), folder_of(tmp_path / "one", "class")
    cases = [
        (("cifar10:/a", "train"), ("cifar10:/a", "train"), True),
        (("cifar10:/a", "train"), ("cifar10:/a", "test"), False),
        (("cifar10:/a", "train"), (both, "test"), False),
        ((both, "train"), (both, "test"), False),
        ((both, "train"), (f"{both}/train", "test"), True),
        ((one, "train"), (one, "test"), True),  # no folder is named like a split: taken whole
        ((f"{tmp_path}/*.parquet", "train"), (f"{tmp_path}/*.parquet", "test"), True),  # not even opened
    ]
    for first, second, expected in cases:
        assert same_images(first, second) == same_images(second, first) == expected
    with pytest.raises(TwoAxisError, match="expected a split called val"):
        same_images((both, "train"), (both, "val"))
