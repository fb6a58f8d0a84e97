"""The paper's evidence on its own networks: train on CIFAR-100 with snapshots, diagnose each, and judge all together.

Paper: arXiv 2605.07086, sections 2 to 4: ResNet-18, VGG-16 and MobileNetV2, five seeds each, 425 convolutions; 5,000
training images for the statistics, the same for every seed, and 1,000 test images for the lesions. Ours differs in the
training recipe (100 epochs by default instead of 200).

    python benchmarks/paper_evidence.py --data DIR/cifar100 --out OUT

OUT gets for each network and seed its weights, snapshots, page and tables, and ``paper.html``, ``paper.md`` and
``paper_tables/`` of all that is there. What is finished is not done again, and a training that was stopped goes on.
Not run on a GPU yet; the same steps for two ResNet-20s, 20 epochs each, take forty minutes on one CPU core, see
docs/evidence.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_suite import NETWORKS, PAPER

from tp_twoaxis.benchmark.protocol import SEEDS

SNAPSHOTS = (0, 5, 10, 25, 50, 100)


def call(*arguments: object) -> None:
    """Run a command of the package, and end with its message where it fails."""
    result = subprocess.run([sys.executable, "-m", "tp_twoaxis", *map(str, arguments)], check=False)
    if result.returncode:
        raise SystemExit(result.returncode)


def train(options: argparse.Namespace, network: str, seed: int) -> Path:
    """Train a network with snapshots where it is not there yet; returns its weights."""
    weights: Path = options.out / f"{network}-{seed}.safetensors"
    if weights.exists():
        return weights
    epochs = options.epochs
    kept = sorted({epoch for epoch in options.snapshots if epoch < epochs} | {epochs})
    fast = ["--amp", "bf16", "--channels-last"]
    state = options.out / f"{network}-{seed}.state.safetensors"
    call(
        "train", NETWORKS[network], "--num-classes", options.classes, "--data", options.data, "--epochs", epochs, *fast,
        "--snapshots", ",".join(map(str, kept)), "--seed", seed, "--device", options.device, "--eval-split", "test",
        "--state", state, "--resume", "--out", weights,
    )  # fmt: skip
    return weights


def diagnose(options: argparse.Namespace, network: str, weights: Path) -> Path:
    """Judge all claims on a network; returns the folder of its tables."""
    page = weights.with_suffix(".html")
    if not page.exists():
        call(
            "diagnose", NETWORKS[network], "--num-classes", options.classes, "--checkpoint", weights, "--data",
            options.data, "--images", options.images, "--batch-size", 128, "--eval-split", "test", "--snapshots",
            weights.with_suffix(".snapshots"), "--device", options.device, "--out", page,
        )  # fmt: skip
    return page.with_name(f"{page.stem}_tables")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with Parquet shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights, pages and tables")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=PAPER, help="default the paper's")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default the paper's five")
    parser.add_argument("--classes", type=int, default=100, help="of the data; default 100")
    parser.add_argument("--epochs", type=int, default=100, help="of training; default 100")
    parser.add_argument("--snapshots", nargs="+", type=int, default=list(SNAPSHOTS), help="epochs; default the paper's")
    parser.add_argument("--images", type=int, default=5000, help="for the statistics; default 5,000")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default a GPU's")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    tables = []
    for seed in options.seeds:  # all networks of a seed first: a run that is stopped has some of each
        for network in options.networks:
            tables.append(diagnose(options, network, train(options, network, seed)))
            if len(tables) > 1:
                together = ["--out", options.out / "paper.html", "--markdown", options.out / "paper.md"]
                call("diagnose", "--combine", ",".join(map(str, tables)), *together, "--force")


if __name__ == "__main__":
    main()
