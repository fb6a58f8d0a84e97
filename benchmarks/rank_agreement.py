"""Does calibration on sampled positions rank channels as all positions do? For every score of the statistics.

On the two third-party CIFAR-10 ResNet-20s (1,024 training images) and on MobileNetV1-0.75 and EfficientNet-Lite0 at
224 pixels (500 images of ImageNet): Spearman correlation in each convolution, of the channels whose scores differ,
between ``calibrate()`` as it is and ``positions="all"`` on the same images; median and worst layer. Beside it stands
the same for all positions of as many other images, the noise that there is anyway. Four minutes on two CPU cores.

    python benchmarks/rank_agreement.py --data DIR --checkpoints DIR
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from cifar_resnets import CIFAR_NETWORKS, draw, option_parser
from default_score import NETWORKS, Batches, batches
from provenance import save
from scipy.stats import spearmanr
from torch import nn

from tp_twoaxis import CalibrationStatistics, TwoAxisImportance, calibrate
from tp_twoaxis.scores import SCORES

CIFAR_IMAGES, IMAGENET_IMAGES = 1024, 500


def rank_correlations(
    first: CalibrationStatistics, second: CalibrationStatistics, score: str, layers: Iterable[str]
) -> list[float]:
    """Spearman correlation between a score's values from two calibrations, in some layers."""
    one, other = TwoAxisImportance(first, score), TwoAxisImportance(second, score)
    return [float(spearmanr(one.layer_scores(name), other.layer_scores(name)).statistic) for name in layers]


def convolutions(stats: CalibrationStatistics) -> list[str]:
    """Names of the convolutions."""
    return [name for name, entry in stats.layers.items() if entry.kind == "Conv2d"]


def agreement(first: CalibrationStatistics, second: CalibrationStatistics, score: str) -> dict[str, float]:
    """Median and worst rank correlation over the convolutions."""
    found = rank_correlations(first, second, score, convolutions(first))
    rho = [value for value in found if not math.isnan(value)]  # a depthwise layer has one score for all channels
    return {"median": round(statistics.median(rho), 4), "worst": round(min(rho), 3)}


def compare(name: str, model: nn.Module, own: Batches, others: Batches) -> Iterator[dict[str, Any]]:
    """Rows of the table for one network."""
    sampled = calibrate(model, own, max_images=None, progress=False)
    everything = calibrate(model, own, max_images=None, positions="all", progress=False)
    elsewhere = calibrate(model, others, max_images=None, positions="all", progress=False)
    for score in SCORES:
        yield {
            "network": name,
            "score": score,
            "sampled positions": agreement(everything, sampled, score),
            "other images": agreement(everything, elsewhere, score),
        }


def main() -> None:
    arguments = option_parser(__doc__).parse_args()
    rows = []
    for name, network in NETWORKS.items():
        if network.weights is None:
            continue
        model = network.load(arguments.checkpoints / f"{network.weights}.safetensors")
        if name in CIFAR_NETWORKS:
            folder = arguments.data / "cifar10"
            own, others = (draw(folder, network, 0, range(i * CIFAR_IMAGES, (i + 1) * CIFAR_IMAGES)) for i in (0, 1))
        else:
            path = arguments.data / "imagenet" / "sample.parquet"
            own, others = (
                batches(path, network.normalisation, i * IMAGENET_IMAGES, (i + 1) * IMAGENET_IMAGES, 224)
                for i in (0, 1)
            )
        for row in compare(name, model, own, others):
            rows.append(row)
            print(json.dumps(row), flush=True)
    save(
        "rank_agreement",
        "python benchmarks/rank_agreement.py --data DIR --checkpoints DIR",
        "CIFAR-10 training images; ImageNet, an image of each class",
        rows=rows,
    )


if __name__ == "__main__":
    main()
