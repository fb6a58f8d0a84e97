"""A training run: batches, steps, what is counted, and when it is saved."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError, reason
from tp_twoaxis.runtime.batches import Batch, image_batches
from tp_twoaxis.runtime.distributed import broadcast_buffers, data_parallel, min_over_ranks, sum_in_place, world_size
from tp_twoaxis.runtime.model_state import fork_rng, preserve_modes
from tp_twoaxis.runtime.progress_bar import progress_bar
from tp_twoaxis.training import resumption
from tp_twoaxis.training.loss import DISTILLATION, Penalty, check_labels, training_loss
from tp_twoaxis.training.settings import RunSettings, learning_rate

EpochCallback = Callable[[int, nn.Module], None]
"""Called with the number of epochs that are done, and the network."""

# batches after which losses are read from a GPU, which each reading waits for; on the CPU they are free
BATCHES_PER_READING = 20


@dataclass(frozen=True)
class TrainingReport:
    """What a training run did.

    Attributes:
        losses: mean loss of every batch (over all ranks), its penalty included, before its step.
        learning_rates: of every batch.
        accuracies: share of training images classified right, for every epoch that was begun, measured while
            the weights move and on the images as the loader augments them; 0 where labels are missing.
        batches: optimizer steps in all, those before a resumption included.
        planned: steps that the schedule was laid out for; more than ``batches`` only when the loader ended early.
        images: images seen, over all ranks.
        seconds: wall-clock time in the loop, that before a resumption included.
        resumed_at: the step at which this call began; 0 for a fresh start.
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


class TrainingRun:
    """One training run: the network, its optimizer, and how far it has come.

    Args:
        network: unwrapped, with at least one parameter that requires a gradient.
        teacher: of the distillation, on the same device, in evaluation mode.
        loader: yields ``(images, labels)`` or images.
        settings: of the run.
        penalty: see :func:`~tp_twoaxis.training.finetuning.finetune`.
        on_epoch: see there.

    Raises:
        TwoAxisError: the loader is empty, or its length is unknown and there is no cap.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module | None,
        loader: Iterable[Any],
        settings: RunSettings,
        penalty: Penalty | None = None,
        on_epoch: EpochCallback | None = None,
    ) -> None:
        self.network, self.teacher, self.loader, self.settings = network, teacher, loader, settings
        self.penalty, self.on_epoch = penalty, on_epoch
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        first = next(iter(trained.values()))
        self.device, self.dtype = first.device, first.dtype
        self.optimizer = torch.optim.SGD(
            trained.values(),
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.batches_per_epoch, self.steps = plan_steps(loader, settings)
        self.state = resumption.RunState(network, trained, self.optimizer, self.scaler, loader, self.device)
        self.config = {
            **asdict(settings),
            "ranks": world_size(),
            "steps": self.steps,
            "batches_per_epoch": self.batches_per_epoch,
            "model": type(network).__name__,
            "penalty": None if penalty is None else repr(penalty),
        }
        self.progress = resumption.Progress()
        self.resumed_at = 0
        self.started = time.perf_counter()
        self.epoch_start: resumption.RandomState | None = None  # of an epoch that a resumption goes on with
        self.batches_per_reading = 1 if self.device.type == "cpu" else BATCHES_PER_READING
        self.unread_losses: list[Tensor] = []
        # classified right, and all, since the last reading
        self.unread_counts = torch.zeros(2, dtype=torch.int64, device=self.device)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        self.progress, self.epoch_start = resumption.load(path, self.state, self.config)
        self.resumed_at = self.progress.step
        self.started -= self.progress.seconds

    def finish(self, path: Path | None, every: int | None, show_progress: bool) -> TrainingReport:
        """Run the remaining epochs.

        Args:
            path: file of the run's state, written after every epoch; None writes none.
            every: write it also after every so many batches.
            show_progress: show a bar on stderr.
        """
        progress, total = self.progress, self.steps
        # forwards go through the wrapper, which averages gradients and starts from rank 0's weights
        wrapped = data_parallel(self.network, self.device)
        if progress.step == 0:
            self._call_back()
        with progress_bar(total=total, initial=progress.step, desc="training", unit="batch", show=show_progress) as bar:
            while progress.epoch < self.settings.epochs and progress.step < total:
                self._epoch(wrapped, path, every, bar)
                self._read_losses(bar)
                progress.end_epoch()
                self._call_back()
                if path is not None:
                    self._save(path)
        self.optimizer.zero_grad(set_to_none=True)
        broadcast_buffers(self.network)
        return TrainingReport(
            losses=progress.losses,
            learning_rates=[self._rate(step) for step in range(progress.step)],
            accuracies=[right / images for right, images in progress.epochs if images],
            batches=progress.step,
            planned=total,
            images=progress.images,
            seconds=time.perf_counter() - self.started,
            resumed_at=self.resumed_at,
        )

    def _call_back(self) -> None:
        if self.on_epoch is not None:
            with fork_rng(), preserve_modes(self.network), torch.no_grad():
                self.on_epoch(self.progress.epoch, self.network)

    def _epoch(self, wrapped: nn.Module, path: Path | None, every: int | None, bar: Any) -> None:
        progress = self.progress
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(progress.epoch)
        skip, resumed = progress.batch, None
        if self.epoch_start is not None:
            # the pass starts as it did, and the batches that were trained on are read once more and dropped
            resumed = resumption.random_state(self.loader, self.device)
            resumption.set_random_state(self.epoch_start, self.loader, self.device)
            self.epoch_start = None
        start = resumption.random_state(self.loader, self.device)
        with image_batches(self.loader, max_images=None, labels=True, description="", progress=False) as batches:
            for batch in batches:
                if skip:
                    skip -= 1
                    if not skip and resumed is not None:
                        resumption.set_random_state(resumed, self.loader, self.device)
                    continue
                self._step(wrapped, batch)
                if progress.step % self.batches_per_reading == 0:
                    self._read_losses(bar)
                if progress.step == self.steps or progress.batch == self.batches_per_epoch:
                    return  # before another batch is drawn
                if path is not None and every is not None and progress.step % every == 0:
                    self._read_losses(bar)
                    self._save(path, start)
        if progress.batch == 0:
            raise TwoAxisError(
                f"loader: expected batches in epoch {progress.epoch + 1}, got none; check the data path, and pass "
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
                teacher_logits = None
                if self.teacher is not None:
                    with torch.no_grad():
                        teacher_logits = self.teacher(images)
            # the loader's labels, not those on the device, so that the check does not wait for a GPU
            check_labels(batch.labels, logits)
            loss = training_loss(
                logits,
                labels,
                teacher_logits,
                label_smoothing=settings.label_smoothing,
                distillation=settings.distillation or DISTILLATION,
            )
            penalty = None if self.penalty is None else self.penalty(progress.step)
            if penalty is not None:
                loss = loss + penalty
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.step(self.optimizer)
            self.scaler.update()
        except TwoAxisError:
            raise
        except Exception as error:
            raise TwoAxisError(
                f"{type(self.network).__name__} fails in training batch {progress.step} with images "
                f"{list(images.shape)} ({reason(error)}); it must return logits [n, K] with a gradient, and batches "
                "must be large enough for its BatchNorm and small enough for the memory; the model is as it was"
            ) from error
        self.unread_losses.append(loss.detach())
        if labels is not None:
            self.unread_counts[0] += (logits.detach().argmax(1) == labels).sum()
        self.unread_counts[1] += len(images)
        progress.step += 1
        progress.batch += 1

    def _read_losses(self, bar: Any) -> None:
        """Read the losses and counts since the last reading, over all ranks; losses that are not finite are refused."""
        if not self.unread_losses:
            return
        progress = self.progress
        losses = torch.stack(self.unread_losses)
        sum_in_place(losses, self.unread_counts)
        read = len(progress.losses)
        progress.losses += (losses / world_size()).tolist()
        right, images = self.unread_counts.tolist()
        progress.count(right, images)
        bar.update(len(self.unread_losses))
        self.unread_losses = []
        self.unread_counts.zero_()
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

    def _save(self, path: Path, start: resumption.RandomState | None = None) -> None:
        self.progress.seconds = time.perf_counter() - self.started
        resumption.save(path, self.state, self.config, self.progress, start)


def plan_steps(loader: Iterable[Any], settings: RunSettings) -> tuple[int | None, int]:
    """Batches of an epoch, None where the loader has no length, and optimizer steps in all.

    Raises:
        TwoAxisError: there is no batch, or neither a length nor a cap.
    """
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        batches = -1
    batches = min_over_ranks(batches)
    if batches == 0:
        raise TwoAxisError("loader: expected at least one batch of images, got none; check the data path")
    if batches < 0 and settings.max_batches is None:
        raise TwoAxisError("max_batches: expected a number with a loader that has no length, got None; give one")
    bounds = [] if settings.max_batches is None else [settings.max_batches]
    bounds += [] if batches < 0 else [settings.epochs * batches]
    return (batches if batches > 0 else None), min(bounds)
