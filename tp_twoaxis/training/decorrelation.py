"""A penalty on what channels of a layer share in pairs: the local axis, acted on while a network is trained."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.layers import channel_layers, flatten_positions, spread_over_depth
from tp_twoaxis.runtime.model_state import unwrap

# 1 - rho^2 is not taken below this: the slope of -1/2 ln(1 - rho^2) grows without bound (ours)
LEAST_RESIDUAL = 1e-4


class Decorrelation:
    """Penalty ``weight * mean_l R_l`` on a network's batches (paper, appendix O).

    ``R_l`` is the mean of ``R_kj = -1/2 ln(1 - rho_kj^2)`` (equation 2, in nats) over pairs of channels of layer l: k
    of some reference channels, j of some more, j != k, both drawn anew for each batch (the draw is ours). Correlations
    are those of the batch's stored outputs, images and positions being rows, in float32; constant channels are left
    out, and ``rho^2`` is clipped at ``1 - 1e-4``. A penalty of weight 0 leaves training as it is, to the bit.

    Between ``__enter__`` and ``__exit__`` the layers are hooked; use it as the ``penalty`` of
    :func:`~tp_twoaxis.training.finetune` inside a ``with`` block.

    Args:
        model: whose outputs are penalised; wrappers are looked through.
        weight: lambda, not negative, in loss a nat.
        layers: convolutions, at most, spread over depth (paper: 6).
        references: channels k of a layer, at most (paper: 64).
        channels: channels j of a layer, at most, the references among them (paper: 128).
        every: batches from one penalty to the next (paper: 2).
        seed: of the channels.

    Raises:
        TwoAxisError: a number is out of range, or the model has no two-dimensional convolution.

    Example:
        >>> from tp_twoaxis.training import finetune
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
        >>> batch = torch.randn(8, 3, 4, 4), torch.randint(4, (8,))
        >>> with Decorrelation(net, 0.1) as penalty:
        ...     report = finetune(net, [batch] * 4, penalty=penalty, epochs=1, progress=False)
        >>> report.batches
        4
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float,
        *,
        layers: int = 6,
        references: int = 64,
        channels: int = 128,
        every: int = 2,
        seed: int = 0,
    ) -> None:
        positive = {"layers": layers, "references": references, "channels": channels, "every": every}
        for name, number in positive.items():
            if number < 1:
                raise TwoAxisError(f"{name}: expected at least 1, got {number}")
        if not 0 <= weight < float("inf"):
            raise TwoAxisError(f"weight: expected 0 or a positive number, got {weight}")
        convolutions = {n: m for n, m in channel_layers(unwrap(model)).items() if isinstance(m, nn.Conv2d)}
        if not convolutions:
            raise TwoAxisError(f"{type(model).__name__} has no Conv2d whose channels could be decorrelated")
        chosen = spread_over_depth(list(convolutions), layers)
        self.weight, self.references, self.channels = weight, references, channels
        self.every, self.seed = every, seed
        self.layers = {name: convolutions[name] for name in chosen}
        self._outputs: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __repr__(self) -> str:
        return (
            f"Decorrelation(weight={self.weight:g}, layers={list(self.layers)}, references={self.references}, "
            f"channels={self.channels}, every={self.every}, seed={self.seed})"
        )

    def __enter__(self) -> Decorrelation:
        for name, layer in self.layers.items():
            self._hooks.callback(layer.register_forward_hook(self._keep(name)).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._outputs.clear()

    def _keep(self, name: str) -> Any:
        def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
            if layer.training and torch.is_grad_enabled() and self.weight:
                self._outputs[name] = output

        return hook

    def __call__(self, step: int) -> Tensor | None:
        """Penalty of the batch that just ran forward, or None where it has none.

        Raises:
            TwoAxisError: the layers did not run in training mode since the last call.
        """
        outputs, self._outputs = self._outputs, {}
        if step % self.every or not self.weight:
            return None
        if not outputs:
            raise TwoAxisError(
                "Decorrelation: expected its layers to run in training mode before it is called, they did not; call it "
                "inside of its with block, after the forward pass"
            )
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        shared = []
        for name, output in outputs.items():
            rows = flatten_positions(output, self.layers[name], len(output), name).flatten(0, 1)
            drawn = torch.randperm(rows.shape[1], generator=generator)[: self.channels].to(rows.device)
            shared.append(shared_information(rows[:, drawn], self.references))
        return self.weight * torch.stack(shared).mean()


def shared_information(rows: Tensor, references: int) -> Tensor:
    """Mean information that pairs of channels share, ``-1/2 ln(1 - rho_kj^2)``, differentiable.

    Args:
        rows: [n, C], any float dtype; computed in float32 at least.
        references: the first so many channels are k; j are all the others.

    Returns:
        A number in nats, at least 0; 0 where no two channels vary.

    Example:
        >>> rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0]])
        >>> float(shared_information(rows, 2))
        0.0
    """
    with torch.autocast(rows.device.type, enabled=False):
        values = rows if rows.dtype == torch.float64 else rows.float()
        centred = values - values.mean(0)
        power = centred.square().mean(0)
        varying = power > 0
        unit = centred / torch.where(varying, power, torch.ones_like(power)).sqrt()
        rho = unit[:, :references].T @ unit / len(rows)
        pairs = varying[:references, None] & varying
        pairs.fill_diagonal_(False)
        information = -0.5 * torch.log1p(-rho.square().clamp_max(1.0 - LEAST_RESIDUAL))
        return torch.where(pairs, information, 0.0).sum() / pairs.sum().clamp_min(1)
