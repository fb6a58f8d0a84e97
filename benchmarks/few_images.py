r"""What the short call does with few images, with images of another data set, and with noise.

Trained networks are pruned in one step, with importance and repair left out, from 16 to 256 images of their own data,
from 256 images of another data set and from 256 of noise. Beside it stand the same selection with BatchNorm
re-estimated only, another score with the same repair, and L2 with BatchNorm re-estimated. Accuracy is in % on test
images, which nothing was chosen on; the rule itself was chosen on training images held out of calibration.

    python benchmarks/few_images.py --data DIR --checkpoints DIR

``--data`` holds ``cifar10/``, ``cifar100/`` and ``imagenet/`` with ``sample.parquet`` and ``nette.parquet``. Cells that
``results/few_images.json`` holds already are skipped. About half an hour on one CPU core.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from cifar_resnets import test_images
from default_score import NETWORKS, Batches, batches, right
from resumable import ResumableCells
from torch import nn

from tp_twoaxis import prune_to_flops

SHARES = {"resnet20_conv": 0.5, "resnet20_a": 0.5, "mobilenet_v1": 0.65}
SOURCES = (("own", 16), ("own", 64), ("own", 256), ("other", 256), ("noise", 256))
TREATMENTS = (("auto", "auto"), ("auto", "bn"), ("hull", "auto"), ("l2", "bn"))
KEY = ("network", "source", "images", "importance", "repair")


def read(data: Path, name: str, source: str, count: int) -> Batches:
    """Read images to calibrate and repair from; labels are of no use here."""
    network = NETWORKS[name]
    size = 224 if network.on_imagenet else 32
    own = data / ("imagenet/sample.parquet" if network.on_imagenet else "cifar10")
    other = data / ("cifar10" if network.on_imagenet else "cifar100")
    if source == "noise":
        drawn = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
        return list(zip(drawn.split(50), torch.zeros(count, dtype=torch.long).split(50), strict=True))
    if source == "own":
        return batches(own, network.normalisation, 0, count, size)
    # labels of another data set are none of this network's classes
    return [(x, torch.zeros_like(y)) for x, y in batches(other, network.normalisation, 0, count, size)]


def accuracy(model: nn.Module, judges: Batches) -> float:
    """Top-1 accuracy in %."""
    return round(100 * float(right(model, judges).double().mean()), 2)


def measure(dense: nn.Module, cell: dict[str, Any], images: Batches, judges: Batches) -> dict[str, Any]:
    """Prune and repair a copy of the network, and judge it."""
    model = copy.deepcopy(dense)
    report = prune_to_flops(
        model,
        images[0][0][:1],
        cell["importance"],
        flops=SHARES[cell["network"]],
        repair=cell["repair"],
        loader=images,
        progress=False,
    )
    held_back = any("held back" in note for note in report.notes)
    return {**cell, "top1": accuracy(model, judges), "chosen": [report.importance, *report.repair], "bn": held_back}


def page(cells: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """Draw the table for people."""
    lines = ["| network | images | " + " | ".join(f"{a}, {b}" for a, b in TREATMENTS) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(TREATMENTS))
    found = {tuple(cell[key] for key in KEY): cell for cell in cells}
    for name, (source, count) in itertools.product(SHARES, SOURCES):
        own = [found.get((name, source, count, *treatment)) for treatment in TREATMENTS]
        if any(own):
            texts = ["" if c is None else f"{c['top1']}" + (" (held back)" if c["bn"] else "") for c in own]
            title = f"{name} {SHARES[name]:g}, dense {dense[name]}"
            lines.append(f"| {title} | {count} {source} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with cifar10/, cifar100/ and imagenet/")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the third-party safetensors files")
    parser.add_argument("--networks", nargs="+", default=list(SHARES), choices=list(SHARES), help="default all")
    arguments = parser.parse_args()
    cells = ResumableCells("few_images", KEY, "CIFAR-10, CIFAR-100 and ImageNet, see the script", page)
    for name in arguments.networks:
        network = NETWORKS[name]
        dense = network.load(arguments.checkpoints / f"{network.weights}.safetensors")
        judges = (
            batches(arguments.data / "imagenet" / "nette.parquet", network.normalisation, 0, 1000, 224)
            if network.on_imagenet
            else test_images(arguments.data / "cifar10", network)
        )
        cells.dense.setdefault(name, accuracy(dense, judges))
        for (source, count), treatment in itertools.product(SOURCES, TREATMENTS):
            if cell := cells.missing(name, source, count, *treatment):
                cells.add(measure(dense, cell, read(arguments.data, name, source, count), judges))
    print(cells.page())


if __name__ == "__main__":
    main()
