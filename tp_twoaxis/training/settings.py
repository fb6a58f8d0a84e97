"""Settings of a run, what they may be, and the learning rate of every batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.training.loss import Distillation

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["bf16", "fp16"]


@dataclass(frozen=True)
class Settings:
    """What decides the numbers; a checkpoint of other settings is refused."""

    epochs: int
    max_batches: int | None
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    schedule: Schedule
    warmup: float
    label_smoothing: float
    distillation: Distillation | None
    amp: Precision | None
    channels_last: bool
    seed: int

    def check(self, device: torch.device) -> None:
        """Refuse what cannot run.

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
