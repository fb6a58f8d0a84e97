"""Pooled samples are the rows behind the calibration's pooled moments, in the loader's order."""

import numpy as np
import pytest
import reference
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.statistics import PooledSamples, pooled_samples
from tp_twoaxis.statistics.moments import CoMoments


def samples_of(model, loader, **options) -> PooledSamples:
    return pooled_samples(model, loader, progress=False, **options)


class Shared(nn.Module):
    """One convolution that runs twice, on maps of different sizes, and one in some batches only."""

    def __init__(self, extra=False):
        super().__init__()
        self.conv, self.other, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 5)
        self.extra = extra

    def forward(self, x):
        if self.extra and len(x) == 13:
            x = self.other(x)
        x = torch.relu(self.conv(x))
        return self.head(self.conv(x[:, :, ::2]).mean((2, 3)))


@pytest.mark.parametrize("make", [conv_net, Shared], ids=["conv_net", "called twice"])
@pytest.mark.parametrize("batch_size", [7, 60])
def test_their_moments_are_those_of_the_calibration(make, batch_size):
    net, loader = make(), batches(60, batch_size)
    stats, found = calibrate(net, loader, progress=False), samples_of(net, loader)
    assert list(found.outputs) == list(stats.layers)
    assert found.target == stats.target
    assert found.num_images == stats.num_images == 60
    task = torch.cat(list(found.task.values()), dim=1)
    for name, layer in stats.layers.items():
        values = found.outputs[name]
        assert values.dtype == torch.float32
        spread, of_task = layer.pooled.variance, layer.task.variance
        pooled, cross = CoMoments(values.shape[1]), CoMoments(values.shape[1], task.shape[1])
        pooled.update(values)
        cross.update(values, task)
        assert reference.relative_error(pooled.covariance, layer.pooled.covariance.numpy(), spread, spread) < 1e-6
        assert reference.relative_error(cross.covariance, layer.cross.covariance.numpy(), spread, of_task) < 1e-6
        torch.testing.assert_close(pooled.mean, layer.pooled.mean)


def test_rows_are_images_in_the_loaders_order():
    net, loader = conv_net(), batches(40, 9)
    found = samples_of(net, loader)
    rows = reference.emitted(net, [x for x, _ in loader], {"conv2": net.conv2})["conv2"]
    np.testing.assert_allclose(found.outputs["conv2"], rows.mean(1), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        logits = net(torch.cat([x for x, _ in loader])).numpy()
    expected = reference.task_variables(logits, torch.cat([y for _, y in loader]).numpy())
    assert list(found.task) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found.task[name], values, rtol=1e-4, atol=1e-5)
    assert found.target_values().shape == (40,)
    assert found.target_values("one_vs_rest").shape == (40, 5)


def test_batches_do_not_matter_and_the_model_is_as_it_was():
    net = conv_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = (samples_of(net, batches(40, size)) for size in (40, 6))
    for name, values in first.outputs.items():
        torch.testing.assert_close(values, second.outputs[name], rtol=1e-5, atol=1e-5)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_layers_images_and_labels_are_optional():
    net, loader = conv_net(), batches(40, 16)
    found = samples_of(net, loader, layers=["reduce", "conv1"], max_images=20, target="correct_logit")
    assert {name: len(values) for name, values in found.outputs.items()} == {"reduce": 20, "conv1": 20}
    assert found.target == "correct_logit"
    unlabelled = samples_of(net, [x for x, _ in loader], layers=["conv1"])
    assert (unlabelled.target, list(unlabelled.task)) == ("predicted_margin", ["predicted_margin", "predicted_logit"])
    alone = samples_of(net, loader, target=None)
    assert (alone.target, alone.task) == (None, {})
    with pytest.raises(TwoAxisError, match="was not recorded"):
        alone.target_values()


def test_a_float64_model_and_a_layer_far_from_zero():
    net = conv_net().double()
    with torch.no_grad():
        net.conv2.bias += 1e3
    loader = [(x.double(), y) for x, y in batches(60, 20)]
    stats, found = calibrate(net, loader, progress=False), samples_of(net, loader)
    rho = np.corrcoef(found.outputs["conv2"].double().numpy(), rowvar=False)
    np.testing.assert_allclose(rho, stats["conv2"].pooled_correlation, atol=1e-3)  # float32 at 1e3


@pytest.mark.parametrize(
    ("options", "loader", "message"),
    [
        ({"layers": ["nowhere"]}, batches(8, 8), "nowhere"),
        ({"target": "marign"}, batches(8, 8), "did you mean 'margin'"),
        ({}, [], "at least one batch"),
        ({"target": "negative_loss"}, [x for x, _ in batches(8, 8)], "needs labels and batch 0 has none"),
        ({}, [batches(8, 8)[0], batches(8, 8)[0][0]], "labels"),
    ],
)
def test_bad_input_is_named(options, loader, message):
    with pytest.raises(TwoAxisError, match=message):
        samples_of(conv_net(), loader, **options)


def test_layers_that_run_in_some_batches_only_and_values_that_are_not_finite():
    with pytest.raises(TwoAxisError, match="other: expected a layer to run in every batch or in none"):
        samples_of(Shared(extra=True), [*batches(20, 20), *batches(13, 13)])
    with pytest.raises(TwoAxisError, match="other did not run"):
        samples_of(Shared(), batches(20, 20), layers=["conv", "other"])
    net = conv_net()
    with torch.no_grad():
        net.reduce.weight[0] = torch.nan
    with pytest.raises(TwoAxisError, match="reduce: the layer's outputs are not finite"):
        samples_of(net, batches(20, 20), layers=["reduce"])
