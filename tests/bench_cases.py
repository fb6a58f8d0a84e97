"""A sweep of a second or two on generated images, and criteria of a user's own."""

from __future__ import annotations

import functools
import io
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from cases import conv_net
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tp_twoaxis.benchmark import BenchmarkConfig, DataConfig, NetworkConfig, cross
from tp_twoaxis.data import DATASETS, ArrayDataset
from tp_twoaxis.importance.baselines.weight_criteria import RandomImportance
from tp_twoaxis.importance.two_axis import TwoAxisImportance

CLASSES = 5


def pictures(count: int, seed: int) -> list[tuple[int, np.ndarray]]:
    """Pairs of label and uint8 [8, 8, 3]: brightness tells the class, noise hides it a little."""
    rng = np.random.default_rng(seed)
    labels = [i % CLASSES for i in range(count)]
    return [(label, rng.integers(20 * label, 120 + 25 * label, (8, 8, 3), dtype=np.uint8)) for label in labels]


def write_folders(root: Path, train: int = 60, test: int = 40) -> Path:
    for split, count, seed in (("train", train, 0), ("test", test, 1)):
        for i, (label, pixels) in enumerate(pictures(count, seed)):
            path = root / split / f"class{label}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def write_parquet(root: Path, train: int = 60, test: int = 40) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", train, 0), ("test", test, 1)):
        rows = []
        for label, pixels in pictures(count, seed):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": label})
        pd.DataFrame(rows).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


@functools.cache
def checkpoint() -> str:
    """Weights of the tests' network, trained until pruning has something to lose; one file a process."""
    net = conv_net()
    images = torch.stack([torch.from_numpy(p).permute(2, 0, 1) / 255 for _, p in pictures(60, 0)])
    mean, std = (torch.tensor(part)[:, None, None] for part in DATASETS["imagenet"])
    labels = torch.tensor([label for label, _ in pictures(60, 0)])
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net((images - mean) / std), labels).backward()
        optimizer.step()
    path = Path(tempfile.mkdtemp(prefix="bench_cases")) / "net.safetensors"
    save_file(net.state_dict(), path)
    return str(path)


def drawn_pictures(split: str, seed: int) -> ArrayDataset:
    """A data set of a user's own, other images for each seed."""
    labels, pixels = zip(*pictures(40 if split == "test" else 60, 2 * seed + (split == "test")), strict=True)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return ArrayDataset(images, torch.tensor(labels), *DATASETS["imagenet"])


def fixed_pictures(split: str) -> ArrayDataset:
    return drawn_pictures(split, 0)


def tiny_config(data: Path, **changes) -> BenchmarkConfig:
    """2 seeds x 3 criteria x 2 shares on the tests' convolutional network: 12 trials."""
    options = {
        "networks": (NetworkConfig("net", "cases:conv_net", str(data), checkpoint()),),
        "methods": cross(["capture", "l2", "random"]),
        "keep": (0.7, 0.4),
        "seeds": (42, 123),
        "data": DataConfig(calibration_images=24, selection_images=10, batch_size=12),
    }
    return BenchmarkConfig(**{**options, **changes})


def numbers(folder) -> list[tuple]:
    """What must not depend on how often a sweep was interrupted, nor on how many processes ran it."""
    return [
        (r["key"], r["status"], r.get("macs"), r.get("thop_macs"), r.get("accuracy"), r.get("kept_channels"))
        for r in folder.read_all()
    ]


def broken(stats):
    raise RuntimeError("this criterion never works")


def own_score(stats, seed):
    """A user's score, built from the shared statistics."""
    assert seed in (42, 123)
    return TwoAxisImportance(stats, lambda layer: layer.variance.sqrt())


def by_seed(seed):
    return RandomImportance(seed)


def kills_its_worker_once(seed):
    """:func:`by_seed`, but the first process that asks for it ends at once, as if the machine had been switched off."""
    marker = Path(os.environ["KILLED_ONCE"])
    if not marker.exists():
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return RandomImportance(seed)


def kills_its_worker(seed):
    os.kill(os.getpid(), signal.SIGKILL)


def not_callable():
    return 7


class PlainConvNet(nn.Sequential):
    """Without biases and norms: every counter agrees with pencil and paper. [n, 3, 8, 8] -> [n, 5]."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False),
            nn.Conv2d(2 * width, width, 1, bias=False),
            nn.Flatten(),
            nn.Linear(width * 16, CLASSES, bias=False),
        )


def plain_conv_net() -> PlainConvNet:
    torch.manual_seed(0)
    return PlainConvNet().eval()


def analytic_macs(net: PlainConvNet) -> int:
    """Multiply-adds by hand: outputs x what each is made of."""
    first, second, third, _, head = net
    return (
        first.out_channels * 8 * 8 * 3 * 9
        + second.out_channels * 4 * 4 * first.out_channels * 9
        + third.out_channels * 4 * 4 * second.out_channels
        + head.out_features * third.out_channels * 16
    )
