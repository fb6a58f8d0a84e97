"""The one way in which a model runs over images: its modes, random numbers, hooks, device, errors, and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError, listing, reason
from tp_twoaxis.runtime.batches import Batch, image_batches
from tp_twoaxis.runtime.devices import check_device
from tp_twoaxis.runtime.inputs import CallSignature
from tp_twoaxis.runtime.model_state import eager_mode, eval_mode, fork_rng, unwrap


class NoImagesError(TwoAxisError):
    """A loader gave no batch of images."""


@contextmanager
def inference_state(network: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Run a block with a model in eval mode and uncompiled; its modes, torch's random and grad state come back.

    Inside the caller's ``torch.inference_mode`` the block runs outside of it: what is gathered could not be changed
    afterwards, and there would be no gradients.

    Args:
        network: unwrapped.
        gradients: keep autograd on.

    Example:
        >>> with inference_state(nn.Dropout()):
        ...     torch.is_grad_enabled()
        False
    """
    with (
        torch.inference_mode(False),
        fork_rng(),
        eval_mode(network),
        eager_mode(network),
        torch.set_grad_enabled(gradients),
    ):
        yield


class ForwardPass:
    """A model and the batches that it runs on; made by :func:`forward_pass`.

    Iterate over it for every batch with the model's output, or over :attr:`batches` and call it where a batch runs
    more than once or not at all.

    Attributes:
        network: the model, unwrapped.
        device: where it is.
        dtype: of its first parameter; images are converted to it.
        batches: checked batches, as the loader yields them.
        images: that :attr:`batches` has given so far.
    """

    def __init__(self, network: nn.Module, device: torch.device, batches: Iterator[Batch], stack: ExitStack) -> None:
        parameter = next(network.parameters(), None)
        self.network = network
        self.device = device
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        self.images = 0
        self.batches = self._counted(batches)
        self._stack = stack

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        for batch in self.batches:
            yield batch, self(batch)

    def __call__(self, batch: Batch) -> Any:
        """Run the model on a batch.

        Raises:
            TwoAxisError: the model raised; the message has its words and the batch's shape.
        """
        try:
            inputs = batch.inputs.to(self.device, self.dtype)
            return self.network(*inputs.args, **inputs.kwargs)
        except TwoAxisError:
            raise
        except Exception as error:  # a model is anybody's code
            raise TwoAxisError(
                f"{type(self.network).__name__} does not run on batch {batch.number} of shape {batch.inputs.shapes} "
                f"({reason(error)}); give it what its forward takes; the model is as it was"
            ) from error

    def logits(self, batch: Batch) -> Tensor:
        """Run the model and find the logits in what it returns; see :func:`find_logits`."""
        return find_logits(self(batch), self.network)

    def hook(
        self, layer: nn.Module, function: Callable[..., Any], *, before: bool = False, with_kwargs: bool = False
    ) -> None:
        """Hook a layer until the pass ends; ``function`` as of torch's forward hook, or pre-hook if ``before``."""
        register = layer.register_forward_pre_hook if before else layer.register_forward_hook
        self._stack.callback(register(function, with_kwargs=with_kwargs).remove)

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.images += len(batch.inputs)
            yield batch
        if self.images == 0:
            raise NoImagesError(
                "loader: expected at least one batch of images, got none; check the data path and split"
            )


@contextmanager
def forward_pass(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    what: str,
    max_images: int | None = None,
    labels: bool | Literal["required"] = False,
    gradients: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Iterator[ForwardPass]:
    """Run a model over a loader's images, in eval mode; afterwards it is as it was, also when something raised.

    Args:
        model: any module that takes a batch of images; wrappers are looked through.
        loader: see :func:`~tp_twoaxis.runtime.batches.read_batch` for what it may yield.
        what: names the pass on the progress bar and in messages.
        max_images: stop after so many, cutting the last batch; None reads the loader to its end.
        labels: whether batches shall have their labels, if there are any, or ``"required"``.
        gradients: keep autograd on.
        device: run there for the time of the block; default where the model is.
        progress: show a bar on stderr.

    Yields:
        See :class:`ForwardPass`.

    Raises:
        TwoAxisError: while iterating: no images came, a batch is not what it should be, labels are missing, or the
            model or the loader raised.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Linear(4, 2))
        >>> with forward_pass(net, [torch.zeros(3, 4), torch.zeros(2, 4)], what="look", max_images=4) as run:
        ...     [(len(batch.images), tuple(output.shape)) for batch, output in run], run.images
        ([(3, (3, 2)), (1, (1, 2))], 4)
        >>> net.training
        True
    """
    network = unwrap(model)
    with ExitStack() as stack:
        stack.enter_context(inference_state(network, gradients=gradients))
        home = stack.enter_context(_placed(network, device))
        batches = stack.enter_context(
            image_batches(
                loader,
                max_images=max_images,
                labels=bool(labels),
                description=what,
                progress=progress,
                call=CallSignature.of(network),
            )
        )
        yield ForwardPass(network, home, _labelled(batches, what) if labels == "required" else batches, stack)


def find_logits(output: Any, network: nn.Module) -> Tensor:
    """Find the logits in what a model returned.

    Args:
        output: logits, a tuple that starts with them, or an object, named tuple or dict with ``logits``.
        network: the model, for the message.

    Raises:
        TwoAxisError: there are none; a dict without ``logits`` is not guessed at.

    Example:
        >>> find_logits({"features": torch.zeros(3, 8), "logits": torch.zeros(3, 2)}, nn.Identity()).shape
        torch.Size([3, 2])
    """
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping) and "logits" in output:
            output = output["logits"]
        elif not isinstance(output, Mapping) and hasattr(output, "logits"):
            output = output.logits
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        else:
            got = type(output).__name__
            if isinstance(output, Mapping):
                got = f"a {got} with {listing(map(str, output)) or 'nothing'}"
            raise TwoAxisError(
                f"expected logits from {type(network).__name__}, got {got}; wrap the model so that it returns them, "
                "alone, first, or under the name 'logits', or do without (calibrate with target=None)"
            )
    return output


@contextmanager
def _placed(network: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Put a model on another device for a while; parameters keep their identity."""
    parameter = next(network.parameters(), None)
    home = torch.device("cpu") if parameter is None else parameter.device
    if home.type == "meta" and device is None:
        raise TwoAxisError(
            f"{type(network).__name__}: expected weights with values, got the meta device; load them, or build the "
            "network elsewhere"
        )
    if device is None or str(device) == str(home):
        yield home
        return
    check_device(device)
    try:
        network.to(device)
        yield torch.device(device)
    finally:
        network.to(home)


def _labelled(batches: Iterator[Batch], what: str) -> Iterator[Batch]:
    for batch in batches:
        if batch.labels is None:
            raise TwoAxisError(f"{what}: expected labels, batch {batch.number} has none; yield (images, labels)")
        yield batch
