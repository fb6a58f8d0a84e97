"""What users may name, known without PyTorch, so that the command line refuses a typing error at once.

The tables with the functions behind these names import PyTorch; ``tests/test_known_names.py`` fails where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from tp_twoaxis.errors import TwoAxisError, check_name

SCORES = (
    "capture",
    "variance",
    "conditional-variance",
    "low-overlap",
    "composite-local",
    "norm-local",
    "hull",
    "compact-hull",
    "cap-a",
    "spectral-rs",
    "task-mi",
    "target-redundancy",
    "target-excess",
    "composite-pid",
    "pid-no-red",
    "spectral-pid-rs",
)
"""Scores of a layer; the functions are in :mod:`tp_twoaxis.scores.named_scores`."""
CRITERIA = (
    *SCORES,
    "cap-qgw",
    "anticipating",
    "hybrid",
    "l1",
    "l2",
    "taylor",
    "fpgm",
    "random",
    "bn-scale",
    "lamp",
    "taylor-bn",
    "taylor-group",
    "hessian",
    "network-slimming",
    "bn-folded-norm",
    "activation-rms",
    "vbp",
    "chip",
    "mipp",
    "host-fpgm",
    "host-hessian",
    "host-activation",
)
"""All that ranks channels; the table is in :mod:`tp_twoaxis.importance.criteria`."""
ALIASES = {"local": "capture", "target": "task-mi"}
"""Short names of the default score of each axis."""
FAMILIES = {
    "all": ("local", "target", "mixed", "both", "baseline"),
    "all-local": ("local", "mixed"),
    "all-target": ("target",),
    "all-baselines": ("baseline",),
}
"""Names that stand for the criteria of some axes, where several are taken; all but ``all`` mean scores of a layer."""
ENTRY_POINTS = "tp_twoaxis.importances"
"""Group of the entry points by which other packages name criteria."""
REPAIRS = ("bn", "bias", "ridge", "patch", "sequential", "joint", "distill")
"""The table is in :mod:`tp_twoaxis.repair.strategies`."""
NO_REPAIR = "none"
AUTO = "auto"
"""What ``importance`` and ``repair`` are called where they are left open; see :mod:`tp_twoaxis.pruning.recipe`."""
TARGETS = ("margin", "correct_logit", "negative_loss", "one_vs_rest", "predicted_margin", "predicted_logit")
"""Task variables; see :mod:`tp_twoaxis.statistics.targets`."""
POOLINGS = ("mean", "cls")
"""Which row of an image is compared with the task; see :mod:`tp_twoaxis.statistics.pooling`."""
SECTIONS = (
    "alignment",
    "collapse",
    "structure",
    "hulls",
    "learning",
    "gradients",
    "propagation",
    "interventions",
    "calibration-size",
    "controls",
    "target-choice",
    "rescaling",
    "magnitude",
)
"""Questions of the evidence in the paper's order; see :mod:`tp_twoaxis.diagnostics.evidence_sections`."""
BUDGETS = ("macs", "channels", "latency")
"""What a share to keep is a share of; see :mod:`tp_twoaxis.pruning.config`."""
RECIPES = ("paper", "fast")
"""The table is in :mod:`tp_twoaxis.training.settings`."""
REMOVALS = ("mean", "zero")
"""What stands in a removed channel's place; see :mod:`tp_twoaxis.diagnostics.lesions`."""
AMP = ("bf16", "fp16", "none")
"""Precisions of training; see :mod:`tp_twoaxis.training.settings`."""
MODELS = (
    "cifar_resnet20_option_a",
    "cifar_resnet20_conv_shortcut",
    "cifar_resnet56_option_a",
    "cifar_resnet56_conv_shortcut",
    "cifar_resnet18",
    "cifar_vgg16_bn",
    "cifar_mobilenet_v2",
)
"""Built-in networks; the table is in :mod:`tp_twoaxis.models.factory`."""
DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Kinds of device that networks run on; see :mod:`tp_twoaxis.runtime.devices`."""
ATTENTION_UNITS = ("heads", "head-dims")
"""What attention loses; see :mod:`tp_twoaxis.dependency.attention`."""


def plugins() -> dict[str, EntryPoint]:
    """Find the entry points of installed packages by name.

    Example:
        >>> "capture" in plugins()
        False
    """
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def criterion_names() -> list[str]:
    """List the criteria that have a name: the package's, then those of installed entry points.

    Example:
        >>> criterion_names()[:2]
        ['capture', 'variance']
    """
    return list(dict.fromkeys([*CRITERIA, *plugins()]))


def check_criterion(expression: str, families: Iterable[str] = ()) -> None:
    """Refuse a criterion expression that starts with an unknown name; options and factories are not looked at.

    Args:
        expression: what was given.
        families: names that stand for several criteria, where those are taken too.

    Raises:
        TwoAxisError: the message lists the valid names and those near it.

    Example:
        >>> check_criterion("hull(strength=1.0)")
        >>> check_criterion("module:factory")
    """
    name = expression.partition("(")[0].strip()
    if ":" not in name:
        names = [*criterion_names(), *ALIASES, *families]
        check_name("criterion", name, names, more=" or module:factory (`tp-twoaxis scores` lists all)")


def check_criteria(expressions: Iterable[str]) -> None:
    """Refuse a list with an unknown criterion, where families may stand too; see :func:`check_criterion`.

    Example:
        >>> check_criteria(["all-local", "taylor"])
    """
    for expression in expressions:
        if expression not in FAMILIES:
            check_criterion(expression, FAMILIES)


def parse_repair(repair: str | Iterable[str] | None) -> tuple[str, ...]:
    """Read the names of repairs.

    Args:
        repair: names joined by ``+`` or ``,``, or several such texts; ``"none"``, ``""``, ``()`` and None: no repair.

    Returns:
        Each name once, in the order given.

    Raises:
        TwoAxisError: an unknown name, or ``none`` beside others.

    Example:
        >>> parse_repair("ridge+bn"), parse_repair(("bn", "ridge", "bn")), parse_repair("none")
        (('ridge', 'bn'), ('bn', 'ridge'), ())
        >>> parse_repair("rigde")
        Traceback (most recent call last):
        tp_twoaxis.errors.TwoAxisError: repair: expected one of bn, bias, ridge, patch, sequential, joint, distill or
        none, got 'rigde'; did you mean 'ridge'?
    """
    if repair is None:
        return ()
    if not isinstance(repair, Iterable):
        raise TwoAxisError(f"repair: expected names such as 'ridge+bn', got {repair!r}; 'none' repairs nothing")
    texts = (repair,) if isinstance(repair, str) else repair
    words = (word.strip() for text in texts for word in re.split(r"[+,]", str(text)))
    names = list(dict.fromkeys(word for word in words if word))
    if names == [NO_REPAIR]:
        return ()
    if NO_REPAIR in names:
        raise TwoAxisError(f"repair: expected repairs or {NO_REPAIR}, got both in {'+'.join(names)!r}; leave one out")
    for name in names:
        check_name("repair", name, REPAIRS, more=f" or {NO_REPAIR}")
    return tuple(names)
