"""What a sweep is: networks, data and how they are split, methods, grid and seeds; as a JSON file and back.

Paths may hold environment variables (``$TP_TWOAXIS_DATA/cifar10``): the file, and the identity of its results,
then stay the same from machine to machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from tp_twoaxis.benchmark import protocol
from tp_twoaxis.benchmark.methods import STRICT, Method, Trial, cross
from tp_twoaxis.errors import TwoAxisError, check_name, reason
from tp_twoaxis.importance import expand_criteria
from tp_twoaxis.pruning.config import Budget
from tp_twoaxis.repair import parse_repair
from tp_twoaxis.runtime.serialization import Json
from tp_twoaxis.training.settings import Precision

T = TypeVar("T")
KINDS = ("float", "tuple[float, ...]")
"""How pydantic names the alternatives of a value in the place of an error."""
Draw = Literal["fixed", "seed"]
Part = Literal["test", "selection"]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


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

    __pydantic_config__: ClassVar = STRICT

    name: str
    model: str
    data: str
    checkpoint: str | None = None
    num_classes: Count | None = None
    pretrained: bool = False
    test_data: str | None = None
    image_size: Count | None = None
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

    __pydantic_config__: ClassVar = STRICT

    train_split: str = "train"
    test_split: str = "test"
    calibration_images: Count = protocol.CALIBRATION_IMAGES
    calibration_draw: Draw = "fixed"
    selection_images: Annotated[int, Field(ge=0)] = 0
    test_images: Count | None = None
    evaluate_on: Part = "test"
    batch_size: Count = protocol.BATCH_SIZE
    test_batch_size: Count = 128
    decoders: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class MethodGrid:
    """Methods as lists to be crossed, as a config file may hold them; see :func:`~tp_twoaxis.benchmark.methods.cross`.

    Attributes:
        criteria: expressions or families.
        allocation: names.
        repair: repairs of one method each.
        finetune_batches: training batches after the repair.
        steps: of pruning.

    Example:
        >>> len(MethodGrid(("l1", "l2"), repair=((), ("bn",))).methods())
        4
    """

    __pydantic_config__: ClassVar = STRICT

    criteria: tuple[str, ...] = ("all",)
    allocation: tuple[str, ...] = ("global",)
    repair: tuple[tuple[str, ...], ...] = (("bn",),)
    finetune_batches: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = (1,)

    def methods(self) -> tuple[Method, ...]:
        """Cross the lists."""
        return cross(
            expand_criteria(self.criteria),
            allocations=self.allocation,
            repairs=self.repair,
            budgets=self.finetune_batches,
            steps=self.steps,
        )


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
        finetune_lr: learning rate of SGD; or several, of which each trial keeps the one that is best on the selection
            images, all from the same start.
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

    __pydantic_config__: ClassVar = STRICT

    networks: tuple[NetworkConfig, ...]
    methods: tuple[Method, ...]
    keep: tuple[Share, ...] = protocol.KEEP
    grid: Budget = "macs"
    seeds: tuple[int, ...] = protocol.SEEDS
    data: DataConfig = field(default_factory=DataConfig)
    finetune_epochs: Count = protocol.FINETUNE_EPOCHS
    finetune_lr: float | tuple[float, ...] = protocol.FINETUNE_LR
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

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Those that a trial's fine-tuning is tried with."""
        return self.finetune_lr if isinstance(self.finetune_lr, tuple) else (self.finetune_lr,)

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
        methods = given.get("methods", [])
        if isinstance(methods, Mapping):
            criteria = methods.get("criteria", "all")
            lists = {**methods, "criteria": [criteria] if isinstance(criteria, str) else criteria}
            given["methods"] = [dataclasses.asdict(method) for method in _read(MethodGrid, lists, "methods").methods()]
        elif isinstance(methods, (list, tuple)):
            given["methods"] = [_method(method) for method in methods]
        config = _read(cls, given)
        config = dataclasses.replace(config, methods=tuple(method.checked() for method in config.methods))
        config.check()
        return config

    def check(self) -> None:
        """Check kinds, names and ranges, not files.

        Raises:
            TwoAxisError: something does not fit; the message says what.
        """
        _read(BenchmarkConfig, dataclasses.asdict(self))
        for method in self.methods:
            method.checked()
        for what, names in (
            ("networks", [n.name for n in self.networks]),
            ("methods", [m.name for m in self.methods]),
            ("keep", list(self.keep)),
            ("seeds", list(self.seeds)),
            ("finetune_lr", list(self.learning_rates)),
        ):
            if not names or len(set(names)) < len(names):
                raise TwoAxisError(f"{what}: expected one or more, each once, got {names}; give different ones")
        if self.data.evaluate_on == "selection" and self.data.selection_images < 1:
            raise TwoAxisError("evaluate_on: 'selection' needs selection_images of at least 1, got 0; set it")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise TwoAxisError(f"finetune_lr: expected positive numbers, got {self.finetune_lr}; change them")
        if len(self.learning_rates) > 1 and (self.data.evaluate_on != "test" or self.data.selection_images < 1):
            raise TwoAxisError(
                f"finetune_lr: expected selection_images to choose one of {list(self.learning_rates)} on and test "
                f"images to judge it on, got {self.data.selection_images} and evaluate_on={self.data.evaluate_on!r}; "
                "set both, or give one rate"
            )

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
        way = "write it as JSON" if path.suffix in (".yaml", ".yml", ".toml") else "check the file"
        raise TwoAxisError(f"{path}: expected a JSON config, reading it says {reason(error)}; {way}") from error
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


def _method(given: Any) -> Any:
    """Write a method out that stands in a file as a criterion alone, or with its repair as a text."""
    if isinstance(given, str):
        return {"criterion": given}
    if isinstance(given, Mapping) and isinstance(given.get("repair"), str):
        return {**given, "repair": parse_repair(given["repair"])}
    return given


def _read(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make a dataclass of JSON's values, with every key and kind checked by pydantic.

    Raises:
        TwoAxisError: of the first thing that does not fit.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values))
    except ValidationError as error:
        found = error.errors()[0]
    except TypeError as error:
        raise TwoAxisError(f"{where or 'config'}: expected what JSON can hold, got {reason(error)}") from error
    *path, key = (part for part in found["loc"] if part not in KINDS)
    place = ".".join(map(str, [where, *path] if where else path)) or "config"
    if found["type"] == "unexpected_keyword_argument":
        check_name(f"{place}: key", str(key), [f.name for f in dataclasses.fields(_PARTS[path[0]] if path else cls)])
    if found["type"] == "missing":
        raise TwoAxisError(f"{place}: expected the key {key!r}, it is missing; add it")
    place = f"{place}.{key}".removeprefix("config.")
    if found["type"] == "literal_error":
        check_name(place, found["input"], re.findall(r"'([^']+)'", found["ctx"]["expected"]))
    expected = found["msg"].removeprefix("Input should be ").replace("array", "list")
    raise TwoAxisError(f"{place}: expected {expected}, got {reprlib.repr(found['input'])}; correct it")


_PARTS: dict[int | str, type] = {"networks": NetworkConfig, "data": DataConfig, "methods": Method}
