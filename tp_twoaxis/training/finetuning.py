"""Train a network in place, to the end or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.distributed import rank
from tp_twoaxis.runtime.model_state import eval_mode, fork_rng, train_mode, unwrap
from tp_twoaxis.training.loop import EpochCallback, TrainingReport, TrainingRun
from tp_twoaxis.training.loss import DISTILLATION, Distillation, Penalty
from tp_twoaxis.training.settings import Precision, RunSettings, Schedule


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int = 5,
    max_batches: int | None = 200,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = False,
    schedule: Schedule = "cosine",
    warmup: float = 0.0,
    label_smoothing: float = 0.0,
    teacher: nn.Module | None = None,
    distillation: Distillation | tuple[float, float] = DISTILLATION,
    amp: Precision | None = None,
    channels_last: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    penalty: Penalty | None = None,
    on_epoch: EpochCallback | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainingReport:
    """Train a classifier in place with SGD; the defaults are the paper's protocol of fine-tuning.

    The paper fine-tunes a pruned network for 5 epochs, at most 200 batches in all, at a learning rate of 0.01 and
    momentum 0.9; weight decay 5e-4 and the cosine that reaches zero after the last of those batches are ours.

    Weights are either trained to the end or, when anything raises (Ctrl-C too), as they were. Train/eval modes,
    random state and memory layout are restored; gradients from before are discarded and none stay. Only parameters
    with ``requires_grad`` change. A model in evaluation mode is trained in training mode; in one that is in training
    mode each sub-module keeps its flag, so that a BatchNorm set to ``eval()`` stays frozen.

    Under ``torch.distributed`` (torchrun) every rank calls this with its own shard of the images: gradients are
    averaged, so the batch is the ranks' batches together; all ranks start from rank 0's weights and end with the
    same weights and rank 0's BatchNorm statistics. A pass has the batches of the rank that has fewest.

    Args:
        model: a classifier that returns logits [n, K]; wrappers are looked through.
        loader: yields ``(images, labels)``, labels class indices [n]; images alone suffice for pure distillation
            (weight 1). The ``set_epoch`` of a sampler is called with the epoch.
        epochs: passes over the loader.
        max_batches: optimizer steps in all, at most; None sets no cap.
        lr: learning rate after the warm-up; see :func:`~tp_twoaxis.training.settings.learning_rate`.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 factor on all trained parameters.
        nesterov: Nesterov's momentum.
        schedule: ``"cosine"`` or ``"linear"`` to zero, or ``"constant"``.
        warmup: share of all batches over which the rate rises linearly.
        label_smoothing: of the cross-entropy, in [0, 1).
        teacher: the dense network, on the same device; adds distillation, see
            :func:`~tp_twoaxis.training.loss.training_loss`.
        distillation: temperature and weight, used with a teacher.
        amp: autocast to ``"bf16"``, or to ``"fp16"`` with loss scaling (GPU only); weights stay as they are.
        channels_last: run convolutions on channels-last memory, faster on tensor cores.
        checkpoint: file of the run's state (safetensors and JSON, no pickle), replaced atomically at the end of
            every epoch, where all ranks can read it; see :mod:`tp_twoaxis.training.resumption`.
        checkpoint_every: also after every so many batches.
        resume: go on from ``checkpoint`` where there is one. On the CPU the run ends bit for bit as if it had not
            been interrupted, as long as all randomness of the loader comes from its ``generator`` or torch's.
        penalty: called with a batch's number after its forward pass; what it returns, unless None, is added to the
            batch's loss, for example :class:`~tp_twoaxis.training.decorrelation.Decorrelation`. A resumption must have
            one of the same ``repr``.
        on_epoch: called as ``on_epoch(epoch, model)`` on every rank, with 0 before the first step and with n when n
            epochs are done (one that ``max_batches`` cuts counts), before the checkpoint is written: an interrupted
            run may call it twice with one epoch and the same weights, and never leaves an epoch out. What it does to
            modes and torch's random state is undone; weights and the loader are its to leave alone. An example is
            :class:`~tp_twoaxis.training.snapshots.SnapshotWriter`.
        seed: of torch's global random numbers during the run (dropout, order without a generator of its own);
            rank r takes ``seed + r``.
        progress: show a progress bar with loss and accuracy on stderr.

    Returns:
        Losses, learning rates, accuracies, counts and seconds.

    Raises:
        TwoAxisError: an argument is out of range, the loader or the model fails, labels are missing or too large,
            the loss is not finite, or the checkpoint is of another run.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> batch = torch.randn(8, 3, 2, 2), torch.randint(4, (8,))
        >>> report = finetune(net, [batch] * 3, epochs=2, lr=0.5, progress=False)
        >>> report.batches, report.losses[-1] < report.losses[0]
        (6, True)
    """
    network = unwrap(model)
    parameter = next((p for p in network.parameters() if p.requires_grad), None)
    if parameter is None:
        raise TwoAxisError(f"{type(network).__name__}: no parameter requires a gradient; call requires_grad_(True)")
    settings = RunSettings(
        epochs=epochs,
        max_batches=max_batches,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        schedule=schedule,
        warmup=warmup,
        label_smoothing=label_smoothing,
        distillation=None if teacher is None else Distillation(*distillation),
        amp=amp,
        channels_last=channels_last,
        seed=seed,
    )
    settings.check(parameter.device)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise TwoAxisError(f"checkpoint_every: expected at least 1, got {checkpoint_every}")
    if (resume or checkpoint_every) and checkpoint is None:
        raise TwoAxisError("resume and checkpoint_every: expected a checkpoint file with them, got none; name it")
    if teacher is not None:
        teacher = _checked_teacher(teacher, network, parameter.device)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.absolute().parent.is_dir():
        raise TwoAxisError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path is not None and path.exists() and not resume:
        raise TwoAxisError(f"{path}: the checkpoint exists; pass resume=True to go on from it, or remove it")
    with (
        fork_rng(),
        nullcontext() if teacher is None else eval_mode(teacher),
        train_mode(network),
        _restored_on_error(network),
        _channels_last(network, channels_last),
    ):
        torch.manual_seed(seed + rank())
        run = TrainingRun(network, teacher, loader, settings, penalty, on_epoch)
        if path is not None and path.exists():
            run.load(path)
        return run.finish(path, checkpoint_every, progress)


def _checked_teacher(teacher: nn.Module, network: nn.Module, device: torch.device) -> nn.Module:
    teacher = unwrap(teacher)
    if teacher is network:
        raise TwoAxisError(
            "teacher: expected another network than the model, got the same; copy.deepcopy the dense one"
        )
    home = next((p.device for p in teacher.parameters()), device)
    if home != device:
        raise TwoAxisError(f"teacher: expected it on {device} like the model, got {home}; move it there")
    return teacher


@contextmanager
def _restored_on_error(network: nn.Module) -> Iterator[None]:
    """Restore weights and statistics, and drop all gradients, when the block raises."""
    tensors = [*network.parameters(), *network.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        network.zero_grad(set_to_none=True)
        raise


@contextmanager
def _channels_last(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Keep convolution weights in channels-last memory inside the block."""
    changed = [p for p in network.parameters() if enabled and p.ndim == 4 and p.is_contiguous()]
    for parameter in changed:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.data = parameter.data.contiguous()
