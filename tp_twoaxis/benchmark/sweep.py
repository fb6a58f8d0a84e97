"""What a sweep is: networks, data and how they are split, methods, grid and seeds; as a JSON file and back.

Paths may hold environment variables (``$TP_TWOAXIS_DATA/cifar10``): the file, and the identity of its results,
then stay the same from machine to machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from tp_twoaxis.benchmark import protocol
from tp_twoaxis.benchmark.methods import Method, Trial, cross
from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.importance import expand_criteria
from tp_twoaxis.pruning.config import Budget
from tp_twoaxis.runtime.serialization import Json
from tp_twoaxis.training.settings import Precision

T = TypeVar("T")
PARTS = ("test", "selection")
GRIDS = get_args(Budget)
Draw = Literal["fixed", "seed"]
DRAWS = get_args(Draw)
PRECISIONS = get_args(Precision)


@dataclass(frozen=True)
class NetworkConfig:
    """A trained network and its data.

    Attributes:
        name: in tables and file names.
        model: as in :func:`tp_twoaxis.models.build_model`.
        data: as in :func:`tp_twoaxis.data.open_dataset`, or ``module:factory``; see
            :func:`~tp_twoaxis.benchmark.sweep_images.open_images`.
        checkpoint: safetensors file of its weights; None needs ``pretrained`` or a ``module:factory``. ``{seed}`` in
            it stands for the trial's seed, so that every seed is a network of its own.
        num_classes: outputs of the head; None leaves the model's default.
        pretrained: weights that torchvision or timm publish.
        test_data: where the test images are, if not in ``data``.
        image_size: side of the images; None leaves the data's.
        mean: a number a colour, as in training; None: the data's.
        std: a number a colour; None: the data's.
        label_column: Parquet's label column, where there are several.
    """

    name: str
    model: str
    data: str
    checkpoint: str | None = None
    num_classes: int | None = None
    pretrained: bool = False
    test_data: str | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Which images do what. The three parts never overlap.

    The selection images are the same for every seed, and neither calibration nor fine-tuning sees them: what is
    chosen (a default, a constant) is chosen there, with ``evaluate_on="selection"``, never on the test images.

    Attributes:
        train_split: split that calibration, selection and fine-tuning images come from.
        test_split: split of the test images.
        calibration_images: how many calibrate.
        calibration_draw: ``fixed``, the same images for every seed, as in the paper, where each seed is a network of
            its own; or ``seed``, others for each. Where seeds share their weights and nothing is fine-tuned, a fixed
            draw makes them all alike.
        selection_images: held out of the training split.
        test_images: drawn once; None takes all.
        evaluate_on: what the accuracies of this sweep are measured on, ``test`` or ``selection``.
        batch_size: of calibration, repair and fine-tuning.
        test_batch_size: of evaluation; memory only.
        decoders: processes that decode large images, a worker; speed only.
    """

    train_split: str = "train"
    test_split: str = "test"
    calibration_images: int = protocol.CALIBRATION_IMAGES
    calibration_draw: Draw = "fixed"
    selection_images: int = 0
    test_images: int | None = None
    evaluate_on: str = "test"
    batch_size: int = protocol.BATCH_SIZE
    test_batch_size: int = 128
    decoders: int = 0


@dataclass(frozen=True)
class BenchmarkConfig:
    """A sweep: every network with every seed, method and share of MACs kept.

    Attributes:
        networks: one or more, of different names.
        methods: of different names.
        keep: shares to keep, in (0, 1].
        grid: what they are shares of: ``macs``, so that all methods are pruned to equal MACs, or ``channels``, the
            paper's levels of sparsity, where each method ends at MACs of its own.
        seeds: of ``random``, of fine-tuning, and where :class:`DataConfig` says so of the calibration images.
        data: how the images are split.
        finetune_epochs: at most, where a method has a budget.
        finetune_lr: of SGD.
        finetune_amp: autocast while fine-tuning, ``bf16`` or ``fp16``; None computes in full precision.
        channels_last: memory layout of weights and activations; speed, and how sums are rounded.
        min_keep: as in :func:`~tp_twoaxis.prune_to_flops`.
        tolerance: as in :func:`~tp_twoaxis.prune_to_flops`.

    Example:
        >>> config = BenchmarkConfig(
        ...     networks=(NetworkConfig("resnet20", "cifar_resnet20_option_a", "cifar10/"),),
        ...     methods=cross(["local", "l2"]), keep=(0.7, 0.5), seeds=(42,))
        >>> len(config.trials()), BenchmarkConfig.from_dict(config.to_dict()) == config
        (4, True)
    """

    networks: tuple[NetworkConfig, ...]
    methods: tuple[Method, ...]
    keep: tuple[float, ...] = protocol.KEEP
    grid: Budget = "macs"
    seeds: tuple[int, ...] = protocol.SEEDS
    data: DataConfig = field(default_factory=DataConfig)
    finetune_epochs: int = protocol.FINETUNE_EPOCHS
    finetune_lr: float = protocol.FINETUNE_LR
    finetune_amp: Precision | None = None
    channels_last: bool = False
    min_keep: float = 0.1
    tolerance: float = 0.01

    def trials(self) -> list[Trial]:
        """List the trials, those that share statistics together."""
        return [
            Trial(network.name, seed, method, keep)
            for network in self.networks
            for seed in self.seeds
            for method in self.methods
            for keep in self.keep
        ]

    def network(self, name: str) -> NetworkConfig:
        """Find a network by name."""
        return next(network for network in self.networks if network.name == name)

    def to_dict(self) -> Json:
        """Return JSON-able values that :meth:`from_dict` reads."""
        values: Json = json.loads(json.dumps(dataclasses.asdict(self)))
        for method in values["methods"]:
            if method["steps"] == 1:  # what all configs meant before there was a choice: their digests stay
                del method["steps"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchmarkConfig:
        """Read and check a config.

        ``methods`` is a list of names and objects, or one object of lists to be crossed: ``criteria`` (or
        ``"all"``), ``allocation``, ``repair``, ``finetune_batches``, ``steps``.

        Raises:
            TwoAxisError: a key or a name is unknown, or a value is out of range.
        """
        given = {key: value for key, value in values.items() if not key.startswith("_")}
        given["networks"] = tuple(_make(NetworkConfig, n, "networks") for n in _list("networks", given))
        given["methods"] = _methods(given.get("methods", ()))
        given |= {
            key: _numbers(key, given[key], kind) for key, kind in (("keep", float), ("seeds", int)) if key in given
        }
        given["data"] = _make(DataConfig, given.get("data", {}), "data")
        config = _make(cls, given, "config")
        config.check()
        return config

    def check(self) -> None:
        """Check names and ranges, not files.

        Raises:
            TwoAxisError: something does not fit; the message says what.
        """
        for method in self.methods:
            method.checked()
        for what, names in (
            ("networks", [n.name for n in self.networks]),
            ("methods", [m.name for m in self.methods]),
            ("keep", list(self.keep)),
            ("seeds", list(self.seeds)),
        ):
            if not names or len(set(names)) < len(names):
                raise TwoAxisError(f"{what}: expected one or more, each once, got {names}; give different ones")
        wrong = [keep for keep in self.keep if not 0.0 < keep <= 1.0]
        if wrong:
            raise TwoAxisError(f"keep: expected shares above 0 and up to 1, got {wrong[0]:g}")
        check_name("grid", self.grid, GRIDS)
        if self.finetune_amp not in (None, *PRECISIONS):
            raise TwoAxisError(f"finetune_amp: expected {' or '.join(PRECISIONS)} or null, got {self.finetune_amp!r}")
        data = self.data
        check_name("evaluate_on", data.evaluate_on, PARTS)
        check_name("calibration_draw", data.calibration_draw, DRAWS)
        if data.evaluate_on == "selection" and data.selection_images < 1:
            raise TwoAxisError("evaluate_on: 'selection' needs selection_images of at least 1, got 0; set it")
        for name in ("calibration_images", "batch_size", "test_batch_size"):
            if getattr(data, name) < 1:
                raise TwoAxisError(f"{name}: expected at least 1, got {getattr(data, name)}")

    def digest(self) -> str:
        """Hash the whole config; equal configs, equal digests."""
        return _digest(self._identity())

    def conditions(self) -> str:
        """Hash what every trial shares whatever the grid: data, fine-tuning, pruning options."""
        axes = ("networks", "methods", "keep", "seeds")
        return _digest({key: value for key, value in self._identity().items() if key not in axes})

    def _identity(self) -> Json:
        values = self.to_dict()
        if values["data"]["calibration_draw"] == "seed":  # what all configs meant before there was a choice of it
            del values["data"]["calibration_draw"]
        return values

    def extends(self, older: BenchmarkConfig) -> bool:
        """Whether all trials of an older config are trials of this one, under the same conditions."""
        pairs = [(self.networks, older.networks), (self.methods, older.methods)]
        grids = [(self.keep, older.keep), (self.seeds, older.seeds)]
        return self.conditions() == older.conditions() and all(set(b) <= set(a) for a, b in [*pairs, *grids])


def load_config(path: str | Path) -> BenchmarkConfig:
    """Read a config file; keys that start with ``_`` are remarks.

    Raises:
        TwoAxisError: there is no such file, or it is no config.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "config.json")
        >>> _ = path.write_text('{"networks": [{"name": "r18", "model": "resnet18", "data": "images/"}], '
        ...                     '"methods": ["local", {"criterion": "l2", "repair": []}], "keep": [0.5]}')
        >>> [method.name for method in load_config(path).methods]
        ['capture+bn', 'l2']
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TwoAxisError(f"{path}: expected a JSON config, reading it failed: {error}; check the file") from error
    if not isinstance(values, dict):
        raise TwoAxisError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return BenchmarkConfig.from_dict(values)


def seeded(entry: NetworkConfig, seed: int) -> NetworkConfig:
    """Put a seed into the checkpoint's name.

    Example:
        >>> seeded(NetworkConfig("r18", "resnet18", "images/", "r18-{seed}.safetensors"), 42).checkpoint
        'r18-42.safetensors'
    """
    if entry.checkpoint is None:
        return entry
    return dataclasses.replace(entry, checkpoint=entry.checkpoint.replace("{seed}", str(seed)))


def expand(path: str) -> str:
    """Replace environment variables and ``~``.

    Raises:
        TwoAxisError: a variable is not set.

    Example:
        >>> os.environ["PLACE"] = "/data"
        >>> expand("$PLACE/cifar10")
        '/data/cifar10'
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset:
        raise TwoAxisError(f"{path}: expected the environment variable {unset[0]} to be set, it is not; export it")
    return expanded


def _digest(values: Json) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()


def _list(name: str, values: Mapping[str, Any]) -> Sequence[Any]:
    found = values.get(name)
    if not isinstance(found, (list, tuple)):
        raise TwoAxisError(f"{name}: expected a list, got {found!r}; see the example configs")
    return found


def _make(cls: type[T], values: Any, where: str) -> T:
    if not isinstance(values, Mapping):
        raise TwoAxisError(f"{where}: expected an object, got {values!r}; see the example configs")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [name for name in values if name not in fields]
    if unknown:
        check_name(f"{where}: key", unknown[0], fields)
    missing = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise TwoAxisError(f"{where}: expected the key {missing[0]!r}, it is missing; add it")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _numbers(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    try:
        # 1 and 1.0 are the same share, and must be the same config
        return tuple(kind(value) for value in values)
    except (TypeError, ValueError) as error:
        raise TwoAxisError(f"{name}: expected a list of numbers, got {values!r}; correct it") from error


def _methods(given: Any) -> tuple[Method, ...]:
    if isinstance(given, Mapping):
        known = ("criteria", "allocation", "repair", "finetune_batches", "steps")
        unknown = [name for name in given if name not in known]
        if unknown:
            check_name("methods: key", unknown[0], known)
        criteria = given.get("criteria", "all")
        return cross(
            expand_criteria([criteria] if isinstance(criteria, str) else criteria),
            allocations=given.get("allocation", ("global",)),
            repairs=given.get("repair", (("bn",),)),
            budgets=given.get("finetune_batches", (0,)),
            steps=given.get("steps", (1,)),
        )
    methods = [
        Method(m) if isinstance(m, str) else _make(Method, m, "methods") for m in _list("methods", {"methods": given})
    ]
    return tuple(method.checked() for method in methods)
