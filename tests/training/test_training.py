"""The training loop against updates written by hand, interrupted runs and several ranks."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import training_ranks
from cases import batches, conv_net
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from tp_twoaxis.data import ArrayDataset
from tp_twoaxis.errors import FileFormatError, TwoAxisError
from tp_twoaxis.runtime import progress_bar
from tp_twoaxis.training import (
    Distillation,
    Recipe,
    find_recipe,
    finetune,
    learning_rate,
    training_batches,
    training_loss,
)


def linear(seed=0, inputs=6, classes=3):
    torch.manual_seed(seed)
    return nn.Linear(inputs, classes, dtype=torch.float64)


def vectors(count=12, batch_size=4, inputs=6, classes=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (count,), generator=generator)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def array_loader(count=40, batch_size=8, augment=True):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (count,), generator=generator)
    data = ArrayDataset(pixels, labels, (0.5,) * 3, (0.25,) * 3)
    return data.loader(batch_size, shuffle=True, generator=torch.Generator().manual_seed(5), augment=augment)


def item_loader():
    """Read one by one and augmented by the batch, as larger images are."""
    data = array_loader().dataset
    return training_batches([data[i] for i in range(len(data))], 8, seed=6)


def global_loader():
    """Shuffled by torch's global random numbers."""
    data = array_loader().dataset
    return DataLoader([data[i] for i in range(len(data))], 8, shuffle=True)


class Interrupted:
    """A loader that passes another one's batches on and raises after some of them, in all passes together."""

    def __init__(self, loader, after, error):
        self.loader, self.left, self.error = loader, after, error

    def __len__(self):
        return len(self.loader)

    @property
    def generator(self):
        return self.loader.generator

    def __iter__(self):
        for batch in self.loader:
            if self.left == 0:
                raise self.error
            self.left -= 1
            yield batch


class DropoutNet(nn.Sequential):
    """With BatchNorm statistics and random numbers of its own."""

    def __init__(self):
        torch.manual_seed(7)
        super().__init__(
            nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(54, 5)
        )


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_equal_sgd_by_hand(nesterov):
    model, data = linear(), vectors()
    w, b = (p.detach().numpy().copy() for p in (model.weight, model.bias))
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    losses = []
    for step, (x, y) in enumerate(data * 2):
        x, y = x.numpy(), y.numpy()
        rate = 0.1 * (1 + math.cos(math.pi * step / 6)) / 2
        p = softmax(x @ w.T + b)
        losses.append(-np.log(p[np.arange(len(y)), y]).mean())
        error = (p - np.eye(3)[y]) / len(y)
        for value, velocity, gradient in ((w, vw, error.T @ x + 0.02 * w), (b, vb, error.sum(0) + 0.02 * b)):
            velocity *= 0.8
            velocity += gradient
            value -= rate * (gradient + 0.8 * velocity if nesterov else velocity)
    report = finetune(model, data, epochs=2, lr=0.1, momentum=0.8, weight_decay=0.02, nesterov=nesterov, progress=False)
    np.testing.assert_allclose(report.losses, losses, rtol=1e-12)
    np.testing.assert_allclose(model.weight.detach().numpy(), w, rtol=1e-12)
    np.testing.assert_allclose(model.bias.detach().numpy(), b, rtol=1e-12)
    assert (report.batches, report.planned, report.images, report.resumed_at) == (6, 6, 24, 0)


def test_learning_rates_are_torchs_cosine_and_goyals_warmup():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(20):
        assert learning_rate(step, 20, lr=0.3) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()
    rates = [learning_rate(t, 100, lr=1.0, schedule="linear", warmup=0.2) for t in range(100)]
    steps = np.diff(rates)
    np.testing.assert_allclose(steps[:20], 1 / 21)
    np.testing.assert_allclose(steps[20:], -1 / 80)
    assert max(rates) == rates[20] == 1.0
    assert {learning_rate(t, 5, lr=0.2, schedule="constant") for t in range(5)} == {0.2}
    report = finetune(linear(), vectors(), epochs=3, max_batches=5, lr=0.3, warmup=0.4, progress=False)
    assert report.learning_rates == [learning_rate(t, 5, lr=0.3, warmup=0.4) for t in range(5)]


@pytest.mark.parametrize(("epochs", "cap", "expected"), [(5, 200, 15), (5, 7, 7), (1, None, 3), (2, 3, 3)])
def test_batches_are_capped_in_all(epochs, cap, expected):
    report = finetune(linear(), vectors(), epochs=epochs, max_batches=cap, progress=False)
    assert report.batches == report.planned == len(report.losses) == len(report.learning_rates) == expected
    assert len(report.accuracies) == math.ceil(expected / 3)


def test_a_loader_without_a_length_needs_a_cap_and_is_read_once():
    one, other = linear(), linear()
    expected = finetune(one, vectors(), epochs=1, max_batches=None, progress=False)
    report = finetune(other, iter(vectors()), epochs=1, max_batches=3, progress=False)
    assert report.losses == expected.losses
    report = finetune(other, itertools.cycle(vectors()), epochs=1, max_batches=7, progress=False)
    assert report.batches == 7
    assert finetune(other, iter(vectors()), epochs=1, max_batches=9, progress=False).planned == 9
    with pytest.raises(TwoAxisError, match="max_batches: expected a number"):
        finetune(other, iter(vectors()), max_batches=None, progress=False)
    before = values(other)
    with pytest.raises(TwoAxisError, match="expected batches in epoch 2, got none"):
        finetune(other, iter(vectors()), epochs=2, max_batches=9, progress=False)
    assert_same(values(other), before)


def test_no_batch_is_drawn_beyond_the_last():
    drawn = []

    def stream():
        for batch in itertools.cycle(vectors()):
            drawn.append(1)
            yield batch

    finetune(linear(), stream(), epochs=1, max_batches=4, progress=False)
    assert len(drawn) == 4


def test_accuracy_counts_every_epoch():
    x = torch.eye(3, dtype=torch.float64)
    model = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    report = finetune(model, [(x, torch.tensor([0, 1, 0]))], epochs=2, lr=1e-6, progress=False)
    assert report.accuracies == [pytest.approx(2 / 3)] * 2
    assert '"batches": 2' in report.to_json()


def test_loss_is_smoothed_cross_entropy_and_hintons_divergence():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 7, 4)) * 3
    y = rng.integers(0, 4, 7)
    smooth = 0.9 * np.eye(4)[y] + 0.1 / 4
    hard = -(smooth * np.log(softmax(student))).sum(1).mean()
    p, q = softmax(teacher / 2.5), softmax(student / 2.5)
    soft = (p * (np.log(p) - np.log(q))).sum(1).mean()
    expected = 0.3 * hard + 0.7 * 2.5**2 * soft
    logits, labels, taught = torch.tensor(student), torch.tensor(y), torch.tensor(teacher)
    options = {"label_smoothing": 0.1, "distillation": Distillation(2.5, 0.7)}
    assert float(training_loss(logits, labels, taught, **options)) == pytest.approx(expected, rel=1e-12)
    assert float(training_loss(logits, labels, label_smoothing=0.1)) == pytest.approx(hard, rel=1e-12)
    assert training_loss(logits.bfloat16(), labels).dtype == torch.float32
    with pytest.raises(TwoAxisError, match="needs labels"):
        training_loss(logits, None, taught, distillation=Distillation(2.0, 0.5))


def test_a_teacher_teaches_and_stays_as_it_is():
    teacher, student = linear(1).train(), linear(2)
    before = values(teacher)
    images = [x for x, _ in vectors(60, 12)]
    report = finetune(
        student,
        images,
        epochs=200,
        max_batches=None,
        lr=0.5,
        weight_decay=0.0,
        teacher=teacher,
        distillation=(2.0, 1.0),
        progress=False,
    )
    assert report.losses[-1] < 1e-4 * report.losses[0]
    assert report.accuracies[0] == 0
    assert_same(values(teacher), before)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    with pytest.raises(TwoAxisError, match="needs labels"):
        finetune(student, images, progress=False)
    with pytest.raises(TwoAxisError, match="another network"):
        finetune(student, images, teacher=student, progress=False)


def test_what_was_borrowed_comes_back():
    model = conv_net()
    model.conv1.weight.requires_grad_(False)
    frozen = model.conv1.weight.clone()
    statistics = model.bn1.running_mean.clone()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    torch.manual_seed(11)
    random = torch.get_rng_state()
    with torch.no_grad():
        finetune(nn.DataParallel(model), batches(), epochs=1, progress=False)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.conv1.weight, frozen)
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(model.bn1.running_mean, statistics)
    # in a model in training mode a BatchNorm in eval mode stays frozen
    model.train()
    model.bn1.eval()
    flags = [module.training for module in model.modules()]
    statistics = model.bn1.running_mean.clone()
    finetune(model, batches(), epochs=1, progress=False)
    assert torch.equal(model.bn1.running_mean, statistics)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError("disk on fire"), TwoAxisError, "batch 3 raised OSError: disk on fire"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(error, kind, message):
    model = DropoutNet()
    before = values(model)
    with pytest.raises(kind, match=message):
        finetune(model, Interrupted(array_loader(), 3, error), lr=0.5, channels_last=True, progress=False)
    assert_same(values(model), before)
    assert all(p.grad is None and p.is_contiguous() for p in model.parameters())


def test_a_loss_that_is_not_finite_is_one_error():
    model = linear()
    before = values(model)
    with pytest.raises(TwoAxisError, match=r"the loss of batch \d+ is (inf|nan) at learning rate .*lower lr"):
        finetune(model, vectors(), epochs=50, lr=1e200, progress=False)
    assert_same(values(model), before)


def test_layout_and_precision():
    one, other = conv_net().train(), conv_net().train()
    strides = [p.stride() for p in one.parameters()]
    plain = finetune(one, batches(), epochs=2, progress=False)
    last = finetune(other, batches(), epochs=2, channels_last=True, progress=False)
    np.testing.assert_allclose(plain.losses, last.losses, rtol=1e-4)
    assert [p.stride() for p in other.parameters()] == strides
    half = finetune(conv_net().train(), batches(), epochs=2, amp="bf16", progress=False)
    assert half.losses != plain.losses
    np.testing.assert_allclose(half.losses, plain.losses, rtol=0.1)


def test_a_distributed_sampler_shuffles_anew_each_epoch():
    data = array_loader().dataset
    items = [data[i] for i in range(len(data))]
    orders = []

    class Watched(DistributedSampler):
        def __iter__(self):
            order = list(super().__iter__())
            orders.append(order)
            return iter(order)

    sampler = Watched(items, num_replicas=1, rank=0, seed=2)
    finetune(DropoutNet(), DataLoader(items, 8, sampler=sampler), epochs=2, progress=False)
    assert len(orders) == 2
    assert orders[0] != orders[1]


def test_seed_decides_what_the_loader_does_not():
    def losses(seed):
        return finetune(DropoutNet(), batches(), epochs=2, seed=seed, progress=False).losses

    assert losses(0) == losses(0) != losses(1)


@pytest.mark.parametrize("loader_of", [array_loader, item_loader, global_loader])
@pytest.mark.parametrize(("every", "after"), [(None, 2), (3, 2), (None, 8), (3, 8), (3, 11)])
def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, loader_of, every, after):
    options = {"epochs": 3, "lr": 0.1, "progress": False, "seed": 4, "warmup": 0.1}
    whole = DropoutNet()
    loader = loader_of()
    expected = finetune(whole, loader, **options)
    cut = DropoutNet()
    options |= {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": every}
    with pytest.raises(KeyboardInterrupt):
        finetune(cut, Interrupted(loader_of(), after, KeyboardInterrupt()), **options)
    # another process: nothing is left but the file
    resumed = DropoutNet()
    second = loader_of()
    torch.manual_seed(99)
    report = finetune(resumed, second, resume=True, **options)
    done = after - after % every if every else after - after % 5
    assert report.resumed_at == max(done, after - after % 5)
    assert_same(values(resumed), values(whole))
    assert (report.losses, report.learning_rates) == (expected.losses, expected.learning_rates)
    assert (report.accuracies, report.images) == (expected.accuracies, expected.images)
    # what the loader would draw next is the same too
    if loader.generator is not None:
        assert torch.equal(second.generator.get_state(), loader.generator.get_state())
    # a finished run is only read
    again = DropoutNet()
    report = finetune(again, loader_of(), resume=True, **options)
    assert (report.resumed_at, report.losses) == (15, expected.losses)
    assert_same(values(again), values(whole))


def test_checkpoint_is_plain_and_guarded(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    options = {"checkpoint": path, "progress": False}
    model = linear()
    finetune(model, vectors(), epochs=1, **options)
    tensors = load_file(path)
    assert {"weights/weight", "weights/bias", "momentum/weight", "momentum/bias", "random/0/cpu"} == set(tensors)
    assert torch.equal(tensors["weights/weight"], model.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    with pytest.raises(TwoAxisError, match="the checkpoint exists; pass resume=True"):
        finetune(model, vectors(), epochs=1, **options)
    before = values(model)
    with pytest.raises(TwoAxisError, match=r"got one with lr 0.01 instead of 0.5"):
        finetune(model, vectors(), epochs=1, lr=0.5, resume=True, **options)
    with pytest.raises(TwoAxisError, match="those of another"):
        finetune(linear(classes=4), vectors(), epochs=1, resume=True, **options)
    assert_same(values(model), before)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FileFormatError, match="cut short"):
        finetune(model, vectors(), epochs=1, resume=True, **options)
    torch.save(model.state_dict(), path)
    with pytest.raises(FileFormatError, match="pickle"):
        finetune(model, vectors(), epochs=1, resume=True, **options)
    path.unlink()

    def full(*_, **__):
        raise TwoAxisError("disk full")

    monkeypatch.setattr("tp_twoaxis.runtime.serialization.write_bytes", full)
    with pytest.raises(TwoAxisError, match="disk full"):
        finetune(model, vectors(), epochs=1, **options)
    assert_same(values(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"max_batches": 0}, "max_batches: expected at least 1"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"lr": math.nan}, "lr: expected a positive number"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup": 1.0}, "warmup: expected a share"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"schedule": "cosin"}, "schedule: expected one of cosine, linear, constant, got 'cosin'"),
        ({"amp": "fp8"}, "amp: expected None, 'bf16' or 'fp16'"),
        ({"amp": "fp16"}, "fp16 needs a model on a CUDA GPU"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov: expected a momentum"),
        ({"teacher": linear(1), "distillation": (0.0, 0.5)}, "positive temperature"),
        ({"teacher": linear(1), "distillation": (1.0, 1.5)}, r"weight in \[0, 1\]"),
        ({"resume": True}, "expected a checkpoint file"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected at least 1"),
        ({"checkpoint": "/nowhere/x.safetensors"}, "does not exist"),
    ],
)
def test_arguments_out_of_range(options, message):
    model = linear()
    before = values(model)
    with pytest.raises(TwoAxisError, match=message):
        finetune(model, vectors(), **{"progress": False, "epochs": 1, **options})
    assert_same(values(model), before)


class Silent(nn.Linear):
    """Returns no logits."""

    def forward(self, x):
        return [super().forward(x)]


@pytest.mark.parametrize(
    ("model", "loader", "message"),
    [
        (linear(), [], "at least one batch"),
        (
            linear(),
            [(torch.zeros(2, 6), torch.tensor([0, 3]))],
            "expected 0..2 .* got 0..3; build it with num_classes=4",
        ),
        (linear(), [(torch.zeros(2, 6), torch.tensor([-1, 1]))], "got -1..1"),
        (linear(), [(torch.zeros(2, 6), torch.zeros(2))], "expected int64"),
        (linear(), [(torch.zeros(2, 6), torch.tensor([0]))], "expected int64"),
        (linear(), [torch.zeros(2, 6)], "training needs labels"),
        (linear(), [(torch.zeros(2, 5), torch.tensor([0, 1]))], "Linear fails in training batch 0 .*RuntimeError"),
        (linear(), [(torch.full((1, 6), math.nan), torch.tensor([0]))], "NaN"),
        (linear().requires_grad_(False), vectors(), "no parameter requires a gradient"),
        (Silent(6, 3), [(torch.zeros(2, 6), torch.tensor([0, 1]))], r"expected logits \[n, K\], got list"),
        (DropoutNet(), [(torch.zeros(1, 3, 8, 8), torch.tensor([9]))], "labels"),
    ],
)
def test_bad_models_and_loaders(model, loader, message):
    with pytest.raises(TwoAxisError, match=message):
        finetune(model, loader, epochs=1, progress=False)


def test_recipes():
    paper = find_recipe("paper", "cifar_resnet18", "cuda")
    assert paper == Recipe(
        epochs=200,
        batch_size=128,
        lr=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=5e-4,
        schedule="cosine",
        warmup=0.0,
        label_smoothing=0.0,
        amp=None,
        channels_last=False,
    )
    assert find_recipe("paper", "timm:mobilenetv2_100", "cpu").lr == 0.05
    fast = find_recipe("fast", "cifar_mobilenet_v2", "cuda:1")
    assert (fast.lr, fast.amp, fast.channels_last) == (0.2, "bf16", True)
    assert find_recipe("fast", "cifar_resnet18", "cpu").amp is None
    with pytest.raises(TwoAxisError, match="expected one of paper, fast, got 'slow'"):
        find_recipe("slow", "x", "cpu")


def test_shards_are_equal_disjoint_and_shuffled():
    data = array_loader(count=41).dataset
    data.images = torch.arange(41, dtype=torch.uint8)[:, None, None, None].expand(41, 3, 8, 8).contiguous()
    seen = []
    for rank in range(3):
        loader = training_batches(data, 6, augment=False, rank=rank, ranks=3)
        rows = [(images[:, 0, 0, 0] * 0.25 + 0.5) * 255 for images, _ in loader]
        assert [len(part) for part in rows] == [2] * 6 + [1]
        order = torch.cat(rows).round().int().tolist()
        assert order != sorted(order)
        seen += order
    assert sorted(seen) == list(range(39))
    for options, message in (({"batch_size": 5}, "multiple of 2"), ({"batch_size": 0}, "batch_size")):
        with pytest.raises(TwoAxisError, match=message):
            training_batches(data, **options, ranks=2)
    with pytest.raises(TwoAxisError, match="at least an image for each"):
        training_batches(data, 100, ranks=50)


def test_larger_images_are_augmented_by_the_batch():
    items = [(torch.full((3, 16, 16), float(i)), i) for i in range(6)]
    plain = training_batches(items, 3, augment=False, seed=1)
    assert all(bool((images == images[:, :1, :1, :1]).all()) for images, _ in plain)
    loader = training_batches(items, 3, seed=1)
    (images, labels), *rest = list(loader)
    assert (len(loader), len(rest), images.shape) == (2, 1, (3, 3, 16, 16))
    assert torch.equal(images.amax((1, 2, 3)).long(), labels)
    report = finetune(nn.Sequential(nn.Flatten(), nn.Linear(768, 6)), loader, epochs=1, lr=1e-4, progress=False)
    assert report.batches == 2


def test_two_ranks_equal_one_process_on_both_their_batches(tmp_path):
    worker = str(Path(training_ranks.__file__))
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), "2", str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    single = training_ranks.network()
    joined = list(zip(training_ranks.shard(0), training_ranks.shard(1), strict=False))
    both = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in joined]
    report = finetune(single, both, **training_ranks.OPTIONS)
    left, right = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, tensor in values(single).items():
        assert torch.equal(left[name], right[name])
        torch.testing.assert_close(left[name], tensor, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(left["losses"], torch.tensor(report.losses, dtype=torch.float64), rtol=1e-10, atol=0)
    assert left["counts"].tolist() == [report.images, report.batches]
    # interrupted and resumed on both ranks
    assert torch.equal(left["resumed.weight"], left["weight"])
    # BatchNorm statistics are rank 0's everywhere
    assert torch.equal(left["running_mean"], right["running_mean"])


def test_progress_bar_shows_loss_and_accuracy(capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "INTERVAL", 0.0)
    finetune(linear(), vectors(), epochs=1, progress=True)
    text = capsys.readouterr().err
    assert "training" in text
    finetune(linear(), vectors(), epochs=1, progress=False)
    assert capsys.readouterr().err == ""


def test_functional_cross_entropy_agrees():
    x, y = vectors()[0]
    model = linear()
    assert torch.equal(training_loss(model(x), y), F.cross_entropy(model(x), y))
