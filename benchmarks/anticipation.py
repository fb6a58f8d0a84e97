"""How to make reconstruction losses of different layers comparable, and what makes an order inside them good.

Two trained CIFAR-10 ResNet-20s lose half their MACs by each selection and get ``sequential`` repair from 1,000
images; accuracy on 8,000 training images that calibration does not see, no fine-tuning, seed 42. The greedy losses are
those of ``tp_twoaxis.reconstruction.greedy`` at channel level, relative to the variance of their consumers' outputs.

- ``hull``: no anticipation, for comparison.
- ``losses``: all layers' losses against each other as they are.
- ``losses / mean``: over their group's mean loss with every channel present.
- ``noise 0.1``, ``noise 0.01``: weighed by how far the predicted classes diverge when white noise of that power,
  relative to the outputs', is added to a consumer's outputs, and divided by MACs. The limit of little noise is the
  Fisher information of the outputs.
- ``by channels``: measured curves, with losses and reconstructions at channel level.
- ``anticipating(...)``: the importance of that name, with reconstructions of whole patches, and three rankings.

    python benchmarks/anticipation.py --data DIR/cifar10 --checkpoints DIR

About half an hour on one CPU core.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import save
from torch import Tensor, nn

from tp_twoaxis import CalibrationStatistics, calibrate, prune_to_flops
from tp_twoaxis.benchmark.shared_work import LoadedNetwork, Shared
from tp_twoaxis.benchmark.sweep import DataConfig, load_config
from tp_twoaxis.dependency.groups import group_consumers, model_of, root_size
from tp_twoaxis.importance import AnticipatingImportance, make_importance
from tp_twoaxis.reconstruction.greedy import greedy_reconstruction
from tp_twoaxis.runtime.batches import split_batch
from tp_twoaxis.runtime.layers import channel_layers

CONFIG = Path(__file__).parent / "configs" / "cifar10_selection.json"
KEEP = 0.5
SEED = 42
IMAGES = 1000
DATA = DataConfig(calibration_images=2048, selection_images=8000, evaluate_on="selection", calibration_draw="seed")
CURVES = ("hull", "capture", "reconstruction")


class ByChannels(AnticipatingImportance):
    """Order and curves from the moments of channels, whatever the taps."""

    def __init__(self, stats: CalibrationStatistics, model: nn.Module, loader: Any) -> None:
        super().__init__(stats, loader=loader, model=model, progress=False)
        self._distortion.refits.patches = lambda names: {}  # type: ignore[method-assign]


class Losses(AnticipatingImportance):
    """Greedy losses instead of measured curves; ``weights`` multiplies those of each consumer."""

    def __init__(
        self,
        stats: CalibrationStatistics,
        model: nn.Module,
        loader: Any,
        *,
        weights: dict[str, float] | None = None,
        over_mean: bool = False,
    ) -> None:
        super().__init__(stats, loader=loader, model=model, images=2, progress=False)
        self.weights = weights
        self.over_mean = over_mean

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor:
        """Rank a group by its losses; [size] float64."""
        names = {module: name for name, module in model_of(group).named_modules()}
        readings = []
        for member in group_consumers(group):
            reading = self._reading(member, names, {})
            weight = 1.0 if self.weights is None else self.weights[names[member.module]]
            readings.append(replace(reading, power=reading.power / max(weight, 1e-12)))
        order, losses = greedy_reconstruction(readings, root_size(group))
        scores = torch.empty_like(losses)
        scores[order] = losses.cummax(0).values
        if self.over_mean:
            return scores / scores.mean()
        return scores if self.weights is None else scores / self._cost(self._macs_of_a_channel(group, names))


@torch.no_grad()
def divergences(network: nn.Module, stats: CalibrationStatistics, images: Tensor, power: float) -> dict[str, float]:
    """Divergence of the predicted classes, in nats over ``power``, for noise at each layer's outputs."""
    generator = torch.Generator().manual_seed(SEED)
    dense = network(images).log_softmax(1)
    found = {}
    for name, layer in channel_layers(network).items():
        deviation = (power * stats[name].variance).sqrt().float()

        def disturb(module: nn.Module, inputs: Any, output: Tensor, deviation: Tensor = deviation) -> Tensor:
            shape = (-1, 1, 1) if output.ndim == 4 else (-1,)
            return output + deviation.reshape(shape) * torch.randn(output.shape, generator=generator)

        handle = layer.register_forward_hook(disturb)
        divergence = (dense.exp() * (dense - network(images).log_softmax(1))).sum(1).mean()
        handle.remove()
        found[name] = float(divergence) / power
    return found


def measure(shared: Shared, wanted: list[str] | None) -> list[dict[str, object]]:
    """Measure the selections that are wanted, or all, on one network."""
    network = shared.network
    stats = calibrate(network.model, shared.calibration, consumers=True, progress=False)
    images = torch.cat([split_batch(batch)[0] for batch in shared.calibration])[:512]

    def anticipating(**options: Any) -> Callable[[nn.Module], Any]:
        return lambda model: AnticipatingImportance(
            stats, loader=shared.calibration, model=model, progress=False, **options
        )

    def losses(**options: Any) -> Callable[[nn.Module], Any]:
        return lambda model: Losses(stats, model, shared.calibration, **options)

    selections: dict[str, Callable[[nn.Module], Any]] = {
        "hull": lambda model: make_importance("hull", stats=stats),
        "losses": losses(),
        "losses / mean": losses(over_mean=True),
        **{f"noise {power}": losses(weights=divergences(network.model, stats, images, power)) for power in (0.1, 0.01)},
        "by channels": lambda model: ByChannels(stats, model, shared.calibration),
        **{f"anticipating({ranking})": anticipating(ranking=ranking) for ranking in CURVES},
    }
    if unknown := set(wanted or ()) - set(selections):
        raise SystemExit(f"--selections: expected any of {', '.join(selections)}, got {', '.join(sorted(unknown))}")
    rows = []
    for name, build in selections.items():
        if wanted and name not in wanted:
            continue
        start = time.perf_counter()
        model = copy.deepcopy(network.model)
        report = prune_to_flops(
            model,
            network.example,
            build(model),
            flops=KEEP,
            repair="sequential",
            loader=shared.calibration,
            stats=stats,
            max_images=IMAGES,
            progress=False,
        )
        network.laid_out(model)
        rows.append(
            {
                "network": network.entry.name,
                "selection": name,
                "accuracy": round(network.accuracy(model), 4),
                "kept": {g.name: f"{len(g.kept)}/{len(g.kept) + len(g.removed)}" for g in report.groups},
            }
        )
        print(json.dumps(rows[-1]), f"{time.perf_counter() - start:.0f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the CIFAR-10 Parquet shards")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the safetensors files")
    parser.add_argument("--selections", nargs="+", help="some of the selections alone")
    parser.add_argument("--out", default="anticipation", help="name of the file in results")
    arguments = parser.parse_args()
    os.environ["TP_TWOAXIS_DATA"] = str(arguments.data.parent)
    os.environ["TP_TWOAXIS_CHECKPOINTS"] = str(arguments.checkpoints)
    config = replace(load_config(CONFIG), data=DATA, seeds=(SEED,), keep=(KEEP,), channels_last=True)
    rows, dense = [], {}
    for entry in config.networks:
        network = LoadedNetwork(config, entry.name, SEED, "cpu")
        dense[entry.name] = network.dense_accuracy
        rows += measure(Shared(network, SEED), arguments.selections)
    save(
        arguments.out,
        "python benchmarks/anticipation.py --data DIR/cifar10 --checkpoints DIR"
        + (f" --selections {shlex.join(arguments.selections)} --out {arguments.out}" if arguments.selections else ""),
        "CIFAR-10, of the training images 2,048 to calibrate (1,000 to repair), 8,000 others to measure accuracy",
        keep=KEEP,
        dense=dense,
        rows=rows,
    )


if __name__ == "__main__":
    main()
