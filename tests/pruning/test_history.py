"""Removals after one another, numbered as one: against a twin that carries the numbers along."""

import pytest
import torch

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.pruning.history import compose_masks, original_indices


@pytest.mark.parametrize("seed", range(5))
def test_numbers_against_a_list_that_shrinks(seed):
    generator = torch.Generator().manual_seed(seed)
    present, gone = list(range(30)), []
    for _ in range(4):
        leaving = sorted(torch.randperm(len(present), generator=generator)[:5].tolist())
        assert original_indices(gone, range(len(present))) == present
        assert original_indices(reversed(gone), leaving) == [present[i] for i in leaving]
        gone += [present[i] for i in leaving]
        present = [channel for i, channel in enumerate(present) if i not in leaving]


@pytest.mark.parametrize("seed", range(5))
def test_masks_against_removing_twice(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.rand(count, generator=generator) < 0.4

    first = PrunedChannels(draw(12), draw(20), "bn", ("a",))
    then = PrunedChannels(draw(int((~first.inputs).sum())), draw(int((~first.outputs).sum())), "bn", ("b", "a"))
    both = compose_masks(first, then)
    weight = torch.randn(20, 12, generator=generator)
    twice = weight[~first.outputs][:, ~first.inputs][~then.outputs][:, ~then.inputs]
    assert torch.equal(weight[~both.outputs][:, ~both.inputs], twice)
    assert (both.batch_norm, both.norms) == ("bn", ("a", "b"))
