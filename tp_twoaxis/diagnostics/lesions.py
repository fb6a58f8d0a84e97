"""What a network loses without a channel: its stored output replaced, the loss measured, the model untouched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tp_twoaxis.diagnostics.peers import PEERS, Prediction, predict_from_peers
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.batches import Batch, mixed_labels
from tp_twoaxis.runtime.forward import ForwardPass, forward_pass
from tp_twoaxis.runtime.layers import channel_axis, channel_layers, out_channels_of
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.runtime.replay import PrefixReplay
from tp_twoaxis.statistics.store import CalibrationStatistics
from tp_twoaxis.statistics.targets import task_variables

Replacement = Literal["zero", "mean", "peers"]
MINIMUM_DAMAGE = 1e-3  # nats; below it a recovered share says nothing


@dataclass(frozen=True)
class Lesion:
    """What one replacement of one channel does.

    Attributes:
        channel: the channel.
        replacement: what stands in its place.
        loss_increase: of the mean loss, in nats; negative where the network is better without the channel.
        standard_error: of ``loss_increase`` over images, each compared with itself.
        accuracy_drop: share of the images, in [-1, 1].
    """

    channel: int
    replacement: str
    loss_increase: float
    standard_error: float
    accuracy_drop: float


@dataclass(frozen=True)
class Lesions:
    """What lesions of a layer do.

    Attributes:
        layer: the layer's name.
        images: how many were measured on.
        reference: ``"labels"``, or ``"dense predictions"`` where there are none: then the loss is the
            cross-entropy with the classes that the whole network predicts, and accuracy is agreement with them.
        loss: mean loss of the whole network, in nats.
        accuracy: of the whole network.
        lesions: channels in the order given, for each the replacements in the order given.
    """

    layer: str
    images: int
    reference: str
    loss: float
    accuracy: float
    lesions: list[Lesion]

    def find(self, channel: int, replacement: str) -> Lesion:
        """Return one of the lesions.

        Raises:
            KeyError: it was not measured.
        """
        for entry in self.lesions:
            if (entry.channel, entry.replacement) == (channel, replacement):
                return entry
        raise KeyError((channel, replacement))


def lesion(
    model: nn.Module,
    loader: Iterable[Any],
    layer: str,
    channels: int | Iterable[int],
    replacement: Replacement | Sequence[Replacement] = "mean",
    *,
    stats: CalibrationStatistics | None = None,
    peers: int = PEERS,
    max_images: int | None = None,
    progress: bool = True,
) -> Lesions:
    """Replace single channels of a layer and measure what the network loses.

    The stored output of the layer, before BatchNorm and activation, gets another value at every position of
    the channel: 0; the channel's mean; or the prediction from its best peers, whose weights come from the
    calibration (paper, appendix K.2). Each channel is replaced by itself, the others stay. The loader is read
    once; every batch takes one forward pass for the whole network, and for each channel and replacement what
    comes behind the layer: modules that finished before it return what they returned
    (:class:`~tp_twoaxis.runtime.replay.PrefixReplay`). The model runs in eval mode and comes back exactly as it
    was, also when something raises.

    Args:
        model: a classifier that returns logits; wrappers are looked through.
        loader: yields ``(images, labels)`` or images; without labels see :attr:`Lesions.reference`.
        layer: name of a convolution, linear or attention layer.
        channels: one output channel of it, or several.
        replacement: ``"zero"``, ``"mean"``, ``"peers"``, or several of them.
        stats: calibration of this model that holds the layer; ``"zero"`` does without.
        peers: how many predict a channel, at most; 1 to 10.
        max_images: stop after this many; None reads the loader to its end.
        progress: show a progress bar on stderr.

    Raises:
        TwoAxisError: no such layer, channel or replacement; statistics are needed, or are of another state of
            the model; labels come with some batches only, or are no classes of the model; no images came; the
            model raised, or does not run the layer.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        >>> loader = [(torch.randn(64, 8), torch.randint(4, (64,)))]
        >>> stats = calibrate(net, loader, progress=False)
        >>> result = lesion(net, loader, "0", [1, 4], ("mean", "peers"), stats=stats, progress=False)
        >>> [(entry.channel, entry.replacement) for entry in result.lesions]
        [(1, 'mean'), (1, 'peers'), (4, 'mean'), (4, 'peers')]
    """
    network = unwrap(model)
    module = channel_layers(network, [layer])[layer]
    wanted = checked_channels(channels, out_channels_of(module), layer)
    substitutes = _substitutes(network, layer, wanted, _checked_replacements(replacement), stats, peers)
    losses: list[list[Tensor]] = [[] for _ in range(len(substitutes) + 1)]
    right = torch.zeros(len(losses), dtype=torch.int64)
    reference: str | None = None
    with forward_pass(
        network, loader, what=f"lesions of {layer}", max_images=max_images, labels=True, progress=progress
    ) as run:
        ablation = AblationHook(run, module, layer)
        for batch in run.batches:
            labels = batch.labels
            kind = "dense predictions" if labels is None else "labels"
            if kind != (reference or kind):
                raise TwoAxisError(mixed_labels(batch.number, labels))
            reference = kind
            for place, logits in enumerate(ablation.passes(batch, [None, *(made for _, made in substitutes)])):
                if labels is None:
                    labels = logits.argmax(1)  # of the first pass, which leaves the network whole
                losses[place].append(_losses(logits, labels, batch.number))
                right[place] += (logits.argmax(1) == labels.to(logits.device)).sum().cpu()
    assert reference is not None
    return _compared(layer, reference, substitutes, [torch.cat(parts) for parts in losses], right.tolist())


def recovered_share(removed: Lesion, replaced: Lesion, minimum_damage: float = MINIMUM_DAMAGE) -> float | None:
    """Share of a lesion's damage that a better replacement gives back, ``(removed - replaced) / removed``.

    Ratios of small numbers are unstable, so nothing is said (None) unless the damage exceeds ``minimum_damage``
    and two of its standard errors; the paper too asks for a minimum (appendix K.2), the values are ours.

    Args:
        removed: the channel replaced by zero or its mean.
        replaced: the same channel predicted by its peers.
        minimum_damage: in nats.

    Returns:
        At most about 1; negative where the peers' prediction does more harm than the lesion.

    Example:
        >>> removed, replaced = Lesion(3, "mean", 0.5, 0.01, 0.05), Lesion(3, "peers", 0.125, 0.01, 0.01)
        >>> recovered_share(removed, replaced)
        0.75
        >>> recovered_share(replaced, removed, minimum_damage=0.2) is None
        True
    """
    damage = removed.loss_increase
    if damage <= max(minimum_damage, 2.0 * removed.standard_error):
        return None
    return (damage - replaced.loss_increase) / damage


def checked_channels(channels: int | Iterable[int], count: int, layer: str) -> list[int]:
    """Channels as a list without repetitions.

    Args:
        channels: one or several.
        count: how many the layer has.
        layer: its name, for the message.

    Raises:
        TwoAxisError: there are none, or one is no channel of the layer.

    Example:
        >>> checked_channels([2, 0, 2], 4, "conv1")
        [2, 0]
    """
    wanted = [channels] if isinstance(channels, int) else list(dict.fromkeys(channels))
    if not wanted:
        raise TwoAxisError(f"{layer}: expected at least one channel, got none; name some of 0 to {count - 1}")
    for channel in wanted:
        if isinstance(channel, bool) or not isinstance(channel, int) or not 0 <= channel < count:
            raise TwoAxisError(
                f"{layer}: expected channels of 0 to {count - 1}, got {channel!r}; the layer has {count} of them"
            )
    return wanted


def _checked_replacements(replacement: Replacement | Sequence[Replacement]) -> list[Replacement]:
    names = [replacement] if isinstance(replacement, str) else list(replacement)
    known = get_args(Replacement)
    if not names or any(name not in known for name in names):
        raise TwoAxisError(f"replacement: expected one or several of {', '.join(known)}, got {replacement!r}")
    return names


def _substitutes(
    network: nn.Module,
    layer: str,
    channels: list[int],
    replacements: list[Replacement],
    stats: CalibrationStatistics | None,
    peers: int,
) -> list[tuple[str, Prediction]]:
    """Every replacement is affine in the layer's own output: zero and the mean are predictions from no peers."""
    if stats is None:
        if set(replacements) - {"zero"}:
            raise TwoAxisError(
                f"replacement: {' and '.join(replacements)} need the calibration's statistics, got none; pass "
                f"stats=calibrate(model, loader, layers=[{layer!r}])"
            )
        mean, predictions = None, []
    else:
        stats.verify(network, [layer])
        mean = stats[layer].mean
        predictions = predict_from_peers(stats[layer], peers)
    made: list[tuple[str, Prediction]] = []
    for channel in channels:
        for name in replacements:
            if name == "peers":
                made.append((name, predictions[channel]))
            else:
                value = 0.0 if name == "zero" or mean is None else float(mean[channel])
                made.append((name, Prediction(channel, (), (), value, 0.0)))
    return made


def _compared(
    layer: str, reference: str, substitutes: list[tuple[str, Prediction]], losses: list[Tensor], right: list[int]
) -> Lesions:
    """Compare every lesion's losses and hits with those of the whole network, which come first."""
    whole, count = losses[0], len(losses[0])
    found = []
    for (name, substitute), own, hits in zip(substitutes, losses[1:], right[1:], strict=True):
        change = own - whole
        error = float(change.std() / count**0.5) if count > 1 else float("inf")
        found.append(Lesion(substitute.channel, name, float(change.mean()), error, (right[0] - hits) / count))
    return Lesions(layer, count, reference, float(whole.mean()), right[0] / count, found)


class AblationHook:
    """Forward hook that replaces one channel of a layer's output while a substitute is set, until the pass ends."""

    def __init__(self, run: ForwardPass, module: nn.Module, layer: str) -> None:
        self.run, self.module, self.layer = run, module, layer
        self.axis = channel_axis(module)
        self.substitute: Prediction | None = None
        run.hook(module, self)

    def passes(self, batch: Batch, substitutes: Iterable[Prediction | None]) -> Iterator[Tensor]:
        """Run a batch with each substitute, from the layer on.

        Yields:
            Class logits [n, K].

        Raises:
            TwoAxisError: the layer does not run, or there are no such logits.
        """
        self.substitute = None
        replay = PrefixReplay(self.run.network, partial(self.run, batch))
        if not replay.advance([self.module], including=True):
            raise TwoAxisError(f"{self.layer}: the layer did not run in the forward pass; choose one that does")
        for substitute in substitutes:
            self.substitute = substitute
            with replay.replaying():
                logits = self.run.logits(batch)
            if logits.ndim != 2 or len(logits) != len(batch.inputs):
                raise TwoAxisError(
                    f"lesions: expected class logits [{len(batch.inputs)}, K] of batch {batch.number}, got "
                    f"{list(logits.shape)}; pass a classifier"
                )
            yield logits

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Replace the channel; attention's output is a tuple that starts with it."""
        if self.substitute is None:
            return None
        if isinstance(output, tuple):
            return (self._replaced(output[0], self.substitute), *output[1:])
        return self._replaced(output, self.substitute)

    def _replaced(self, output: Tensor, substitute: Prediction) -> Tensor:
        replaced = output.clone()
        channel = replaced.select(self.axis, substitute.channel)
        # in single precision at least: sums of large terms that cancel are common among correlated peers
        wide = torch.promote_types(output.dtype, torch.float32)
        value = torch.full_like(channel, substitute.intercept, dtype=wide)
        for peer, weight in zip(substitute.peers, substitute.weights, strict=True):
            value.add_(output.select(self.axis, peer).to(wide), alpha=weight)
        channel.copy_(value)
        return replaced


def _losses(logits: Tensor, labels: Tensor, index: int) -> Tensor:
    """Cross-entropy of each image in nats, float64 [n] on the CPU."""
    try:
        return -task_variables(logits.cpu(), labels.cpu())["negative_loss"][:, 0]
    except TwoAxisError as error:
        raise TwoAxisError(f"batch {index}: {error}") from error
