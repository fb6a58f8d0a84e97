"""Accuracy of pruned CIFAR-10 ResNet-20s at equal MACs, without fine-tuning.

Two third-party networks x kept MACs x criteria x calibration seeds. Each cell: the seed draws 2,048 training
images; they serve for calibration, for the gradients of Taylor, and for BatchNorm re-estimation alike; the
network is pruned to the target by a global threshold and tested on all 10,000 test images. Nothing is
chosen by these numbers. About 12 seconds a cell and 30 minutes in all on two CPU cores; cells already in
the results file are skipped.

    python benchmarks/cifar_resnet20.py --data DIR/cifar10 --checkpoints DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from tp_twoaxis import HullImportance, LocalImportance, TargetImportance, calibrate, prune_to_flops
from tp_twoaxis.data import ArrayLoader, make_loader, open_dataset
from tp_twoaxis.files import write_bytes
from tp_twoaxis.importance.baselines import FPGMImportance
from tp_twoaxis.models import build_model, load_weights

NETWORKS = {
    "conv_shortcut": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "option_a": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
METHODS = {
    "local capture": "ours, local axis",
    "hull": "ours, local axis",
    "task MI": "ours, target axis",
    "L2": "host's GroupMagnitudeImportance",
    "Taylor": "host's GroupTaylorImportance",
    "FPGM": "Euclidean distances between filters",
    "random": "host's RandomImportance",
}
IMAGES, BATCH = 2048, 128
RESULTS = Path(__file__).parent / "results" / "cifar_resnet20.json"


@torch.no_grad()
def accuracy(model: nn.Module, loader: ArrayLoader) -> float:
    model.eval()
    hits = [
        (model(x.to(memory_format=torch.channels_last)).argmax(1) == y).float().mean().item() * len(y)
        for x, y in loader
    ]
    return sum(hits) / 10_000


def importance_of(method: str, model: nn.Module, stats: object, loader: ArrayLoader, seed: int) -> object:
    if method == "Taylor":
        model.eval()
        model.zero_grad()
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
        return tp.importance.GroupTaylorImportance()
    if method == "random":
        torch.manual_seed(seed)
    return {
        "local capture": lambda: LocalImportance(stats),
        "hull": lambda: HullImportance(stats),
        "task MI": lambda: TargetImportance(stats),
        "L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "FPGM": FPGMImportance,
        "random": tp.importance.RandomImportance,
    }[method]()


def provenance() -> dict[str, str | int]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=RESULTS.parents[1]
    ).stdout.strip()
    return {
        "command": "python benchmarks/cifar_resnet20.py --data DIR/cifar10 --checkpoints DIR",
        "commit": commit,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "data": "CIFAR-10: 2,048 of 25,000 training images a seed; all 10,000 test images",
        "date": time.strftime("%Y-%m-%d"),
    }


def save(cells: list[dict[str, object]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    write_bytes(RESULTS, json.dumps({"provenance": provenance(), "cells": cells}, indent=1).encode())


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
    cells = json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else []
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
                    dense = accuracy(model, test) if dense is None else dense
                    stats = calibrate(model, loader, progress=False) if stats is None else stats
                    pruned = copy.deepcopy(model)
                    start = time.perf_counter()
                    importance = importance_of(method, pruned, stats, loader, seed)
                    report = prune_to_flops(
                        pruned, torch.zeros(1, 3, 32, 32), importance, flops=flops, loader=loader, progress=False
                    )
                    cells.append(
                        {
                            "network": network,
                            "seed": seed,
                            "method": method,
                            "flops": flops,
                            "achieved": round(report.achieved, 5),
                            "accuracy": accuracy(pruned, test),
                            "dense": dense,
                            "seconds": round(time.perf_counter() - start, 2),
                        }
                    )
                    save(cells)
    bar.close()
    print(table(cells))


if __name__ == "__main__":
    main()
