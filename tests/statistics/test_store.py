"""Statistics merge, are saved and loaded to the last bit, and are matched against the model."""

import json
import pickle

import pytest
import torch
import torch_pruning as tp
from cases import batches, conv_net
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DataParallel

from tp_twoaxis import CalibrationStatistics, TwoAxisError, calibrate
from tp_twoaxis.errors import FileFormatError, StaleStatisticsError
from tp_twoaxis.runtime.serialization import read_tensors, write_tensors
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.store import FORMAT, VERSION


def run(model=None, loader=None, **options):
    return calibrate(
        conv_net() if model is None else model, batches() if loader is None else loader, progress=False, **options
    )


def state(stats):
    """Every number of statistics, as bytes, and what else there is."""
    numbers = [(m.count, *(t.numpy().tobytes() for t in (m.mean, m.other_mean, m.scatter))) for m in stats._moments()]
    layers = [
        (s.name, s.kind, s.shape, s.fingerprint, s.weight_power.numpy().tobytes(), s.columns, s.target)
        for s in stats.layers.values()
    ]
    return numbers, layers, stats.target, stats.num_images, stats._columns


def agree(found, expected):
    assert found.num_images == expected.num_images
    for mine, theirs in zip(found._moments(), expected._moments(), strict=True):
        assert mine.count == theirs.count
        torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mine.covariance, theirs.covariance, rtol=1e-9, atol=1e-12)


# merging


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_parts_merge_in_any_order(order):
    model = conv_net().double()
    loader = [(x.double(), y) for x, y in batches(37, 15)]  # the last part is smaller
    whole = run(model, loader, positions="all")
    parts = [run(model, [loader[i]], positions="all") for i in order]
    last = state(parts[2])
    merged = parts[0].merge(parts[1])
    assert merged is parts[0]
    agree(merged.merge(parts[2]), whole)
    assert state(parts[2]) == last
    for name in whole:
        rho = merged[name].target_correlation()
        torch.testing.assert_close(rho, whole[name].target_correlation(), rtol=1e-9, atol=1e-12)
        assert torch.equal(merged[name].correlation, merged[name].correlation.T)


def test_all_layers_see_the_merged_task():
    stats = run().merge(run())
    assert {id(entry.task) for entry in stats.layers.values()} == {id(stats._task)}
    assert stats["fc"].task.count == stats["fc"].cross.count == stats.num_images == 96


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: run(conv_net(seed=1)), "weights"),
        (lambda: run(conv_net().double()), "weights"),
        (lambda: run(conv_net(width=8)), "layers"),
        (lambda: run(layers=["conv1"]), "layers"),
        (lambda: run(conv_net(classes=7)), "task variables"),
        (lambda: run(target=None), "target"),
        (lambda: run(target="predicted_margin"), "target"),
        (lambda: run(loader=[x for x, _ in batches()]), "target"),
    ],
)
def test_foreign_statistics_are_refused_and_nothing_changes(other, what):
    stats = run()
    before = state(stats)
    with pytest.raises(TwoAxisError, match=f"merge: the two statistics differ in their {what}; only parts of one"):
        stats.merge(other())
    assert state(stats) == before


# files


@pytest.mark.parametrize("options", [{}, {"target": None}, {"target": "one_vs_rest", "layers": ["conv2"]}])
def test_a_file_gives_everything_back_to_the_last_bit(tmp_path, options):
    stats = run(**options)
    stats.save(tmp_path / "a.safetensors")
    loaded = CalibrationStatistics.load(str(tmp_path / "a.safetensors"))
    assert state(loaded) == state(stats)
    for name in stats:
        assert torch.equal(loaded[name].correlation, stats[name].correlation)
        if stats.target:
            assert torch.equal(loaded[name].target_correlation(), stats[name].target_correlation())
    loaded.verify(conv_net())
    stats.merge(loaded).save(tmp_path / "a.safetensors")  # what was loaded merges, and a merger is saved again
    assert state(CalibrationStatistics.load(tmp_path / "a.safetensors")) == state(stats)


def test_a_model_that_is_one_layer_is_saved_too(tmp_path):
    stats = run(nn.Linear(3, 4), [torch.randn(5, 3)])
    stats.save(tmp_path / "a")
    assert state(CalibrationStatistics.load(tmp_path / "a")) == state(stats)


def test_a_symmetric_matrix_is_stored_once(tmp_path):
    stats = run(layers=["conv2"])
    stats.save(tmp_path / "a")
    tensors, _ = read_tensors(tmp_path / "a", kind=FORMAT, version=VERSION)
    assert tensors["conv2/rows.upper"].shape == (16 * 17 // 2,)
    assert tensors["conv2/cross.scatter"].shape == (16, 10)


def saved(tmp_path):
    path = tmp_path / "a.safetensors"
    run().save(path)
    return path


def rewritten(tmp_path, change, **options):
    """A file of statistics whose tensors and header went through ``change``."""
    path = saved(tmp_path)
    tensors, header = read_tensors(path, kind=FORMAT, version=VERSION)
    header = change(tensors, header) or header
    write_tensors(path, tensors, header, **{"kind": FORMAT, "version": VERSION} | options)
    return path


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_file_that_was_cut_short(tmp_path, keep):
    path = saved(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(FileFormatError, match=r"a\.safetensors: not readable as safetensors, cut short or corrupted"):
        CalibrationStatistics.load(path)


@pytest.mark.parametrize("content", [b"not a file of numbers at all", b"\x00" * 64, b"\xff" * 64, b"{}"])
def test_a_file_of_something_else(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FileFormatError, match="not readable as safetensors"):
        CalibrationStatistics.load(tmp_path / "a")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_named_and_never_run(tmp_path, write):
    write({"a": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(FileFormatError, match=r"got a pickle \(torch.save\).*safetensors.torch.save_file"):
        CalibrationStatistics.load(tmp_path / "a.pth")


def test_files_of_other_programs_kinds_and_versions(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(FileFormatError, match="expected a file of format 'tp-twoaxis/statistics', got None"):
        CalibrationStatistics.load(tmp_path / "foreign")
    save_file({"a": torch.ones(2)}, tmp_path / "no-header", metadata={"format": FORMAT, "version": "1"})
    with pytest.raises(FileFormatError, match="no-header"):
        CalibrationStatistics.load(tmp_path / "no-header")
    with pytest.raises(FileFormatError, match="got 'tp-twoaxis/pruned'"):
        CalibrationStatistics.load(rewritten(tmp_path, lambda *_: None, kind="tp-twoaxis/pruned"))
    with pytest.raises(FileFormatError, match=rf"version {VERSION + 1}, this release reads up to {VERSION}; update"):
        CalibrationStatistics.load(rewritten(tmp_path, lambda *_: None, version=VERSION + 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: tensors.pop("conv2/rows.mean") is None,
        lambda tensors, header: tensors.pop("conv2/rows.upper") is None,
        lambda tensors, header: tensors.pop("conv2/cross.other_mean") is None,
        lambda tensors, header: tensors.pop("conv2/weight_power") is None,
        lambda tensors, header: tensors.update({"conv2/rows.upper": torch.zeros(7)}),
        lambda tensors, header: tensors.update({"conv2/cross.scatter": torch.zeros(7, 7)}),
        lambda tensors, header: header["counts"].pop("conv2/pooled") is None,
        lambda tensors, header: header["layers"][1].pop("fingerprint") is None,
        lambda tensors, header: header.pop("columns") is None,
        lambda tensors, header: header.update(columns=[]),
        lambda tensors, header: header.update(counts=3),
        lambda tensors, header: header.update(num_images="many"),
        lambda tensors, header: [1],
    ],
)
def test_a_file_that_is_incomplete(tmp_path, change):
    path = rewritten(tmp_path, change)
    with pytest.raises(FileFormatError, match=r"a.safetensors: the file is incomplete .* calibrate and save again"):
        CalibrationStatistics.load(path)


def test_what_was_reduced_is_known_in_files_and_after_a_merge(tmp_path):
    whole, part = run(), run()
    assert not whole.reduced
    whole.reduced = True
    whole.save(tmp_path / "a")
    assert CalibrationStatistics.load(tmp_path / "a").reduced
    assert part.merge(whole).reduced
    assert whole.merge(run()).reduced


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_earlier_versions_are_read_and_not_merged(tmp_path, version):
    """Their rows' weights are not known; alone they are what they were."""

    def change(_, header):
        del header["weights"]
        for layer in header["layers"]:
            del layer["dtype"]

    stats, now = CalibrationStatistics.load(rewritten(tmp_path, change, version=version)), run()
    assert list(stats) == list(now)
    assert not stats.mergeable
    assert stats["conv2"].rows.weight == stats["conv2"].num_rows
    assert torch.equal(stats["conv2"].correlation, now["conv2"].correlation)
    stats.verify(conv_net())
    stats.save(tmp_path / "again")
    assert not CalibrationStatistics.load(tmp_path / "again").mergeable
    for one, other in ((stats, now), (now, stats), (stats, stats)):
        with pytest.raises(TwoAxisError, match=r"merge: .* earlier version, .* each sampled row.*calibrate again"):
            one.merge(other)


@pytest.mark.parametrize("positions", ["auto", "all", 5])
def test_weights_are_kept(tmp_path, positions):
    stats = run(positions=positions)
    stats.save(tmp_path / "a")
    again = CalibrationStatistics.load(tmp_path / "a")
    assert [m.weight for m in again._moments()] == [m.weight for m in stats._moments()]
    assert again["conv2"].rows.weight == pytest.approx(48 * 64)


def test_parts_sampled_at_different_rates_weigh_as_their_images(tmp_path):
    """A part with every position outweighs one with few by no more than it has images."""
    loader = batches(96, 16)
    bright = [(3 * x, y) for x, y in loader[:1]]
    few, many = run(loader=bright, positions="all"), run(loader=loader[1:], positions=2)
    exact = run(loader=bright + loader[1:], positions="all")
    merged = few.merge(many)["conv1"]
    assert float((merged.variance / exact["conv1"].variance - 1).abs().mean()) < 0.1
    share = 16 / 96
    parts = [run(loader=part, positions="all")["conv1"] for part in (bright, loader[1:])]
    within = share * parts[0].variance + (1 - share) * parts[1].variance
    assert float((merged.variance / within - 1).abs().mean()) < 0.15


def test_places_that_do_not_exist(tmp_path):
    with pytest.raises(FileFormatError, match="nothing: no such file"):
        CalibrationStatistics.load(tmp_path / "nothing")
    with pytest.raises(FileFormatError, match="no such file"):
        CalibrationStatistics.load(tmp_path)
    with pytest.raises(TwoAxisError, match=r"the folder .*missing does not exist; create it first"):
        run().save(tmp_path / "missing" / "a")


def test_the_header_is_plain_json(tmp_path):
    _, header = read_tensors(saved(tmp_path), kind=FORMAT, version=VERSION)
    assert json.loads(json.dumps(header)) == header
    assert header["layers"][0]["name"] == "conv1"
    assert header["num_images"] == 48


# the model they belong to


def test_the_same_state_of_the_model_is_accepted():
    stats, net = run(), conv_net()
    stats.verify(net)
    stats.verify(DataParallel(net.train().requires_grad_(False)))
    stats.verify(net.to(memory_format=torch.channels_last))
    other = conv_net(seed=7)
    with pytest.raises(StaleStatisticsError):
        stats.verify(other)
    other.load_state_dict(net.state_dict())
    stats.verify(other)


def test_a_pruned_model_is_refused():
    stats, net = run(), conv_net()
    graph = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3, 8, 8))
    graph.get_pruning_group(net.reduce, tp.prune_conv_out_channels, idxs=[1, 5]).prune()
    stats.verify(net, ["conv1", "conv2", "depthwise"])
    with pytest.raises(
        StaleStatisticsError,
        match=r"reduce: statistics hold 8 channels and .*, the layer has 6 .* - it was pruned.*again",
    ):
        stats.verify(net)
    with pytest.raises(
        StaleStatisticsError, match=r"fc: .* weight \[5, 32\], the layer has .* weight \[5, 24\] - it was pruned"
    ):
        stats.verify(net, ["fc"])


def test_a_trained_model_is_refused_where_it_was_trained():
    net = conv_net()
    net.conv1.requires_grad_(False)
    stats = run(net)
    x, y = batches()[0]
    nn.functional.cross_entropy(net(x), y).backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-4).step()
    stats.verify(net, ["conv1"])
    for name in ("conv2", "depthwise", "reduce", "fc"):
        with pytest.raises(
            StaleStatisticsError, match=f"{name}: its parameters or running statistics are not those.*calibrate"
        ):
            stats.verify(net, [name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_model_is_refused(dtype):
    with pytest.raises(StaleStatisticsError, match=r"conv1: its parameters or running statistics are not those.*cast"):
        run().verify(conv_net().to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_moved_model_is_accepted():
    run().verify(conv_net().cuda())


def test_another_model_is_refused():
    with pytest.raises(StaleStatisticsError, match="conv1: statistics hold this layer, Sequential has no such layer"):
        run().verify(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(StaleStatisticsError, match=r"conv1: statistics hold 16 channels and .*, the layer has 8 "):
        run().verify(conv_net(width=8))
    with pytest.raises(TwoAxisError, match="no statistics of layer 'bn1'"):
        run().verify(conv_net(), ["bn1"])


# looking in


def test_statistics_are_a_mapping_of_layers():
    stats = run()
    assert list(stats) == ["conv1", "conv2", "depthwise", "reduce", "fc"]
    assert len(stats) == 5
    assert "fc" in stats
    assert 3 not in stats
    assert repr(stats) == "CalibrationStatistics(5 layers, 48 images, target='margin')"
    entry = stats["depthwise"]
    assert (entry.kind, entry.shape, entry.num_channels) == ("Conv2d", (16, 1, 3, 3), 16)
    assert entry.covariance.dtype == entry.target_correlation().dtype == torch.float64
    assert torch.equal(entry.covariance.diagonal(), entry.variance)
    with pytest.raises(TwoAxisError, match=r"depthwise: task variable 'loss' was not recorded .recorded: pred"):
        entry.target_correlation("loss")


def test_statistics_that_hold_other_moments_do_not_merge():
    mine, theirs = run(), run()
    theirs["conv1"].pooled = CoMoments.from_parts(4, torch.zeros(16), torch.zeros(16, 0), torch.zeros(0))
    before = mine["conv1"].rows.count
    with pytest.raises(TwoAxisError, match="differ in their recorded moments"):
        mine.merge(theirs)
    assert mine["conv1"].rows.count == before
