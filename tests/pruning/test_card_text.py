"""The text beside a pruned network: what it says, and that the code in it runs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from cases import conv_net

from tp_twoaxis import TwoAxisError, model_card, prune_to_flops, save_pruned


@pytest.fixture(scope="module")
def pruned():
    network, images = conv_net(), torch.randn(16, 3, 8, 8)
    report = prune_to_flops(network, images[:1], "l2", flops=0.6, repair="bn", loader=[images], progress=False)
    return network, report


def test_it_says_what_was_done(pruned):
    _, report = pruned
    text = model_card(report, name="Net", accuracy={"before": 0.9, "after": 0.8, "images": 2000, "split": "test"})
    assert f"# Net, pruned to {report.achieved:.1%} of its MACs" in text
    assert "by the criterion `l2`; repair: bn" in text
    assert "Top-1 accuracy on 2,000 images (test): 90.00 % before, 80.00 % after" in text
    assert all(f"`{group.name}`" in text for group in report.groups if group.removed)
    assert "Not measured." in model_card(report)


def test_of_many_groups_the_most_pruned_are_listed(pruned):
    _, report = pruned
    group = next(group for group in report.groups if group.removed)
    many = [replace(group, name=f"Größe {i}") for i in range(300)]
    text = model_card(replace(report, groups=many))
    assert text.count("`Größe") == 20
    assert "280 more groups lost smaller shares." in text


def test_the_code_in_it_loads_the_network(pruned, tmp_path, monkeypatch):
    network, report = pruned
    monkeypatch.chdir(tmp_path)
    card = model_card(report, file="p.safetensors", factory="conv_net", imports="from cases import conv_net")
    save_pruned(network, "p.safetensors", report, card=card)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "p.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(names["model"](images), network.eval()(images))
    save_pruned(network, "q.safetensors", report, card=True)
    assert '"q.safetensors"' in (tmp_path / "q.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (({"a": 1}, {}), "report: expected what prune_to_flops returned, got dict"),
        ((None, {"accuracy": {"before": 0.9}}), "expected before and after, after is missing"),
    ],
)
def test_bad_arguments(pruned, arguments, part):
    report, options = arguments
    with pytest.raises(TwoAxisError, match=part):
        model_card(report or pruned[1], **options)
