"""Where to score coupled channels: at their producers, reduced in four ways, or at their consumers.

Two trained CIFAR-10 ResNet-20s, whose residual streams have two to four producers a channel. Accuracy on 2,000 training
images that calibration does not see, after removal down to shares of the MACs under one global threshold and
re-estimation of BatchNorm on the 2,000 calibration images; no fine-tuning, seed 42.

    python benchmarks/coupled_groups.py --data DIR/cifar10 --checkpoints DIR

The networks' weights and images are those of ``configs/cifar10_selection.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from dataclasses import replace
from pathlib import Path

from provenance import save

from tp_twoaxis import TwoAxisImportance, calibrate, prune_to_flops
from tp_twoaxis.benchmark.shared_work import LoadedNetwork, Shared
from tp_twoaxis.benchmark.sweep import DataConfig, load_config
from tp_twoaxis.repair import reestimate_batch_norm

CONFIG = Path(__file__).parent / "configs" / "cifar10_selection.json"
SCORES = ("capture", "variance", "hull")
SITES = (
    *({"site": "producer", "group_reduction": how} for how in ("mean", "sum", "max", "first")),
    {"site": "consumer", "group_reduction": "mean"},
)
KEEP = (0.7, 0.5, 0.35)
SEED = 42
DATA = DataConfig(calibration_images=2000, selection_images=2000, evaluate_on="selection", calibration_draw="seed")


def measure(shared: Shared) -> list[dict[str, object]]:
    """Measure every score at every site on one network."""
    network = shared.network
    stats = calibrate(network.model, shared.calibration, consumers=True, progress=False)
    accuracies: dict[str, float] = {}  # by what is removed: sites that remove the same channels are measured once
    rows: list[dict[str, object]] = []
    for score in SCORES:
        for site in SITES:
            start = time.perf_counter()
            found = []
            for keep in KEEP:
                model = copy.deepcopy(network.model)
                importance = TwoAxisImportance(stats, score, **site)  # type: ignore[arg-type]
                report = prune_to_flops(model, network.example, importance, flops=keep, repair=(), progress=False)
                removed = json.dumps(report.removed_channels, sort_keys=True)
                if removed not in accuracies:
                    network.laid_out(model)
                    reestimate_batch_norm(model, shared.calibration, progress=False)
                    accuracies[removed] = network.accuracy(model)
                found.append(accuracies[removed])
            rows.append(
                {
                    "network": network.entry.name,
                    "score": score,
                    **site,
                    "accuracy": dict(zip(map(str, KEEP), found, strict=True)),
                    "mean": round(sum(found) / len(found), 4),
                }
            )
            print(json.dumps(rows[-1]), f"{time.perf_counter() - start:.0f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the CIFAR-10 Parquet shards")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the safetensors files")
    arguments = parser.parse_args()
    os.environ["TP_TWOAXIS_DATA"] = str(arguments.data.parent)
    os.environ["TP_TWOAXIS_CHECKPOINTS"] = str(arguments.checkpoints)
    config = replace(load_config(CONFIG), data=DATA, seeds=(SEED,), keep=KEEP, channels_last=True)
    rows, dense = [], {}
    for entry in config.networks:
        network = LoadedNetwork(config, entry.name, SEED, "cpu")
        dense[entry.name] = network.dense_accuracy
        rows += measure(Shared(network, SEED))
    save(
        "coupled_groups",
        "python benchmarks/coupled_groups.py --data DIR/cifar10 --checkpoints DIR",
        "CIFAR-10, of the training images 2,000 to calibrate and 2,000 others to measure accuracy",
        dense=dense,
        rows=rows,
    )


if __name__ == "__main__":
    main()
