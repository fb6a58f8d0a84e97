"""What a calibration knows: statistics by layer, merged, reduced, saved, and matched against a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tp_twoaxis.errors import FileFormatError, TwoAxisError, listing, reason
from tp_twoaxis.runtime.distributed import gather_over_ranks
from tp_twoaxis.runtime.fingerprints import (
    Fingerprint,
    ModelFingerprints,
    describe_layer,
    described_channels,
    fingerprint,
    weight_shape,
)
from tp_twoaxis.runtime.image_rows import joined_rows
from tp_twoaxis.runtime.layers import channel_weight
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.runtime.serialization import read_tensors, write_tensors
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.packing import pack, unpack
from tp_twoaxis.statistics.recorder import LayerRecord
from tp_twoaxis.statistics.reduction import RankPart, common_form, reduce_moments

FORMAT = "tp-twoaxis/statistics"
# 1 had neither inputs nor gradients, 1 and 2 no weights of rows and no dtypes; their files are read as they are
VERSION = 3
_UNKNOWN_RATES = (
    "the statistics come from a file of an earlier version, which does not say how many positions each sampled row "
    "stands for, so that parts cannot be weighted; calibrate again"
)


class CalibrationStatistics:
    """Statistics of a calibration set, by layer name; parts merge, and files hold no pickle.

    Attributes:
        layers: layer name -> :class:`LayerStatistics`, in the model's order.
        target: the default task variable, or None.
        num_images: images seen.
        image_rows: which rows of the data set's split they are, [num_images] int64 ascending; None where the loader did
            not say (:func:`~tp_twoaxis.runtime.image_rows.image_rows`), or for shards.
        mergeable: whether it is known how many positions each row stands for; not so in files of versions before 3.
        reduced: whether images of all ranks are in them, by :meth:`all_reduce` or by a merge with such statistics.

    Example:
        >>> import tempfile, os
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> parts = [calibrate(net, [(torch.randn(32, 8), torch.randint(4, (32,)))], progress=False) for _ in range(2)]
        >>> stats = parts[0].merge(parts[1])
        >>> path = os.path.join(tempfile.mkdtemp(), "stats.safetensors")
        >>> stats.save(path)
        >>> CalibrationStatistics.load(path).num_images
        64
    """

    def __init__(
        self,
        layers: dict[str, LayerStatistics],
        *,
        task: CoMoments | None,
        columns: dict[str, tuple[int, int]],
        target: str | None,
        num_images: int,
        mergeable: bool = True,
        reduced: bool = False,
        image_rows: Tensor | None = None,
    ) -> None:
        self.layers = layers
        self.target = target
        self.num_images = num_images
        self.mergeable = mergeable
        self.reduced = reduced
        self.image_rows = image_rows
        self._task = task
        self._columns = columns

    @classmethod
    def from_records(
        cls,
        layers: dict[str, nn.Module],
        records: dict[str, LayerRecord],
        task: CoMoments | None,
        columns: dict[str, tuple[int, int]],
        saliency: dict[str, CoMoments] | None = None,
        *,
        target: str | None,
        num_images: int,
        explicit: bool,
        image_rows: Tensor | None = None,
    ) -> CalibrationStatistics:
        """Bind what a recorder gathered to its layers; see :func:`~tp_twoaxis.calibrate` for what is refused."""
        silent = [name for name in layers if name not in records]
        if explicit and silent:
            raise TwoAxisError(f"layers: {listing(silent)} did not run in the forward pass; leave them out")
        if task is not None and not task.to("cpu").finite:
            raise TwoAxisError("the model's logits are not finite on finite images; check its weights and dtype")
        statistics = {}
        for name, layer in layers.items():
            if name not in records:
                continue
            record = records[name]
            moments = {"outputs": (record.rows, record.pooled, record.cross), "inputs": (record.inputs,)}
            for what, part in ((what, part) for what, parts in moments.items() for part in parts):
                if part is not None and not part.to("cpu").finite:
                    raise TwoAxisError(
                        f"{name}: the layer's {what} are not finite on finite images; check its weights and dtype"
                    )
            gradients = None if saliency is None else saliency[name].to("cpu")
            if gradients is not None and not bool(torch.isfinite(gradients.mean).all()):
                raise TwoAxisError(
                    f"{name}: the loss's gradients are not finite on finite images; check the model's weights and dtype"
                )
            statistics[name] = LayerStatistics(
                name,
                type(layer).__name__,
                weight_shape(layer),
                fingerprint(layer),
                channel_weight(layer).double().square().sum(1).cpu(),
                record.rows,
                record.pooled,
                record.cross,
                task,
                columns,
                target,
                record.inputs,
                gradients,
                record.dtype,
                record.pooling,
            )
        return cls(statistics, task=task, columns=columns, target=target, num_images=num_images, image_rows=image_rows)

    @classmethod
    def empty(cls) -> CalibrationStatistics:
        """Statistics of no images, for a rank that has none: :meth:`all_reduce` fills them.

        Example:
            >>> len(CalibrationStatistics.empty()), CalibrationStatistics.empty().num_images
            (0, 0)
        """
        return cls({}, task=None, columns={}, target=None, num_images=0)

    @property
    def has_gradients(self) -> bool:
        """Whether they were gathered with ``calibrate(gradients=True)``."""
        return any(entry.gradients is not None for entry in self.layers.values())

    @property
    def extras(self) -> tuple[Literal["gradients", "consumers"], ...]:
        """What they hold besides the usual: ``"gradients"``, ``"consumers"``."""
        held: dict[Literal["gradients", "consumers"], bool]
        held = {"gradients": self.has_gradients, "consumers": self.consumers}
        return tuple(extra for extra, there in held.items() if there)

    def __getitem__(self, name: str) -> LayerStatistics:
        """Statistics of a layer; a TwoAxisError names the layers there are."""
        if name not in self.layers:
            raise TwoAxisError(f"no statistics of layer {name!r}; there are: {listing(self.layers)}")
        return self.layers[name]

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def consumers(self) -> bool:
        """Whether the inputs of layers were recorded too."""
        return any(entry.inputs is not None for entry in self.layers.values())

    def __repr__(self) -> str:
        return f"CalibrationStatistics({len(self)} layers, {self.num_images} images, target={self.target!r})"

    def merge(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """Take in the statistics of other images of the same model.

        Returns:
            self.

        Raises:
            TwoAxisError: the other statistics are of another model, of another state of it, or of other
                layers or task variables; self is then unchanged.
        """
        self.check_mergeable(other)
        for moments, others in zip(self._moments(), other._moments(), strict=True):
            moments.merge(others)
        self.num_images += other.num_images
        self.image_rows = joined_rows([self.image_rows, other.image_rows])
        self.reduced |= other.reduced
        return self

    def check_mergeable(self, other: CalibrationStatistics) -> None:
        """Check that other statistics are of other images of the same model.

        Raises:
            TwoAxisError: they are of another model, of another state of it, or of other layers or task variables; or
                either comes from a file that does not say how many positions a row stands for.
        """
        if not (self.mergeable and other.mergeable):
            raise TwoAxisError(f"merge: {_UNKNOWN_RATES}")
        mine, theirs = self._identity(), other._identity()
        for what in mine:
            if mine[what] != theirs[what]:
                raise TwoAxisError(
                    f"merge: the two statistics differ in their {what}; "
                    "only parts of one calibration of one model merge"
                )

    @torch.inference_mode(mode=False)
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> CalibrationStatistics:
        """Merge over all ranks, with one flat all-reduce; afterwards every rank holds the statistics of all shards.

        Shards may be of any lengths, and ranks without images (:meth:`empty`) end with the statistics of the others.

        Args:
            group: the ranks; default all.

        Returns:
            self, unchanged when ``torch.distributed`` is not initialised.

        Raises:
            TwoAxisError: on every rank, when the ranks calibrated different models, layers or targets; when a rank's
                statistics were reduced before, so that images would count twice; or when no rank has images.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        parts = gather_over_ranks(self._part(), group)
        form = common_form(parts)
        if not self.layers:
            blank = self._from_header(*form.without_images())
            self.layers, self.target = blank.layers, blank.target
            self._task, self._columns = blank._task, blank._columns
        reduce_moments(list(self._moments()), group)
        self.num_images = sum(part.header["num_images"] for part in parts)
        self.image_rows = joined_rows(part.image_rows for part in parts if part.header["num_images"])
        self.reduced = True
        return self

    def _part(self) -> RankPart:
        refusal = None if self.mergeable else _UNKNOWN_RATES
        if self.reduced:
            refusal = "the statistics hold the images of all ranks already; reduce those of each rank's own images once"
        powers = {f"{name}/weight_power": entry.weight_power for name, entry in self.layers.items()}
        shapes = {key: (moments.scatter.shape, moments.paired) for key, moments in self._named_moments()}
        return RankPart(refusal, self._identity(), self._header(), powers, shapes, self.image_rows)

    def verify(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        """Check that a model is the one, in the state, that was calibrated.

        Args:
            model: the model; wrappers are looked through.
            names: layers to check; default all of the statistics.

        Raises:
            StaleStatisticsError: a layer is missing, was pruned, or its weights changed.
        """
        checked = [self[name].name for name in (self.layers if names is None else names)]
        self.fingerprints().verify(unwrap(model), names=checked)

    def fingerprints(self) -> ModelFingerprints:
        """What :meth:`verify` compares with; kept by a caller that checks often, it skips unchanged tensors."""
        recorded = {
            name: Fingerprint(described_channels(entry.num_channels, entry.shape), entry.fingerprint)
            for name, entry in self.layers.items()
        }
        return ModelFingerprints(recorded, nn.Module.named_parameters, describe_layer, "call calibrate() again")

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, atomically.

        Raises:
            TwoAxisError: the folder does not exist or cannot be written.
        """
        tensors = {f"{name}/weight_power": entry.weight_power for name, entry in self.layers.items()}
        for key, moments in self._named_moments():
            tensors |= pack(key, moments)
        if self.image_rows is not None:
            tensors["image_rows"] = self.image_rows
        write_tensors(path, tensors, self._header(), kind=FORMAT, version=VERSION)

    def _header(self) -> dict[str, Any]:
        """All that is no tensor, as it stands in files."""
        return {
            "target": self.target,
            "columns": self._columns,
            "num_images": self.num_images,
            "reduced": self.reduced,
            "counts": {key: moments.count for key, moments in self._named_moments()},
            "weights": {key: moments.weight for key, moments in self._named_moments()} if self.mergeable else None,
            "layers": [
                {
                    "name": s.name,
                    "kind": s.kind,
                    "shape": s.shape,
                    "fingerprint": s.fingerprint,
                    "dtype": str(s.dtype).removeprefix("torch."),
                    "pooling": s.pooling,
                }
                for s in self.layers.values()
            ],
        }

    @classmethod
    @torch.inference_mode(mode=False)
    def load(cls, path: str | Path) -> CalibrationStatistics:
        """Read what :meth:`save` wrote; nothing is unpickled.

        Raises:
            FileFormatError: the file is missing, corrupted, foreign, or of a newer version.
        """
        tensors, header = read_tensors(path, kind=FORMAT, version=VERSION)
        try:
            return cls._from_header(header, tensors)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileFormatError(
                f"{path}: the file is incomplete ({reason(error)}); calibrate and save again"
            ) from error

    @classmethod
    def _from_header(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CalibrationStatistics:
        counts = header["counts"]
        weights = header.get("weights")
        sizes = {key: (int(n), float(n if weights is None else weights[key])) for key, n in counts.items()}
        columns = {name: (int(a), int(b)) for name, (a, b) in header["columns"].items()}
        task = unpack("task", tensors, sizes)
        layers = {}
        for item in header["layers"]:
            name = item["name"]
            rows, pooled = unpack(f"{name}/rows", tensors, sizes), unpack(f"{name}/pooled", tensors, sizes)
            if rows is None or pooled is None:
                raise KeyError(name)
            layers[name] = LayerStatistics(
                name,
                item["kind"],
                tuple(item["shape"]),
                item["fingerprint"],
                tensors[f"{name}/weight_power"],
                rows,
                pooled,
                unpack(f"{name}/cross", tensors, sizes),
                task,
                columns,
                header["target"],
                unpack(f"{name}/inputs", tensors, sizes),
                unpack(f"{name}/gradients", tensors, sizes),
                getattr(torch, item.get("dtype", "float32")),
                item.get("pooling", "mean"),
            )
        return cls(
            layers,
            task=task,
            columns=columns,
            target=header["target"],
            num_images=int(header["num_images"]),
            mergeable=weights is not None,
            reduced=bool(header.get("reduced", False)),
            image_rows=tensors.get("image_rows"),
        )

    def _identity(self) -> dict[str, object]:
        return {
            "target": self.target,
            "task variables": list(self._columns.items()),
            "gradients": self.has_gradients,
            "pooling": sorted({s.pooling for s in self.layers.values()}),
            "layers": [(s.name, s.shape) for s in self.layers.values()],
            "weights": [s.fingerprint for s in self.layers.values()],
            "recorded inputs": [s.name for s in self.layers.values() if s.inputs is not None],
            "recorded moments": [(key, list(moments.scatter.shape)) for key, moments in self._named_moments()],
        }

    def _named_moments(self) -> Iterator[tuple[str, CoMoments]]:
        if self._task is not None:
            yield "task", self._task
        for name, entry in self.layers.items():
            yield f"{name}/rows", entry.rows
            yield f"{name}/pooled", entry.pooled
            if entry.cross is not None:
                yield f"{name}/cross", entry.cross
            if entry.inputs is not None:
                yield f"{name}/inputs", entry.inputs
            if entry.gradients is not None:
                yield f"{name}/gradients", entry.gradients

    def _moments(self) -> Iterator[CoMoments]:
        return (moments for _, moments in self._named_moments())
