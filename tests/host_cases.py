"""Every criterion as a class that fits where the host's tests build theirs: without a model, without images."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch.nn import functional as F

from tp_twoaxis import AnticipatingImportance, CapQGWImportance, HybridImportance, TwoAxisImportance, calibrate
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance.gradient_baselines import HessianImportance, TaylorBNImportance
from tp_twoaxis.importance.groups import model_of
from tp_twoaxis.importance.registry import IMPORTANCES
from tp_twoaxis.scores.registry import SCORES

# the host's own, also while a stand-in has its name there
Magnitude = tp.importance.GroupMagnitudeImportance
# no normalizer of their own: random numbers, and the normalisation that is the host's LAMP
FIXED = ("random", "lamp")
# host versions that a pruner calls with more than they can do are left to their own tests
NAMES = [name for name in IMPORTANCES if not name.startswith("host-") and name != "taylor"]


class LazyImportance(tp.importance.Importance):
    """A criterion that is built at its first call, from the model of the group, and renews itself when stale.

    Losses are the sum of the outputs, as in the host's tests, so that any network will do. Target scores refer to
    the predicted margin; they need a classifier.
    """

    def __init__(self, name, images, *, normalizer="mean"):
        self.name, self.images, self.normalizer = name, images, normalizer
        self.made = None

    def __call__(self, group):
        model = model_of(group)
        if self.made is None:
            with torch.enable_grad():
                self.made = self._make(model)
        if self.name == "taylor-bn" and all(p.grad is None for p in model.parameters()):
            with torch.enable_grad():
                model(self.images).sum().backward()
        try:
            return self.made(group)
        except StaleStatisticsError:
            if self.name != "anticipating":
                raise
            # the others were given a loader to recalibrate from; this one is built anew
            self.made = self._make(model)
            return self.made(group)

    def _make(self, model):
        entry, loader = IMPORTANCES[self.name], [(self.images, torch.zeros(len(self.images), dtype=torch.int64))]
        options = {} if self.name in FIXED else {"normalizer": self.normalizer}
        if self.name in SCORES:
            target = "predicted_margin" if SCORES[self.name].axis == "target" else None
            if SCORES[self.name].normalizer != "mean" and self.normalizer in ("mean", "sum", "max"):
                options = {"normalizer": "auto"}  # signed, which these refuse
            stats = calibrate(model, loader, target=target, progress=False)
            return TwoAxisImportance(stats, self.name, loader=loader, **options)
        if self.name == "anticipating":
            stats = calibrate(model, loader, target=None, consumers=True, progress=False)
            return AnticipatingImportance(stats, model, loader, levels=8, images=8, progress=False)
        if self.name == "cap-qgw":
            stats = calibrate(model, loader, target=None, gradients=True, progress=False)
            return CapQGWImportance(stats, loader=loader, **options)
        if self.name == "hybrid":  # its normalisation is the allocation's
            stats = calibrate(model, loader, target=None, progress=False)
            allocation = Magnitude(normalizer=self.normalizer)
            return HybridImportance(allocation, TwoAxisImportance(stats, loader=loader))
        if self.name == "hessian":
            return HessianImportance.calibrate(
                model, loader, progress=False, loss=lambda output, _: output.sum(), loader=loader, **options
            )
        if self.name == "taylor-bn":
            return TaylorBNImportance(**options)
        if entry.needs == "images":
            return entry.build(model, loader, progress=False, loader=loader, **options)
        return entry.build(**options)


def stand_ins(name, images):
    """Classes to put into the place of the host's, by their names there."""

    def stand_in(host):
        class StandIn(LazyImportance):
            def __init__(self, *_, normalizer="mean", **__):
                super().__init__(name, images, normalizer=normalizer)

        StandIn.__name__ = f"{name} for {host}"
        return StandIn

    hosts = ("MagnitudeImportance", "GroupMagnitudeImportance", "TaylorImportance", "LAMPImportance")
    return {host: stand_in(host) for host in (*hosts, "BNScaleImportance")}


def loss_of(output):
    """A loss that every network has."""
    return F.softplus(output).mean()
