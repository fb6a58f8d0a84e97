"""What scoring a ResNet-50 costs, statistics in hand: processor seconds by score, and by score and layer width.

The statistics are of random images and random weights; their values do not matter to the time, how wide the
layers are does. Each score runs over all 54 layers (26,560 channels in the convolutions and 1,000 in the head, up to
2,048 in one layer) with what every user pays: variances and correlations are derived from the moments anew for each
score. Seconds are the processor's, summed over threads, so that other programs on the machine do not count: with
one thread (OMP_NUM_THREADS=1) they are what a clock shows on an idle machine. Reported are medians over the rounds.

    OMP_NUM_THREADS=1 python benchmarks/scoring_speed.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict

import torch
from provenance import save
from tqdm import tqdm

from tp_twoaxis import CalibrationStatistics, calibrate
from tp_twoaxis.models import build_model
from tp_twoaxis.scores import SCORES, greedy_hulls
from tp_twoaxis.scores.named_scores import evaluate
from tp_twoaxis.statistics import LayerStatistics

SIZE, IMAGES, BATCH = 64, 96, 32


def calibrated() -> CalibrationStatistics:
    torch.manual_seed(0)
    model = build_model("resnet50", num_classes=1000)
    batches = [(torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(1000, (BATCH,))) for _ in range(IMAGES // BATCH)]
    return calibrate(model, batches, progress=False)


def hulls(layer: LayerStatistics) -> torch.Tensor:
    """Replaceability hulls by their defaults: a pool of 32, at most 10 peers."""
    return greedy_hulls(layer.correlation, active=layer.variance > 0).explanation


def measure(stats: CalibrationStatistics, name: str, rounds: int) -> dict[str, object]:
    score = hulls if name == "hulls, pool 32" else SCORES[name].function
    totals: list[float] = []
    widths: dict[int, list[float]] = defaultdict(list)
    for _ in range(rounds):
        seconds: dict[int, float] = defaultdict(float)
        for layer in stats.layers.values():
            start = time.process_time()
            evaluate(score, layer)
            seconds[layer.num_channels] += time.process_time() - start
        totals.append(sum(seconds.values()))
        for width, value in seconds.items():
            widths[width].append(value)
    return {
        "score": name,
        "processor seconds": round(statistics.median(totals), 3),
        "by width": {width: round(statistics.median(widths[width]), 3) for width in sorted(widths)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    names = [*SCORES, "hulls, pool 32"]
    parser.add_argument("--scores", nargs="+", default=names, choices=names, metavar="SCORE", help="default: all")
    arguments = parser.parse_args()
    stats = calibrated()
    layers: dict[int, int] = defaultdict(int)
    for layer in stats.layers.values():
        layers[layer.num_channels] += 1
    rows = []
    for name in tqdm(arguments.scores, leave=False):
        rows.append(measure(stats, name, arguments.rounds))
        print(json.dumps(rows[-1]), flush=True)
    save(
        "scoring_speed",
        f"OMP_NUM_THREADS=1 python benchmarks/scoring_speed.py --rounds {arguments.rounds}",
        "random images, random weights",
        network="resnet50",
        threads=torch.get_num_threads(),
        rounds=arguments.rounds,
        layers_by_width={width: layers[width] for width in sorted(layers)},
        rows=rows,
    )


if __name__ == "__main__":
    main()
