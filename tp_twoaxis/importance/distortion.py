"""How far a network's logits move when channels leave and their consumers are refitted: measured, not modelled."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.flops import MacsCount, count_macs
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.layer_refits import LayerChange, LayerRefits
from tp_twoaxis.runtime.batches import Batch, image_batches
from tp_twoaxis.runtime.forward import ForwardPass, forward_pass
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.runtime.progress_bar import progress_bar
from tp_twoaxis.runtime.replay import PrefixReplay
from tp_twoaxis.statistics.store import CalibrationStatistics

Key = TypeVar("Key")
# images that run at a time, so many that what is replayed stays small in memory
BATCH = 32
# images that are read at most, in units of those that distortion is measured on
READ_IMAGES = 4
# distortion of logits that are no numbers
LARGEST_DISTORTION = 1e6


class Distortion:
    """Measures the distortion of a dense network's logits for given missing inputs of its layers, on a few images.

    Layers that lose inputs are refitted as repair would do it
    (:class:`~tp_twoaxis.importance.layer_refits.LayerRefits`); nothing is removed, no weight changes for longer than a
    call. They are fitted on other images than those on which the distortion is measured: on the same ones a wide layer
    before the head would look free, because few images are fitted by its many weights. The **distortion** is the
    logits' mean squared distance from the dense network's, relative to their variance over the images: 0 where nothing
    changes, 1 where the logits hold no more than their mean, more where they mislead. Unlike a divergence between the
    predicted classes it does not vanish for a network that is sure of every calibration image.

    What runs before the first changed layer is replayed, not computed
    (:class:`~tp_twoaxis.runtime.replay.PrefixReplay`). For every set of layers this is compared with a whole pass once,
    on an image; where they differ, because the network holds a state for example, whole passes are made.

    Copies of an object share the network, the images and all that was measured.

    Attributes:
        images: to measure on, in random order, [n, ...].
        refits: changes of the network's layers, fitted on other images.
        known: what those who measure remember, for all copies.

    Args:
        model: dense; copied.
        stats: its statistics by ``calibrate(consumers=True)``.
        loader: yields ``(images, labels)`` or images; labels are not used.
        images: measure on so many at most, and fit on up to three times as many others; of fewer, two fifths are for
            measuring.
        max_images: read no more than that.
        progress: show progress bars on stderr.

    Raises:
        TwoAxisError: the loader gave no two images that the network tells apart.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        >>> loader = [torch.randn(32, 3, 8, 8)]
        >>> stats = calibrate(net, loader, target=None, consumers=True, progress=False)
        >>> distortion = Distortion(net, stats, loader, progress=False)
        >>> distortion({"3": torch.arange(288) < 36}) > 0.0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        stats: CalibrationStatistics,
        loader: Iterable[Any],
        *,
        images: int = 128,
        max_images: int | None = None,
        progress: bool = True,
    ) -> None:
        self.network = copy.deepcopy(unwrap(model)).requires_grad_(False)
        self.network.zero_grad(set_to_none=True)
        self.layers = dict(self.network.named_modules())
        parameter = next(self.network.parameters())
        limit = READ_IMAGES * images if max_images is None else min(READ_IMAGES * images, max_images)
        with image_batches(
            loader, max_images=limit, labels=False, description="anticipate", progress=progress
        ) as batches:
            parts = [batch.images.to(parameter.device, parameter.dtype) for batch in batches]
        read = torch.cat(parts) if parts else torch.zeros(0, 1)
        measured = spread(len(read), min(images, max(2, len(read) * 2 // 5)))
        # in random order, so that the first of them are like all
        order = torch.randperm(int(measured.sum()), generator=torch.Generator().manual_seed(0))
        self.images = read[measured][order.to(read.device)]
        self.example = self.images[:1]
        self.refits = LayerRefits(
            self.network, stats, list(torch.split(read[~measured] if len(read) > 2 else read, BATCH))
        )
        self._dense = torch.zeros(0)
        self._replayable: dict[frozenset[str], bool] = {}
        self._bar = progress_bar(desc="anticipate", unit="pass", show=progress)
        self.known: dict[Any, Any] = {}
        if not (parts and self.power(min(len(self.images), BATCH)) > 0.0):
            raise TwoAxisError(
                f"anticipating: expected images that the network tells apart, got {len(self._dense)} with the same "
                "logits; give more images"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Distortion:
        return self

    @cached_property
    def macs(self) -> MacsCount:
        """MACs of the dense network."""
        return count_macs(self.network, self.example)

    @cached_property
    def _calls(self) -> list[str]:
        """Layers in the order in which they are called first."""
        names: dict[str, None] = {}
        with forward_pass(self.network, [self.example], what="anticipate") as run:
            for name, layer in self.layers.items():
                run.hook(layer, lambda *_, name=name: names.setdefault(name), before=True)
            for _ in run:
                pass
        return list(names)

    def _first(self, layers: Iterable[str]) -> int:
        """Place of the first of some layers in the order of calls."""
        called = [self._calls.index(name) for name in layers if name in self._calls]
        return min(called, default=0)

    def repeated_share(self, layers: Iterable[str]) -> float:
        """Share of the network's MACs that is computed for each trial that changes these layers, in [0, 1]."""
        before = self._calls[: self._first(layers)]
        # modules around others, which may hold the layers, count as repeated
        innermost = [name for name in before if not any(True for _ in self.layers[name].children())]
        replayed = sum(self.macs.by_module.get(name, 0) for name in innermost)
        return 1.0 - replayed / max(self.macs.total, 1)

    def __call__(self, missing: Mapping[str, Tensor]) -> float:
        """Measure on all images.

        Args:
            missing: layer name -> [C_in] bool, inputs that it has to do without; at least one.
        """
        changes = {name: self.refits.change(name, inputs) for name, inputs in missing.items()}
        count = len(self.images)
        return float(self.measure({"": changes}, range(count))[""].mean()) / self.power(count)

    @torch.no_grad()
    def measure(self, trials: Mapping[Key, Mapping[str, LayerChange]], images: range) -> dict[Key, Tensor]:
        """Measure several trials on some of the images.

        Args:
            trials: any key -> layer name -> how it is changed. Those that change the same layers share a record, and
                the first of them is the one by which the replay is checked.
            images: consecutive numbers, of :attr:`images`.

        Returns:
            For each key the squared distance of each image's logits, [len(images)] float64, finite; their mean over
            :meth:`power` is the distortion.
        """
        largest = LARGEST_DISTORTION * self.power(images.stop)
        found: dict[Key, list[Tensor]] = {key: [] for key in trials}
        ordered = sorted(trials, key=lambda key: (self._first(trials[key]), sorted(trials[key])))
        for start in range(images.start, images.stop, BATCH):
            part = slice(start, min(start + BATCH, images.stop))
            with forward_pass(self.network, [self.images[part]], what="anticipate") as run:
                (batch,) = run.batches
                replay = PrefixReplay(self.network, partial(run, batch))
                for names, keys in groupby(ordered, key=lambda key: frozenset(trials[key])):
                    ready = self._replayable.get(names, True) and replay.advance(self.layers[name] for name in names)
                    for key in keys:
                        logits = self._logits(run, batch, trials[key].values(), replay if ready else None)
                        if ready and names not in self._replayable:
                            ready = self._replayable[names] = self._is_right(run, batch, trials[key].values(), logits)
                            if not ready:
                                logits = self._logits(run, batch, trials[key].values(), None)
                        found[key].append((logits - self._dense[part]).square().sum(1))
        return {key: torch.cat(parts).nan_to_num(nan=largest).clamp_max(largest).cpu() for key, parts in found.items()}

    def _logits(
        self, run: ForwardPass, batch: Batch, changes: Iterable[LayerChange], replay: PrefixReplay | None
    ) -> Tensor:
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change.applied())
            if replay is not None:
                stack.enter_context(replay.replaying())
            self._bar.update()
            return run.logits(batch).double()

    def _is_right(self, run: ForwardPass, batch: Batch, changes: Iterable[LayerChange], logits: Tensor) -> bool:
        """Compare logits that began with a replay with those of a whole pass, on the first image."""
        whole = self._logits(run, batch._replace(inputs=batch.inputs[:1]), changes, None)
        dense = self._dense[:1].square().sum()
        rounding = 1000 * torch.finfo(run.dtype).eps
        return bool((whole - logits[:1]).square().sum() <= rounding**2 * (whole.square().sum() + dense))

    @torch.no_grad()
    def power(self, count: int) -> float:
        """Variance of the dense network's logits over the first ``count`` images, summed over classes."""
        if len(self._dense) < count:
            batches = list(torch.split(self.images[len(self._dense) : count], BATCH))
            with forward_pass(self.network, batches, what="anticipate") as run:
                logits = [run.logits(batch).double() for batch in run.batches]
            self._dense = torch.cat([self._dense, *logits] if len(self._dense) else logits)
        return float(self._dense[:count].var(0, correction=0).sum())


def spread(total: int, chosen: int) -> Tensor:
    """Choose so many of all, evenly spread: [total] bool.

    Example:
        >>> spread(5, 2).tolist()
        [False, True, False, True, False]
    """
    found = torch.zeros(total, dtype=torch.bool)
    if chosen:
        found[((torch.arange(min(chosen, total)) + 0.5) * total / min(chosen, total)).long()] = True
    return found
