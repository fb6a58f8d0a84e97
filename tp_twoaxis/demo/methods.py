"""What the demo compares, in the order of its tables, colours and markers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One criterion of the comparison.

    Attributes:
        name: in :data:`tp_twoaxis.importance.registry.IMPORTANCES`.
        label: in tables and figures.
        kind: the axis, or what a baseline looks at.
        light: colour on white.
        dark: colour on black.
        marker: matplotlib's, so that no reader depends on colour.
    """

    name: str
    label: str
    kind: str
    light: str
    dark: str
    marker: str


# hues after Okabe and Ito, told apart by colour-blind readers; lightness set for each background
METHODS = (
    Method("capture", "local capture", "local axis", "#0063a6", "#5cb3f2", "o"),
    Method("hull", "hull-refined", "local axis", "#007f5f", "#2fd0a3", "D"),
    Method("task-mi", "task MI", "task axis", "#c44500", "#ff8a4c", "s"),
    Method("l2", "L2 magnitude", "weights", "#1f1f1f", "#f0f0f0", "^"),
    Method("fpgm", "FPGM", "weights", "#b8860b", "#e8c547", "v"),
    Method("taylor", "Taylor", "gradients", "#a6428f", "#e69fd6", "P"),
    Method("random", "random", "chance", "#8a8a8a", "#8f8f8f", "x"),
)
LOCAL, MAGNITUDE = "capture", "l2"
