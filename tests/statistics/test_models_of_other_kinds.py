"""Models with several inputs, and without class logits: calibrated, and ranked by the local axis."""

import pytest
import torch
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate, prune_to_flops, select_score
from tp_twoaxis.importance.pruning_state import PruningState
from tp_twoaxis.importance.registry import make_importance
from tp_twoaxis.statistics import calibrate_shards
from tp_twoaxis.statistics.activations import InputMoments, gather_activations
from tp_twoaxis.statistics.gradients import accumulate_gradients, gather_squared_gradients


class Siamese(nn.Module):
    """Two images through one body, and a vector beside them; [n, 5]."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU())
        self.vector, self.fc = nn.Linear(4, 24), nn.Linear(24, classes)

    def forward(self, left, right, context):
        pooled = self.body(left).mean((2, 3)) - self.body(right).mean((2, 3))
        return self.fc(pooled * torch.tanh(self.vector(context)))


def samples(n=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, 3, 9, 9, generator=generator, dtype=dtype) for _ in range(2))
    return left, right, torch.randn(n, 4, generator=generator, dtype=dtype), torch.randint(5, (n,), generator=generator)


FORMS = {
    "flat": lambda a, b, c, y: (a, b, c, y),
    "nested": lambda a, b, c, y: ((a, b, c), y),
    "named": lambda a, b, c, y: {"left": a, "right": b, "context": c, "labels": y},
    "nested names": lambda a, b, c, y: ({"context": c, "right": b, "left": a}, y),
}


def loader(form="flat", batch=12, labels=True, **options):
    parts = zip(*(part.split(batch) for part in samples(**options)), strict=True)
    return [FORMS[form](*part) if labels else part[:3] for part in parts]


def close(found, expected, tolerance=1e-9):
    assert list(found) == list(expected)
    for mine, theirs in zip(found._moments(), expected._moments(), strict=True):
        assert (mine.count, mine.weight) == (theirs.count, pytest.approx(theirs.weight))
        torch.testing.assert_close(mine.mean, theirs.mean, rtol=tolerance, atol=1e-11)
        torch.testing.assert_close(mine.covariance, theirs.covariance, rtol=tolerance, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_several_inputs_in_every_form_and_batch_size(form):
    net = Siamese().double()
    options = {"positions": 6, "gradients": True, "consumers": True, "progress": False}
    expected = calibrate(net, loader(dtype=torch.float64, batch=32), **options)
    assert expected["body.0"].num_rows == 2 * 32 * 6
    close(calibrate(net, loader(form, dtype=torch.float64, batch=5), **options), expected)


def test_rows_of_several_inputs_equal_numpys():
    net, (left, right, context, _) = Siamese().double(), samples(dtype=torch.float64)
    stats = calibrate(net, loader(dtype=torch.float64), positions="all", progress=False)
    with torch.no_grad():
        maps = torch.cat([net.body[0](left), net.body[0](right)])
        vector = net.vector(context)
    rows = maps.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(stats["body.0"].covariance, torch.cov(rows.T, correction=0), rtol=1e-9, atol=1e-12)
    pooled = (maps[:32].mean((2, 3)) + maps[32:].mean((2, 3))) / 2
    torch.testing.assert_close(stats["body.0"].pooled_correlation, torch.corrcoef(pooled.T), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(stats["vector"].covariance, torch.cov(vector.T, correction=0), rtol=1e-9, atol=1e-12)


def test_shards_and_other_statistics_of_several_inputs():
    net = Siamese().double()
    data = loader(dtype=torch.float64)
    parts = calibrate_shards(net, data, shards=3, positions=6, progress=False)
    merged = parts[0].merge(parts[1]).merge(parts[2])
    close(merged, calibrate(net, data, positions=6, progress=False))
    assert gather_activations(net, data, InputMoments, progress=False).num_images == 32
    assert accumulate_gradients(net, data, progress=False) == 32
    whole = net.fc.weight.grad.clone()
    squares = gather_squared_gradients(net, data, progress=False)
    assert squares.num_images == 32
    assert (squares.means["fc.weight"] >= whole.square() - 1e-12).all()  # Jensen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("criterion", ["capture", "hull", "task-mi", "taylor"])
def test_several_inputs_are_ranked_and_pruned(form, criterion):
    net, data = Siamese(), loader(form)
    example = tuple(part[:1] for part in samples()[:3])
    report = prune_to_flops(net, example, criterion, flops=0.6, loader=data, repair=("bn",), progress=False)
    assert report.achieved == pytest.approx(0.6, abs=0.1)
    assert net.body[0].out_channels < 16
    assert net(*example).shape == (1, 5)


def test_a_score_is_chosen_for_several_inputs():
    example = tuple(part[:1] for part in samples()[:3])
    result = select_score(Siamese(), example, loader(n=64), ["capture", "l2"], flops=0.7, repair=(), progress=False)
    assert (result.calibration_images, result.held_out_images) == (32, 32)


# no class logits


class Segmenter(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.a, self.b = form, nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 6, 3, padding=1)

    def forward(self, x):
        return self.form(self.b(torch.relu(self.a(x))))


OUTPUTS = {
    "maps": lambda y: y,
    "a dict without logits": lambda y: {"out": y, "features": y.mean((2, 3))},
    "a list": lambda y: [y, y * 2],
    "a number an image": lambda y: y.mean((1, 2, 3)),
    "words": lambda y: {"out": y, "name": "maps"},
}


@pytest.mark.parametrize("form", OUTPUTS)
@pytest.mark.parametrize("criterion", ["capture", "norm-local", "hull", "composite-local"])
def test_scores_of_the_local_axis_need_no_logits(form, criterion):
    images = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    masks = [(x, torch.zeros(len(x), 8, 8)) for x in images]
    expected = calibrate(Segmenter(OUTPUTS["maps"]), images, target=None, progress=False)
    for data in (images, masks):
        net = Segmenter(OUTPUTS[form])
        made = make_importance(criterion, model=net, loader=data, progress=False)
        assert made.stats.target is None
        close(made.stats, expected)
    with pytest.raises(TwoAxisError, match=r"logits .*target=None"):
        make_importance("task-mi", model=net, loader=data, progress=False)


def test_a_network_without_logits_is_pruned():
    net, x = Segmenter(OUTPUTS["maps"]), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    report = prune_to_flops(net, x[:1], "capture", flops=0.5, loader=[x], repair=("bn",), progress=False)
    assert report.achieved == pytest.approx(0.5, abs=0.1)
    assert net(x).shape == (16, 6, 8, 8)


def test_a_target_is_gathered_once_a_score_reads_it():
    net = Siamese()
    state = PruningState(net, loader(), progress=False)
    local = state.statistics(target=False)
    assert local.target is None
    both = state.statistics("consumers")
    assert (both.target, state.statistics(target=False), state.statistics()) == ("margin", local, both)
    assert PruningState(net, loader(), target=None, progress=False).statistics().target is None
    with pytest.raises(TwoAxisError, match=r"target: expected one of margin, .* got 'accuracy'"):
        PruningState(net, loader(), target="accuracy")
