r"""The recipe where nothing is named beside other criteria with the same repair, on networks of more families.

VGG-16 at a quarter of its widths, a vision transformer and a ConvNeXt, both small, are trained on CIFAR-10 where their
weights are missing (as in ``default_score.py``, from images that calibrate too and none that judges), pruned in one
step and repaired from 1,024 training images by what the short call takes. So are a residual network and a transformer
for scikit-learn's 8 x 8 digits, trained in every run, from 300 images that nothing was trained on. Nothing is
fine-tuned. Accuracy is in % on all 10,000 and on 400 test images, which nothing was chosen on; the digits networks are
each the mean of three, trained from seeds 0 to 2 on splits of their own. (Two ResNet-20s:
``configs/cifar10_recipe.json``; networks at 224 pixels: ``repair_224.py``.)

    python benchmarks/default_recipe.py --data DIR --checkpoints DIR

``--data`` holds ``cifar10/``. Cells that ``results/default_recipe.json`` holds already are skipped. About three
quarters of an hour on one CPU core, of which ten minutes are training.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cifar_resnets import option_parser, test_images
from default_score import CALIBRATE, NETWORKS, Batches, batches, train
from few_images import accuracy
from resumable import ResumableCells
from torch import nn
from torch.nn import functional as F

from tp_twoaxis import prune_to_flops
from tp_twoaxis.data import digits
from tp_twoaxis.demo.network import DigitsResNet, shifted

CRITERIA = ("auto", "hull", "capture", "l2", "taylor", "fpgm")
KEY = ("network", "share", "importance")
EPOCHS, RATE, SEEDS = 40, 3e-3, (0, 1, 2)  # of the digits networks


def digits_vit() -> nn.Module:
    """Build a vision transformer of three blocks of 64 channels and four heads, on 16 patches of 2 x 2 pixels."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2, num_classes=10
    )


TRAINED = ("vgg16_quarter", "vit_small", "convnext_small")
DIGITS: dict[str, Callable[[], nn.Module]] = {"digits_cnn": DigitsResNet, "digits_vit": digits_vit}
SHARES = {name: NETWORKS[name].keep for name in TRAINED} | dict.fromkeys(DIGITS, (0.5, 0.35))


class Case(NamedTuple):
    """A trained network, images to calibrate and repair from, and images to judge on."""

    dense: nn.Module
    images: Batches
    judges: Batches


def cifar_case(name: str, arguments: argparse.Namespace) -> Case:
    """Load a network of CIFAR-10, trained where its weights are missing."""
    network, weights, folder = NETWORKS[name], arguments.checkpoints / f"{name}.safetensors", arguments.data / "cifar10"
    if not weights.exists():
        train(network, weights, folder)
    images = batches(folder, network.normalisation, 0, CALIBRATE, 32)
    return Case(network.load(weights), images, test_images(folder, network))


def digits_case(name: str, seed: int) -> Case:
    """Train a network of the digits: AdamW in one cycle, random shifts."""
    torch.manual_seed(seed)
    model, generator = DIGITS[name](), torch.Generator().manual_seed(seed)
    loader = digits("train", seed).loader(128, shuffle=True, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * len(loader))
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader, EPOCHS)):
        loss = F.cross_entropy(model(shifted(images, generator)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return Case(model.eval(), list(digits("calibration", seed).loader(100)), list(digits("test", seed).loader(200)))


def measure(cases: list[Case], cell: dict[str, Any]) -> dict[str, Any]:
    """Prune and repair a copy of each network, and judge it."""
    found, seconds, chosen = [], 0.0, []
    for dense, images, judges in cases:
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
        found.append(accuracy(model, judges))
        seconds += sum(value for phase, value in report.seconds.items() if "/" not in phase)
        chosen = [report.importance, *report.repair]
    seconds = round(seconds / len(cases), 1)
    return {**cell, "top1": mean(found), "chosen": chosen, "seconds": seconds}


def mean(values: list[float]) -> float:
    """Average accuracies in %."""
    return round(sum(values) / len(values), 2)


def page(cells: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """Draw the table for people."""
    lines = ["| network, MACs kept | " + " | ".join(CRITERIA) + " |", "| --- |" + " --- |" * len(CRITERIA)]
    found = {tuple(cell[key] for key in KEY): cell["top1"] for cell in cells}
    for name, shares in SHARES.items():
        for share in shares:
            texts = [str(found.get((name, share, criterion), "")) for criterion in CRITERIA]
            lines.append(f"| {name} {share:g}, dense {dense.get(name, '')} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(SHARES), choices=list(SHARES), help="default all")
    arguments = parser.parse_args()
    cells = ResumableCells("default_recipe", KEY, "CIFAR-10 and digits, see the script", page)
    for name in arguments.networks:
        cases = [digits_case(name, seed) for seed in SEEDS] if name in DIGITS else [cifar_case(name, arguments)]
        cells.dense.setdefault(name, mean([accuracy(case.dense, case.judges) for case in cases]))
        for share, criterion in itertools.product(SHARES[name], CRITERIA):
            if cell := cells.missing(name, share, criterion):
                cells.add(measure(cases, cell))
    print(cells.page())


if __name__ == "__main__":
    main()
