"""The diagonal of the empirical Fisher matrix: squared gradients, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tp_twoaxis.batches import image_batches
from tp_twoaxis.borrow import evaluating, preserved_rng, unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.freshness import ModelState

Loss = Callable[[Any, Tensor], Tensor]


class SquaredGradients:
    """Mean over images of each parameter's squared gradient, and the model state it holds for.

    Attributes:
        means: parameter name -> float64 tensor of its shape, on the CPU; parameters that do not train are absent.
        num_images: images seen.
        state: to verify a model with.
    """

    def __init__(self, means: dict[str, Tensor], num_images: int, state: ModelState) -> None:
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
    """Average the squared gradient of the loss over images, one backward pass an image.

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
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not trained:
        raise TwoAxisError(f"{type(network).__name__}: no parameter requires a gradient; call requires_grad_(True)")
    first = next(iter(trained.values()))
    # float64 lives on CPU and CUDA; other accelerators hand their gradients over
    home = first.device if first.device.type in ("cpu", "cuda") else torch.device("cpu")
    sums = {name: torch.zeros(p.shape, dtype=torch.float64, device=home) for name, p in trained.items()}
    used = 0
    with (
        preserved_rng(),
        evaluating(network),
        torch.enable_grad(),
        image_batches(
            loader, max_images=max_images, labels=True, description="squared gradients", progress=progress
        ) as batches,
    ):
        for index, images, labels in batches:
            if labels is None:
                raise TwoAxisError(
                    f"squared gradients of the loss need labels, batch {index} has none; yield (images, labels)"
                )
            images, labels = images.to(first.device, first.dtype), labels.to(first.device)
            try:
                for image, label in zip(torch.split(images, 1), torch.split(labels, 1), strict=True):
                    value = loss(network(image), label)
                    gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
                    for total, gradient in zip(sums.values(), gradients, strict=True):
                        if gradient is not None:
                            total += gradient.to(home, torch.float64).square()
            except Exception as error:
                raise TwoAxisError(
                    f"{type(network).__name__} raised {type(error).__name__} while gradients were gathered: {error}; "
                    "it must return logits [n, K] with labels in [0, K), or give a loss= that fits it"
                ) from error
            used += len(images)
    if used == 0:
        raise TwoAxisError("loader: expected at least one batch of images, got none; check the data path")
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise TwoAxisError(f"{name}: its gradients are not finite on finite images; check the model and the loss")
    return SquaredGradients({name: (total / used).cpu() for name, total in sums.items()}, used, ModelState(network))
