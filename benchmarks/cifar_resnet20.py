"""Accuracy of pruned CIFAR-10 ResNet-20s at equal MACs, without fine-tuning.

Two third-party networks x kept MACs x criteria x calibration seeds. Each cell: the seed draws 2,048 training
images; they serve for calibration, for the gradients of Taylor, and for BatchNorm re-estimation alike; the
network is pruned to the target by a global threshold and tested on all 10,000 test images. Nothing is
chosen by these numbers. A cell takes 13 seconds and more on one CPU core, 126 cells half an hour to an hour;
cells already in the results file are skipped.

    python benchmarks/cifar_resnet20.py --data DIR/cifar10 --checkpoints DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from provenance import RESULTS, save
from tqdm import tqdm

from tp_twoaxis import calibrate, prune_to_flops
from tp_twoaxis.data import make_loader, open_dataset
from tp_twoaxis.evaluation import accuracy
from tp_twoaxis.importance.registry import make_importance
from tp_twoaxis.models import build_model, load_weights

NETWORKS = {
    "conv_shortcut": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "option_a": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
METHODS = {
    "local capture": "capture",
    "hull": "hull",
    "task MI": "task-mi",
    "L2": "l2",
    "Taylor": "taylor",
    "FPGM": "fpgm",
    "random": "random",
}
IMAGES, BATCH = 2048, 128
COMMAND = "python benchmarks/cifar_resnet20.py --data DIR/cifar10 --checkpoints DIR"
DATA = "CIFAR-10: 2,048 of 25,000 training images a seed; all 10,000 test images"


def table(cells: list[dict[str, object]]) -> str:
    """Markdown: mean and sample standard deviation over seeds, in percent."""
    rows = []
    for network in NETWORKS:
        mine = [c for c in cells if c["network"] == network]
        kept = sorted({c["flops"] for c in mine}, reverse=True)
        dense = next((c["dense"] for c in mine), float("nan"))
        rows += [
            f"\n{network} (dense {100 * dense:.1f} %)\n",
            "| kept MACs | " + " | ".join(METHODS) + " |",
            "| --- |" + " --- |" * len(METHODS),
        ]
        for flops in kept:
            columns = []
            for method in METHODS:
                values = [100 * c["accuracy"] for c in mine if (c["flops"], c["method"]) == (flops, method)]
                columns.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "-")
            rows.append(f"| {flops} | " + " | ".join(columns) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the CIFAR-10 Parquet shards")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the two safetensors files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    arguments = parser.parse_args()
    earlier = RESULTS / "cifar_resnet20.json"
    cells = json.loads(earlier.read_text())["cells"] if earlier.exists() else []
    done = {(c["network"], c["seed"], c["method"], c["flops"]) for c in cells}
    total = len(arguments.networks) * len(arguments.seeds) * len(METHODS) * len(arguments.keep)
    bar = tqdm(total=total, unit="cell")
    for network in arguments.networks:
        mean, std = NETWORKS[network]
        train = open_dataset(arguments.data, split="train", mean=mean, std=std)
        test = make_loader(open_dataset(arguments.data, split="test", mean=mean, std=std), 500)
        model = build_model(f"cifar_resnet20_{network}").eval()
        load_weights(model, arguments.checkpoints / f"cifar10_resnet20_{network}.safetensors")
        model.to(memory_format=torch.channels_last)
        dense = None
        for seed in arguments.seeds:
            loader = make_loader(train, BATCH, num_images=IMAGES, seed=seed)
            stats = None
            for method in METHODS:
                for flops in arguments.keep:
                    bar.update()
                    if (network, seed, method, flops) in done:
                        continue
                    dense = accuracy(model, test, progress=False)[0] if dense is None else dense
                    stats = calibrate(model, loader, progress=False) if stats is None else stats
                    pruned = copy.deepcopy(model)
                    start = time.perf_counter()
                    importance = make_importance(
                        METHODS[method], stats=stats, model=pruned, loader=loader, seed=seed, progress=False
                    )
                    report = prune_to_flops(
                        pruned,
                        torch.zeros(1, 3, 32, 32),
                        importance,
                        flops=flops,
                        loader=loader,
                        other_counters=False,
                        progress=False,
                    )
                    cells.append(
                        {
                            "network": network,
                            "seed": seed,
                            "method": method,
                            "flops": flops,
                            "achieved": round(report.achieved, 5),
                            "accuracy": round(accuracy(pruned, test, progress=False)[0], 6),
                            "dense": dense,
                            "seconds": round(time.perf_counter() - start, 2),
                        }
                    )
                    save("cifar_resnet20", COMMAND, DATA, cells=cells)
    bar.close()
    print(table(cells))


if __name__ == "__main__":
    main()
