"""The paper's suite on one GPU: train a network on CIFAR-100, calibrate, prune, fine-tune, measure.

Paper: arXiv 2605.07086, tables 8 and 9: ResNet-18, VGG-16 and MobileNetV2 on CIFAR-100, five seeds; ten shares of
channels removed by one global threshold, fine-tuned for at most 200 batches, area under accuracy retention over the
MACs that all methods cover. Ours differs in the training recipe (30 epochs in bfloat16 instead of 200); every record
names it.

Command, once for each network and seed (and for each part of a sweep that is too long for one call):

    python benchmarks/gpu_suite.py --data DIR/cifar100 --store STORE --out OUT --network resnet18 --seed 42

Each call trains what is not in STORE yet, measures what is not in OUT yet, and stops by itself after --seconds. Data
may come in pieces: every call copies the Parquet shards that it finds in --data to STORE, and a call that still lacks
some prints which and ends. Trials of all calls make one folder, also from several machines: copy their ``cells/``
together. ``tp-twoaxis report OUT`` draws the tables, the paper's comparisons of families among them.

Expected on an H100-class GPU: under 10 minutes a call, by its own clock; 210 trials a network and seed take several.
Not run on a GPU yet; on two CPU cores a small form of it ran, see results/cifar100_resnet20_cpu.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tp_twoaxis.benchmark import BenchmarkConfig, run_benchmark
from tp_twoaxis.benchmark.methods import Trial
from tp_twoaxis.benchmark.protocol import FINETUNE_BATCHES, KEEP, SEEDS
from tp_twoaxis.benchmark.report import make_report
from tp_twoaxis.benchmark.results import ResultsFolder
from tp_twoaxis.benchmark.trial_runner import TrialRunner
from tp_twoaxis.data import open_dataset
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.models import build_model
from tp_twoaxis.runtime.serialization import write_bytes
from tp_twoaxis.training import find_recipe, finetune, training_batches

NETWORKS = {
    "resnet18": "cifar_resnet18",
    "vgg16": "cifar_vgg16_bn",
    "mobilenetv2": "cifar_mobilenet_v2",
    "resnet20": "cifar_resnet20_conv_shortcut",  # not the paper's: small enough for a CPU
}
PAPER = ["resnet18", "vgg16", "mobilenetv2"]
METHODS = (
    "capture,variance,hull,composite-local,spectral-rs,cap-qgw,cap-a,norm-local,task-mi,composite-pid,pid-no-red,"
    "spectral-pid-rs,hybrid,taylor,l1,l2,fpgm,chip,network-slimming,activation-rms,random"
)
STORE = "TP_TWOAXIS_STORE"


def collect(data: Path | None, store: Path) -> list[str]:
    """Copy shards into the store; return the names of those that are still missing."""
    target = store / "cifar100"
    target.mkdir(parents=True, exist_ok=True)
    for shard in sorted(data.glob("*.parquet")) if data is not None else []:
        there = target / shard.name
        if not (there.is_file() and there.stat().st_size == shard.stat().st_size):
            partial = target / f".{shard.name}.partial"
            shutil.copyfile(shard, partial)
            partial.replace(there)
    names = {path.name for path in target.glob("*.parquet")}
    missing = []
    for split in ("train", "test"):
        counts = {m[1] for name in names if (m := re.fullmatch(rf"{split}-\d+-of-(\d+)\.parquet", name))}
        wanted = [f"{split}-{i:05}-of-{count}.parquet" for count in counts for i in range(int(count))]
        missing += [name for name in wanted or [f"{split}-*.parquet"] if name not in names]
    return missing


def train(options: argparse.Namespace, weights: Path) -> dict[str, Any] | None:
    """Train the dense network by the fast recipe, or leave it alone if it is there; a killed run goes on."""
    if weights.is_file():
        return None
    model_name = NETWORKS[options.network]
    recipe = find_recipe("fast", model_name, options.device)
    recipe = replace(recipe, epochs=options.epochs or recipe.epochs, warmup=min(recipe.warmup, 0.2))
    if options.device == "cpu":
        recipe = replace(recipe, amp="bf16", channels_last=True, batch_size=128, lr=0.1)
    data = open_dataset(str(options.store / "cifar100"), split="train", label_column="fine_label")
    torch.manual_seed(options.seed)
    model = build_model(model_name, num_classes=100).to(options.device)
    loader = training_batches(data, recipe.batch_size, device=options.device, seed=options.seed)
    weights.parent.mkdir(exist_ok=True)
    state = weights.with_suffix(".state.safetensors")
    report = finetune(
        model, loader, max_batches=None, checkpoint=state, resume=True, seed=options.seed, **recipe.settings()
    )
    how = {"recipe": asdict(recipe), "seed": options.seed, "seconds": report.seconds, "losses": report.losses[-1]}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(weights, save(tensors, metadata={"format": "pt", "training": json.dumps(how)}))
    state.unlink(missing_ok=True)
    return how


def suite(options: argparse.Namespace) -> BenchmarkConfig:
    """The whole suite, of which a call measures one network and seed; every seed is a network of its own."""
    networks = [options.network] if options.network not in PAPER else PAPER
    return BenchmarkConfig.from_dict(
        {
            "networks": [
                {
                    "name": name,
                    "model": NETWORKS[name],
                    "num_classes": 100,
                    "checkpoint": f"${STORE}/weights/{name}-{{seed}}.safetensors",
                    "data": f"${STORE}/cifar100",
                    "label_column": "fine_label",
                }
                for name in networks
            ],
            "methods": {
                "criteria": options.methods.split(","),
                "repair": [[]],
                "finetune_batches": [options.finetune_batches],
            },
            "keep": [float(share) for share in options.keep.split(",")],
            "grid": "channels",
            "seeds": sorted({*SEEDS, options.seed}),
            "data": {
                "calibration_images": options.images,
                "selection_images": options.selection_images,
                "test_images": options.test_images,
                "test_batch_size": 1000,
            },
            "finetune_amp": "bf16",
            "channels_last": True,
            # ten sparsity levels up to 95 % of the channels: a floor of 10 % would make the last ones alike
            "min_keep": 0.02,
        }
    )


@dataclass(frozen=True)
class UntilDeadline:
    """An engine that starts no trial which would probably end too late; the next call goes on."""

    deadline: float

    def fill(self, results: ResultsFolder, trials: Sequence[Trial], device: str, look: Callable[[], None]) -> None:
        """Run trials while there is time."""
        runner, longest = TrialRunner(results.config, device), 0.0
        for trial in trials:
            start = time.monotonic()
            if start + longest > self.deadline:
                return
            results.write(trial, runner.run(trial))
            longest = max(longest, time.monotonic() - start)
            look()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with shards of CIFAR-100 (train-*, test-*.parquet)")
    parser.add_argument("--store", type=Path, required=True, help="folder that keeps data and weights between calls")
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--seed", type=int, default=SEEDS[0], help=f"the paper's are {', '.join(map(str, SEEDS))}")
    parser.add_argument("--part", default="1/1", help="k/n: the k-th of n parts of the sweep")
    parser.add_argument("--methods", default=METHODS, help=f"criteria, all calls the same; default {METHODS}")
    parser.add_argument("--keep", default=",".join(f"{k:g}" for k in KEEP), help="shares of the channels to keep")
    parser.add_argument("--finetune-batches", type=int, default=FINETUNE_BATCHES)
    parser.add_argument("--epochs", type=int, help="of training; default the recipe's 30")
    parser.add_argument("--images", type=int, default=5000, help="calibration images")
    parser.add_argument("--selection-images", type=int, default=5000, help="training images that no seed uses")
    parser.add_argument("--test-images", type=int, help="test images to draw; default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing that would end later than this")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    started = time.monotonic()
    options = parse(arguments)
    number, _, count = options.part.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise SystemExit(f"--part: expected k/n such as 2/4, got {options.part!r}")
    options.store = options.store.absolute()
    if missing := collect(options.data, options.store):
        print(json.dumps({"waiting_for": missing, "store": str(options.store)}))
        return
    os.environ[STORE] = str(options.store)
    try:
        trained = train(options, options.store / "weights" / f"{options.network}-{options.seed}.safetensors")
        summary = run_benchmark(
            suite(options),
            options.out,
            engine=UntilDeadline(started + options.seconds),
            device=options.device,
            only=lambda trial: (trial.network, trial.seed) == (options.network, options.seed),
            part=(int(number), int(count)),
        )
        if summary.left < summary.total:
            report = make_report(options.out)
            print(report.markdown())
            print(report.axes.to_string(index=False))
    except TwoAxisError as error:
        raise SystemExit(str(error)) from error
    print(json.dumps({"trained": trained, "cells": summary.total, "left": summary.left, "failed": summary.failed}))


if __name__ == "__main__":
    main()
