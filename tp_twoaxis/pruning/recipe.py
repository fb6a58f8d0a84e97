"""What is done where the caller leaves it open: the criterion and the repair that keep most, as far as images allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tp_twoaxis.dependency.flops import ExampleInputs, call
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import Criterion
from tp_twoaxis.known_names import AUTO
from tp_twoaxis.repair.batch_norm import batch_norms
from tp_twoaxis.repair.images import FEWEST_HELD_OUT, HELD_OUT_EVERY
from tp_twoaxis.runtime.batches import read_batch
from tp_twoaxis.runtime.forward import find_logits, inference_state
from tp_twoaxis.runtime.inputs import CallSignature
from tp_twoaxis.statistics.store import CalibrationStatistics

SELECTING, RESERVE = "anticipating", "hull"
BEST_REPAIR = "joint"
# with fewer images none can be held out to judge what is fitted to the others
FEWEST_IMAGES = FEWEST_HELD_OUT * HELD_OUT_EVERY


@dataclass(frozen=True)
class PruningRecipe:
    """What will be done.

    Attributes:
        importance: as given, or the criterion's name that was chosen.
        repair: as given, or the repairs that were chosen.
        notes: what was chosen, and why.
    """

    importance: str | Criterion | Callable[[Any], Tensor]
    repair: str | Iterable[str]
    notes: list[str] = field(default_factory=list)


def choose_recipe(
    network: nn.Module,
    example_inputs: ExampleInputs,
    importance: str | Criterion | Callable[[Any], Tensor] = AUTO,
    repair: str | Iterable[str] = AUTO,
    *,
    loader: Iterable[Any] | None = None,
    stats: CalibrationStatistics | None = None,
) -> PruningRecipe:
    """Choose a criterion and a repair where they are ``"auto"``.

    From ten images on channels are selected by ``anticipating``, which measures what the repaired network loses, and
    repaired by ``joint``. With fewer images ``hull`` selects and ``bn`` repairs; models with several inputs or without
    class logits are selected by ``hull`` too; and without images, but with statistics of what layers read, ``ridge``
    repairs. Whatever is chosen, repair keeps on images held out only what brings the network nearer to the dense one
    than ``bn``. How these rules do with few images: ``benchmarks/few_images.py``.

    Args:
        network: dense; run once, and left as it was.
        example_inputs: of its forward; moved to its device.
        importance: as for :func:`~tp_twoaxis.prune_to_flops`; anything but ``"auto"`` is kept.
        repair: likewise.
        loader: of the images; the first batches are read.
        stats: of the network, if there are any.

    Returns:
        The recipe; nothing in it is ``"auto"``.

    Raises:
        TwoAxisError: there are neither images nor statistics that a choice could be made from.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        >>> images = torch.randn(64, 3, 8, 8)
        >>> recipe = choose_recipe(net, images[:1], loader=[images])
        >>> recipe.importance, recipe.repair
        ('anticipating', ('joint',))
    """
    open_importance, open_repair = is_auto(importance), is_auto(repair)
    notes: list[str] = []
    if not (open_importance or open_repair):
        return PruningRecipe(importance, repair)
    if loader is None and stats is None:
        raise TwoAxisError(
            "expected loader=... with images to choose channels by and to repair from, labels are not needed, got "
            "none; without images, name a criterion of weights and do without repair: importance='l2', repair='none'"
        )
    if isinstance(loader, Iterator):
        raise TwoAxisError(
            f"images are read more than once: expected a list or a DataLoader, got {type(loader).__name__}; pass "
            "list(loader)"
        )
    count = 0 if loader is None else images_up_to(loader, FEWEST_IMAGES, CallSignature.of(network))
    if open_importance:
        importance, why = _choose_criterion(network, example_inputs, loader, stats, count)
        notes.append(f"importance was left open: {importance}, {why}")
    if open_repair:
        repair, why = _choose_repair(network, loader, stats, count)
        notes.append(f"repair was left open: {'+'.join(repair) or 'none'}, {why}")
    return PruningRecipe(importance, repair, notes)


def is_auto(choice: Any) -> bool:
    """Whether a choice is left open.

    Example:
        >>> is_auto("auto"), is_auto(("auto",)), is_auto("l2")
        (True, True, False)
    """
    return isinstance(choice, (str, tuple)) and choice in (AUTO, (AUTO,))


def images_up_to(loader: Iterable[Any], most: int, call: CallSignature) -> int:
    """Count a loader's images, reading no more batches than it takes to find ``most``.

    Example:
        >>> import torch
        >>> images_up_to([torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1)], 4, CallSignature.of(nn.Identity()))
        6
    """
    count = 0
    for number, batch in enumerate(loader):
        count += len(read_batch(batch, number, labels=False, call=call)[0])
        if count >= most:
            break
    return count


def _choose_criterion(
    network: nn.Module,
    example_inputs: ExampleInputs,
    loader: Iterable[Any] | None,
    stats: CalibrationStatistics | None,
    count: int,
) -> tuple[str, str]:
    if loader is None:
        return RESERVE, "because there are statistics but no images to measure on"
    if stats is not None and not stats.consumers:
        return (
            RESERVE,
            "because the statistics given do not hold what layers read, which calibrate(consumers=True) does",
        )
    if count < FEWEST_IMAGES:
        return RESERVE, f"because {SELECTING} needs {FEWEST_IMAGES} images, and there are {count}"
    if why := _no_logits(network, example_inputs):
        return RESERVE, f"because {SELECTING} compares logits, and {why}"
    return SELECTING, "which measures what the repaired network loses for the MACs that each group saves"


def _no_logits(network: nn.Module, example_inputs: ExampleInputs) -> str:
    given = tree_leaves(example_inputs)
    if CallSignature.of(network).required != 1 or len(given) != 1:
        return f"{type(network).__name__} takes several inputs"
    with inference_state(network):
        try:
            device = next(network.parameters()).device
            logits = find_logits(call(network, tree_map(lambda x: x.to(device), example_inputs)), network)
        except TwoAxisError:
            return f"{type(network).__name__} returns none"
        except Exception:  # what the network cannot run on is said where its MACs are counted
            return ""
    return "" if logits.ndim == 2 else f"the output of {type(network).__name__} has shape {list(logits.shape)}"


def _choose_repair(
    network: nn.Module, loader: Iterable[Any] | None, stats: CalibrationStatistics | None, count: int
) -> tuple[tuple[str, ...], str]:
    if loader is None:
        if stats is not None and stats.consumers:
            return ("ridge",), "because there are statistics but no images; pass loader=... for more"
        raise TwoAxisError(
            "repair: expected loader=... with images, labels are not needed, or stats=calibrate(model, loader, "
            "consumers=True), got neither; repair='none' leaves the network as removal left it"
        )
    if count >= FEWEST_IMAGES:
        return (BEST_REPAIR,), "which keeps most without training; 'sequential' takes about half the time"
    few = f"because refits need {FEWEST_IMAGES} images, and there are {count}"
    return (("bn",), few) if batch_norms(network) else ((), few)
