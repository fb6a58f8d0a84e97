"""The optional backward pass: what channels' outputs, and parameters, do to the loss to first order."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tp_twoaxis.batches import image_batches
from tp_twoaxis.borrow import evaluating, preserved_rng, unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.layers import num_channels, per_image
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.targets import class_indices


class OutputSaliency:
    """Measure first-order Taylor saliencies of layers' outputs while the model runs inside the ``with`` block.

    An image's saliency of a channel is ``|sum_p a_p dL/da_p|``: the sum over positions p of the stored output a
    times the gradient of that image's cross-entropy L with respect to it, in nats, and then the absolute value.
    To first order this is the change of the image's loss when the channel is set to zero everywhere at
    once (Molchanov et al. 2017); that the sum comes before the absolute value, and the mean over images after it,
    is ours: positions of one image may cancel, images may not.

    Each output is multiplied by a gate of ones, one an image and channel: the gate's gradient is that sum. So no
    activation is kept beside those that the backward pass keeps, what the model does to the output in place
    afterwards does no harm, gradients of the weights are not computed, and no parameter's ``grad`` is touched. A
    layer called several times a batch counts with the sum over its calls.

    Args:
        layers: name -> layer, from :func:`~tp_twoaxis.statistics.layers.channel_layers`.

    Attributes:
        records: name -> moments of the saliencies, one row an image; paired with nothing, so they hold count and
            mean alone.

    Example:
        >>> net = nn.Linear(3, 4)
        >>> with OutputSaliency({"": net}) as saliency:
        ...     saliency.begin(2)
        ...     saliency.finish(net(torch.randn(2, 3)), torch.tensor([0, 3]))
        >>> saliency.records[""].count, saliency.records[""].mean.shape
        (2, torch.Size([4]))
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.records: dict[str, CoMoments] = {}
        self._handles: list[RemovableHandle] = []
        self._batch_size = 0
        self._gates: dict[str, Tensor] = {}

    def __enter__(self) -> OutputSaliency:
        self._handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._gates = [], {}

    def begin(self, batch_size: int) -> None:
        """Announce a batch of ``batch_size`` images, at least one; what runs outside of a batch is not seen."""
        self._batch_size = batch_size
        self._gates = {}

    def finish(self, logits: Tensor, labels: Tensor) -> None:
        """Run the backward pass of the batch and take its saliencies in.

        Args:
            logits: [batch, K], what the model returned for the batch.
            labels: [batch] class indices.

        Raises:
            TwoAxisError: logits or labels do not fit, or no gradient reaches the layers.
        """
        if logits.ndim != 2 or len(logits) != self._batch_size:
            raise TwoAxisError(
                f"gradients=True: expected logits [{self._batch_size}, K] to take the cross-entropy of, got "
                f"{list(logits.shape)}; leave it out for models that are no classifiers"
            )
        if not logits.requires_grad:
            raise TwoAxisError(
                "gradients=True: expected logits that depend on the layers' outputs, got some without a gradient; "
                "the model's forward runs under no_grad or detaches, or the caller under inference_mode"
            )
        # the sum, not the mean: each image's gradient is then that of its own loss, whatever the batch size
        loss = F.cross_entropy(logits, class_indices(labels, logits), reduction="sum")
        gradients = torch.autograd.grad(loss, list(self._gates.values()), allow_unused=True)
        for (name, gate), gradient in zip(self._gates.items(), gradients, strict=True):
            # None: the layer's output does not reach the logits, as an auxiliary head's does not
            values = torch.zeros_like(gate) if gradient is None else gradient.abs()
            values = values.detach() if values.device.type in ("cpu", "cuda") else values.detach().cpu()
            if name not in self.records:
                self.records[name] = CoMoments(gate.shape[1], 0, device=values.device)
            self.records[name].update(values, values[:, :0])
        self._gates, self._batch_size = {}, 0

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not self._batch_size:
                return None
            y = output[0] if isinstance(output, tuple) else output
            if name not in self._gates:
                self._gates[name] = torch.ones(
                    self._batch_size, num_channels(layer), dtype=y.dtype, device=y.device, requires_grad=True
                )
            gated = y * per_image(self._gates[name], y, layer)
            return (gated, *output[1:]) if isinstance(output, tuple) else gated

        return hook


def accumulate_gradients(
    model: nn.Module, loader: Iterable[Any], *, max_images: int | None = 5000, progress: bool = True
) -> int:
    """Leave the gradient of the mean cross-entropy over all images in every parameter's ``grad``.

    The model runs in eval mode, so BatchNorm statistics stay and dropout is off; modes and random state come
    back. Gradients from before are discarded, and the new ones **stay on the model**, where Torch-Pruning's
    Taylor criteria look for them: call ``model.zero_grad()`` after pruning. When the pass fails there are none.

    Args:
        model: a classifier that returns logits [n, K]; wrappers are looked through.
        loader: yields ``(images, labels)``, labels class indices [n].
        max_images: stop after this many; None reads the loader to its end.
        progress: show a progress bar on stderr.

    Returns:
        The number of images used.

    Raises:
        TwoAxisError: no labelled images came, the model failed on them, or no parameter trains.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> accumulate_gradients(net, [(torch.randn(8, 3, 2, 2), torch.randint(4, (8,)))], progress=False)
        8
        >>> net[1].weight.grad.shape
        torch.Size([4, 12])
    """
    network = unwrap(model)
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise TwoAxisError(f"{type(network).__name__}: no parameter requires a gradient; call requires_grad_(True)")
    device, dtype = trained[0].device, trained[0].dtype
    network.zero_grad(set_to_none=True)
    used = 0
    with (
        preserved_rng(),
        evaluating(network),
        torch.enable_grad(),
        image_batches(
            loader, max_images=max_images, labels=True, description="gradients", progress=progress
        ) as batches,
    ):
        try:
            for index, images, labels in batches:
                if labels is None:
                    raise TwoAxisError(
                        f"gradients of the loss need labels, batch {index} has none; yield (images, labels)"
                    )
                logits = network(images.to(device, dtype, non_blocking=True))
                # sums now and one division at the end: a small last batch then weighs no more than its images
                F.cross_entropy(logits, labels.to(device), reduction="sum").backward()  # type: ignore[no-untyped-call]
                used += len(images)
            if used == 0:
                raise TwoAxisError("loader: expected at least one batch of images, got none; check the data path")
        except Exception as error:
            network.zero_grad(set_to_none=True)
            if isinstance(error, TwoAxisError):
                raise
            raise TwoAxisError(
                f"{type(network).__name__} raised {type(error).__name__} while gradients were gathered: {error}; "
                "it must return logits [n, K], and labels must be class indices in [0, K)"
            ) from error
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad /= used
    return used
