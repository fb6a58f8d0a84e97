"""Where the batch is in what layers write: read right in every order of rows, or refused; never by a chance length."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.layers import channel_layers
from tp_twoaxis.statistics.activations import InputMoments, gather_activations
from tp_twoaxis.statistics.layouts import BatchLayout, find_layouts

LENGTH = 12  # tokens of an image: a multiple of the batches of 4 and 6, and of 3 and 2


def tokens(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, LENGTH, 5, generator=generator) + torch.randn(n, 1, 5, generator=generator)
    return x.double(), torch.randint(3, (n,), generator=generator)


class Encoder(nn.Module):
    """The same numbers whatever the order in which rows pass the middle layer."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.order, self.middle, self.head = order, nn.Linear(5, 7), nn.Linear(7, 3)
        self.double()

    def forward(self, x):
        n, length, width = x.shape
        if self.order == "image first":
            y = self.middle(x)
        elif self.order == "sequence first":
            y = self.middle(x.transpose(0, 1)).transpose(0, 1)
        elif self.order == "flat":
            y = self.middle(x.reshape(-1, width)).view(n, length, -1)
        elif self.order == "flat, sequence first":
            y = self.middle(x.transpose(0, 1).reshape(-1, width)).view(length, n, -1).transpose(0, 1)
        elif self.order == "views behind each other":
            views = torch.cat(x.chunk(2, 1))
            y = torch.cat(self.middle(views).chunk(2), 1)
        elif self.order == "views side by side":
            views = x.reshape(n * 2, length // 2, width)
            y = self.middle(views).reshape(n, length, -1)
        else:  # windows of views: rows are [view, image, window]
            views = torch.stack(x.chunk(2, 1))  # [2, n, 6, C]
            y = self.middle(views.reshape(2 * n * 3, 2, width)).view(2, n, 6, -1)
            y = torch.cat(list(y), 1)
        return self.head(torch.relu(y).mean(1))


ORDERS = (
    "image first",
    "sequence first",
    "flat",
    "flat, sequence first",
    "views behind each other",
    "views side by side",
    "windows of views",
)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 7, 24])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_rows_gives_the_same_statistics(order, batch_size):
    x, y = tokens()
    loader = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    options = {"positions": "all", "gradients": True, "consumers": True, "progress": False}
    expected = calibrate(Encoder("image first"), [(x, y)], **options)["middle"]
    found = calibrate(Encoder(order), loader, **options)["middle"]
    assert (found.num_rows, found.num_images) == (24 * LENGTH, 24)
    for name in ("covariance", "pooled_correlation", "mean", "saliency", "input_covariance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.target_correlation(), expected.target_correlation(), rtol=1e-9, atol=1e-12)


def test_the_order_of_reference_is_numpys():
    x, y = tokens()
    net = Encoder("image first")
    rows = reference.emitted(net, [x], {"middle": net.middle})["middle"]
    found = calibrate(net, [(x, y)], positions="all", progress=False)["middle"]
    np.testing.assert_allclose(found.pooled_correlation, reference.correlation(rows.mean(1)), atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_activations_of_every_order_agree(order):
    x, _ = tokens()
    expected = gather_activations(Encoder("image first"), [x], InputMoments, progress=False).records["middle"]
    found = gather_activations(Encoder(order), x.split(4), InputMoments, progress=False).records["middle"]
    assert found.count == expected.count
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-9, atol=1e-12)


def layouts(net, x):
    with forward_pass(net, [x], what="look") as run:
        return find_layouts(run, channel_layers(net), next(run.batches))


@pytest.mark.parametrize(
    ("order", "layout"),
    [
        ("image first", BatchLayout(0)),
        ("sequence first", BatchLayout(1)),
        ("flat", BatchLayout(0, 1, None)),
        ("flat, sequence first", BatchLayout(0, None, 1)),
        ("views behind each other", BatchLayout(0, None, 1)),
        ("windows of views", BatchLayout(0, 2, None)),
    ],
)
@pytest.mark.parametrize("images", ["real", "equal", "black", "one"])
def test_layouts_are_found_on_images_of_any_kind(order, layout, images):
    x, _ = tokens(4)
    x = {"real": x, "equal": x[:1].expand(4, -1, -1), "black": torch.zeros_like(x), "one": x[:1]}[images]
    assert layouts(Encoder(order), x)["middle"] == layout


def test_maps_of_convolutions_and_attention_in_both_orders():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.first = nn.MultiheadAttention(4, 2, batch_first=True)
            self.second = nn.MultiheadAttention(4, 2)

        def forward(self, x):  # two crops behind each other
            n = len(x)
            y = self.conv(torch.cat([x[..., :4, :], x[..., 4:, :]])).view(2, n, 4, -1).permute(1, 0, 3, 2)
            y = y.reshape(n, -1, 4)
            y = self.first(y, y, y)[0].transpose(0, 1)
            return self.second(y, y, y)[0]

    found = layouts(Mixed(), torch.randn(5, 1, 8, 5, generator=torch.Generator().manual_seed(0)))
    assert found == {"conv": BatchLayout(0, None, 1), "first": BatchLayout(0), "second": BatchLayout(1)}


class Odd(nn.Module):
    """A layer whose rows belong to no image, or to several."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.fc, self.head, self.batch = kind, nn.Linear(5, 5), nn.Linear(5, 3), None
        self.register_buffer("table", torch.randn(LENGTH, 5))

    def forward(self, x):
        if self.kind == "a table":
            x = x + self.fc(self.table)
        elif self.kind == "image by image":
            x = torch.stack([self.fc(image) for image in x])
        elif self.kind == "pairs of images":
            x = self.fc(x.mean(1)[:, None] + x.mean(1)[None]).mean(1)[:, None] + x
        elif self.kind == "two ways":
            x = self.fc(self.fc(x).transpose(0, 1)).transpose(0, 1)
        elif self.kind == "a token more":
            x = self.fc(torch.cat([x.flatten(0, 1), self.table[:1]]))[:-1].view_as(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("kind", ["a table", "image by image", "pairs of images", "two ways", "a token more"])
def test_rows_that_are_of_no_image_are_refused(kind):
    x, y = tokens()
    loader = [(x.float()[:12], y[:12])]
    with pytest.raises(TwoAxisError, match=r"^fc: expected outputs of which one dimension grows with the batch.*leave"):
        calibrate(Odd(kind), loader, progress=False)
    assert list(calibrate(Odd(kind), loader, layers=["head"], progress=False)) == ["head"]


def test_a_model_for_batches_of_one_size_is_named():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(x.view(4, -1, 5)).mean(1)

    x, y = tokens(4)
    with pytest.raises(TwoAxisError, match="Fixed: expected a model that runs on batches of any size, it runs on 4"):
        calibrate(Fixed(), [(x.float()[:, :7].contiguous(), y)], progress=False)
