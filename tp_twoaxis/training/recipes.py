"""How a network is trained from scratch: the paper's recipe, a fast one, and the batches for either."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tp_twoaxis.augmentation import crop_and_flip
from tp_twoaxis.batches import split_batch
from tp_twoaxis.data import ArrayDataset, make_loader
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.training.settings import Precision, Schedule


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run; ``batch_size`` is that of all ranks together."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    amp: Precision | None = None
    channels_last: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the arguments of :func:`~tp_twoaxis.training.finetuning.finetune`, which sees no batch size.

        Example:
            >>> RECIPES["paper"].settings()["lr"]
            0.1
        """
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "batch_size"}


# paper: SGD 0.9, 200 epochs, cosine, 0.1 at a batch of 128, crop 32 pad 4 and flip; weight decay 5e-4 is ours.
# fast: 30 epochs instead of 200. A batch of 512 keeps a modern GPU busy, and the rate grows with it, after a
#   warm-up of 5 epochs (Goyal et al. 2017); a short run ends better on a straight line to zero, with Nesterov's
#   momentum (Page 2018, "How to train your ResNet"). Weight decay and a plain cross-entropy stay the paper's, so
#   that the logits, which the target axis reads, are trained towards the same loss.
RECIPES = {
    "paper": Recipe(epochs=200, batch_size=128, lr=0.1),
    "fast": Recipe(epochs=30, batch_size=512, lr=0.4, nesterov=True, schedule="linear", warmup=5 / 30),
}


def find_recipe(name: str, model: str, device: torch.device | str) -> Recipe:
    """Look up a recipe for a network and a device.

    MobileNets take half the learning rate, as in the paper. On CUDA the fast recipe computes in bfloat16 and in
    channels-last memory; elsewhere both would cost more than they save.

    Args:
        name: ``"paper"`` or ``"fast"``.
        model: the network's name.
        device: where it is trained.

    Raises:
        TwoAxisError: there is no such recipe.

    Example:
        >>> find_recipe("paper", "cifar_mobilenet_v2", "cpu").lr
        0.05
        >>> find_recipe("fast", "cifar_resnet18", "cuda").amp
        'bf16'
    """
    if name not in RECIPES:
        raise TwoAxisError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}; choose one")
    recipe = RECIPES[name]
    if "mobilenet" in model.lower():
        recipe = dataclasses.replace(recipe, lr=recipe.lr / 2)
    if name == "fast" and str(device).startswith("cuda"):
        recipe = dataclasses.replace(recipe, amp="bf16", channels_last=True)
    return recipe


class AugmentedBatches:
    """A loader's batches, each image cropped at a random offset and half of them mirrored.

    The crop is that of :class:`~tp_twoaxis.data.ArrayLoader`, with padding of the data's mean instead of black.

    Args:
        loader: yields float images [n, C, H, W], alone or with labels.
        generator: a CPU generator of the loader's order and of offsets and mirrors.

    Example:
        >>> batch = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
        >>> images, labels = next(iter(AugmentedBatches([batch], torch.Generator().manual_seed(0))))
        >>> images.shape, labels.tolist()
        (torch.Size([2, 3, 8, 8]), [0, 1])
    """

    def __init__(self, loader: Any, generator: torch.Generator) -> None:
        self.loader = loader
        self.generator = generator

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for index, batch in enumerate(self.loader):
            images, labels = split_batch(batch, index)
            yield crop_and_flip(images, self.generator), labels


def training_batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    augment: bool = True,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Any:
    """Batches to train on, in a new order for each pass.

    Images in memory (:class:`~tp_twoaxis.data.ArrayDataset`) move to the device once, as bytes, and are shuffled,
    augmented and normalised there: CIFAR takes 0.15 GB, and no worker process has to keep up with the GPU.

    Args:
        dataset: of :mod:`tp_twoaxis.data`, or any map-style data set.
        batch_size: images a batch over all ranks.
        device: where the network is trained.
        augment: crop at a random offset (pad an eighth of the side) and mirror at random.
        seed: of order and augmentation.
        workers: processes that decode larger images.
        rank: which shard this process takes: every ``ranks``-th image, and equally many for every rank.
        ranks: number of processes.

    Returns:
        A re-iterable loader with a length and with the ``generator`` that all its randomness comes from.

    Raises:
        TwoAxisError: the batch size is no multiple of the number of ranks, or there are fewer images than ranks.

    Example:
        >>> from tp_twoaxis.data import digits
        >>> loader = training_batches(digits("train"), 100, augment=False, rank=1, ranks=2)
        >>> len(loader), next(iter(loader))[0].shape
        (11, torch.Size([50, 1, 8, 8]))
    """
    if batch_size < 1 or batch_size % ranks:
        raise TwoAxisError(f"batch_size: expected a multiple of {ranks} ranks, got {batch_size}; choose another")
    size = len(dataset)  # type: ignore[arg-type]  # map-style data sets have a length, their base class none
    if size < ranks:
        raise TwoAxisError(f"data: expected at least an image for each of {ranks} ranks, got {size}")
    rows = range(rank, size - size % ranks, ranks)
    generator = torch.Generator().manual_seed(seed + rank)
    if isinstance(dataset, ArrayDataset):
        return dataset.to(device).loader(batch_size // ranks, rows, shuffle=True, generator=generator, augment=augment)
    part = dataset if ranks == 1 else torch.utils.data.Subset(dataset, rows)
    loader = make_loader(part, batch_size // ranks, seed=seed + rank, shuffle=True, workers=workers)
    return AugmentedBatches(loader, loader.generator) if augment else loader  # type: ignore[arg-type]
