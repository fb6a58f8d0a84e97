"""Batches of any loader: taken apart, cut, checked, counted."""

import pytest
import torch
from cases import batches
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tp_twoaxis import TwoAxisError
from tp_twoaxis.runtime.batches import check_inputs, expected_images, image_batches, split_batch
from tp_twoaxis.runtime.inputs import Inputs


def read(loader, max_images=None, labels=True):
    with image_batches(loader, max_images=max_images, labels=labels, description="", progress=False) as iterator:
        return list(iterator)


def test_split_batch_and_check_images_pass_what_is_right():
    x, y = batches()[0]
    assert split_batch((x, y)) == (x, y)
    assert split_batch(x) == (x, None)
    check_inputs(Inputs((x,)))
    check_inputs(Inputs((x.bfloat16(),)))


def test_labels_of_any_kind_are_dropped_where_none_are_wanted():
    x, _ = batches()[0]
    boxes = [{"boxes": torch.zeros(1, 4)}] * len(x)
    assert split_batch((x, boxes), labels=False) == (x, None)
    with pytest.raises(TwoAxisError, match=r"expected tensors \(images, labels\).*got \(Tensor, list\)"):
        split_batch((x, boxes))


def test_batches_are_cut_at_the_number_of_images_and_keep_their_own_numbers():
    got = read([torch.zeros(3, 1), torch.zeros(0, 1), torch.zeros(3, 1), torch.zeros(3, 1)], max_images=5)
    assert [(batch.number, len(batch.images)) for batch in got] == [(0, 3), (2, 2)]


def test_an_error_inside_the_loader_names_the_batch():
    def broken():
        yield torch.zeros(2, 1)
        raise OSError("disk gone")

    with pytest.raises(TwoAxisError, match="loader: batch 1 raised OSError: disk gone"):
        read(broken())


class Endless(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(10, 3))


class Unsized:
    def __iter__(self):
        return iter(batches())

    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("loader", "max_images", "expected"),
    [
        (DataLoader(TensorDataset(torch.zeros(50, 3)), batch_size=16), None, 50),
        (DataLoader(TensorDataset(torch.zeros(50, 3)), batch_size=16), 20, 20),
        (DataLoader(Endless(), batch_size=4), None, None),
        ([torch.zeros(16, 3)] * 3, None, 48),
        ([torch.zeros(16, 3)] * 3, 40, 40),
        (iter([torch.zeros(16, 3)]), 40, None),
        (Unsized(), 40, None),
    ],
)
def test_images_to_expect(loader, max_images, expected):
    assert expected_images(loader, 16, max_images) == expected
