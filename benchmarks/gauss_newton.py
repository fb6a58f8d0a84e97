r"""Gauss-Newton steps of all layers together, after ``joint``: what fitting more than two layers at a time is worth.

Two third-party CIFAR-10 ResNet-20s are pruned by ``anticipating``, in one step or two, and repaired by ``joint`` from
2,048 images. Then all weights together move towards what the outputs of the nine blocks, at the channels that stay, and
the logits are in the dense network, each squared error over its variance: conjugate gradients on the Gauss-Newton
system of the same images (matrix-free, by forward and reverse differentiation), with every parameter in units of its
root mean square. The iterate and the step, of 1, 1/2 and 1/4, that are best on 512 other training images are taken,
then it is linearised anew. No labels, no learning rate.

    python benchmarks/gauss_newton.py --data DIR --checkpoints DIR

``--data`` holds ``cifar10/``. Accuracy is in % on all 10,000 test images, which nothing is chosen on. Cells that
``results/gauss_newton.json`` holds already are skipped. About an hour and a half on two CPU cores.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from cifar_resnets import EXAMPLE, IMAGES, dense_networks, draw, option_parser, test_images
from default_score import Batches
from few_images import accuracy
from resumable import ResumableCells
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from tp_twoaxis import prune_to_flops
from tp_twoaxis.reconstruction.patch_fit import STEPS

SHARES, PRUNING_STEPS = (0.5, 0.35), (1, 2)
KEY = ("network", "share", "steps")
ROUNDS, ITERATIONS, CHUNK, JUDGES = 4, 16, 256, 512
JUDGED = (2, 4, 8, 12, 16)  # iterations after which the step so far is judged
RIDGE = 1e-3  # of the curvature along the first gradient
Weights = dict[str, Tensor]


def dot(a: Weights, b: Weights) -> float:
    """Inner product of all parameters."""
    return sum(float((a[key].double() * b[key].double()).sum()) for key in a)


def plus(a: Weights, factor: float, b: Weights) -> Weights:
    """Add a multiple of ``b``."""
    return {key: a[key] + factor * b[key] for key in a}


class LeastSquares:
    """Distance of a pruned network's block outputs and logits from the dense network's, as residuals of its weights.

    Args:
        network: pruned.
        dense: before that.
        kept: block -> channels of its output that the pruned network still has.
        images: of the distance; at least one batch.
    """

    def __init__(self, network: nn.Module, dense: nn.Module, kept: dict[str, Tensor], images: Tensor) -> None:
        self.network, self.kept = network, kept
        self.seen: dict[str, Tensor] = {}
        self.images = images.split(CHUNK)
        with torch.no_grad():
            self.targets = [self._targets(dense, chunk) for chunk in self.images]
        self.count = len(images)
        for name in kept:
            network.get_submodule(name).register_forward_hook(self._hook(name))
        self.parameters = {name: p.detach().clone() for name, p in network.named_parameters()}
        # units: with them a step of the same size changes every tensor by the same share
        self.scales = {name: p.square().mean().sqrt().clamp_min(1e-3) for name, p in self.parameters.items()}
        self.powers = {
            key: sum(float((t[key] - t[key].mean(0)).square().sum()) for t in self.targets) / self.count
            for key in self.targets[0]
        }

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self.seen[name] = output

        return hook

    def _targets(self, dense: nn.Module, images: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        handles = [
            dense.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name, own=own: seen.update({name: output[:, own]})
            )
            for name, own in self.kept.items()
        ]
        logits = dense(images)
        for handle in handles:
            handle.remove()
        return {**seen, "": logits - logits.mean(1, keepdim=True)}

    def residual(self, change: Weights, number: int) -> Tensor:
        """Give the weighted residuals of a chunk, at the parameters plus so much of their units."""
        weights = {name: p + self.scales[name] * change[name] for name, p in self.parameters.items()}
        logits = functional_call(self.network, weights, (self.images[number],))
        found = {**self.seen, "": logits - logits.mean(1, keepdim=True)}
        parts = []
        for key, target in self.targets[number].items():
            weight = (1.0 if not key else 1.0 / len(self.kept)) / self.powers[key] / self.count
            parts.append((found[key] - target).flatten() * math.sqrt(weight))
        return torch.cat(parts)

    @torch.no_grad()
    def loss(self, change: Weights) -> float:
        """Squared norm of all residuals."""
        return sum(float(self.residual(change, n).square().sum()) for n in range(len(self.images)))

    def gradient(self, change: Weights) -> Weights:
        """Half of the loss's gradient."""
        total = {key: torch.zeros_like(p) for key, p in change.items()}
        for number in range(len(self.images)):
            value, back = vjp(lambda c, n=number: self.residual(c, n), change)
            total = plus(total, 1.0, back(value)[0])
        return total

    def curvature(self, change: Weights, direction: Weights) -> Weights:
        """Multiply by the Gauss-Newton matrix ``J'J``."""
        total = {key: torch.zeros_like(p) for key, p in change.items()}
        for number in range(len(self.images)):

            def residual(c: Weights, n: int = number) -> Tensor:
                return self.residual(c, n)

            forward = jvp(residual, (change,), (direction,))[1]
            total = plus(total, 1.0, vjp(residual, change)[1](forward)[0])
        return total


def solve(fitted: LeastSquares, judge: Callable[[Weights], float], start: Weights) -> Weights:
    """Take a round of conjugate gradients from some weights; the step that the judge likes best, or none."""
    residual = {key: -g for key, g in fitted.gradient(start).items()}
    step = {key: torch.zeros_like(p) for key, p in start.items()}
    direction, before = residual, dot(residual, residual)
    best, chosen = judge(start), start
    ridge = 0.0
    for iteration in range(1, ITERATIONS + 1):
        product = fitted.curvature(start, direction)
        ridge = ridge or RIDGE * dot(direction, product) / dot(direction, direction)
        product = plus(product, ridge, direction)
        size = before / dot(direction, product)
        step, residual = plus(step, size, direction), plus(residual, -size, product)
        after = dot(residual, residual)
        direction, before = plus(residual, after / before, direction), after
        if iteration in JUDGED:
            for part in STEPS:
                tried = plus(start, part, step)
                if (loss := judge(tried)) < best:
                    best, chosen = loss, tried
    return chosen


def measure(dense: nn.Module, cell: dict[str, Any], images: Batches, judges: Tensor, test: Batches) -> dict[str, Any]:
    """Prune and repair a copy, and take the rounds."""
    network, begin = copy.deepcopy(dense), time.perf_counter()
    report = prune_to_flops(
        network,
        EXAMPLE,
        "anticipating",
        flops=cell["share"],
        steps=cell["steps"],
        repair="joint",
        loader=images,
        progress=False,
    )
    seconds = round(time.perf_counter() - begin)
    blocks = {name: block for name, block in dense.named_modules() if hasattr(block, "conv2")}
    kept = {}
    for name, block in blocks.items():
        gone = set(report.removed_channels.get(f"{name}.conv2", []))
        kept[name] = torch.tensor([c for c in range(block.conv2.out_channels) if c not in gone])
    network.to(memory_format=torch.contiguous_format)
    x = torch.cat([inputs for inputs, _ in images]).contiguous()
    fitted, held_out = (LeastSquares(network.eval(), dense, kept, own) for own in (x, judges.contiguous()))
    change = {key: torch.zeros_like(p) for key, p in fitted.parameters.items()}
    rows: list[dict[str, float]] = []
    for number in range(ROUNDS + 1):
        if number:
            change = solve(fitted, held_out.loss, change)
            seconds = round(time.perf_counter() - begin)
        pruned = copy.deepcopy(network)
        with torch.no_grad():
            for name, parameter in pruned.named_parameters():
                parameter.add_(fitted.scales[name] * change[name])
        row = {"round": number, "seconds": seconds, "top1": accuracy(pruned, test)}
        rows.append({**row, "fitted": round(fitted.loss(change), 4), "held_out": round(held_out.loss(change), 4)})
        print(rows[-1], flush=True)
    return {**cell, "rounds": rows}


def page(cells: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """Draw the table for people."""
    heads = ["joint", *(f"round {number}" for number in range(1, ROUNDS + 1))]
    lines = [
        "| network, MACs kept | pruning steps | " + " | ".join(heads) + " |",
        "| --- | --- |" + " --- |" * len(heads),
    ]
    for cell in cells:
        whole = dense[cell["network"]]
        found = [f"{row['top1']} ({100 * row['top1'] / whole:.1f}), {row['seconds']} s" for row in cell["rounds"]]
        found += [""] * (len(heads) - len(found))
        lines.append(f"| {cell['network']} {cell['share']:g}, dense {whole} | {cell['steps']} | {' | '.join(found)} |")
    title = "Top-1 accuracy in %, in brackets in % of the dense network's, and seconds from the start:"
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, choices=SHARES, help="default all")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=PRUNING_STEPS, choices=PRUNING_STEPS, help="default all"
    )
    arguments = parser.parse_args()
    cells = ResumableCells("gauss_newton", KEY, "CIFAR-10, see the script", page)
    for name, network, dense, folder in dense_networks(arguments):
        test, images = test_images(folder, network), draw(folder, network, 0)
        judges = torch.cat([x for x, _ in draw(folder, network, 0, range(IMAGES, IMAGES + JUDGES))])
        cells.dense.setdefault(name, accuracy(dense, test))
        for share, steps in itertools.product(arguments.shares, arguments.steps):
            if cell := cells.missing(name, share, steps):
                cells.add(measure(dense, cell, images, judges, test))
    print(cells.page())


if __name__ == "__main__":
    main()
