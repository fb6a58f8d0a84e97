"""Which images a loader gives, for every kind of loader that says so, and None for those that do not."""

from __future__ import annotations

import torch
from bench_cases import write_parquet
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset, TensorDataset

from tp_twoaxis import CalibrationStatistics, calibrate
from tp_twoaxis.data import ArrayDataset, digits, make_loader, open_dataset
from tp_twoaxis.runtime.image_rows import image_rows

PIXELS = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 1, 8, 8).contiguous()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(4, 3))


def seen(loader) -> list[int]:
    """Which images came, by their only grey value."""
    values = torch.cat([batch[0] if isinstance(batch, (tuple, list)) else batch for batch in loader])
    return sorted(round(float(v)) for v in values.flatten(1)[:, 0] * 255)


def test_rows_are_those_of_the_images_that_come() -> None:
    data = ArrayDataset(PIXELS, torch.zeros(20, dtype=torch.int64), (0.0,), (1.0,))
    chosen = [3, 17, 5, 8, 11]
    for loader in (
        make_loader(data, 2, num_images=7, seed=3),
        make_loader(data, 4, num_images=9, seed=3, shuffle=True),
        make_loader(data, 4, num_images=9, seed=3, rank=1, ranks=2),
        data.loader(2, chosen),
        DataLoader(Subset(data, chosen), batch_size=2),
        DataLoader(Subset(data, chosen), batch_size=2, shuffle=True),
        DataLoader(Subset(Subset(data, range(4, 20)), [0, 9]), batch_size=2),
        DataLoader(data, batch_size=None),
    ):
        came = seen([batch[0][None] if batch[0].ndim == 3 else batch for batch in loader])
        assert image_rows(loader, len(came)).tolist() == came
    assert image_rows(data.loader(2, chosen), 3).tolist() == [3, 5, 17]


def test_loaders_that_do_not_say_are_not_guessed() -> None:
    data = TensorDataset(torch.zeros(10, 3))
    shuffled = DataLoader(data, batch_size=2, shuffle=True)
    assert image_rows(shuffled, 10).tolist() == list(range(10))
    own = DataLoader(data, batch_sampler=[[0, 5], [7, 1]])
    other = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(range(4)), 2, drop_last=False))
    for loader in (shuffled, iter(shuffled), own, other, DataLoader(Stream()), [torch.zeros(4, 3)]):
        assert image_rows(loader, 4) is None


def test_drawn_data_sets_know_their_rows(tmp_path) -> None:
    spec = str(write_parquet(tmp_path / "data"))
    for size in (None, 96):  # in memory, and read one by one
        whole, drawn = open_dataset(spec, image_size=size), open_dataset(spec, image_size=size, num_images=9, seed=4)
        rows = image_rows(make_loader(drawn, 4), 9)
        assert len(rows) == 9
        assert all(torch.equal(drawn[i][0], whole[int(row)][0]) for i, row in enumerate(rows))
    assert image_rows(make_loader(whole, 4), 60).tolist() == list(range(60))
    parts = [
        set(image_rows(make_loader(digits(split), 64), len(digits(split))).tolist()) for split in ("train", "test")
    ]
    assert not parts[0] & parts[1]


def test_statistics_keep_the_rows(tmp_path) -> None:
    data = ArrayDataset(PIXELS.repeat(2, 1, 1, 1), torch.arange(40) % 3, (0.0,), (1.0,))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    first, second = (calibrate(net, data.loader(4, rows), progress=False) for rows in ([30, 2, 9, 4, 22], [1, 39, 11]))
    assert first.image_rows.tolist() == [2, 4, 9, 22, 30]
    assert calibrate(net, data.loader(4, [30, 2, 9]), max_images=2, progress=False).image_rows.tolist() == [2, 30]
    first.merge(second)
    first.save(tmp_path / "s.safetensors")
    loaded = CalibrationStatistics.load(tmp_path / "s.safetensors")
    assert loaded.image_rows.tolist() == [1, 2, 4, 9, 11, 22, 30, 39]
    unknown = calibrate(net, [(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))], progress=False)
    assert unknown.image_rows is None
    assert loaded.merge(unknown).image_rows is None
    loaded.save(tmp_path / "s.safetensors")
    assert CalibrationStatistics.load(tmp_path / "s.safetensors").image_rows is None
