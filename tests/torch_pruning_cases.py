"""Every criterion as a class that fits where Torch-Pruning's tests build theirs: without a model, without images."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch.nn import functional as F

from tp_twoaxis.dependency.groups import model_of
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance import CRITERIA, HybridImportance, PruningState, TwoAxisImportance
from tp_twoaxis.importance.baselines.gradient_criteria import TaylorBNImportance
from tp_twoaxis.scores.named_scores import SCORES

# Torch-Pruning's own, also while a stand-in has its name there
Magnitude = tp.importance.GroupMagnitudeImportance
# no normalizer of their own: random numbers, and the normalisation that is Torch-Pruning's LAMP
FIXED = ("random", "lamp")
# Torch-Pruning's versions, called by a pruner with more than they can do, have their own tests
NAMES = [name for name in CRITERIA if not name.startswith("host-") and name != "taylor"]


class LazyImportance(tp.importance.Importance):
    """A criterion that is built at its first call, from the model of the group, and renews itself when stale.

    Losses are the sum of the outputs, as in Torch-Pruning's tests, so that any network will do. Target scores refer to
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
            # the others have a loader to recalibrate from; this one is built anew
            self.made = self._make(model)
            return self.made(group)

    def _make(self, model):
        criterion, loader = CRITERIA[self.name], [(self.images, torch.zeros(len(self.images), dtype=torch.int64))]
        options = {} if self.name in FIXED else {"normalizer": self.normalizer}
        state = PruningState(model, loader, target=None, progress=False)
        if self.name in SCORES:
            state.target = "predicted_margin" if criterion.axis == "target" else None
            if SCORES[self.name].normalizer != "mean" and self.normalizer in ("mean", "sum", "max"):
                options = {"normalizer": "auto"}  # signed, which these refuse
        if self.name == "anticipating":
            options = {"levels": 8, "images": 8}
        if self.name == "hybrid":  # its normalisation is the allocation's
            ranking = TwoAxisImportance(state.statistics(), loader=loader)
            return HybridImportance(Magnitude(normalizer=self.normalizer), ranking)
        if self.name in ("hessian", "taylor-group"):
            options["loss"] = lambda output, _: output.sum()
        if self.name == "taylor-bn":
            return TaylorBNImportance(**options)
        made = criterion.configured(options).build(state)
        if criterion.needs:
            made.loader = loader  # to gather anew from when stale
        return made


def stand_ins(name, images):
    """Classes to put into the place of Torch-Pruning's, by their names there."""

    def stand_in(theirs):
        class StandIn(LazyImportance):
            def __init__(self, *_, normalizer="mean", **__):
                super().__init__(name, images, normalizer=normalizer)

        StandIn.__name__ = f"{name} for {theirs}"
        return StandIn

    replaced = ("MagnitudeImportance", "GroupMagnitudeImportance", "TaylorImportance", "LAMPImportance")
    return {theirs: stand_in(theirs) for theirs in (*replaced, "BNScaleImportance")}


def loss_of(output):
    """A loss that every network has."""
    return F.softplus(output).mean()
