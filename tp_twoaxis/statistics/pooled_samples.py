"""Every image's pooled outputs beside its task variables: what an estimator needs that moments do not suffice for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError, check_name, listing
from tp_twoaxis.runtime.batches import mixed_labels
from tp_twoaxis.runtime.forward import ForwardPass, forward_pass
from tp_twoaxis.runtime.layers import channel_layers
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.statistics.layouts import BatchLayout, find_layouts
from tp_twoaxis.statistics.pooling import POOLINGS, PooledOutputs, Pooling, runs_in_some, writes_tokens
from tp_twoaxis.statistics.targets import TARGETS, batch_variables, class_logits


@dataclass(frozen=True)
class PooledSamples:
    """Pooled outputs of n images, and what the network says about each; all on the CPU.

    Attributes:
        outputs: layer -> [n, C] float32, each channel's average over positions.
        task: task variable -> [n, 1] float64, ``one_vs_rest`` [n, K]; empty without a target.
        target: the default task variable, or None.
        num_images: n.
    """

    outputs: dict[str, Tensor]
    task: dict[str, Tensor]
    target: str | None
    num_images: int

    def target_values(self, name: str | None = None) -> Tensor:
        """Return a task variable.

        Args:
            name: of the variable; default the target.

        Returns:
            [n] float64; of ``one_vs_rest`` [n, K].

        Raises:
            TwoAxisError: it was not recorded.

        Example:
            >>> samples = PooledSamples({}, {"margin": torch.tensor([[1.0], [2.0]])}, "margin", 2)
            >>> samples.target_values().tolist()
            [1.0, 2.0]
        """
        name = name or self.target
        if name not in self.task:
            raise TwoAxisError(
                f"task variable {name!r} was not recorded (recorded: {', '.join(self.task) or 'none'}); "
                "call pooled_samples() with labels and a target"
            )
        return self.task[name] if name == "one_vs_rest" else self.task[name][:, 0]


def pooled_samples(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    target: str | None = "margin",
    layers: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    max_images: int | None = 5000,
    progress: bool = True,
    pooling: Pooling = "mean",
) -> PooledSamples:
    """Keep the pooled outputs whose moments :func:`~tp_twoaxis.calibrate` gathers, image by image.

    Layers are found, pooled and paired with the task as there, and the model comes back as it was. It takes 4 bytes an
    image and channel: 84 MB for VGG-16's 4,224 and 5,000 images; where that is too much, take some layers at a time.
    Values are rounded to float32, at which a channel whose mean is 10,000 of its standard deviations keeps three digits
    of what varies. Under ``torchrun`` each rank has its own images only.

    Args:
        model: see :func:`~tp_twoaxis.calibrate`.
        loader: see there; the order of the images is the order of the rows.
        target: default task variable; without labels ``margin`` becomes ``predicted_margin``. None keeps none.
        layers: names of the layers to keep; default all convolutions, linear and attention layers that run.
        device: where to run; default where the model is.
        max_images: stop after this many; None reads the loader to its end.
        progress: show a progress bar on stderr.
        pooling: as of the calibration: the ``"mean"`` over positions; or ``"cls"``, the first token of layers that
            write tokens.

    Raises:
        TwoAxisError: ``pooling`` is neither, or what :func:`~tp_twoaxis.calibrate` raises about model, loader, labels,
            layers and values.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(3)]
        >>> samples = pooled_samples(net, loader, layers=["0"], progress=False)
        >>> samples.outputs["0"].shape, samples.target_values().shape
        (torch.Size([48, 8]), torch.Size([48]))
    """
    if target is not None:
        check_name("target", target, TARGETS, more=" or None")
    check_name("pooling", pooling, POOLINGS)
    network = unwrap(model)
    watched = channel_layers(network, layers)
    if not watched:
        raise TwoAxisError(f"{type(network).__name__} has no convolution, linear or attention layer to sample")
    with forward_pass(
        network,
        loader,
        what="sample",
        max_images=max_images,
        labels=target is not None,
        device=device,
        progress=progress,
    ) as run:
        outputs, task = _gather(run, watched, target, pooling)
    if layers is not None and (silent := [name for name in watched if name not in outputs]):
        raise TwoAxisError(f"layers: {listing(silent)} did not run in the forward pass; leave them out")
    for name, values in outputs.items():
        if not bool(torch.isfinite(values).all()):
            raise TwoAxisError(
                f"{name}: the layer's outputs are not finite on finite images; check its weights and dtype"
            )
    default = target if target in task else ("predicted_margin" if target else None)
    return PooledSamples(outputs, task, default, run.images)


def _gather(
    run: ForwardPass, layers: dict[str, nn.Module], target: str | None, kind: Pooling
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the model over all batches; rows of the layers, in their order, and of the task variables."""
    outputs: dict[str, list[Tensor]] = {}
    task: dict[str, list[Tensor]] = {}
    first = next(run.batches)
    pooling = _Pooling(layers, find_layouts(run, layers, first), kind)
    for name, layer in layers.items():
        run.hook(layer, pooling.hook(name))
    for batch in chain([first], run.batches):
        pooling.begin(len(batch.inputs))
        output = run(batch)
        for name, values in pooling.outputs.finish().items():
            outputs.setdefault(name, []).append(values.float().cpu())
        if target is None:
            continue
        variables = batch_variables(class_logits(output, run.network), batch, target)
        if task and list(variables) != list(task):
            raise TwoAxisError(mixed_labels(batch.number, batch.labels))
        for name, values in variables.items():
            task.setdefault(name, []).append(values.cpu())
    # popped, so that one layer's parts at a time are there twice
    rows = {name: torch.cat(outputs.pop(name)) for name in layers if name in outputs}
    return rows, {name: torch.cat(parts) for name, parts in task.items()}


class _Pooling:
    """Hooks that pool what layers write."""

    def __init__(self, layers: dict[str, nn.Module], layouts: dict[str, BatchLayout], kind: Pooling) -> None:
        self.outputs = PooledOutputs(layers, kind)
        self._layouts = layouts
        self._images = 0

    def begin(self, images: int) -> None:
        """Announce a batch of so many images."""
        self._images = images
        self.outputs.begin()

    def hook(self, name: str) -> Any:
        """Make a layer's forward hook."""

        def pool(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if name not in self._layouts:
                raise TwoAxisError(runs_in_some([name]))
            y = output[0] if isinstance(output, tuple) else output
            with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
                rows = self._layouts[name].rows(y.detach(), layer, self._images, name)
                self.outputs.add(name, rows, tokens=writes_tokens(layer, y))

        return pool
