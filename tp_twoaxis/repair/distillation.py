"""Repair ``distill``: training without labels, towards what the dense network computes from the same images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tp_twoaxis.data.augmentation import crop_and_flip
from tp_twoaxis.reconstruction.patch_fit import STEPS
from tp_twoaxis.repair.feature_distance import FeatureDistance, feature_distance
from tp_twoaxis.repair.images import RepairImages
from tp_twoaxis.repair.repair_task import NO_GAIN, Outcome, RepairTask
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.runtime.progress_bar import progress_bar
from tp_twoaxis.training.settings import learning_rate

# images of a step, at most
BATCH = 128
# learning rates, relative to the root mean square of each parameter, so that depthwise kernels, wide layers and gains
# of BatchNorms move alike: one after the other, until one brings the network nearer on images held out
RATES = (1e-2, 2e-3)
# share of the steps over which the rate rises; over the others it falls to zero
WARMUP = 0.3
# parameters near zero move as if their root mean square was this
SMALLEST_SCALE = 1e-3


def distill(task: RepairTask) -> dict[str, Outcome]:
    """Train the repaired network without labels, towards the dense network's features and outputs.

    Each step runs a batch through both networks, its images cropped at random offsets, mirrored and mixed with each
    other: that asks the dense network what it does between the images that there are. The loss is
    :class:`~tp_twoaxis.repair.feature_distance.FeatureDistance`. Adam (Kingma and Ba 2015) moves all parameters at
    rates relative to their sizes, in one cycle; BatchNorm statistics stay fixed. The change is kept whole, in part, or
    not at all, by the same loss on the images held out; where it does not help, a smaller rate is tried.

    Related work: features as targets, FitNets (Romero et al. 2015); a teacher that sees each augmented view, Beyer et
    al. 2022; mixtures of images, mixup (Zhang et al. 2018).

    Args:
        task: with images; the network may be repaired already.

    Returns:
        The outcome for every consumer of a removed channel that may be refitted; nothing where training was undone.
    """
    assert task.images is not None
    steps, images = task.training_steps, task.images
    with _trainable(task) as parameters, feature_distance(task) as distance:
        start = [p.detach().clone() for p in parameters]
        before = distance.held_out()
        for rate in RATES:
            _set(parameters, start)
            _train(distance, images, parameters, rate, steps)
            size, after = _keep_useful_part(distance, parameters, start, before)
            if size > 0:
                break
    if not size > 0:
        task.notes.append(f"distill: {steps} steps of training were undone, {NO_GAIN}")
        return {}
    judged = "" if before is None else f"; on images held out the loss fell from {before:.3g} to {after:.3g}"
    task.notes.append(f"distill: trained without labels for {steps} steps{judged}")
    return {name: Outcome(True) for name in task.refittable}


def mix(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mix each image of half of the batch with another one of the batch, in random shares.

    Args:
        images: [N, ...].
        generator: a CPU generator.

    Example:
        >>> mix(torch.ones(4, 3, 8, 8), torch.Generator().manual_seed(0)).mean().item()
        1.0
    """
    count = len(images)
    share = torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.5)
    share = share.to(images).view(-1, *[1] * (images.ndim - 1))
    return images.lerp(images[torch.randperm(count, generator=generator).to(images.device)], share)


def _train(
    distance: FeatureDistance, images: RepairImages, parameters: list[nn.Parameter], rate: float, steps: int
) -> None:
    """Take so many steps in one cycle; stops early where the loss is not finite."""
    scales = [max(float(p.detach().double().square().mean().sqrt()), SMALLEST_SCALE) for p in parameters]
    groups = [{"params": [p], "lr": rate * scale} for p, scale in zip(parameters, scales, strict=True)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, steps, lr=1.0, warmup=WARMUP) if step < steps else 0.0
    )
    generator = torch.Generator().manual_seed(0)
    batches = _batches(images)
    with progress_bar(total=steps, desc="distill", unit="step", show=images.progress) as bar:
        for _ in range(steps):
            loss = distance(_augmented(next(batches), generator))
            if not torch.isfinite(loss):
                return
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            bar.update()


def _batches(images: RepairImages) -> Iterator[Inputs]:
    """Read the fitted images over and over."""
    while True:
        with images.fitted() as batches:
            for inputs in batches:
                yield from inputs.split(BATCH)


def _augmented(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Crop, mirror and mix images; inputs of other kinds, or several of them, stay as they are."""
    tensors = inputs.tensors
    if len(tensors) != 1 or tensors[0].ndim != 4 or not tensors[0].is_floating_point():
        return inputs
    return inputs.replaced([mix(crop_and_flip(tensors[0].contiguous(), generator), generator)])


@contextmanager
def _trainable(task: RepairTask) -> Iterator[list[nn.Parameter]]:
    """Put new parameters with gradients in the places of those that may change; afterwards they are frozen or not as
    those were.
    """
    whole = {name for name in task.whole if name not in task.masks or not task.masks[name].inputs.any()}
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in task.network.named_modules():
        for key, old in module._parameters.items():
            if old is not None and old.is_floating_point() and name not in whole:
                if old not in made:
                    # not channels last: with that, oneDNN 3.12 crashes in the gradient of some 1x1 convolutions
                    made[old] = nn.Parameter(old.detach().clone(memory_format=torch.contiguous_format))
                module._parameters[key] = made[old]
    try:
        yield list(made.values())
    finally:
        for old, new in made.items():
            new.requires_grad_(old.requires_grad)
            new.grad = None
            if new.stride() != old.stride():
                new.data = torch.empty_like(old).copy_(new.data)


def _set(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _keep_useful_part(
    distance: FeatureDistance, parameters: list[nn.Parameter], start: list[Tensor], before: float | None
) -> tuple[float, float | None]:
    """Leave the part of the change with the least loss on images held out; returns it, 0 for none, and that loss."""
    if before is None:
        return 1.0, None
    end = [p.detach().clone() for p in parameters]
    losses = {0.0: before}
    for part in STEPS:
        _set(parameters, [a.lerp(b, part) for a, b in zip(start, end, strict=True)])
        loss = distance.held_out()
        losses[part] = math.inf if loss is None or math.isnan(loss) else loss
    best = min(losses, key=losses.__getitem__)
    _set(parameters, [a.lerp(b, best) for a, b in zip(start, end, strict=True)])
    return best, losses[best]
