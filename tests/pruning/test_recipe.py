"""What is done where importance and repair are left out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate, prune_to_flops
from tp_twoaxis.importance import find_criterion
from tp_twoaxis.pruning.recipe import choose_recipe, is_auto
from tp_twoaxis.repair.guard import output_distance

X = torch.randn(1, 3, 12, 12)


def conv_net(*, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(12)] if norm else []
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), *norms, nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 4),
    ).eval()  # fmt: skip


def images(count: int, size: int = 16) -> list[torch.Tensor]:
    drawn = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    # smooth fields, so that channels have something in common
    return list(nn.functional.avg_pool2d(drawn, 3, 1, 1).split(size))


@pytest.mark.parametrize(
    ("count", "criterion", "repair"),
    [
        (64, "anticipating", ("joint",)),
        (10, "anticipating", ("joint",)),
        (9, "hull", ("bn",)),
        (1, "hull", ("bn",)),
    ],
)
def test_the_images_decide(count, criterion, repair):
    recipe = choose_recipe(conv_net(), X, loader=images(count))
    assert (recipe.importance, tuple(recipe.repair)) == (criterion, repair)
    assert len(recipe.notes) == 2
    assert criterion in recipe.notes[0]
    assert "+".join(repair) in recipe.notes[1]


def test_without_norms_there_is_nothing_that_nine_images_could_repair():
    assert choose_recipe(conv_net(norm=False), X, loader=images(9)).repair == ()


@pytest.mark.parametrize(("importance", "repair"), [("l2", "auto"), ("auto", "bn"), ("l2", ()), ("l2", "none")])
def test_what_is_named_is_kept(importance, repair):
    recipe = choose_recipe(conv_net(), X, importance, repair, loader=images(64))
    assert importance in ("auto", recipe.importance)
    assert is_auto(repair) or recipe.repair == repair
    assert len(recipe.notes) == is_auto(importance) + is_auto(repair)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, a, b):
        return self.net(a + b)


def test_models_without_one_input_and_class_logits_are_ranked_without_them():
    maps = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    recipe = choose_recipe(maps, X, loader=images(64))
    assert recipe.importance == "hull"
    assert "shape [1, 4, 8, 8]" in recipe.notes[0]
    pairs = [(a, b) for a, b in zip(images(64), images(64), strict=True)]
    recipe = choose_recipe(TwoInputs(), (X, X), loader=pairs)
    assert recipe.importance == "hull"
    assert "several inputs" in recipe.notes[0]


class NamedInput(nn.Module):
    """As a Hugging Face classifier: one image by name, labels and more that may be left out, logits in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, pixel_values=None, labels=None):
        return {"logits": self.net(pixel_values)}


@pytest.mark.parametrize("example", [X, (X,), {"pixel_values": X}], ids=["tensor", "tuple", "by name"])
def test_one_input_by_name_is_one_input(example):
    loader = [{"pixel_values": x} for x in images(64)]
    assert choose_recipe(NamedInput(), example, loader=loader).importance == "anticipating"
    report = prune_to_flops(NamedInput(), example, loader=loader, progress=False)
    assert (report.importance, report.repair) == ("anticipating", ["joint"])


def test_statistics_alone_suffice_if_they_know_what_layers_read():
    net, loader = conv_net(), images(64)
    stats = calibrate(net, loader, target=None, consumers=True, progress=False)
    recipe = choose_recipe(net, X, stats=stats)
    assert (recipe.importance, recipe.repair) == ("hull", ("ridge",))
    outputs = calibrate(net, loader, target=None, progress=False)
    with pytest.raises(TwoAxisError, match="consumers=True"):
        choose_recipe(net, X, stats=outputs)
    assert choose_recipe(net, X, repair="none", stats=outputs).importance == "hull"


def test_no_images_and_a_generator_are_refused_with_the_way_out():
    net = conv_net()
    with pytest.raises(TwoAxisError, match="importance='l2', repair='none'"):
        prune_to_flops(net, X)
    with pytest.raises(TwoAxisError, match=r"list\(loader\)"):
        prune_to_flops(net, X, loader=iter(images(64)))
    with pytest.raises(TwoAxisError, match="did you mean 'taylor'"):
        prune_to_flops(net, X, "tailor")


def test_the_short_call_does_what_its_report_says_and_is_no_worse_than_bn():
    dense, loader = conv_net(), images(80)
    short, named, plain = (copy.deepcopy(dense) for _ in range(3))
    report = prune_to_flops(short, X, loader=loader, progress=False)
    assert (report.importance, report.repair) == ("anticipating", ["joint"])
    assert report.notes[:2] == choose_recipe(dense, X, loader=loader).notes
    prune_to_flops(named, X, "anticipating", repair="joint", loader=loader, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(short.parameters(), named.parameters(), strict=True))
    prune_to_flops(plain, X, "anticipating", repair="bn", loader=loader, progress=False)
    fresh = [torch.cat(images(200))[80:]]
    assert output_distance(short, dense, fresh) < output_distance(plain, dense, fresh)


def test_an_object_as_importance_gets_the_repair_that_was_left_open():
    net, loader = conv_net(), images(64)
    importance = find_criterion("l2")
    report = prune_to_flops(net, X, importance, loader=loader, progress=False)
    assert (report.importance, report.repair) == ("l2", ["joint"])
