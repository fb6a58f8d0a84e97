"""What trials share: rows that do not overlap, statistics once, three counters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from baseline_cases import full_group
from bench_cases import analytic_macs, drawn_pictures, plain_conv_net, tiny_config, write_folders, write_parquet
from cases import conv_net

from tp_twoaxis import TwoAxisError, prune_to_flops
from tp_twoaxis.benchmark import DataConfig, NetworkConfig
from tp_twoaxis.benchmark.shared_work import LoadedNetwork, Shared, check_inputs, measure_sizes
from tp_twoaxis.benchmark.sweep_images import rows_from_text, rows_to_text, split_rows
from tp_twoaxis.data import ArrayDataset
from tp_twoaxis.importance import criteria, find_criterion, pruning_state
from tp_twoaxis.importance.baselines import activation_criteria


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("draw", ["fixed", "seed"])
def test_parts_do_not_overlap_and_only_a_seed_s_own_draw_depends_on_it(draw):
    data = DataConfig(calibration_images=300, selection_images=200, calibration_draw=draw)
    parts = {seed: split_rows(1000, data, seed) for seed in (42, 123)}
    for calibration, selection, rest in parts.values():
        assert (len(calibration), len(selection), len(rest)) == (300, 200, 800)
        assert not set(selection.tolist()) & set(rest.tolist())
        assert set(calibration.tolist()) <= set(rest.tolist())
    assert torch.equal(parts[42][1], parts[123][1])
    assert torch.equal(parts[42][0], parts[123][0]) == (draw == "fixed")
    assert torch.equal(rows_from_text(rows_to_text(parts[42][0])), parts[42][0])
    with pytest.raises(TwoAxisError, match="hold out fewer"):
        split_rows(200, data, 1)


def test_three_counters_against_arithmetic():
    net, example = plain_conv_net(), torch.zeros(1, 3, 8, 8)
    for flops in (1.0, 0.6, 0.3):
        if flops < 1:
            prune_to_flops(net, example, "l2", flops=flops, repair=(), tolerance=0.2, progress=False)
        sizes = measure_sizes(net, example)
        assert sizes.macs == sizes.tp == sizes.thop == analytic_macs(net)
        assert sizes.params == sum(p.numel() for p in net.parameters())


def test_counters_differ_by_what_they_count_besides_products():
    """ConvNet has biases, norms and activations, which Torch-Pruning and thop count in part, and we do not."""
    sizes = measure_sizes(conv_net(), torch.zeros(1, 3, 8, 8))
    products = 64 * (16 * 27 + 16 * 144 + 16 * 9 + 8 * 16) + 32 * 5
    assert sizes.macs == products
    assert products < sizes.tp < 1.1 * products
    assert products <= sizes.thop < 1.1 * products


@pytest.mark.parametrize("write", [write_folders, write_parquet])
def test_statistics_and_gradients_are_gathered_once(tmp_path, monkeypatch, write):
    config = tiny_config(write(tmp_path / "data"))
    check_inputs(config, config.trials())
    shared = Shared(LoadedNetwork(config, "net", 42, "cpu"), 42)
    calls = []
    calibrate, gradients = pruning_state.calibrate, criteria.accumulate_gradients
    monkeypatch.setattr(pruning_state, "calibrate", lambda *a, **o: calls.append("stats") or calibrate(*a, **o))
    monkeypatch.setattr(criteria, "accumulate_gradients", lambda *a, **o: calls.append("labels") or gradients(*a, **o))
    models = [shared.prepare(find_criterion(name))[0] for name in ("capture", "hull", "taylor", "taylor", "l2")]
    assert calls == ["stats", "labels"]
    for name in ("cap-qgw", "hybrid", "cap-qgw", "hybrid"):
        _, importance, seconds = shared.prepare(find_criterion(name))
        assert importance.stats is shared.statistics(*(["gradients"] if name == "cap-qgw" else []))
    assert set(seconds) == {"statistics", "gradients"}
    assert calls == ["stats", "labels", "stats", "labels"]
    assert shared.statistics("gradients").has_gradients
    assert not shared.statistics().has_gradients
    assert shared.statistics().num_images == 24
    assert calls == ["stats", "labels", "stats", "labels"]
    assert len({id(model) for model in models}) == 5
    first, second = models[2].conv1.weight.grad, models[3].conv1.weight.grad
    assert first is not second
    assert torch.equal(first, second)
    assert shared.network.model.conv1.weight.grad is None
    assert models[4].conv1.weight.grad is None
    assert set(shared.prepare(find_criterion("taylor"))[2]) == {"gradients"}


def test_activations_are_gathered_once(folders, monkeypatch):
    shared = Shared(LoadedNetwork(tiny_config(folders), "net", 42, "cpu"), 42)
    gather, calls = activation_criteria.gather_activations, []
    monkeypatch.setattr(
        activation_criteria, "gather_activations", lambda *a, **o: calls.append("images") or gather(*a, **o)
    )
    (model, importance, seconds), (other, second, _) = (shared.prepare(find_criterion("vbp")) for _ in range(2))
    assert calls == ["images"]
    assert set(seconds) == {"activations"}
    assert importance.statistics.num_images == 24
    assert model is not other
    group = full_group(other, "conv1")
    assert torch.equal(second(group), importance(group))


def test_what_is_evaluated(folders):
    config = tiny_config(folders)
    loader, count = LoadedNetwork(config, "net", 42, "cpu").images.evaluation
    assert count == 40
    assert sum(len(labels) for _, labels in loader) == 40
    data = dataclasses.replace(config.data, evaluate_on="selection")
    network = LoadedNetwork(dataclasses.replace(config, data=data), "net", 42, "cpu")
    loader, count = network.images.evaluation
    assert count == 10
    assert torch.equal(loader.indices, split_rows(60, data, 42)[1])
    assert isinstance(network.images.train, ArrayDataset)
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, test_images=7))
    assert LoadedNetwork(few, "net", 42, "cpu").images.evaluation[1] == 7


def test_training_loader_shuffles_and_leaves_the_selection_out(folders):
    shared = Shared(LoadedNetwork(tiny_config(folders), "net", 42, "cpu"), 42)
    one, two = (list(shared.training_loader()) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))
    assert sum(len(labels) for _, labels in one) == 50
    assert shared.training_loader().augment


def test_large_images_are_read_lazily(folders):
    config = tiny_config(folders, networks=(NetworkConfig("net", "cases:conv_net", str(folders), image_size=72),))
    shared = Shared(LoadedNetwork(config, "net", 42, "cpu"), 42)
    images, labels = next(iter(shared.calibration))
    assert images.shape == (12, 3, 72, 72)
    assert len(labels) == 12
    assert sum(len(y) for _, y in shared.training_loader()) == 50


def test_inputs_are_checked_before_any_work(folders, tmp_path):
    def check(**options):
        config = tiny_config(folders, networks=(NetworkConfig("net", **options),))
        check_inputs(config, config.trials())

    flat = tmp_path / "flat"
    (flat / "train").mkdir(parents=True)
    for file in list((folders / "train" / "class0").iterdir())[:2]:
        (flat / "train" / file.name).write_bytes(file.read_bytes())
    for options, message in [
        ({"model": "resnet19", "data": str(folders)}, "did you mean"),
        ({"model": "cases:conv_net", "data": str(tmp_path / "no")}, "check the path"),
        ({"model": "cases:conv_net", "data": str(folders), "checkpoint": "no.safetensors"}, "there is none"),
        ({"model": "cases:conv_net", "data": str(folders), "checkpoint": "a", "pretrained": True}, "got both"),
        ({"model": "cases:conv_net", "data": str(folders / "train")}, "apart from the training images"),
        ({"model": "cases:conv_net", "data": str(folders), "test_data": str(folders / "train")}, "apart from"),
        ({"model": "cases:conv_net", "data": str(flat)}, "expected labels"),
    ]:
        with pytest.raises(TwoAxisError, match=message):
            check(**options)
    shards = write_parquet(tmp_path / "shards")
    with pytest.raises(TwoAxisError, match="apart from the training images"):
        check(model="cases:conv_net", data=str(shards / "*.parquet"))
    check(model="cases:conv_net", data=str(shards / "train*"), test_data=str(shards / "test*"))


def test_images_of_a_factory(folders):
    def network(data, **options):
        return LoadedNetwork(tiny_config(folders, networks=(NetworkConfig("net", "cases:conv_net", data, **options),)),
                             "net", 1, "cpu")  # fmt: skip

    drawn, fixed = network("bench_cases:drawn_pictures"), network("bench_cases:fixed_pictures")
    assert drawn.for_seed(1) is drawn
    other = drawn.for_seed(2)
    assert not torch.equal(other.images.train.images, drawn.images.train.images)
    assert torch.equal(other.images.train.images, drawn_pictures("train", 2).images)
    assert other.images.evaluation[1] == 40
    assert fixed.for_seed(2) is fixed
    few = dataclasses.replace(fixed.config, data=dataclasses.replace(fixed.config.data, test_images=7))
    assert LoadedNetwork(few, "net", 1, "cpu").images.evaluation[1] == 7
    for data, options, message in [
        ("bench_cases:fixed_pictures", {"image_size": 8}, "image_size is set"),
        ("bench_cases:not_callable", {}, "expected an ArrayDataset or ImageDataset, got int"),
        ("bench_cases:pictured", {}, "did you mean pictures"),
    ]:
        with pytest.raises(TwoAxisError, match=message):
            check_inputs(network(data, **options).config, network(data, **options).config.trials())
    same = dataclasses.replace(fixed.config, data=DataConfig(test_split="train"))
    with pytest.raises(TwoAxisError, match="apart from the training images"):
        check_inputs(same, same.trials())
