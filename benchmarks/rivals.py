r"""What other methods that do not train keep at the same MACs: folding, Gram ridge, conditional variance, low rank.

Two third-party CIFAR-10 ResNet-20s lose 30, 50 and 65 % of their MACs in one step; nothing is fine-tuned.

- ``folding, bn``: Model Folding with BatchNorm re-estimated, see ``model_folding.py``.
- ``l2, ridge+bn``: removed channels are regressed on those that stay and absorbed into their consumers' weights, in one
  pass over the images (He et al. 2017 solve for the same; GRAIL calls it Gram ridge).
- ``conditional-variance``: the variance that all peers leave unexplained, with three repairs.
- ``low-rank, bn``: convolutions in two factors, see ``low_rank.py``. It removes no channel and stands here for
  orientation.

The criteria and repairs beside which they stand are those of ``benchmarks/configs/cifar10_recipe.json``.

    python benchmarks/rivals.py --data DIR --checkpoints DIR

``--data`` holds ``cifar10/``. 2,048 training images serve to calibrate, repair and re-estimate BatchNorm, drawn twice.
Accuracy is in % on all 10,000 test images, which nothing is chosen on. Cells that ``results/rivals.json`` holds already
are skipped. About half an hour on one CPU core.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

from cifar_resnets import CIFAR_NETWORKS, EXAMPLE, IMAGES, dense_networks, draw, option_parser, test_images
from default_score import Batches
from few_images import accuracy
from low_rank import Factors, factors_of, truncate
from model_folding import fold
from resumable import ResumableCells
from torch import nn

from tp_twoaxis import prune_to_flops
from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.repair.batch_norm import reestimate_batch_norm

SHARES, DRAWS = (0.7, 0.5, 0.35), (0, 1)
METHODS = (
    "folding, bn",
    "l2, ridge+bn",
    "conditional-variance, bn",
    "conditional-variance, ridge+bn",
    "conditional-variance, sequential",
    "low-rank, bn",
)
KEY = ("network", "share", "method", "draw")


def reduce(dense: nn.Module, cell: dict[str, Any], images: Batches, factors: dict[str, Factors]) -> nn.Module:
    """Bring a copy of the network to a share of its MACs."""
    method, repair = cell["method"].split(", ")
    if method == "folding":
        network = fold(dense, EXAMPLE, cell["share"], cell["draw"])
    elif method == "low-rank":
        if not factors:
            factors.update(factors_of(dense, images))
        network = truncate(dense, EXAMPLE, cell["share"], factors)
    else:
        network = copy.deepcopy(dense)
        prune_to_flops(network, EXAMPLE, method, flops=cell["share"], repair=repair, loader=images, progress=False)
        return network
    reestimate_batch_norm(network, images, progress=False)
    return network


def page(cells: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """Draw the table for people: means of the draws, and the larger one's distance from the mean."""
    heads = list(itertools.product(CIFAR_NETWORKS, SHARES))
    known = ", ".join(f"{name} {accuracy:.2f} %" for name, accuracy in dense.items())
    text = (
        f"Top-1 accuracy in % on all CIFAR-10 test images, mean of {len(DRAWS)} draws of {IMAGES} training images, and "
        f"half of their difference; one step, not fine-tuned. Dense: {known}.\n\n"
        "| method, repair | " + " | ".join(f"{name} {share:g}" for name, share in heads) + " |\n"
    )
    lines = ["| --- |" + " --- |" * len(heads)]
    for method in METHODS:
        texts = []
        for network, share in heads:
            own = [c["top1"] for c in cells if (c["network"], c["share"], c["method"]) == (network, share, method)]
            texts.append(f"{sum(own) / len(own):.1f} ± {(max(own) - min(own)) / 2:.1f}" if own else "")
        lines.append(f"| {method} | {' | '.join(texts)} |")
    return text + "\n".join(lines) + "\n"


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default all")
    arguments = parser.parse_args()
    cells = ResumableCells("rivals", KEY, "CIFAR-10, see the script", page)
    for name, network, dense, folder in dense_networks(arguments):
        judges = test_images(folder, network)
        cells.dense.setdefault(name, accuracy(dense, judges))
        for seed in DRAWS:
            images, factors = draw(folder, network, seed), {}
            for share, method in itertools.product(SHARES, arguments.methods):
                if cell := cells.missing(name, share, method, seed):
                    pruned = reduce(dense, cell, images, factors)
                    kept = count_macs(pruned, EXAMPLE).total / count_macs(dense, EXAMPLE).total
                    cells.add({**cell, "kept": round(kept, 4), "top1": accuracy(pruned, judges)})
    print(cells.page())


if __name__ == "__main__":
    main()
