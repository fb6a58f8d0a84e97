"""What a model is called with: every form of a loader's item is read as the call that it means, or refused."""

from collections import UserDict

import pytest
import torch
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.runtime.batches import image_batches, read_batch, split_batch, split_shards
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.inputs import CallSignature, Inputs

A, B, Y = torch.randn(4, 3), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])


class Pair(nn.Module):
    def forward(self, left, right, weight=None):
        return left.sum(1) + 10 * right.sum(1) + (0 if weight is None else 100 * weight.sum(1))


class One(nn.Module):
    def forward(self, x):
        return x


class Optional(nn.Module):
    def forward(self, x, mask=None):
        return x if mask is None else x * mask


class Named(nn.Module):
    def forward(self, pixel_values=None, attention_mask=None, labels=None):
        return pixel_values


def read(item, network, labels=True):
    return read_batch(item, labels=labels, call=CallSignature.of(network))


def same(inputs, *args, **kwargs):
    assert [type(value) for value in inputs.args] == [type(value) for value in args]
    assert all(torch.equal(a, b) for a, b in zip(inputs.args, args, strict=True))
    assert inputs.kwargs.keys() == kwargs.keys()
    assert all(torch.equal(inputs.kwargs[name], kwargs[name]) for name in kwargs)


# signatures


def test_signatures():
    class Any(nn.Module):
        def forward(self, *args, scale=1.0, **kwargs):
            return args

    assert CallSignature.of(Pair()) == CallSignature(("left", "right", "weight"), 2)
    assert CallSignature.of(nn.Sequential()) == CallSignature(("input",), 1)
    assert CallSignature.of(Any()) == CallSignature((), 1)
    assert CallSignature.of(Named()).required == 1
    odd = nn.Identity()
    odd.forward = torch.relu  # written in C
    assert CallSignature.of(odd) == CallSignature()


# items


@pytest.mark.parametrize(
    ("item", "labelled"),
    [
        ((A, B), False),
        ([A, B], False),
        ((A, B, Y), True),
        (((A, B), Y), True),
        (((A, B),), False),
        ([[A, B], Y, ["path"] * 4], True),
        ((Inputs((A, B)), Y), True),
        (Inputs((A, B)), False),
    ],
)
def test_two_inputs_by_position(item, labelled):
    inputs, labels = read(item, Pair())
    same(inputs, A, B)
    assert torch.equal(labels, Y) if labelled else labels is None
    assert read(item, Pair(), labels=False)[1] is None


@pytest.mark.parametrize(
    ("item", "labelled"),
    [
        ({"left": A, "right": B}, False),
        ({"right": B, "labels": Y, "left": A, "file": ["a"] * 4}, True),
        (UserDict(left=A, right=B, label=Y), True),
        (({"left": A, "right": B}, Y), True),
    ],
)
def test_two_inputs_by_name(item, labelled):
    inputs, labels = read(item, Pair())
    same(inputs, left=A, right=B)
    assert torch.equal(labels, Y) if labelled else labels is None


def test_names_of_one_input():
    for item in ({"pixel_values": A, "labels": Y}, {"image": A, "label": Y}, {"images": A}):
        same(read(item, One())[0], A)
    same(read({"x": A, "labels": Y}, One())[0], x=A)
    same(read({"pixel_values": A, "labels": Y}, Named())[0], pixel_values=A)  # labels are not handed to the model
    same(read({"image": A, "mask": B}, Optional())[0], A, mask=B)
    same(read({"image": A, "right": B}, Pair())[0], A, right=B)


@pytest.mark.parametrize(
    ("item", "network", "message"),
    [
        ((A,), Pair(), r"the model needs 2 inputs \(left, right\)"),
        (A, Pair(), None),
        ((A, B, Y, Y), Pair(), "more tensors than inputs and labels"),
        ((A, Y, B), One(), "more tensors than inputs and labels"),
        ((A, B), Optional(), r"may be labels or the input 'mask': yield \(inputs, labels\) or \(inputs,\)"),
        ({"left": A}, Pair(), "the model's input right is missing"),
        ({"right": B}, Pair(), "the model's input left is missing"),
        ({"left": A, "right": B, "wieght": B}, Pair(), "the model has no input wieght: leave it out"),
        ({"pixel_values": A, "attn_mask": B}, Named(), "the model has no input attn_mask"),
        ({"pixel_values": A, "image": A}, One(), "a mapping with pixel_values: Tensor, image: Tensor"),
        ({"image": A, "labels": Y, "label": Y}, One(), "labels come twice"),
        (({"x": A, "labels": Y}, Y), One(), "labels come twice"),
        ((["a", "b"], Y), One(), "got none"),
        (((A, [B]), Y), Pair(), "expected tensors, numbers or None, got list"),
        (((A, B[:3]), Y), Pair(), r"the same number of images .* got \[4, 3\], \[3, 2\]"),
        ({}, One(), "a mapping with "),
    ],
)
def test_items_that_could_mean_several_things_or_nothing(item, network, message):
    if message is None:  # one tensor for two inputs: the model says so
        with (
            pytest.raises(TwoAxisError, match=r"Pair does not run on batch 0 .*TypeError"),
            forward_pass(network, [item], what="look") as run,
        ):
            list(run)
        return
    with pytest.raises(TwoAxisError, match=f"loader: expected tensors.*in batch 0, got .*{message}.*; wrap the loader"):
        read(item, network)


def test_steps_for_one_input_refuse_several():
    with pytest.raises(TwoAxisError, match=r"batches of one image tensor, .* got inputs of shapes \[4, 3\], \[4, 2\]"):
        split_batch(((A, B), Y))


# passes


@pytest.mark.parametrize("item", [(A, B, Y), {"left": A, "right": B, "labels": Y}, ((A, B), Y)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pass_calls_the_model_as_the_item_says(item, dtype):
    net = Pair()
    net.register_parameter("p", nn.Parameter(torch.zeros(1, dtype=dtype)))
    with forward_pass(net, [item, item], what="look", labels=True, max_images=6) as run:
        found = [(batch.labels, output) for batch, output in run]
    assert run.images == 6
    assert [len(output) for _, output in found] == [4, 2]
    expected = Pair()(A.to(dtype), B.to(dtype))
    for labels, output in found:
        assert torch.equal(output, expected[: len(output)])
        assert torch.equal(labels, Y[: len(output)])


def test_only_floats_are_cast_and_what_is_no_batch_stays():
    inputs = Inputs((A, torch.arange(4), 3, None), {"t": torch.tensor(2.0), "mask": B > 0})
    moved = inputs.to("cpu", torch.float64)
    assert [value.dtype for value in moved.args[:2]] == [torch.float64, torch.int64]
    assert moved.args[2:] == (3, None)
    assert moved.kwargs["t"] is inputs.kwargs["t"]
    assert moved.kwargs["mask"].dtype == torch.bool
    part = inputs[torch.tensor([2, 0])]
    assert torch.equal(part.args[0], A[[2, 0]])
    assert len(part) == 2
    again = Inputs.concatenate(inputs.split(3))
    assert [len(piece) for piece in inputs.split(3)] == [3, 1]
    assert torch.equal(again.kwargs["mask"], inputs.kwargs["mask"])


def test_numbers_that_are_not_finite_are_found_in_every_input():
    bad = B.clone()
    bad[1, 0] = torch.nan
    for item in ((A, bad), {"left": A, "right": bad}):
        with pytest.raises(TwoAxisError, match="batch 0 holds NaN"), forward_pass(Pair(), [item], what="look") as run:
            list(run)
    with (
        pytest.raises(TwoAxisError, match=r"float images .* got torch.uint8"),
        forward_pass(Pair(), [(A, B.to(torch.uint8))], what="look") as run,
    ):
        list(run)


def test_shards_keep_inputs_and_labels_together():
    loader = [(A + i, B + i, Y) for i in range(3)]
    options = {"max_images": None, "labels": True, "description": "", "progress": False}
    with image_batches(loader, **options, call=CallSignature.of(Pair())) as batches:
        shards = list(split_shards(batches, 2))
    assert sum(len(batch.inputs) for _, batch in shards) == 12
    rows = {
        tuple(row.tolist()): label for a, b, y in loader for row, label in zip(torch.cat([a, b], 1), y, strict=True)
    }
    for _, batch in shards:
        for row, label in zip(torch.cat(batch.inputs.tensors, 1), batch.labels, strict=True):
            assert rows[tuple(row.tolist())] == label
