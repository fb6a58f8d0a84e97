"""What a pruning has to keep to, checked when it is given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from tp_twoaxis.dependency.attention import AttentionUnit
from tp_twoaxis.errors import TwoAxisError, check_count, check_name, is_number, listing
from tp_twoaxis.pruning.plan import check_constraints
from tp_twoaxis.repair import parse_repair
from tp_twoaxis.repair.repair_task import TRAINING_STEPS

Budget = Literal["macs", "channels", "latency"]


@dataclass(frozen=True)
class PruningConfig:
    """Constraints of :func:`~tp_twoaxis.prune_to_flops`; see its arguments of the same names.

    Raises:
        TwoAxisError: here, an unknown name or a number out of range.

    Example:
        >>> PruningConfig(flops=0.5, repair="ridge+bn").repair
        ('ridge', 'bn')
    """

    flops: float = 0.5
    budget: Budget = "macs"
    steps: int = 1
    repair: str | Iterable[str] = ("bn",)
    ignored_layers: Iterable[nn.Module | str] = ()
    min_keep: float = 0.1
    round_to: int | None = None
    attention: AttentionUnit = "heads"
    tolerance: float = 0.01
    guard: bool = True
    max_memory: float = 4.0
    training_steps: int = TRAINING_STEPS

    def __post_init__(self) -> None:
        check_name("budget", self.budget, get_args(Budget))
        check_name("attention", self.attention, get_args(AttentionUnit))
        check_constraints(self.flops, self.min_keep, self.round_to, self.tolerance)
        if not (is_number(self.max_memory) and self.max_memory > 0):
            raise TwoAxisError(f"max_memory: expected GiB above 0, got {self.max_memory!r}")
        check_count("steps", self.steps)
        check_count("training_steps", self.training_steps)
        object.__setattr__(self, "repair", parse_repair(self.repair))
        object.__setattr__(self, "ignored_layers", listed_layers(self.ignored_layers))

    def ignored_in(self, network: nn.Module) -> list[nn.Module]:
        """Find the layers that keep their output channels.

        Raises:
            TwoAxisError: one is not part of the network.
        """
        modules = dict(network.named_modules())
        found = []
        for layer in self.ignored_layers:
            if isinstance(layer, str) and layer not in modules:
                near = difflib.get_close_matches(layer, modules, n=3) or [name for name in modules if name][:3]
                raise TwoAxisError(f"ignored_layers: the model has no layer {layer!r}; near it: {listing(near)}")
            module = modules[layer] if isinstance(layer, str) else layer
            if not any(module is other for other in modules.values()):
                raise TwoAxisError(
                    f"ignored_layers: {type(module).__name__} is not part of this model; pass its own layers or their "
                    "names"
                )
            found.append(module)
        return found

    def ignored_names(self, network: nn.Module) -> list[str]:
        """Name the layers that keep their output channels, and all that is inside of them.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
            >>> PruningConfig(ignored_layers=[net[1]]).ignored_names(net)
            ['1', '1.0']
        """
        ignored = {module for layer in self.ignored_in(network) for module in layer.modules()}
        return [name for name, module in network.named_modules() if module in ignored]


def listed_layers(layers: Iterable[nn.Module | str]) -> tuple[nn.Module | str, ...]:
    """Read ``ignored_layers``.

    Raises:
        TwoAxisError: a single name or layer, or nothing that holds any.

    Example:
        >>> listed_layers(["conv1", "fc"])
        ('conv1', 'fc')
    """
    if isinstance(layers, (str, nn.Module)) or not isinstance(layers, Iterable):
        raise TwoAxisError(f"ignored_layers: expected layers or their names, got {layers!r}; pass a list")
    return tuple(layers)
