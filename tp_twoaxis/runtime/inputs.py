"""What a model is called with for a batch of images: one tensor or several, by position or by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError


@dataclass(frozen=True)
class Inputs:
    """The arguments of a model's call for a batch.

    Its tensors have the images along their first dimension; numbers, strings, None and tensors without dimensions are
    handed on as they are.

    Attributes:
        args: by position.
        kwargs: by name.

    Raises:
        TwoAxisError: no tensor among them, tensors of different numbers of images, or other things.

    Example:
        >>> pair = Inputs((torch.zeros(4, 3), torch.ones(4, 2)), {"scale": 2.0})
        >>> len(pair), [tuple(tensor.shape) for tensor in pair[:2].tensors]
        (4, [(2, 3), (2, 2)])
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (*self.args, *self.kwargs.values()):
            if not isinstance(value, (Tensor, bool, int, float, str, type(None))):
                raise TwoAxisError(f"inputs: expected tensors, numbers or None, got {type(value).__name__}")
        if len({len(tensor) for tensor in self.tensors}) != 1:
            raise TwoAxisError(
                "inputs: expected tensors that have the same number of images in their first dimension, got "
                f"{self.shapes or 'none'}"
            )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those with a dimension of images, in the order of the call."""
        return tuple(v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor) and v.ndim)

    @property
    def images(self) -> Tensor:
        """The one tensor that there is.

        Raises:
            TwoAxisError: there are several.
        """
        if len(self.tensors) > 1:
            raise TwoAxisError(
                f"loader: expected batches of one image tensor, which is all that this step takes, got inputs of "
                f"shapes {self.shapes}"
            )
        return self.tensors[0]

    @property
    def shapes(self) -> str:
        """The tensors' shapes, for messages."""
        return ", ".join(str(list(tensor.shape)) for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: slice | Tensor) -> Inputs:
        """Select images by a slice or by indices [n]."""
        return self._each(lambda tensor: tensor[rows if isinstance(rows, slice) else rows.to(tensor.device)])

    def split(self, size: int) -> list[Inputs]:
        """Cut into parts of ``size`` images; the last may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Inputs:
        """Move to a device; tensors of floats also to a dtype."""
        return self._each(
            lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
        )

    def usable(self) -> Inputs:
        """Copy tensors that were made in inference mode; see :func:`usable`."""
        return self._each(usable)

    @staticmethod
    def concatenate(parts: Sequence[Inputs]) -> Inputs:
        """Join batches; what is no tensor is taken from the first.

        Example:
            >>> len(Inputs.concatenate([Inputs((torch.zeros(2, 3),)), Inputs((torch.zeros(1, 3),))]))
            3
        """
        return parts[0].replaced(torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True))

    def replaced(self, tensors: Iterable[Tensor]) -> Inputs:
        """Put other tensors in the places of :attr:`tensors`."""
        others = iter(tensors)
        return self._each(lambda _: next(others))

    def _each(self, function: Any) -> Inputs:
        def changed(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) and value.ndim else value

        return Inputs(
            tuple(changed(value) for value in self.args), {name: changed(v) for name, v in self.kwargs.items()}
        )


def usable(tensor: Tensor) -> Tensor:
    """Copy a tensor that was made in inference mode, which no backward pass could use; return others as they are.

    Example:
        >>> with torch.inference_mode():
        ...     tensor = torch.zeros(2)
        >>> tensor.is_inference(), usable(tensor).is_inference()
        (True, False)
    """
    return tensor.clone() if tensor.is_inference() else tensor


@dataclass(frozen=True)
class CallSignature:
    """How a model is called.

    Attributes:
        names: of the parameters of its ``forward`` that can be given by position, in order.
        required: how many of them have no default; of a model with none, and of one with ``*args``, 1.

    Example:
        >>> class Pair(nn.Module):
        ...     def forward(self, left, right, weight=None):
        ...         return left + right
        >>> CallSignature.of(Pair())
        CallSignature(names=('left', 'right', 'weight'), required=2)
    """

    names: tuple[str, ...] = ()
    required: int = 1

    @classmethod
    def of(cls, network: nn.Module) -> CallSignature:
        """Read the signature of a model's ``forward``."""
        try:
            parameters = inspect.signature(network.forward).parameters.values()
        except (TypeError, ValueError):  # written in C, or replaced by something without one
            return cls()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return cls(tuple(p.name for p in positional), max(1, sum(p.default is p.empty for p in positional)))
