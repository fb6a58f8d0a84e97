r"""Exchanges of single channels: whether they improve the order in which ``anticipating`` removes them.

Greedy removal never takes a channel back. Local search can (OSSCAR, Meng et al. 2024): of the channels that stay and
those that left, exchange the pair that lowers the consumer's error most, until none does. Here it starts from the
greedy sets of every convolution inside a block of two third-party CIFAR-10 ResNet-20s, with half and three tenths of
the channels kept. Errors are those of the consumer's outputs after a refit over whole patches, over their variance, on
the 256 training images of the fits and on 256 others.

    python benchmarks/channel_exchanges.py --data DIR --checkpoints DIR

``--data`` holds ``cifar10/``. A few minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from default_score import NETWORKS, Batches, batches
from provenance import save
from torch import Tensor, nn

from tp_twoaxis.diagnostics.exact_power import PatchCovariance
from tp_twoaxis.reconstruction.greedy import Reading, greedy_reconstruction
from tp_twoaxis.runtime.forward import forward_pass

CIFAR_NETWORKS, SHARES, IMAGES = ("resnet20_conv", "resnet20_a"), (0.5, 0.3), 256
RIDGE = 1e-4
NEGLIGIBLE = 1e-6  # relative gain that does not count


def covariances(dense: nn.Module, names: list[str], images: Batches) -> dict[str, Tensor]:
    """Gather the patch covariances of some convolutions, at all positions."""
    found = {name: PatchCovariance(dense.get_submodule(name)) for name in names}
    with forward_pass(dense, images, what="covariances") as run:
        for name, own in found.items():

            def record(
                layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, own: PatchCovariance = own
            ) -> None:
                own.update(inputs[0], output[0, 0].numel())

            run.hook(dense.get_submodule(name), record)
        for _ in run:
            pass
    return {name: own.covariance[0] for name, own in found.items()}


class Consumer:
    """A convolution whose inputs leave, with the covariances of its patches on fitted images and on others."""

    def __init__(self, weight: Tensor, fitted: Tensor, others: Tensor) -> None:
        self.taps = weight[0, 0].numel()
        self.weight = weight.double().flatten(1)
        self.fitted, self.others = fitted, others
        self.ridge = RIDGE * fitted.diagonal().mean() * torch.eye(len(fitted), dtype=torch.float64)

    @property
    def width(self) -> int:
        """Channels that it reads."""
        return self.weight.shape[1] // self.taps

    def error(self, kept: Tensor, judged: Tensor) -> float:
        """Relative error of the outputs from the channels kept, [C] bool, refitted on the fitted images."""
        own = kept.repeat_interleave(self.taps)
        lost = (self.fitted + self.ridge)[own][:, own], self.fitted[own][:, ~own]
        change = torch.zeros_like(self.weight)
        change[:, own] = torch.linalg.solve(*lost).mm(self.weight[:, ~own].T).T
        change[:, ~own] = -self.weight[:, ~own]
        power = ((self.weight @ judged) * self.weight).sum()
        return float(((change @ judged) * change).sum() / power)

    def greedy(self, kept: int) -> Tensor:
        """Give the set that greedy removal leaves, [C] bool."""
        everything = torch.arange(self.width)
        power = float(((self.weight @ self.fitted) * self.weight).sum())
        reading = Reading(self.fitted, self.weight, everything, everything, power, self.taps)
        order, _ = greedy_reconstruction([reading], self.width, ridge=RIDGE)
        mask = torch.zeros(self.width, dtype=torch.bool)
        mask[order[self.width - kept :]] = True
        return mask

    def exchanged(self, kept: Tensor) -> tuple[Tensor, int]:
        """Exchange pairs of channels while that lowers the error; returns the set, and how many exchanges."""
        best, exchanges = self.error(kept, self.fitted), 0
        while True:
            better = None
            for back, away in itertools.product((~kept).nonzero()[:, 0], kept.nonzero()[:, 0]):
                tried = kept.clone()
                tried[back], tried[away] = True, False
                error = self.error(tried, self.fitted)
                if error < best * (1 - NEGLIGIBLE):
                    best, better = error, tried
            if better is None:
                return kept, exchanges
            kept, exchanges = better, exchanges + 1


def measure(consumer: Consumer, share: float) -> dict[str, Any]:
    """Compare the greedy set with what exchanges make of it."""
    start = consumer.greedy(round(share * consumer.width))
    end, exchanges = consumer.exchanged(start)
    errors = {
        f"{name}_{images}": round(consumer.error(kept, judged), 5)
        for name, kept in (("greedy", start), ("exchanged", end))
        for images, judged in (("fitted", consumer.fitted), ("others", consumer.others))
    }
    return {"channels": consumer.width, "share": share, "exchanges": exchanges, **errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with cifar10/")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the third-party safetensors files")
    arguments = parser.parse_args()
    rows = []
    for network_name in CIFAR_NETWORKS:
        network = NETWORKS[network_name]
        dense = network.load(arguments.checkpoints / f"{network.weights}.safetensors")
        names = [name for name, layer in dense.named_modules() if name.endswith("conv2")]
        folder = arguments.data / "cifar10"
        fitted, others = (
            covariances(dense, names, batches(folder, network.normalisation, first, first + IMAGES, 32))
            for first in (0, IMAGES)
        )
        for name, share in itertools.product(names, SHARES):
            weight = dense.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            consumer = Consumer(weight.detach(), fitted[name], others[name])
            rows.append({"network": network_name, "layer": name, **measure(consumer, share)})
            print(rows[-1], flush=True)
    gains = torch.tensor([1 - row["exchanged_others"] / row["greedy_others"] for row in rows], dtype=torch.float64)
    summary = {
        "sets": len(rows),
        "that an exchange improves": sum(row["exchanges"] > 0 for row in rows),
        "mean gain on other images": round(float(gains.mean()), 5),
        "largest": round(float(gains.max()), 5),
        "smallest": round(float(gains.min()), 5),
    }
    print(summary)
    command = "python benchmarks/channel_exchanges.py --data DIR --checkpoints DIR"
    save("channel_exchanges", command, f"CIFAR-10, the first {2 * IMAGES} training images", summary=summary, rows=rows)


if __name__ == "__main__":
    main()
