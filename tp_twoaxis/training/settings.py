"""Settings of training: those of a run, the recipes for training from scratch, and the learning rate of every batch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.training.loss import Distillation

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What recipes and runs have in common; see :func:`~tp_twoaxis.training.finetuning.finetune`."""

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Schedule = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    amp: Precision | None = None
    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrainingSettings):
    """All settings that decide a run's numbers; a checkpoint of other settings is refused."""

    max_batches: int | None
    distillation: Distillation | None
    seed: int

    def check(self, device: torch.device) -> None:
        """Refuse values out of range, and combinations that cannot run.

        Raises:
            TwoAxisError: naming the argument.
        """
        positive = {"epochs": self.epochs, "max_batches": self.max_batches}
        ranges = (
            ("lr", self.lr, 0 < self.lr < math.inf, "a positive number"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or a positive number"),
            ("warmup", self.warmup, 0 <= self.warmup < 1, "a share of the batches in [0, 1)"),
            ("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "a number in [0, 1)"),
            ("schedule", self.schedule, self.schedule in get_args(Schedule), "one of cosine, linear, constant"),
            ("amp", self.amp, self.amp in (None, *get_args(Precision)), "None, 'bf16' or 'fp16'"),
            *((name, value, value is None or value >= 1, "at least 1") for name, value in positive.items()),
        )
        for name, value, fits, expected in ranges:
            if not fits:
                raise TwoAxisError(f"{name}: expected {expected}, got {value!r}")
        if self.nesterov and self.momentum == 0:
            raise TwoAxisError("nesterov: expected a momentum above 0 with it, got 0; 0.9 is usual")
        if self.amp == "fp16" and device.type != "cuda":
            raise TwoAxisError(f"amp: fp16 needs a model on a CUDA GPU, got one on {device}; take 'bf16' or None")
        if self.distillation is not None:
            temperature, weight = self.distillation
            if not (0 < temperature < math.inf and 0 <= weight <= 1):
                raise TwoAxisError(
                    f"distillation: expected a positive temperature and a weight in [0, 1], got {temperature}, {weight}"
                )


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingSettings):
    """How a network is trained from scratch; ``batch_size`` is that of all ranks together."""

    batch_size: int

    def settings(self) -> dict[str, Any]:
        """Return the arguments of :func:`~tp_twoaxis.training.finetuning.finetune`, which takes no batch size.

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
    channels-last memory. Elsewhere they are for the caller to choose: what they save depends on the processor.

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
    check_name("recipe", name, RECIPES)
    recipe = RECIPES[name]
    if "mobilenet" in model.lower():
        recipe = dataclasses.replace(recipe, lr=recipe.lr / 2)
    if name == "fast" and str(device).startswith("cuda"):
        recipe = dataclasses.replace(recipe, amp="bf16", channels_last=True)
    return recipe


def learning_rate(step: int, steps: int, *, lr: float, schedule: Schedule = "cosine", warmup: float = 0.0) -> float:
    """Learning rate of one batch, a pure function of its number, so that there is no state to save.

    With w warm-up batches (``warmup * steps``, rounded) batch t < w has ``lr * (t + 1) / (w + 1)``; after them,
    with s = (t - w) / (steps - w), cosine has ``lr * (1 + cos(pi s)) / 2``, linear ``lr * (1 - s)``.

    Args:
        step: number of the batch, from 0 to ``steps - 1``.
        steps: batches in all.
        lr: the highest rate.
        schedule: ``"cosine"``, ``"linear"`` or ``"constant"``.
        warmup: share of the batches, in [0, 1).

    Example:
        >>> [round(learning_rate(t, 4, lr=1.0), 3) for t in range(4)]
        [1.0, 0.854, 0.5, 0.146]
        >>> [round(learning_rate(t, 6, lr=1.0, schedule="linear", warmup=0.34), 2) for t in range(6)]
        [0.33, 0.67, 1.0, 0.75, 0.5, 0.25]
    """
    rising = round(warmup * steps)
    if step < rising:
        return lr * (step + 1) / (rising + 1)
    share = (step - rising) / (steps - rising)
    if schedule == "constant":
        return lr
    return lr * (1 - share) if schedule == "linear" else lr * (1 + math.cos(math.pi * share)) / 2
