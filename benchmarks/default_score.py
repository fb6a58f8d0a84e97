"""Which score should be the default? Every local score, and task MI, on four trained networks of three families.

Two third-party CIFAR-10 ResNet-20s, the demo's digits network, and VGG-16-BN at a quarter of its widths, which is
trained here on CIFAR-10 where its weights are missing. A score is judged by the accuracy that remains, relative to the
dense network's, at three shares of the MACs with BatchNorm re-estimated and without fine-tuning, on training images
that did not calibrate; no test image is read. The VGG and the digits network were not trained on those that judge
them either, the third-party networks were. Two seeds: of the calibration images, and of the digits network's weights.

    python benchmarks/default_score.py --data DIR/cifar10 --checkpoints DIR --trained DIR

A network and seed that ``results/default_score.json`` holds already is skipped. On one CPU core training takes about
ten minutes and the rest fifteen.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, save
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tp_twoaxis import TwoAxisImportance, calibrate, prune_to_flops
from tp_twoaxis.benchmark.shared_work import LoadedNetwork, Shared
from tp_twoaxis.benchmark.sweep import BenchmarkConfig, DataConfig, NetworkConfig, load_config
from tp_twoaxis.data import digits
from tp_twoaxis.demo.network import train as train_digits
from tp_twoaxis.importance import expand_criteria
from tp_twoaxis.pruning.selection_result import tied_with_best
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.serialization import write_bytes
from tp_twoaxis.training import finetune

CONFIG = Path(__file__).parent / "configs" / "cifar10_selection.json"
CANDIDATES = (*expand_criteria(["all-local"]), "task-mi")
KEEP = (0.7, 0.5, 0.35)
SEEDS = (42, 123)
DATA = DataConfig(calibration_images=2048, selection_images=2048, evaluate_on="selection")
VGG, DIGITS = "vgg16_quarter", "digits"
DIGITS_EPOCHS = 25  # the demo's
RECIPE: dict[str, Any] = {
    "epochs": 12,
    "max_batches": None,
    "lr": 0.1,
    "nesterov": True,
    "schedule": "linear",
    "warmup": 0.2,
    "amp": "bf16",
    "channels_last": True,
}


def vgg16_quarter() -> nn.Module:
    """VGG-16-BN for 32 x 32 pixels, every width a quarter of the original's: 0.92 million parameters."""
    from torchvision.models import vgg

    widths = [width if width == "M" else int(width) // 4 for width in vgg.cfgs["D"]]
    features = vgg.make_layers(widths, batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


@dataclass
class Case:
    """A dense network with one seed's images."""

    model: nn.Module
    calibration: Any
    judges: Any

    @cached_property
    def dense(self) -> float:
        """Accuracy before pruning."""
        return float(self.right(self.model).double().mean())

    def right(self, model: nn.Module) -> Tensor:
        """Find which of the judging images a model puts into their class, [n] bool."""
        with forward_pass(model, self.judges, what="judge", labels="required") as run:
            return torch.cat([run.logits(batch).argmax(1) == batch.labels for batch in run.batches])


def cases(config: BenchmarkConfig, wanted: set[tuple[str, int]]) -> Iterator[tuple[str, int, Case]]:
    """Make the networks and seeds that are wanted: the fastest first, all networks of one seed before the next."""
    networks: dict[str, LoadedNetwork] = {}
    for seed in config.seeds:
        if (DIGITS, seed) in wanted:
            images = digits("train", seed)
            model = train_digits(images, epochs=DIGITS_EPOCHS, seed=seed, tick=lambda: None)
            yield DIGITS, seed, Case(model, images.loader(100), digits("calibration", seed).loader(100))
        for entry in config.networks:
            if (entry.name, seed) in wanted:
                if entry.name not in networks:
                    networks[entry.name] = LoadedNetwork(config, entry.name, seed, "cpu")
                network = networks[entry.name]
                judges = network.images.evaluation[0]
                yield entry.name, seed, Case(network.model, Shared(network, seed).calibration, judges)


def train_vgg(config: BenchmarkConfig, path: Path) -> None:
    """Train the VGG on all training images but those that judge; an interrupted run goes on."""
    entry = config.network(VGG)
    torch.manual_seed(0)
    network = vgg16_quarter()
    # its images and their split are the sweep's; the weights are not there yet
    images = Shared(LoadedNetwork(config, entry.name, 0, "cpu"), 0).training_loader()
    state = path.with_suffix(".state")
    progress = sys.stderr.isatty()
    report = finetune(network, images, checkpoint=state, resume=True, progress=progress, **RECIPE)
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    recipe = json.dumps({**RECIPE, "images": len(images.sampler), "seconds": round(report.seconds)})
    write_bytes(path, to_bytes(tensors, metadata={"format": "pt", "training": recipe}))
    state.unlink(missing_ok=True)


def measure(case: Case) -> dict[str, Any]:
    """Prune copies of one network by every candidate, and judge them on the same images."""
    start = time.perf_counter()
    stats = calibrate(case.model, case.calibration, max_images=None, progress=False)
    example = next(iter(case.judges))[0][:1]
    hits: dict[str, Tensor] = {}
    accuracies: dict[str, dict[str, float]] = {}
    for name in CANDIDATES:
        found = []
        for keep in KEEP:
            model = copy.deepcopy(case.model)
            prune_to_flops(
                model,
                example,
                TwoAxisImportance(stats, name),
                flops=keep,
                loader=case.calibration,
                max_images=None,
                other_counters=False,
                progress=False,
            )
            found.append(case.right(model))
        hits[name] = torch.stack(found).double().mean(0)
        accuracies[name] = {str(keep): round(float(r.double().mean()), 4) for keep, r in zip(KEEP, found, strict=True)}
        print(f"  {name:16}", *accuracies[name].values(), flush=True)
    best = max(hits, key=lambda name: float(hits[name].mean()))
    return {
        "dense": round(case.dense, 4),
        "images": [stats.num_images, len(hits[best])],
        "accuracy": accuracies,
        "best": best,
        "tied": tied_with_best(hits, best),
        "seconds": round(time.perf_counter() - start, 1),
    }


def summary(units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank the candidates by retention, a row each, the best first.

    Retention is accuracy over the dense network's, mean over shares and seeds; its spread is half the distance between
    the seeds. ``behind`` is the mean over networks of its distance to the first row, and the standard error of
    that mean over the networks.
    """
    networks = list(dict.fromkeys(unit["network"] for unit in units))

    def retention(name: str, network: str) -> list[float]:
        own = [unit for unit in units if unit["network"] == network]
        return [sum(unit["accuracy"][name].values()) / len(KEEP) / unit["dense"] for unit in own]

    table = {name: {network: retention(name, network) for network in networks} for name in CANDIDATES}
    means = {name: {network: sum(of) / len(of) for network, of in row.items()} for name, row in table.items()}
    rows = []
    for name in CANDIDATES:
        ranks = [1 + sum(means[other][net] > means[name][net] for other in CANDIDATES) for net in networks]
        spread = {net: (max(of) - min(of)) / 2.0 for net, of in table[name].items()}
        rows.append(
            {
                "score": name,
                "retention": round(sum(means[name].values()) / len(networks), 4),
                "rank": sum(ranks) / len(networks),
                "networks": {net: [round(means[name][net], 4), round(spread[net], 4)] for net in networks},
                "best_or_tied": sum(name in (unit["best"], *unit["tied"]) for unit in units),
            }
        )
    rows.sort(key=lambda row: -row["retention"])
    leader = means[rows[0]["score"]]
    for row in rows:
        behind = torch.tensor([means[row["score"]][net] - leader[net] for net in networks], dtype=torch.float64)
        error = float(behind.std()) / len(networks) ** 0.5 if len(networks) > 1 else 0.0
        row["behind"] = [round(float(behind.mean()), 4), round(error, 4)]
    return rows


def markdown(rows: list[dict[str, Any]], units: list[dict[str, Any]]) -> str:
    """Draw the summary for people."""
    networks = list(rows[0]["networks"])
    seeds = {net: [str(unit["seed"]) for unit in units if unit["network"] == net] for net in networks}
    heads = [f"{net} ({', '.join(drawn)})" for net, drawn in seeds.items()]
    lines = [
        "Accuracy that is left, % of the dense network's, mean over 70, 50 and 35 % of the MACs and the seeds in "
        "parentheses, +- half the distance between two seeds. Rank: mean over the networks. Behind the best: mean over "
        "the networks +- its standard error. Tied: network-seed pairs out of "
        f"{len(units)} where a score is the best or less than two standard errors (image by image) below it.\n",
        "| score | all | rank | " + " | ".join(heads) + " | behind the best | tied |",
        "| --- |" + " --- |" * (len(networks) + 4),
    ]
    for row in rows:
        cells = [f"{100 * mean:.1f} +- {100 * spread:.1f}" for mean, spread in row["networks"].values()]
        behind, error = row["behind"]
        lines.append(
            f"| {row['score']} | {100 * row['retention']:.1f} | {row['rank']:.2f} | {' | '.join(cells)} | "
            f"{100 * abs(behind):.1f} +- {100 * error:.1f} | {row['best_or_tied']} |"
        )
    return "\n".join(lines) + "\n"


def accuracy_table(units: list[dict[str, Any]]) -> str:
    """Write every accuracy as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["network", "seed", "score", "kept_macs", "accuracy", "dense"])
    for unit in units:
        for name, accuracies in unit["accuracy"].items():
            for keep, found in accuracies.items():
                writer.writerow([unit["network"], unit["seed"], name, keep, found, unit["dense"]])
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the CIFAR-10 Parquet shards")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the third-party safetensors files")
    parser.add_argument("--trained", required=True, type=Path, help="folder of the VGG's weights, trained if missing")
    arguments = parser.parse_args()
    os.environ["TP_TWOAXIS_DATA"] = str(arguments.data.parent)
    os.environ["TP_TWOAXIS_CHECKPOINTS"] = str(arguments.checkpoints)
    weights = arguments.trained / f"{VGG}.safetensors"
    config = load_config(CONFIG)
    vgg = NetworkConfig(VGG, "default_score:vgg16_quarter", str(arguments.data), checkpoint=str(weights))
    networks = (vgg, *config.networks)
    config = replace(config, networks=networks, data=DATA, seeds=SEEDS, keep=KEEP, channels_last=True)
    written = RESULTS / "default_score.json"
    units = json.loads(written.read_text())["units"] if written.exists() else []
    order = [(name, seed) for name in (*(entry.name for entry in networks), DIGITS) for seed in SEEDS]
    wanted = set(order) - {(unit["network"], unit["seed"]) for unit in units}
    if any(name == VGG for name, _ in wanted) and not weights.exists():
        arguments.trained.mkdir(parents=True, exist_ok=True)
        train_vgg(config, weights)
    for name, seed, case in cases(config, wanted):
        print(f"{name}, seed {seed}: dense {case.dense:.4f}", flush=True)
        units.append({"network": name, "seed": seed, **measure(case)})
        units.sort(key=lambda unit: order.index((unit["network"], unit["seed"])))
        rows = summary(units)
        save(
            "default_score",
            "python benchmarks/default_score.py --data DIR/cifar10 --checkpoints DIR --trained DIR",
            "CIFAR-10, of the training images 2,048 to calibrate and 2,048 others to judge; digits, 1,097 and 300",
            vgg_recipe=RECIPE,
            summary=rows,
            units=units,
        )
        write_bytes(RESULTS / "default_score.csv", accuracy_table(units).encode())
        write_bytes(RESULTS / "default_score.md", markdown(rows, units).encode())
    print(markdown(summary(units), units))


if __name__ == "__main__":
    main()
