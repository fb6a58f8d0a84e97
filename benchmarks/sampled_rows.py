"""Do sampled rows rank channels like all rows? Against the noise of drawing other images.

On the CIFAR-10 ResNet-20 with conv shortcuts: Spearman correlation, mean and minimum over layers, between the
scores of a calibration that uses every position of 1,024 training images and (a) one that samples 4 to 32
positions of the same images, (b) one that uses every position of 1,024 other images. ``positions="auto"``
takes 16 here.

And do more images make up for fewer positions? The same correlation with a calibration on all positions of 2,048
other images, for 512 images with every position, 512 with a quarter of each layer's positions, and 128 with every
position, which are as many rows; mean over four draws, and half the distance between the lowest and the highest. About
three minutes on two CPU cores.

    python benchmarks/sampled_rows.py --data DIR/cifar10 --checkpoints DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from provenance import save
from rank_agreement import rank_correlations
from torch import nn

from tp_twoaxis import CalibrationStatistics, calibrate
from tp_twoaxis.data import ArrayDataset, ImageDataset, open_dataset
from tp_twoaxis.models import build_model, load_weights
from tp_twoaxis.runtime.layers import channel_layers

IMAGES = 1024
SCORES = ("capture", "hull", "low-overlap")
DRAWS, LARGE, SMALL, REFERENCE = 4, 512, 128, 2048
# a map's positions by the layers' stage, from the images' 32 x 32 on
POSITIONS = {"conv1": 1024, "layer1": 1024, "layer2": 256, "layer3": 64}


def agreement(first: CalibrationStatistics, second: CalibrationStatistics, score: str) -> dict[str, float]:
    rho = rank_correlations(first, second, score, first)
    return {"mean": round(sum(rho) / len(rho), 4), "minimum": round(min(rho), 3)}


def images_or_positions(model: nn.Module, images: ArrayDataset | ImageDataset) -> list[dict[str, Any]]:
    """Compare calibrations of equally many rows, and of equally many images, with a large one."""
    everything = {"all": [name for name in channel_layers(model) if name.partition(".")[0] in POSITIONS]}
    quarters: dict[str | int, list[str]] = {}
    for name in everything["all"]:
        quarters.setdefault(POSITIONS[name.partition(".")[0]] // 4, []).append(name)

    def gather(rows: range, layers: Mapping[Any, list[str]]) -> list[CalibrationStatistics]:
        loader = images.loader(128, rows)
        return [calibrate(model, loader, positions=p, layers=names, progress=False) for p, names in layers.items()]

    start = DRAWS * LARGE
    (reference,) = gather(range(start, start + REFERENCE), everything)
    found = []
    for calibrated_on, count, layers in (
        (f"{LARGE} images, all positions", LARGE, everything),
        (f"{LARGE} images, a quarter of the positions", LARGE, quarters),
        (f"{SMALL} images, all positions", SMALL, everything),
    ):
        row: dict[str, Any] = {"calibrated on": calibrated_on}
        draws = [gather(range(LARGE * draw, LARGE * draw + count), layers) for draw in range(DRAWS)]
        for score in SCORES:
            rho = [
                sum(agreement(part, reference, score)["mean"] * len(part) for part in parts) / len(everything["all"])
                for parts in draws
            ]
            row[score] = {"mean": round(sum(rho) / DRAWS, 4), "spread": round((max(rho) - min(rho)) / 2, 4)}
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the CIFAR-10 Parquet shards")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the safetensors files")
    arguments = parser.parse_args()
    model = build_model("cifar_resnet20_conv_shortcut")
    load_weights(model, arguments.checkpoints / "cifar10_resnet20_conv_shortcut.safetensors")
    normalised = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
    images = open_dataset(arguments.data, num_images=2 * IMAGES, **normalised)
    loader = images.loader(128, range(IMAGES))
    everything = calibrate(model, loader, positions="all")
    others = calibrate(model, images.loader(128, range(IMAGES, 2 * IMAGES)), positions="all")
    rows = [{"compared": "1,024 other images, all positions", **{s: agreement(everything, others, s) for s in SCORES}}]
    for positions in (4, 8, 16, 32):
        sampled = calibrate(model, loader, positions=positions)
        rows.append(
            {"compared": f"{positions} positions an image", **{s: agreement(everything, sampled, s) for s in SCORES}}
        )
    print(json.dumps(rows, indent=1))
    more = open_dataset(arguments.data, num_images=DRAWS * LARGE + REFERENCE, seed=1, **normalised)
    control = images_or_positions(model, more)
    save(
        "sampled_rows",
        "python benchmarks/sampled_rows.py --data DIR/cifar10 --checkpoints DIR",
        "CIFAR-10, of 25,000 training images 2,048 (seed 0) for the rows, 4,096 (seed 1) for images_or_positions",
        rows=rows,
        images_or_positions=control,
    )


if __name__ == "__main__":
    main()
