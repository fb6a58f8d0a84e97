r"""Repairs of two ResNet-20s from many images, with and without training: what more images and more steps are worth.

The two third-party CIFAR-10 ResNet-20s are pruned by ``anticipating`` and repaired from 20,000 training images, whose
labels nothing reads: by ``joint``, which takes no training step, and by ``distill`` with 4,000 steps, four times its
default. From 2,048 images and with its default: ``configs/cifar10_label_free.json``. Accuracy is in % on all 10,000
test images, which nothing was chosen on.

    python benchmarks/many_images.py --data DIR --checkpoints DIR

``--data`` holds ``cifar10/``. Cells that ``results/many_images.json`` holds already are skipped. About an hour and
three quarters on one CPU core.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

from cifar_resnets import CIFAR_NETWORKS, EXAMPLE, dense_networks, draw, option_parser, test_images
from default_score import Batches
from few_images import accuracy
from resumable import ResumableCells
from torch import nn

from tp_twoaxis import prune_to_flops

SHARES = (0.5, 0.35)
REPAIRS = (("joint", 0), ("distill", 4000))
IMAGES = 20_000
KEY = ("network", "share", "repair", "training_steps")


def measure(dense: nn.Module, cell: dict[str, Any], images: Batches, test: Batches) -> dict[str, Any]:
    """Prune and repair a copy of the network, and judge it."""
    model = copy.deepcopy(dense)
    report = prune_to_flops(
        model,
        EXAMPLE,
        "anticipating",
        flops=cell["share"],
        repair=cell["repair"],
        loader=images,
        max_images=None,
        training_steps=cell["training_steps"] or 1,
        progress=False,
    )
    seconds = round(sum(value for phase, value in report.seconds.items() if "/" not in phase), 1)
    notes = [note for note in report.notes if "repair ran on" in note or "distill" in note]
    return {**cell, "top1": accuracy(model, test), "seconds": seconds, "notes": notes}


def page(cells: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """Draw the table for people."""
    heads = [f"{repair}, {steps} steps" if steps else repair for repair, steps in REPAIRS]
    lines = ["| network, MACs kept | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    found = {tuple(cell[key] for key in KEY): cell["top1"] for cell in cells}
    for name, share in itertools.product(CIFAR_NETWORKS, SHARES):
        own = [found.get((name, share, *treatment)) for treatment in REPAIRS]
        if any(own):
            share_of_dense = ["" if top1 is None else f"{top1} ({100 * top1 / dense[name]:.1f})" for top1 in own]
            lines.append(f"| {name} {share:g}, dense {dense[name]} | {' | '.join(share_of_dense)} |")
    title = f"Top-1 accuracy in %, and in brackets in % of the dense network's, from {IMAGES:,} images without labels:"
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument(
        "--networks", nargs="+", default=list(CIFAR_NETWORKS), choices=CIFAR_NETWORKS, help="default all"
    )
    arguments = parser.parse_args()
    cells = ResumableCells("many_images", KEY, "CIFAR-10, see the script", page)
    for name, network, dense, folder in dense_networks(arguments):
        if name not in arguments.networks:
            continue
        test, images = test_images(folder, network), draw(folder, network, 0, range(IMAGES))
        cells.dense.setdefault(name, accuracy(dense, test))
        for share, (repair, steps) in itertools.product(SHARES, REPAIRS):
            if cell := cells.missing(name, share, repair, steps):
                cells.add(measure(dense, cell, images, test))
    print(cells.page())


if __name__ == "__main__":
    main()
