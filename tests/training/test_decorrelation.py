"""The decorrelation penalty against loops, and in training: it lowers what channels share and resumes as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.training import finetune
from tp_twoaxis.training.decorrelation import Decorrelation, shared_information

SETTINGS = {"max_batches": None, "lr": 0.05, "schedule": "constant", "progress": False}


def slow_shared_information(rows, references):
    """Loops over pairs, from the formula."""
    count = rows.shape[1]
    total, pairs = 0.0, 0
    for k in range(min(references, count)):
        for j in range(count):
            if j == k or np.ptp(rows[:, k]) == 0 or np.ptp(rows[:, j]) == 0:
                continue
            rho = np.corrcoef(rows[:, k], rows[:, j])[0, 1]
            total += -0.5 * math.log(1 - min(rho**2, 1 - 1e-4))
            pairs += 1
    return total / max(pairs, 1)


@pytest.mark.parametrize("references", [3, 7, 20])
def test_shared_information_equals_its_slow_twin(references):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    rows[:, 1] = rows[:, 0] + 0.1 * rows[:, 1]
    rows[:, 2] = 3.0 * rows[:, 0]  # clipped
    rows[:, 4] = 5.0  # constant
    expected = slow_shared_information(rows.numpy(), references)
    assert float(shared_information(rows, references)) == pytest.approx(expected, rel=1e-12)
    assert float(shared_information(rows.float() * 9 + 2, references)) == pytest.approx(expected, rel=1e-4)
    assert float(shared_information(rows[:, 4:5], references)) == 0.0


def test_its_gradient_is_that_of_differences():
    rows = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shared_information(x, 2), rows)
    constant = torch.cat([torch.randn(20, 2, dtype=torch.float64), torch.ones(20, 1, dtype=torch.float64)], 1)
    constant.requires_grad_()
    shared_information(constant, 3).backward()
    assert bool(constant.grad.isfinite().all())


def assert_same(first, second):
    weights = second.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items())


def mean_shared(net):
    with torch.no_grad(), Decorrelation(net, 1.0) as penalty:
        kept = {}
        for name, layer in penalty.layers.items():
            layer.register_forward_hook(lambda _, __, output, name=name: kept.update({name: output}))
        net.eval()(torch.cat([images for images, _ in batches()]))
    rows = [output.movedim(1, -1).flatten(0, -2) for output in kept.values()]
    return sum(float(shared_information(r, r.shape[1])) for r in rows) / len(rows)


def test_the_penalty_lowers_what_channels_share():
    after = {}
    for weight in (0.0, 1.0):
        net = conv_net()
        with Decorrelation(net, weight) as penalty:
            finetune(net, batches(), epochs=12, penalty=penalty, **SETTINGS)
        after[weight] = mean_shared(net)
    assert after[1.0] < 0.8 * after[0.0]


def test_weight_zero_changes_nothing_and_the_hooks_leave():
    plain, watched = conv_net(), conv_net()
    finetune(plain, batches(), epochs=2, **SETTINGS)
    with Decorrelation(watched, 0.0) as penalty:
        finetune(watched, batches(), epochs=2, penalty=penalty, **SETTINGS)
    assert_same(plain, watched)
    assert not any(module._forward_hooks for module in watched.modules())


def test_one_penalty_a_step_by_hand():
    net, data = conv_net().double().train(), [(x.double(), y) for x, y in batches(32)]
    twin = conv_net().double().train()
    with Decorrelation(net, 0.5, layers=2, references=64, channels=128, every=2) as penalty:
        assert list(penalty.layers) == ["conv1", "reduce"]
        report = finetune(net, data, epochs=1, penalty=penalty, momentum=0, weight_decay=0, **SETTINGS)
    outputs = []
    for layer in (twin.conv1, twin.reduce):
        layer.register_forward_hook(lambda _, __, output: outputs.append(output.movedim(1, -1).flatten(0, -2)))
    images, labels = data[0]
    loss = nn.functional.cross_entropy(twin(images), labels)
    # all channels are drawn, so that the order does not matter
    loss = loss + 0.5 * sum(shared_information(rows, rows.shape[1]) for rows in outputs) / 2
    assert report.losses[0] == pytest.approx(loss.item(), rel=1e-10)
    loss.backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.05 * parameter.grad
    images, labels = data[1]
    # the second batch has no penalty
    assert report.losses[1] == pytest.approx(nn.functional.cross_entropy(twin(images), labels).item(), rel=1e-8)


def test_an_interrupted_training_goes_on_as_it_was(tmp_path):
    def stop(epoch, network):
        if epoch == 2:
            raise KeyboardInterrupt

    def run(net, weight=0.3, **options):
        with Decorrelation(net, weight, references=4, channels=6) as penalty:
            return finetune(net, batches(), epochs=3, penalty=penalty, **SETTINGS, **options)

    whole, state = conv_net(), tmp_path / "state.safetensors"
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(conv_net(), checkpoint=state, on_epoch=stop)
    with pytest.raises(TwoAxisError, match=r"weight=0.3.* instead of .*weight=0.1"):
        run(conv_net(), weight=0.1, checkpoint=state, resume=True)
    again = conv_net()
    assert run(again, checkpoint=state, resume=True).resumed_at == 3
    assert_same(whole, again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "weight: expected 0 or a positive"),
        ({"weight": math.nan}, "weight: expected 0 or a positive"),
        ({"layers": 0}, "layers: expected at least 1"),
        ({"every": 0}, "every: expected at least 1"),
        ({"model": nn.Linear(2, 2)}, "no Conv2d"),
    ],
)
def test_bad_input(changes, message):
    options = {"model": conv_net(), "weight": 0.1, **changes}
    with pytest.raises(TwoAxisError, match=message):
        Decorrelation(options.pop("model"), options.pop("weight"), **options)


def test_a_penalty_without_its_pass_is_refused():
    with pytest.raises(TwoAxisError, match="call it inside of its with block"):
        Decorrelation(conv_net(), 0.1)(0)
