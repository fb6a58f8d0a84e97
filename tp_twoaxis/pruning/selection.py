"""Which score to prune a network by: try them on copies and judge them on images that were held out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.attention import AttentionUnit
from tp_twoaxis.dependency.flops import ExampleInputs
from tp_twoaxis.errors import TwoAxisError, is_number, listing, reason
from tp_twoaxis.importance import FAMILIES, Criterion, Importance, PruningState, as_criterion, expand_criteria
from tp_twoaxis.importance.criterion import criterion_from_factory
from tp_twoaxis.pruning.config import PruningConfig, listed_layers
from tp_twoaxis.pruning.prune import prune_to_flops
from tp_twoaxis.pruning.recipe import choose_recipe
from tp_twoaxis.pruning.selection_result import SelectionResult, SelectionRow, rank_candidates, tied_with_best
from tp_twoaxis.repair import check_repair
from tp_twoaxis.runtime.batches import image_batches, mixed_labels
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.inputs import CallSignature, Inputs
from tp_twoaxis.runtime.model_state import fork_rng, unwrap
from tp_twoaxis.runtime.progress_bar import progress_bar

Factory = Callable[..., Importance]
Batches = list[tuple[Inputs, Tensor]] | list[Inputs]


def select_score(
    model: nn.Module,
    example_inputs: ExampleInputs,
    loader: Iterable[Any],
    candidates: str | Iterable[str | Factory] | Mapping[str, str | Factory] = "all-local",
    *,
    flops: float | Iterable[float] = 0.5,
    repair: str | Iterable[str] = ("bn",),
    held_out: float = 0.5,
    max_images: int | None = 5000,
    target: str | None = "margin",
    ignored_layers: Iterable[nn.Module | str] = (),
    min_keep: float = 0.1,
    round_to: int | None = None,
    attention: AttentionUnit = "heads",
    tolerance: float = 0.01,
    guard: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> SelectionResult:
    """Choose a score for a network by a small sweep on held-out calibration images (the paper's practical selector).

    The loader is read once and its images are split at random into two parts. On the first, statistics are gathered
    once for all candidates; for every candidate and share a copy of the model is pruned and repaired with the same
    images. The second part judges it. No test image is needed, and the model is not touched.

    A candidate is as good as its top-1 accuracy on the held-out images, averaged over the shares; without labels, as
    its agreement: the share of images that it puts into the class that the dense network does. Equal ones are ordered
    by the mean Kullback-Leibler divergence of their prediction from the dense network's. A candidate that fails at a
    share is out, with the reason in the table.

    Args:
        model: the trained classifier; wrappers are looked through.
        example_inputs: as for :func:`~tp_twoaxis.prune_to_flops`.
        loader: yields ``(images, labels)`` or images, all of one shape and normalised as in training. They are held
            in memory, so that a loader that shuffles cannot mix the two parts: 5,000 images of 224 pixels take 3 GB,
            and twice that while they are split.
        candidates: criterion expressions or families (``"all-local"``), functions ``CalibrationStatistics ->
            importance`` such as ``HullImportance`` (called with those of ``stats``, ``model``, ``loader`` and ``seed``
            that they have), or a mapping of labels to either.
        flops: share of the dense MACs to keep, or several.
        repair: as for ``prune_to_flops``, from the first part.
        held_out: share of the images in the second part.
        max_images: of both parts; None reads the loader to its end.
        target: task variable of the calibration, as for :func:`~tp_twoaxis.calibrate`.
        ignored_layers: layers or their names that keep their channels.
        min_keep: share of every group's channels that always stays.
        round_to: keep multiples of this many channels.
        attention: as for ``prune_to_flops``.
        guard: as for ``prune_to_flops``.
        tolerance: accepted relative distance to the target.
        seed: of the split, and of ``random``.
        progress: show progress bars on stderr.

    Returns:
        The best name, the table of all that was tried, and the importance to go on with.

    Raises:
        TwoAxisError: an unknown name, images or labels that do not fit, numbers out of range; or every candidate
            failed, with the reasons.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        >>> loader = [(torch.randn(64, 3, 8, 8), torch.randint(4, (64,)))]
        >>> x = torch.randn(1, 3, 8, 8)
        >>> result = select_score(net, x, loader, ["capture", "l2"], progress=False)
        >>> result.best in ("capture", "l2"), len(result.table)
        (True, 2)
        >>> report = prune_to_flops(net, x, result.importance(), flops=0.5, repair=(), progress=False)
    """
    network = unwrap(model)
    criteria = _candidates(candidates)
    shares = list(flops) if isinstance(flops, Iterable) else [flops]
    if not shares:
        raise TwoAxisError(f"flops: expected shares of MACs to keep, above 0 and up to 1, got {flops!r}")
    names = {module: name for name, module in network.named_modules()}
    ignored = [
        names.get(layer, layer) if isinstance(layer, nn.Module) else layer for layer in listed_layers(ignored_layers)
    ]
    repair = choose_recipe(network, example_inputs, "l2", repair, loader=loader).repair
    configs = [
        PruningConfig(share, "macs", 1, repair, ignored, min_keep, round_to, attention, tolerance, guard)
        for share in shares
    ]
    configs[0].ignored_in(network)
    if not (is_number(held_out) and 0.0 < held_out < 1.0):
        raise TwoAxisError(f"held_out: expected a share between 0 and 1, got {held_out!r}; 0.5 is usual")
    check_repair(repair, network, loader)
    with fork_rng():
        calibration, judges = _split(network, loader, max_images, held_out, seed, progress)
        state = PruningState(network, calibration, target=target, max_images=None, seed=seed, progress=progress)
        readers = [criterion for criterion in criteria.values() if "statistics" in criterion.needs]
        if readers:
            extras = dict.fromkeys(extra for criterion in readers for extra in criterion.extras)
            state.statistics(*extras, target=any(criterion.reads_task for criterion in readers))
        judge = HeldOutEvaluator(network, judges)
        table: list[SelectionRow] = []
        hits: dict[tuple[str, float], Tensor] = {}
        trials = [(name, config) for name in criteria for config in configs]
        for name, config in progress_bar(trials, desc="select", unit="trial", show=progress):
            row, right = _attempt(name, criteria[name], config, example_inputs, state, judge)
            table.append(row)
            if right is not None:
                hits[name, config.flops] = right
    ranking = rank_candidates(table)
    if not ranking:
        raise TwoAxisError(_all_failed(table))
    best = ranking[0][0]
    rights = {name: torch.stack([hits[name, share] for share in shares]).double().mean(0) for name, _, _ in ranking}
    return SelectionResult(
        best,
        judge.measure,
        table,
        tied_with_best(rights, best),
        judge.dense,
        sum(len(batch[0] if isinstance(batch, tuple) else batch) for batch in calibration),
        judge.images,
        state.known_statistics,
        criteria[best],
    )


def _attempt(
    name: str,
    criterion: Criterion,
    config: PruningConfig,
    example_inputs: ExampleInputs,
    state: PruningState,
    judge: HeldOutEvaluator,
) -> tuple[SelectionRow, Tensor | None]:
    """Prune a copy of the network by one candidate to one share, and judge it; a failure is a row too."""
    start = time.perf_counter()
    assert state.model is not None
    try:
        pruned = copy.deepcopy(state.model)
        own = replace(state, model=pruned, stats=state.known_statistics, progress=False)
        report = prune_to_flops(
            pruned,
            example_inputs,
            criterion.build(own),
            loader=state.loader,
            max_images=None,
            progress=False,
            **vars(config),
        )
        right, divergence = judge.judge(pruned)
    except Exception as error:  # a candidate may be anybody's code
        why = str(error) if isinstance(error, TwoAxisError) else reason(error)
        return SelectionRow(name, config.flops, None, None, None, time.perf_counter() - start, why), None
    seconds = time.perf_counter() - start
    mean = float(right.double().mean())
    return SelectionRow(name, config.flops, report.achieved, mean, divergence, seconds), right


def _candidates(given: str | Iterable[str | Factory] | Mapping[str, str | Factory]) -> dict[str, Criterion]:
    if not isinstance(given, Iterable):
        raise TwoAxisError(f"candidates: expected names, functions or a mapping of labels to them, got {given!r}")
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        pairs = [
            (_label(part), part)
            for item in ([given] if isinstance(given, str) else given)
            for part in (expand_criteria([item]) if isinstance(item, str) and item in FAMILIES else [item])
        ]
    if not pairs:
        raise TwoAxisError(f"candidates: expected at least one, got none; families are {', '.join(FAMILIES)}")
    found: dict[str, Criterion] = {}
    for label, item in pairs:
        if label in found:
            raise TwoAxisError(f"candidates: {label!r} is there twice; pass a mapping with a label for each")
        if isinstance(item, (str, Criterion)):
            found[label] = as_criterion(item)
        elif callable(item):
            found[label] = criterion_from_factory(label, item)
        else:
            raise TwoAxisError(
                f"candidates: expected names or functions CalibrationStatistics -> importance, got {item!r}"
            )
    return found


def _label(item: Any) -> str:
    if isinstance(item, Criterion):
        return item.name
    return item if isinstance(item, str) else getattr(item, "__name__", type(item).__name__)


def _split(
    network: nn.Module, loader: Iterable[Any], max_images: int | None, held_out: float, seed: int, progress: bool
) -> tuple[Batches, Batches]:
    """Read all images and split them into calibration and held-out batches of the loader's size."""
    images: list[Inputs] = []
    labels: list[Tensor] = []
    size = 0
    call = CallSignature.of(network)
    with image_batches(
        loader, max_images=max_images, labels=True, description="read", progress=progress, call=call
    ) as batches:
        for number, part, classes in batches:
            if number and (classes is None) == bool(labels):
                raise TwoAxisError(mixed_labels(number, classes))
            if images and part[:0].shapes != images[0][:0].shapes:
                raise TwoAxisError(
                    f"loader: expected images of one shape, got {part.shapes} in batch {number} after "
                    f"{images[0].shapes}; resize them"
                )
            if classes is not None and (classes.shape != (len(part),) or classes.is_floating_point()):
                raise TwoAxisError(
                    f"loader: expected class indices [{len(part)}] in batch {number}, got {classes.dtype} "
                    f"{list(classes.shape)}"
                )
            images.append(part)
            labels += [] if classes is None else [classes]
            size = size or len(part)
    count = sum(len(part) for part in images)
    kept_back = round(held_out * count)
    if kept_back < 1 or count - kept_back < 2:
        raise TwoAxisError(
            f"loader: expected images for two parts, 2 to calibrate and 1 held out at least, got {count} with "
            f"held_out={held_out}; give more images"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    whole, classes = Inputs.concatenate(images), torch.cat(labels) if labels else None

    def batched(chosen: Tensor) -> Batches:
        parts = torch.split(chosen, size)
        if classes is None:
            return [whole[part] for part in parts]
        return [(whole[part], classes[part.to(classes.device)]) for part in parts]

    return batched(order[kept_back:]), batched(order[:kept_back])


class HeldOutEvaluator:
    """Held-out images, the dense network's predictions for them, and how a pruned one compares.

    Attributes:
        measure: ``"accuracy"`` where there are labels, else ``"agreement"`` with the dense network.
        dense: the dense network's own, in [0, 1].
        images: how many there are.
    """

    def __init__(self, network: nn.Module, batches: Batches) -> None:
        self._images = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
        self._dense = self._log_probabilities(network)
        predicted = self._dense.argmax(1)
        labels = [batch[1].cpu() for batch in batches if isinstance(batch, tuple)]
        self._labels = torch.cat(labels) if labels else predicted
        self.measure = "accuracy" if labels else "agreement"
        self.dense = float((predicted == self._labels).double().mean())
        self.images = len(self._labels)

    def judge(self, network: nn.Module) -> tuple[Tensor, float]:
        """Return which images are right, [n] bool, and the mean divergence from the dense network in nats."""
        log_probabilities = self._log_probabilities(network)
        divergence = (self._dense.exp() * (self._dense - log_probabilities)).sum(1).mean()
        return log_probabilities.argmax(1) == self._labels, max(0.0, float(divergence))

    def _log_probabilities(self, network: nn.Module) -> Tensor:
        with forward_pass(network, self._images, what="judge") as run:
            logits = [run.logits(batch).cpu() for batch in run.batches]
        whole = torch.cat(logits)
        if whole.ndim != 2 or not bool(torch.isfinite(whole).all()):
            got = f"shape {list(whole.shape)}" if whole.ndim != 2 else "values that are not finite"
            raise TwoAxisError(f"{type(network).__name__}: expected finite logits [n, K] on held-out images, got {got}")
        return whole.double().log_softmax(1)


def _all_failed(table: list[SelectionRow]) -> str:
    reasons: dict[str, list[str]] = {}
    for row in table:
        if row.error is not None and row.candidate not in reasons.setdefault(row.error, []):
            reasons[row.error].append(row.candidate)
    causes = "; ".join(f"{listing(names)}: {why}" for why, names in reasons.items())
    return f"no candidate could be judged at every share - {causes}"
