"""The optional backward pass: what channels' outputs, and parameters, do to the loss to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from tp_twoaxis.errors import TwoAxisError, reason
from tp_twoaxis.runtime.batches import Batch
from tp_twoaxis.runtime.fingerprints import ModelFingerprints
from tp_twoaxis.runtime.forward import ForwardPass, forward_pass
from tp_twoaxis.runtime.layers import out_channels_of
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.runtime.weight_sums import sum_by_input, sum_by_output
from tp_twoaxis.statistics.layouts import BatchLayout, usual_layout
from tp_twoaxis.statistics.moments import CoMoments, float64_device
from tp_twoaxis.statistics.targets import class_indices

Loss = Callable[[Any, Tensor], Tensor]
SUMMED_LAYERS = (_ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm, nn.GroupNorm)
"""Layers whose parameters belong to channels that they write or read."""


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
        layers: name -> layer, from :func:`~tp_twoaxis.runtime.layers.channel_layers`.
        layouts: name -> where the layer has its images; default where layers of its kind usually have them.

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

    def __init__(self, layers: dict[str, nn.Module], layouts: Mapping[str, BatchLayout] | None = None) -> None:
        self.layers = layers
        self.layouts = {name: usual_layout(layer) for name, layer in layers.items()} | dict(layouts or {})
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
            values = values.detach().to(float64_device(values.device))
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
                    self._batch_size, out_channels_of(layer), dtype=y.dtype, device=y.device, requires_grad=True
                )
            gated = y * self.layouts[name].per_image(self._gates[name], y, layer, name)
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
    trained = list(_trained(network).values())
    network.zero_grad(set_to_none=True)
    try:
        with _labelled_pass(network, loader, "gradients", max_images, progress) as run:
            for batch, logits in run:
                assert batch.labels is not None
                with _backward_errors(
                    network, "it must return logits [n, K], and labels must be class indices in [0, K)"
                ):
                    # sums now and one division at the end: a small last batch then weighs no more than its images
                    loss = F.cross_entropy(logits, batch.labels.to(logits.device), reduction="sum")
                    loss.backward()  # type: ignore[no-untyped-call]
    except BaseException:
        network.zero_grad(set_to_none=True)
        raise
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad /= run.images
    return run.images


class SquaredGradients:
    """Mean over images of each parameter's squared gradient, and the model state it holds for.

    Attributes:
        means: parameter name -> float64 tensor of its shape, on the CPU; parameters that do not train are absent.
        num_images: images seen.
        state: to verify a model with.
    """

    def __init__(self, means: dict[str, Tensor], num_images: int, state: ModelFingerprints) -> None:
        self.means = means
        self.num_images = num_images
        self.state = state

    def __repr__(self) -> str:
        return f"SquaredGradients({len(self.means)} parameters, {self.num_images} images)"


def gather_squared_gradients(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Loss = F.cross_entropy,
    max_images: int | None = 5000,
    progress: bool = True,
) -> SquaredGradients:
    """Average the squared gradient of the loss over images: the diagonal of the empirical Fisher matrix.

    The square of a batch's gradient is not the sum of its images' squares, so images go one by one; that is
    exact for every layer type, and on a CPU a vectorised pass over per-image gradients took longer. The model
    runs in eval mode and comes back as it was, its gradients included.

    Args:
        model: a model that returns logits [n, K], or whatever ``loss`` takes; wrappers are looked through.
        loader: yields ``(images, labels)``, labels class indices [n].
        loss: ``(output of one image [1, ...], its label [1]) -> scalar``.
        max_images: stop after this many; None reads the loader to its end.
        progress: show a progress bar on stderr.

    Raises:
        TwoAxisError: no labelled images came, the model or the loss failed, no parameter trains, or gradients
            are not finite.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> loader = [(torch.randn(8, 3, 2, 2), torch.randint(4, (8,)))]
        >>> gather_squared_gradients(net, loader, progress=False).means["1.weight"].shape
        torch.Size([4, 12])
    """
    network = unwrap(model)
    trained = _trained(network)
    first = next(iter(trained.values()))
    home = float64_device(first.device)
    sums = {name: torch.zeros(p.shape, dtype=torch.float64, device=home) for name, p in trained.items()}
    with _labelled_pass(network, loader, "squared gradients", max_images, progress) as run:
        for batch in run.batches:
            assert batch.labels is not None
            for image, label in zip(batch.inputs.split(1), torch.split(batch.labels, 1), strict=True):
                output = run(Batch(batch.number, image, None))
                with _backward_errors(
                    network, "it must return logits [n, K] with labels in [0, K), or give a loss= that fits it"
                ):
                    value = loss(output, label.to(run.device))
                    gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total += gradient.to(home, torch.float64).square()
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise TwoAxisError(f"{name}: its gradients are not finite on finite images; check the model and the loss")
    means = {name: (total / run.images).cpu() for name, total in sums.items()}
    return SquaredGradients(means, run.images, ModelFingerprints.of_model(network))


class MinibatchProducts:
    """Weight times gradient, summed by channel in each minibatch, and the model state it holds for.

    Attributes:
        by_output: parameter name -> [minibatches, C] float64 on the CPU, sums over what belongs to a channel that the
            layer writes; parameters that do not train are absent.
        by_input: name of a weight -> [minibatches, C_in], the same by the channels that the layer reads.
        sizes: [minibatches] images of each.
        num_images: images seen.
        state: to verify a model with.
    """

    def __init__(
        self, by_output: dict[str, Tensor], by_input: dict[str, Tensor], sizes: Tensor, state: ModelFingerprints
    ) -> None:
        self.by_output = by_output
        self.by_input = by_input
        self.sizes = sizes
        self.num_images = int(sizes.sum())
        self.state = state

    def __repr__(self) -> str:
        return f"MinibatchProducts({len(self.by_output)} parameters, {len(self.sizes)} minibatches)"


def gather_minibatch_products(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Loss = F.cross_entropy,
    max_images: int | None = 5000,
    progress: bool = True,
) -> MinibatchProducts:
    """Sum weight times gradient of each minibatch's loss by channel, for convolutions, linear layers and norms.

    The loader's batches are the minibatches: how many images a gradient is a mean of is part of what is measured. The
    model runs in eval mode and comes back as it was, its gradients included.

    Args:
        model: a model that returns logits [n, K], or whatever ``loss`` takes; wrappers are looked through.
        loader: yields ``(images, labels)``, labels class indices [n].
        loss: ``(output of a minibatch, its labels) -> scalar``, a mean over the images.
        max_images: stop after this many; None reads the loader to its end.
        progress: show a progress bar on stderr.

    Raises:
        TwoAxisError: no labelled images came, the model or the loss failed, no parameter trains, or gradients
            are not finite.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> loader = [(torch.randn(8, 3, 2, 2), torch.randint(4, (8,)))] * 3
        >>> products = gather_minibatch_products(net, loader, progress=False)
        >>> products.by_output["1.weight"].shape, products.by_input["1.weight"].shape
        (torch.Size([3, 4]), torch.Size([3, 12]))
    """
    network = unwrap(model)
    trained = _trained(network)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, SUMMED_LAYERS)}
    by_output: dict[str, list[Tensor]] = {}
    by_input: dict[str, list[Tensor]] = {}
    sizes = []
    with _labelled_pass(network, loader, "weight-gradient products", max_images, progress) as run:
        for batch, output in run:
            assert batch.labels is not None
            with _backward_errors(
                network, "it must return logits [n, K] with labels in [0, K), or give a loss= that fits it"
            ):
                value = loss(output, batch.labels.to(run.device))
                gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
            sizes.append(len(batch.labels))
            products = {
                parameter: torch.zeros_like(parameter) if gradient is None else parameter.detach() * gradient
                for parameter, gradient in zip(trained.values(), gradients, strict=True)
            }
            for name, layer in layers.items():
                for key, parameter in layer.named_parameters(name, recurse=False):
                    if (product := products.get(parameter)) is None:
                        continue
                    if parameter.ndim == 1:  # a bias, or a norm's
                        by_output.setdefault(key, []).append(product.cpu().double())
                    elif isinstance(layer, (_ConvNd, nn.Linear)):
                        by_output.setdefault(key, []).append(sum_by_output(product, layer).cpu().double())
                        by_input.setdefault(key, []).append(sum_by_input(product, layer).cpu().double())
    for key, sums in by_output.items():
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            raise TwoAxisError(f"{key}: its gradients are not finite on finite images; check the model and the loss")
    return MinibatchProducts(
        {key: torch.stack(sums) for key, sums in by_output.items()},
        {key: torch.stack(sums) for key, sums in by_input.items()},
        torch.tensor(sizes),
        ModelFingerprints.of_model(network),
    )


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not trained:
        raise TwoAxisError(f"{type(network).__name__}: no parameter requires a gradient; call requires_grad_(True)")
    return trained


def _labelled_pass(
    network: nn.Module, loader: Iterable[Any], what: str, max_images: int | None, progress: bool
) -> AbstractContextManager[ForwardPass]:
    return forward_pass(
        network, loader, what=what, max_images=max_images, labels="required", gradients=True, progress=progress
    )


@contextmanager
def _backward_errors(network: nn.Module, advice: str) -> Iterator[None]:
    """Say what a loss or a backward pass asks of the model."""
    try:
        yield
    except Exception as error:  # a loss, and a model's own autograd function, may raise anything
        raise TwoAxisError(
            f"{type(network).__name__} failed while gradients were gathered ({reason(error)}); {advice}"
        ) from error
