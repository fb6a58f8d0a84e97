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

import itertools
from typing import Any

import torch
from cifar_resnets import dense_networks, option_parser, patch_covariances
from default_score import batches
from provenance import save
from torch import Tensor

from tp_twoaxis.reconstruction.greedy import Reading, greedy_reconstruction

SHARES, IMAGES = (0.5, 0.3), 256
RIDGE = 1e-4
NEGLIGIBLE = 1e-6  # relative gain that does not count


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
    arguments = option_parser(__doc__).parse_args()
    rows = []
    for network_name, network, dense, folder in dense_networks(arguments):
        names = [name for name, layer in dense.named_modules() if name.endswith("conv2")]
        fitted, others = (
            patch_covariances(dense, names, batches(folder, network.normalisation, first, first + IMAGES, 32))
            for first in (0, IMAGES)
        )
        for name, share in itertools.product(names, SHARES):
            weight = dense.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            consumer = Consumer(weight.detach(), fitted[name][0], others[name][0])
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
