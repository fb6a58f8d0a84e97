r"""The recipe where nothing is named beside other criteria with the same repair, on networks of three more families.

VGG-16 at a quarter of its widths, a vision transformer and a ConvNeXt, both small, are trained on CIFAR-10 where their
weights are missing (as in ``default_score.py``, from images that calibrate too and none that judges), pruned in one
step and repaired from 1,024 training images by what the short call takes. Nothing is fine-tuned. Accuracy is in % on
all 10,000 test images, which nothing was chosen on. (Two ResNet-20s: ``configs/cifar10_recipe.json``; networks at 224
pixels: ``repair_224.py``.)

    python benchmarks/default_recipe.py --data DIR --checkpoints DIR

``--data`` holds ``cifar10/``. Cells that ``results/default_recipe.json`` holds already are skipped. About three
quarters of an hour on one CPU core, of which ten minutes are training.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

from cifar_resnets import option_parser, test_images
from default_score import CALIBRATE, NETWORKS, Batches, batches, train
from few_images import accuracy
from resumable import ResumableCells
from torch import nn

from tp_twoaxis import prune_to_flops

TRAINED = ("vgg16_quarter", "vit_small", "convnext_small")
CRITERIA = ("auto", "hull", "capture", "l2", "taylor", "fpgm")
KEY = ("network", "share", "importance")


def measure(dense: nn.Module, cell: dict[str, Any], images: Batches, judges: Batches) -> dict[str, Any]:
    """Prune and repair a copy of the network, and judge it."""
    model = copy.deepcopy(dense)
    report = prune_to_flops(
        model,
        images[0][0][:1],
        cell["importance"],
        flops=cell["share"],
        loader=images,
        max_images=None,
        progress=False,
    )
    seconds = round(sum(value for phase, value in report.seconds.items() if "/" not in phase), 1)
    return {**cell, "top1": accuracy(model, judges), "chosen": [report.importance, *report.repair], "seconds": seconds}


def page(cells: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """Draw the table for people."""
    lines = ["| network, MACs kept | " + " | ".join(CRITERIA) + " |", "| --- |" + " --- |" * len(CRITERIA)]
    found = {tuple(cell[key] for key in KEY): cell["top1"] for cell in cells}
    for name in TRAINED:
        for share in NETWORKS[name].keep:
            texts = [str(found.get((name, share, criterion), "")) for criterion in CRITERIA]
            lines.append(f"| {name} {share:g}, dense {dense.get(name, '')} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(TRAINED), choices=TRAINED, help="default all")
    arguments = parser.parse_args()
    cells = ResumableCells("default_recipe", KEY, "CIFAR-10, see the script", page)
    folder = arguments.data / "cifar10"
    for name in arguments.networks:
        network, weights = NETWORKS[name], arguments.checkpoints / f"{name}.safetensors"
        if not weights.exists():
            train(network, weights, folder)
        dense, judges = network.load(weights), test_images(folder, network)
        images = batches(folder, network.normalisation, 0, CALIBRATE, 32)
        cells.dense.setdefault(name, accuracy(dense, judges))
        for share, criterion in itertools.product(network.keep, CRITERIA):
            if cell := cells.missing(name, share, criterion):
                cells.add(measure(dense, cell, images, judges))
    print(cells.page())


if __name__ == "__main__":
    main()
