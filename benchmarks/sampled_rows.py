"""Do sampled rows rank channels like all rows? Against the noise of drawing other images.

On the CIFAR-10 ResNet-20 with conv shortcuts: Spearman correlation, mean and minimum over layers, between the
scores of a calibration that uses every position of 1,024 training images and (a) one that samples 4 to 32
positions of the same images, (b) one that uses every position of 1,024 other images. ``positions="auto"``
takes 16 here. About two minutes on two CPU cores.

    python benchmarks/sampled_rows.py --data DIR/cifar10 --checkpoints DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from provenance import save
from scipy.stats import spearmanr

from tp_twoaxis import CalibrationStatistics, TwoAxisImportance, calibrate
from tp_twoaxis.data import open_dataset
from tp_twoaxis.models import build_model, load_weights

IMAGES = 1024
SCORES = ("capture", "hull", "low-overlap")


def agreement(first: CalibrationStatistics, second: CalibrationStatistics, score: str) -> dict[str, float]:
    one, other = TwoAxisImportance(first, score), TwoAxisImportance(second, score)
    rho = [float(spearmanr(one.layer_scores(name), other.layer_scores(name)).statistic) for name in first]
    return {"mean": round(sum(rho) / len(rho), 4), "minimum": round(min(rho), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the CIFAR-10 Parquet shards")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the safetensors files")
    arguments = parser.parse_args()
    model = build_model("cifar_resnet20_conv_shortcut")
    load_weights(model, arguments.checkpoints / "cifar10_resnet20_conv_shortcut.safetensors")
    images = open_dataset(
        arguments.data,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        num_images=2 * IMAGES,
    )
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
    save(
        "sampled_rows",
        "python benchmarks/sampled_rows.py --data DIR/cifar10 --checkpoints DIR",
        "CIFAR-10, 2,048 of 25,000 training images, seed 0",
        rows=rows,
    )


if __name__ == "__main__":
    main()
