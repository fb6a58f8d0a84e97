"""Data sets by name, in-memory batches and loaders."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from tp_twoaxis.data import (
    DATASETS,
    ArrayDataset,
    ArrayLoader,
    ImageDataset,
    digits,
    make_loader,
    open_dataset,
)
from tp_twoaxis.errors import TwoAxisError

DATA = os.environ.get("TP_TWOAXIS_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TP_TWOAXIS_DATA does not name the folder of real images")


def pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write_shard(path: Path, images: list, image_column: str = "img", **columns) -> None:
    rows = {image_column: [{"bytes": data, "path": None} for data in images], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path, row_group_size=2)


@pytest.fixture
def shards(tmp_path):
    """A folder of two train shards and a test shard; row i of train is pixels(i) with label i % 3."""
    for shard in range(2):
        rows = range(5 * shard, 5 * shard + 5)
        kind = "PNG" if shard else "WEBP"
        images = [encoded(pixels(i), kind) for i in rows]
        write_shard(tmp_path / "set" / f"train-0000{shard}-of-00002.parquet", images, label=[i % 3 for i in rows])
    write_shard(tmp_path / "set" / "test-00000-of-00001.parquet", [encoded(pixels(99))], label=[1])
    return tmp_path / "set"


def test_parquet_folder_is_exact_and_in_order(shards):
    data = open_dataset(str(shards))
    assert isinstance(data, ArrayDataset)
    assert len(data) == 10
    assert data.labels.tolist() == [i % 3 for i in range(10)]
    for i in range(10):
        assert np.array_equal(data.images[i].permute(1, 2, 0).numpy(), pixels(i))
    assert len(open_dataset(str(shards), split="test")) == 1


def test_parquet_file_glob_and_data_folder(shards, tmp_path):
    assert len(open_dataset(str(shards / "train-00001-of-00002.parquet"))) == 5
    assert len(open_dataset(str(shards / "t*.parquet"))) == 11
    shards.rename(tmp_path / "data")
    assert len(open_dataset(str(tmp_path))) == 10


def test_large_images_are_read_lazily(tmp_path):
    images = [pixels(i, 90, 120) for i in range(5)]
    write_shard(tmp_path / "validation.parquet", [encoded(i) for i in images], "image", fine_label=range(5))
    data = open_dataset(str(tmp_path), split="val", image_size=80, crop_fraction=80 / 90)
    assert isinstance(data, ImageDataset)
    image, label = data[4]
    assert (image.shape, image.dtype, label) == ((3, 80, 80), torch.float32, 4)
    mean, std = (torch.tensor(part)[:, None, None] for part in DATASETS["imagenet"])
    centre = torch.from_numpy(images[4][5:85, 20:100]).permute(2, 0, 1)
    torch.testing.assert_close(image, (centre / 255 - mean) / std)
    assert open_dataset(str(tmp_path), split="validation")[0][0].shape == (3, 224, 224)
    again = pickle.loads(pickle.dumps(data))  # workers of a DataLoader receive it so
    assert torch.equal(again[3][0], data[3][0])
    with pytest.raises(IndexError):
        data[5]


def test_resize_is_torchvisions(tmp_path):
    from torchvision.transforms import v2

    image = pixels(0, 75, 100)
    write_shard(tmp_path / "a.parquet", [encoded(image)])
    mine = open_dataset(str(tmp_path / "a.parquet"), image_size=28, mean=[0.0] * 3, std=[1.0] * 3)[0]
    steps = v2.Compose([v2.Resize(32), v2.CenterCrop(28), v2.PILToTensor()])
    assert torch.equal((mine * 255).round().byte(), steps(Image.fromarray(image)))


def test_small_images_can_be_enlarged(shards):
    data = open_dataset(str(shards), image_size=96)
    assert isinstance(data, ImageDataset)
    assert data[0][0].shape == (3, 96, 96)
    assert open_dataset(str(shards), image_size=16).images.shape == (10, 3, 16, 16)


@pytest.mark.parametrize(
    ("columns", "label_column", "expected"),
    [
        ({"label": [3, 4], "other": [1, 2]}, None, [3, 4]),
        ({"coarse_label": [1, 2], "fine_label": [3, 4]}, None, [3, 4]),
        ({"coarse_label": [1, 2], "fine_label": [3, 4]}, "coarse_label", [1, 2]),
        ({"species": [5, 6]}, None, [5, 6]),
        ({"note": ["a", "b"]}, None, None),
        ({"label": [-1, -1]}, None, None),
    ],
)
def test_label_columns(tmp_path, columns, label_column, expected):
    write_shard(tmp_path / "a.parquet", [encoded(pixels(0)), encoded(pixels(1))], **columns)
    data = open_dataset(str(tmp_path / "a.parquet"), label_column=label_column)
    if expected is None:
        assert data.labels is None
        assert isinstance(data[0], torch.Tensor)
        assert isinstance(next(iter(make_loader(data, 2))), torch.Tensor)
    else:
        assert data.labels.tolist() == expected


def test_normalisation_follows_the_name(shards, tmp_path):
    assert open_dataset(str(shards)).mean == DATASETS["imagenet"].mean
    shards.rename(tmp_path / "CIFAR100")
    assert open_dataset(str(tmp_path / "CIFAR100")).std == DATASETS["cifar100"].std
    assert open_dataset(str(tmp_path / "CIFAR100" / "test*")).std == DATASETS["cifar100"].std
    (tmp_path / "CIFAR100").rename(tmp_path / "cifar10")
    data = open_dataset(str(tmp_path / "cifar10"), mean=(0.5, 0.5, 0.5))
    assert (data.mean, data.std) == ((0.5, 0.5, 0.5), DATASETS["cifar10"].std)


@pytest.fixture
def folders(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            for i in range(2 + label):
                path = tmp_path / "images" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(pixels(i, 70, 70)))
    return tmp_path / "images"


def test_image_folder_agrees_with_torchvision(folders):
    from torchvision.datasets import ImageFolder

    for path, split in ((folders, "train"), (folders, "validation"), (folders / "val", "test")):
        data = open_dataset(str(path), split=split, image_size=70)
        root = folders / "train" if split == "train" else folders / "val"
        reference = ImageFolder(str(root))
        assert data.labels.tolist() == reference.targets
        mean, std = (torch.tensor(part)[:, None, None] for part in DATASETS["imagenet"])
        pixel_values = ((data[3][0] * std + mean) * 255).round().byte().permute(1, 2, 0)
        assert np.array_equal(pixel_values.numpy(), np.asarray(reference[3][0]))


def test_flat_folder_has_images_only(folders):
    data = open_dataset(str(folders / "train" / "bee"))
    assert (len(data), data.labels) == (3, None)


def test_torchvision_cifar_in_memory(monkeypatch, tmp_path):
    from torchvision import datasets

    class Fake:
        base_folder, url = "cifar-10-batches-py", "https://example.org"

        def __init__(self, root, train, download):
            assert not download
            self.data = np.stack([pixels(i, 32, 32) for i in range(4 if train else 2)])
            self.targets = list(range(len(self.data)))

    with pytest.raises(TwoAxisError, match="cifar-10-batches-py"):
        open_dataset(f"cifar10:{tmp_path}")
    with pytest.raises(TwoAxisError, match="one of train, test"):
        open_dataset(f"cifar10:{tmp_path}", split="val")
    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    data = open_dataset(f"cifar10:{tmp_path}", split="test")
    assert (len(data), data.labels.tolist(), data.mean) == (2, [0, 1], DATASETS["cifar10"].mean)
    assert np.array_equal(data.images[1].permute(1, 2, 0).numpy(), pixels(1, 32, 32))


def test_errors_say_what_is_there(shards, folders, tmp_path):
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "ints" / "a.parquet", [encoded(pixels(0))], a=[1], b=[2])
    write_shard(tmp_path / "null" / "a.parquet", [encoded(pixels(0))] * 2, label=pd.array([1, None], "Int64"))
    write_shard(tmp_path / "none" / "a.parquet", [encoded(pixels(0)), None], label=[1, 2])
    write_shard(tmp_path / "bad" / "a.parquet", [encoded(pixels(0)), b"no image"], label=[1, 2])
    mixed = [encoded(pixels(0)), encoded(pixels(1, 9, 8))]
    write_shard(tmp_path / "mixed" / "a.parquet", mixed, label=[1, 2])
    write_shard(tmp_path / "zero" / "a.parquet", [])
    pd.DataFrame({"x": [1.0]}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    (folders / "train" / "ant" / "0.png").write_text("no image")
    for spec, options, message in [
        ("nowhere", {}, "check the path"),
        ("empty", {}, "found none"),
        ("set", {"split": "val"}, "got test, train"),
        ("set", {"split": "dev"}, "expected one of train"),
        ("images", {"split": "test"}, "got train, val"),
        ("set", {"label_column": "fine"}, "label: int64"),
        ("set", {"mean": (0.5,)}, "3 numbers"),
        ("set", {"image_size": 0}, "image_size"),
        ("set", {"crop_fraction": 0}, "crop_fraction"),
        ("ints/*.parquet", {}, "label_column"),
        ("null/*.parquet", {}, "1 are null"),
        ("none/*.parquet", {}, r"row 1: .*embed"),
        ("bad/*.parquet", {}, r"a\.parquet row 1"),
        ("mixed/*.parquet", {}, "row 1: .*set image_size"),
        ("zero/*.parquet", {}, "struct column|at least one row"),
        ("x.parquet", {}, "x: double"),
        ("text.parquet", {}, "Parquet file"),
        ("images", {}, r"0\.png"),
        ("{set,mixed}", {}, "check the path"),
    ]:
        with pytest.raises(TwoAxisError, match=message):
            open_dataset(str(tmp_path / spec), **options)
    write_shard(shards / "train-2.parquet", [encoded(pixels(0))], "image", label=[0])
    with pytest.raises(TwoAxisError, match="shards of one data set"):
        open_dataset(str(shards))


def test_class_named_like_a_split_needs_no_split(tmp_path):
    """Only exact names are splits: a class called `tests` is a class."""
    for name in ("tests", "others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encoded(pixels(0)))
    assert open_dataset(str(tmp_path), split="val").labels.tolist() == [0, 1]


@pytest.fixture
def arrays():
    images = torch.arange(10 * 3 * 32 * 32).reshape(10, 3, 32, 32).to(torch.uint8)
    return ArrayDataset(images, torch.arange(10), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


def test_batches_equal_items(arrays):
    loader = arrays.loader(4)
    assert len(loader) == 3
    for _ in range(2):  # re-iterable
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [4, 4, 2]
        assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack([i for i, _ in arrays]))
        assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))


def test_indices_and_shuffle(arrays):
    assert next(iter(arrays.loader(9, [7, 2, 7])))[1].tolist() == [7, 2, 7]
    assert list(arrays.loader(2, [])) == []
    loader = arrays.loader(10, shuffle=True, generator=torch.Generator().manual_seed(3))
    first, second = (next(iter(loader))[1].tolist() for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(10))
    again = arrays.loader(10, shuffle=True, generator=torch.Generator().manual_seed(3))
    assert next(iter(again))[1].tolist() == first
    for wrong in ([10], [-1]):
        with pytest.raises(TwoAxisError, match=r"expected 0\.\.9"):
            arrays.loader(2, wrong)
    with pytest.raises(TwoAxisError, match="batch_size"):
        arrays.loader(0)


def test_augmented_images_are_crops_of_the_padded_ones(arrays):
    original = torch.nn.functional.pad(arrays.images, (4,) * 4)
    loader = arrays.loader(10, augment=True, generator=torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(3):
        images, _ = next(iter(loader))
        for i in range(10):
            crops = {
                (dy, dx, mirrored): original[i, :, dy : dy + 32, dx : dx + 32].flip((-1,) if mirrored else ())
                for dy in range(9)
                for dx in range(9)
                for mirrored in (False, True)
            }
            fits = [key for key, crop in crops.items() if torch.equal(arrays.normalise(crop), images[i])]
            assert len(fits) == 1
            seen.add(fits[0])
    assert len(seen) > 20  # offsets and mirroring differ from image to image
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_array_dataset_checks_what_it_gets():
    images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    for wrong in (
        (images.float(), labels, (0.0,), (1.0,)),
        (images[0], labels, (0.0,), (1.0,)),
        (images, labels[:1], (0.0,), (1.0,)),
        (images, labels.float(), (0.0,), (1.0,)),
        (images, labels, (0.0, 0.0), (1.0, 1.0)),
        (images, labels, (0.0,), (0.0,)),
    ):
        with pytest.raises(TwoAxisError, match="expected"):
            ArrayDataset(*wrong)


def test_make_loader_draws_a_fixed_part(arrays, shards):
    loader = make_loader(arrays, 3, num_images=5, seed=1)
    assert isinstance(loader, ArrayLoader)
    drawn = [torch.cat([labels for _, labels in loader]).tolist() for _ in range(2)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 5
    others = {tuple(make_loader(arrays, 3, num_images=5, seed=s).indices.tolist()) for s in range(5)}
    assert len(others) > 1
    lazy = make_loader(open_dataset(str(shards), image_size=80), 4, num_images=6, seed=1)
    assert isinstance(lazy, DataLoader)
    assert sum(len(labels) for _, labels in lazy) == 6
    plain = TensorDataset(torch.zeros(10, 1), torch.arange(10))  # equal seeds draw equal rows of any data set
    assert torch.cat([y for _, y in make_loader(plain, 3, num_images=5, seed=1)]).tolist() == drawn[0]
    assert len(make_loader(arrays, 3, num_images=99).indices) == 10
    for options in ({"num_images": 0}, {"batch_size": 0}):
        with pytest.raises(TwoAxisError, match="at least 1"):
            make_loader(arrays, **{"batch_size": 2, **options})


def test_digits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    parts = [digits(split) for split in ("train", "calibration", "test")]
    assert [len(part) for part in parts] == [1097, 300, 400]
    together = torch.cat([part.images for part in parts]).flatten(1)
    original = torch.from_numpy(np.rint(load_digits().data * 255 / 16)).byte()
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, original.tolist()))
    assert torch.equal(digits("test").images, parts[2].images)
    assert not torch.equal(digits("test", seed=1).images, parts[2].images)
    everything = ArrayDataset(torch.cat([p.images for p in parts]), None, *DATASETS["digits"])
    whole = everything.normalise(everything.images)
    assert abs(float(whole.mean())) < 1e-3
    assert abs(float(whole.std()) - 1) < 1e-3
    with pytest.raises(TwoAxisError, match="calibration"):
        digits("val")


@needs_data
def test_real_cifar_shards():
    data = open_dataset(str(Path(DATA, "cifar10")), split="test")
    assert data.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(data.labels).tolist() == [1000] * 10
    channels = data.images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(channels, torch.tensor(data.mean).double(), atol=0.01, rtol=0)


def test_open_dataset_draws_before_decoding_the_images_make_loader_would(shards: Path) -> None:
    drawn = open_dataset(str(shards), num_images=4, seed=3)
    loader = make_loader(open_dataset(str(shards)), batch_size=10, num_images=4, seed=3)
    images, labels = next(iter(loader))
    assert len(drawn) == 4
    assert torch.equal(torch.stack([drawn[i][0] for i in range(4)]), images)
    assert torch.equal(drawn.labels, labels)
    assert len(loader.sampler) == 4


def test_tiny_imagenet_as_it_is_unpacked(tmp_path):
    for index, name in enumerate(("n02", "n01", "n03")):
        folder = tmp_path / "train" / name / "images"
        folder.mkdir(parents=True)
        Image.new("RGB", (16, 16), (80 * index, 0, 0)).save(folder / f"{name}_0.JPEG")
        (folder.parent / f"{name}_boxes.txt").write_text("not an image")
    (tmp_path / "val" / "images").mkdir(parents=True)
    lines = []
    for index, name in enumerate(("n03", "n01")):
        Image.new("RGB", (16, 16)).save(tmp_path / "val" / "images" / f"val_{index}.JPEG")
        lines.append(f"val_{index}.JPEG\t{name}\t0\t0\t15\t15")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    assert open_dataset(str(tmp_path), split="train").labels.tolist() == [0, 1, 2]
    # numbered like the training classes, though one of them has no image here
    assert open_dataset(str(tmp_path), split="val").labels.tolist() == [2, 0]
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(TwoAxisError, match="unpack the data set again"):
        open_dataset(str(tmp_path), split="val")
