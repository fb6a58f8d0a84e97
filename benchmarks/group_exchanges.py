r"""Exchanges of MACs between groups: whether they improve the allocation of ``anticipating``.

Its curves are of one group at a time. Here the allocation is improved by what the whole repaired network says: the
scores of one group after the other are multiplied by 1.25, so that the others give up MACs for it, or by 0.8, so that
it gives them up; the network is pruned to half of its MACs and repaired by ``sequential`` anew; and what
brings its logits nearer to the dense network's on 1,000 training images that no fit saw is kept. One round over all
groups, from 1,024 images. Accuracy is in % on all 10,000 test images, before and after, which nothing is chosen on.

    python benchmarks/group_exchanges.py --data DIR --checkpoints DIR
    python benchmarks/group_exchanges.py --data DIR --checkpoints DIR --oracle

With ``--oracle`` the test images themselves, with their labels, choose what is kept: no method may, and what it gains
is what better judges could give this search at most in one round (other allocations may be better). ``--data`` holds
``cifar10/``. About half an hour on one CPU core, each.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch_pruning as tp
from cifar_resnets import EXAMPLE, dense_networks, draw, option_parser, test_images
from default_score import Batches
from few_images import accuracy
from provenance import save
from torch import Tensor, nn

from tp_twoaxis import AnticipatingImportance, calibrate, prune_to_flops
from tp_twoaxis.repair.guard import output_distance

SHARE, REPAIRS, FACTORS = 0.5, ("sequential", "joint"), (1.25, 0.8)
IMAGES, JUDGES = 1024, 1000


class WeightedGroups(tp.importance.Importance):
    """An importance with a factor for each group's scores."""

    own_channels_only = True

    def __init__(self, importance: AnticipatingImportance) -> None:
        self.importance = importance
        self.factors: dict[str, float] = {}

    def prepare_groups(self, groups: list[Any]) -> None:
        """Measure all curves together."""
        self.importance.prepare_groups(groups)

    def constant_channels(self, group: Any) -> Tensor:
        """Name the channels that leave first."""
        return self.importance.constant_channels(group)

    def __call__(self, group: Any) -> Tensor | None:
        """Rank a group's channels."""
        scores = self.importance(group)
        return None if scores is None else scores * self.factors.setdefault(self.importance.curve(group).name, 1.0)


class Trials:
    """What allocations make of a network."""

    def __init__(self, dense: nn.Module, images: Batches, judges: Batches, test: Batches, oracle: bool) -> None:
        self.dense, self.images, self.judges, self.test, self.oracle = dense, images, judges, test, oracle
        stats = calibrate(dense, images, target=None, consumers=True, progress=False)
        self.importance = WeightedGroups(AnticipatingImportance(stats, loader=images, progress=False))

    def pruned(self, repair: str) -> nn.Module:
        """Prune a copy by the factors as they are."""
        network = copy.deepcopy(self.dense)
        prune_to_flops(
            network, EXAMPLE, self.importance, flops=SHARE, repair=repair, loader=self.images, progress=False
        )
        return network

    def distance(self) -> float:
        """How far the repaired network's logits are from the dense network's, on images that judge; with an oracle the
        share of test images that it gets wrong.
        """
        network = self.pruned(REPAIRS[0])
        if self.oracle:
            return 1 - accuracy(network, self.test) / 100
        return output_distance(network, self.dense, [x for x, _ in self.judges])

    def row(self, name: str, exchanges: int, distance: float) -> dict[str, Any]:
        """Test the networks after so many exchanges."""
        top1 = {repair: accuracy(self.pruned(repair), self.test) for repair in REPAIRS}
        return {"network": name, "exchanges": exchanges, "distance": round(distance, 5), **top1}


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--oracle", action="store_true", help="let the test images choose, which no method may")
    arguments = parser.parse_args()
    oracle: bool = arguments.oracle
    rows = []
    for name, network, dense, folder in dense_networks(arguments):
        judges = draw(folder, network, 0, range(IMAGES, IMAGES + JUDGES))
        trials = Trials(dense, draw(folder, network, 0, range(IMAGES)), judges, test_images(folder, network), oracle)
        best, exchanges, factors = trials.distance(), 0, trials.importance.factors
        rows.append(trials.row(name, exchanges, best))
        print(rows[-1], flush=True)
        for group, factor in itertools.product(list(factors), FACTORS):
            before = factors[group]
            factors[group] *= factor
            found = trials.distance()
            print({"group": group, "factor": factors[group], "distance": round(found, 5)}, flush=True)
            if found < best:
                best, exchanges = found, exchanges + 1
            else:
                factors[group] = before
        rows.append(trials.row(name, exchanges, best))
        print(rows[-1], flush=True)
    command = "python benchmarks/group_exchanges.py --data DIR --checkpoints DIR" + " --oracle" * oracle
    save(
        "group_exchanges" + "_oracle" * oracle,
        command,
        f"CIFAR-10: {IMAGES} + {JUDGES} training images, 10,000 test images",
        rows=rows,
    )


if __name__ == "__main__":
    main()
