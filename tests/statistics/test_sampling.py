"""Keys and positions: a slow twin in plain integers, what they may depend on, and that every position is as likely."""

import numpy as np
import pytest
import torch

from tp_twoaxis.statistics.sampling import KEY_NUMBERS, image_keys, sampled_positions, select_rows, stratified

MASK = 2**64 - 1


def mix(x):
    """splitmix64's finaliser on unsigned 64-bit numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_key(*images):
    """Key of one image."""
    key = 0
    for stream, image in enumerate(images):
        flat = image.numpy().ravel()
        flat = flat[:: -(-len(flat) // KEY_NUMBERS) | 1]
        bits = flat.view({4: np.int32, 8: np.int64, 2: np.int16}[flat.itemsize]) if flat.dtype.kind == "f" else flat
        total = sum(int(b) * (mix((i + (stream << 40) + 1) & MASK) | 1) for i, b in enumerate(bits.tolist()))
        key = mix((key + total) & MASK)
    return key


def slow_positions(key, available, wanted):
    found = []
    for stretch in range(wanted):
        within = (mix((key + mix(stretch + 1)) & MASK) >> 11) / 2**53
        found.append(min(int((stretch + within) * (available / wanted)), available - 1))
    return found


def images(n=12, *shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *(shape or (3, 8, 8)), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8])
def test_keys_equal_the_slow_twin(dtype):
    x = (10 * images(4)).abs().to(dtype)
    assert [key & MASK for key in image_keys(x).tolist()] == [slow_key(image) for image in x]


def test_keys_of_several_inputs_and_of_large_images_equal_the_slow_twin():
    x, y = images(3, 3, 40, 40), images(3, 5, seed=1)
    assert [key & MASK for key in image_keys(x, y).tolist()] == [slow_key(*pair) for pair in zip(x, y, strict=True)]
    assert not torch.equal(image_keys(x, y), image_keys(x, y.flip(0)))


def test_a_key_is_the_images_own():
    x = images()
    keys = image_keys(x)
    assert len(set(keys.tolist())) == len(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert torch.equal(image_keys(x[order]), keys[order])
    assert torch.equal(torch.cat([image_keys(part) for part in x.split(5)]), keys)
    assert torch.equal(image_keys(x.to(memory_format=torch.channels_last)), keys)
    assert torch.equal(image_keys(torch.cat([x, x]))[len(x) :], keys)


@pytest.mark.parametrize(("available", "wanted"), [(1, 1), (10, 3), (64, 8), (49, 32), (1000, 333), (197, 8)])
def test_positions_equal_the_slow_twin(available, wanted):
    keys = image_keys(images())
    found = sampled_positions(keys, available, wanted)
    assert found.tolist() == [slow_positions(key & MASK, available, wanted) for key in keys.tolist()]
    assert (found.diff(dim=1) >= 0).all()
    starts = torch.arange(wanted) * available / wanted
    assert (found >= starts.floor()).all()
    assert (found < starts + available / wanted).all()


@pytest.mark.parametrize(("available", "wanted"), [(64, 8), (49, 32), (50, 7), (197, 1)])
def test_every_position_is_as_likely_as_any_other(available, wanted):
    n = 20000
    seen = torch.bincount(sampled_positions(torch.arange(n), available, wanted).ravel(), minlength=available).double()
    expected = n * wanted / available
    # the counts' standard deviation is below that of a binomial; the largest of 200 stays within five of them
    assert (seen - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("channels_first", [False, True])
def test_selected_rows_are_those_positions(channels_first):
    view = images(4, 5, 42).transpose(1, 2) if channels_first else images(4, 42, 5)
    assert (view.stride(1) == 1) == channels_first
    positions = sampled_positions(image_keys(view), 42, 5)
    expected = [[view[i, p].tolist() for p in row] for i, row in enumerate(positions.tolist())]
    assert select_rows(view, positions).tolist() == expected


@pytest.mark.parametrize(("available", "wanted"), [(1, 1), (10, 3), (64, 7), (64, 64), (1000, 333)])
def test_stratified_takes_one_of_each_stretch(available, wanted):
    chosen = stratified(available, wanted)
    edges = [i * available // wanted for i in range(wanted + 1)]
    assert len(chosen) == wanted
    assert all(a <= index < b for a, index, b in zip(edges, chosen.tolist(), edges[1:], strict=False))
    assert torch.equal(chosen, stratified(available, wanted))
