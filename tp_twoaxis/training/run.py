"""A training run: batches, steps, what is counted, and when it is saved."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from tp_twoaxis.batches import Batch, image_batches
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.ranks import averaging, rank, ranks, share_buffers
from tp_twoaxis.training import state
from tp_twoaxis.training.loss import DISTILLATION, check_labels, training_loss
from tp_twoaxis.training.settings import Settings, learning_rate

# batches between two looks at the losses on a GPU, which each look waits for; on the CPU they are free
LOOK_EVERY = 20


@dataclass(frozen=True)
class TrainingReport:
    """What a training run did.

    Attributes:
        losses: mean loss of every batch (over all ranks), before its step.
        learning_rates: of every batch.
        accuracies: share of training images classified right, for every epoch that was begun, measured while
            the weights move and on the images as the loader augments them; 0 where labels are missing.
        batches: optimizer steps in all, those before a resumption included.
        planned: steps that the schedule was laid out for; more than ``batches`` only when the loader ended early.
        images: images seen, over all ranks.
        seconds: wall-clock time in the loop, over all sittings.
        resumed_at: the step at which this sitting began; 0 for a fresh start.
    """

    losses: list[float]
    learning_rates: list[float]
    accuracies: list[float]
    batches: int
    planned: int
    images: int
    seconds: float
    resumed_at: int

    def to_json(self) -> str:
        """Return all of it as one JSON object."""
        return json.dumps(asdict(self))


class Run:
    """One training run: the network, its optimizer, and how far it has come."""

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module | None,
        loader: Iterable[Any],
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.network, self.teacher, self.loader, self.settings = network, teacher, loader, settings
        self.device, self.dtype = device, dtype
        self.trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.SGD(
            self.trained.values(),
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.per_epoch, self.steps = plan(loader, settings, device)
        self.look_every = 1 if device.type == "cpu" else LOOK_EVERY
        self.progress = state.Progress()
        self.resumed_at = 0
        self.begun = time.perf_counter()
        self.replay: state.RandomState | None = None
        self.unread: list[Tensor] = []
        # classified right, and all; over all ranks once they are read
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        self.progress, self.replay = state.load(path, self._parts(), self._config(), rank())
        self.resumed_at = self.progress.step
        self.begun -= self.progress.seconds

    def to_the_end(self, path: Path | None, every: int | None, show: bool) -> TrainingReport:
        """Run the epochs that are left."""
        progress, total = self.progress, self.steps
        # forwards go through the wrapper, which averages gradients and starts from rank 0's weights
        wrapped = averaging(self.network, self.device)
        with tqdm(
            total=total, initial=progress.step, desc="training", unit="batch", disable=not show, leave=False
        ) as bar:
            while progress.epoch < self.settings.epochs and progress.step < total:
                self._epoch(wrapped, path, every, bar)
                self._look(bar)
                progress.end_epoch()
                if path is not None:
                    self._save(path, None)
        self.optimizer.zero_grad(set_to_none=True)
        share_buffers(self.network)
        rates = [self._rate(step) for step in range(progress.step)]
        return TrainingReport(
            losses=progress.losses,
            learning_rates=rates,
            accuracies=[right / images for right, images in progress.epochs if images],
            batches=progress.step,
            planned=total,
            images=progress.images,
            seconds=time.perf_counter() - self.begun,
            resumed_at=self.resumed_at,
        )

    def _epoch(self, wrapped: nn.Module, path: Path | None, every: int | None, bar: Any) -> None:
        progress = self.progress
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(progress.epoch)
        skip, resumed = progress.batch, None
        if self.replay is not None:
            # the pass starts as it did, and the batches that were trained on are read once more and dropped
            resumed, first = state.random_state(self.loader, self.device), self.replay
            state.set_random_state(first, self.loader, self.device)
            self.replay = None
        start = state.random_state(self.loader, self.device)
        with image_batches(self.loader, max_images=None, labels=True, description="", progress=False) as batches:
            for batch in batches:
                if skip:
                    skip -= 1
                    if not skip and resumed is not None:
                        state.set_random_state(resumed, self.loader, self.device)
                    continue
                self._step(wrapped, batch)
                if progress.step % self.look_every == 0:
                    self._look(bar)
                if progress.step == self.steps or progress.batch == self.per_epoch:
                    return  # before another batch is drawn
                if path is not None and every is not None and progress.step % every == 0:
                    self._look(bar)
                    self._save(path, start)
        if progress.batch == 0:
            raise TwoAxisError(
                f"loader: expected batches in epoch {progress.epoch + 1}, got none; check the data path, and hand over "
                "a loader that can be read again (a generator can be read once: epochs=1)"
            )

    def _step(self, wrapped: nn.Module, batch: Batch) -> None:
        progress, settings = self.progress, self.settings
        images = batch.images.to(self.device, self.dtype, non_blocking=True)
        if settings.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(progress.step)
        half = torch.float16 if settings.amp == "fp16" else torch.bfloat16
        try:
            with torch.autocast(self.device.type, dtype=half, enabled=settings.amp is not None):
                logits = wrapped(images)
                taught = None
                if self.teacher is not None:
                    with torch.no_grad():
                        taught = self.teacher(images)
            # those of the loader, so that the GPU need not be waited for
            check_labels(batch.labels, logits)
            loss = training_loss(
                logits,
                labels,
                taught,
                label_smoothing=settings.label_smoothing,
                distillation=settings.distillation or DISTILLATION,
            )
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.step(self.optimizer)
            self.scaler.update()
        except TwoAxisError:
            raise
        except Exception as error:
            raise TwoAxisError(
                f"{type(self.network).__name__} raised {type(error).__name__} in training batch {progress.step} with "
                f"images {list(images.shape)}: {error}; it must return logits [n, K] with a gradient, and batches must "
                "be large enough for its BatchNorm and small enough for the memory; the model is as it was"
            ) from error
        self.unread.append(loss.detach())
        if labels is not None:
            self.counts[0] += (logits.detach().argmax(1) == labels).sum()
        self.counts[1] += len(images)
        progress.step += 1
        progress.batch += 1

    def _look(self, bar: Any) -> None:
        """Read the losses of the last batches, over all ranks, and refuse those that are not finite."""
        if not self.unread:
            return
        progress = self.progress
        losses = torch.stack(self.unread)
        if ranks() > 1:
            dist.all_reduce(losses)
            dist.all_reduce(self.counts)
        read = len(progress.losses)
        progress.losses += (losses / ranks()).tolist()
        right, images = self.counts.tolist()
        progress.count(right, images)
        bar.update(len(self.unread))
        self.unread = []
        self.counts.zero_()
        wrong = next((i for i in range(read, progress.step) if not math.isfinite(progress.losses[i])), None)
        if wrong is not None:
            raise TwoAxisError(
                f"training: the loss of batch {wrong} is {progress.losses[wrong]} at learning rate "
                f"{self._rate(wrong):.3g}; lower lr, add warmup, or check the labels; the model is as it was"
            )
        bar.set_postfix(
            epoch=f"{progress.epoch + 1}/{self.settings.epochs}",
            loss=f"{progress.losses[-1]:.3f}",
            accuracy=f"{progress.right / progress.seen:.1%}",
            refresh=False,
        )

    def _rate(self, step: int) -> float:
        settings = self.settings
        return learning_rate(step, self.steps, lr=settings.lr, schedule=settings.schedule, warmup=settings.warmup)

    def _save(self, path: Path, start: state.RandomState | None) -> None:
        now = state.random_state(self.loader, self.device)
        self.progress.seconds = time.perf_counter() - self.begun
        state.save(path, self._parts(), self._config(), self.progress, now, start)

    def _parts(self) -> state.Parts:
        return state.Parts(self.network, self.trained, self.optimizer, self.scaler, self.loader, self.device)

    def _config(self) -> dict[str, Any]:
        plan = {"ranks": ranks(), "steps": self.steps, "batches_per_epoch": self.per_epoch}
        return {**asdict(self.settings), **plan, "model": type(self.network).__name__}


def plan(loader: Iterable[Any], settings: Settings, device: torch.device) -> tuple[int | None, int]:
    """Batches of an epoch, where the loader tells, and optimizer steps in all."""
    try:
        per_epoch = len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        per_epoch = -1
    if ranks() > 1:
        fewest = torch.tensor(per_epoch, device=device)
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
        per_epoch = int(fewest)
    if per_epoch == 0:
        raise TwoAxisError("loader: expected at least one batch of images, got none; check the data path")
    if per_epoch < 0 and settings.max_batches is None:
        raise TwoAxisError("max_batches: expected a number with a loader that has no length, got None; give one")
    bounds = [] if settings.max_batches is None else [settings.max_batches]
    bounds += [] if per_epoch < 0 else [settings.epochs * per_epoch]
    return (per_epoch if per_epoch > 0 else None), min(bounds)
