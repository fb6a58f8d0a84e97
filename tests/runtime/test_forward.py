"""A pass of a model over images: what it yields, what it refuses, and that everything is restored afterwards."""

from types import SimpleNamespace

import pytest
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.runtime import progress_bar
from tp_twoaxis.runtime.forward import find_logits, forward_pass, inference_state


class Noisy(nn.Module):
    """Draws random numbers, has a frozen BatchNorm, and fails on request."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout()
        self.error = None

    def forward(self, x):
        torch.rand(5)
        if self.error is not None:
            raise self.error
        return self.dropout(self.norm(self.linear(x)))


def rows(*sizes):
    return [torch.randn(size, 4, generator=torch.Generator().manual_seed(size)) for size in sizes]


def failing(loader, error):
    yield from loader
    raise error


def state_of(model):
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "tensors": [(id(t), t.dtype, t.device, t._version) for t in [*model.parameters(), *model.buffers()]],
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
    }


# what comes back


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("culprit", [None, "model", "loader", "body", "interrupt"])
def test_everything_is_restored_whoever_raises(culprit, outer, gradients):
    model = Noisy().train()
    model.norm.eval()
    kept = model.linear.register_forward_hook(lambda *_: None)
    loader = failing(rows(3, 3), OSError("disk gone")) if culprit == "loader" else rows(3, 3)
    if culprit == "model":
        model.error = RuntimeError("no")
    body = {"body": RuntimeError("inside"), "interrupt": KeyboardInterrupt()}.get(culprit)
    raised = None
    with torch.set_grad_enabled(outer):
        before = state_of(model)
        try:
            with forward_pass(nn.DataParallel(model), loader, what="look", gradients=gradients) as run:
                run.hook(model.linear, lambda *_: None)
                run.hook(model.norm, lambda *_: None, before=True)
                for _, output in run:
                    assert not any(module.training for module in model.modules())
                    assert torch.is_grad_enabled() == output.requires_grad == gradients
                    torch.manual_seed(99)
                    if body is not None:
                        raise body
        except (Exception, KeyboardInterrupt) as error:
            raised = error
        assert state_of(model) == before
    kept.remove()
    expected = {"model": TwoAxisError, "loader": TwoAxisError, "body": RuntimeError, "interrupt": KeyboardInterrupt}
    assert type(raised) is expected.get(culprit, type(None))


def test_inference_state_alone():
    model = Noisy().train()
    before = state_of(model)
    with inference_state(model, gradients=True):
        assert not model.dropout.training
        assert torch.is_grad_enabled()
        torch.rand(3)
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="inside"), inference_state(model):
        raise RuntimeError("inside")
    assert state_of(model) == before


class Moved(nn.Module):
    """Notes where it is sent instead of going there."""

    def __init__(self):
        super().__init__()
        self.weight, self.places = nn.Parameter(torch.zeros(1)), []

    def to(self, device):
        self.places.append(str(device))
        return self

    def forward(self, x):
        return x


@pytest.mark.parametrize("raises", [False, True])
def test_another_device_is_for_the_time_of_the_pass(raises):
    model = Moved()
    try:
        with forward_pass(model, rows(2), what="look", device="meta") as run:
            assert (run.device, model.places) == (torch.device("meta"), ["meta"])
            assert [output.device.type for _, output in run] == ["meta"]
            if raises:
                raise RuntimeError
    except RuntimeError:
        pass
    assert model.places == ["meta", "cpu"]


def test_the_models_own_device_moves_nothing():
    model = Moved()
    for device in (None, "cpu", torch.device("cpu")):
        with forward_pass(model, rows(2), what="look", device=device) as run:
            assert (run.device, len(list(run))) == (torch.device("cpu"), 1)
    assert model.places == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parameters_keep_their_identity_on_the_way_to_cuda_and_back():
    model = conv_net()
    before = [(id(p), p.device) for p in model.parameters()]
    expected = [model(images) for images, _ in batches()]
    with forward_pass(model, batches(), what="look", device="cuda") as run:
        outputs = [output for _, output in run]
    assert all(output.is_cuda for output in outputs)
    torch.testing.assert_close([output.cpu() for output in outputs], expected, rtol=1e-4, atol=1e-4)
    assert [(id(p), p.device) for p in model.parameters()] == before


# what it yields


def test_batches_with_the_models_outputs():
    model = conv_net()
    with forward_pass(model, batches(), what="look", labels=True) as run:
        got = [(batch.number, batch.images, batch.labels, output) for batch, output in run]
    assert run.images == 48
    for index, (images, labels) in enumerate(batches()):
        number, own, own_labels, output = got[index]
        assert number == index
        assert torch.equal(own, images)
        assert torch.equal(own_labels, labels)
        with torch.no_grad():
            assert torch.equal(output, model(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_follow_the_models_dtype_and_the_model_keeps_it(dtype):
    model = nn.Linear(4, 2).to(dtype)
    with forward_pass(model, rows(3), what="look") as run:
        assert run.dtype == dtype
        assert [output.dtype for _, output in run] == [dtype]
    assert model.weight.dtype == dtype
    with forward_pass(nn.Identity(), [torch.zeros(2, 1).double()], what="look") as run:
        assert [output.dtype for _, output in run] == [torch.float32]


@pytest.mark.parametrize(
    ("max_images", "expected"), [(None, [3, 3, 3]), (9, [3, 3, 3]), (6, [3, 3]), (4, [3, 1]), (1, [1])]
)
def test_images_are_cut_and_nothing_is_read_beyond(max_images, expected):
    read = []

    def stream():
        for batch in rows(3, 3, 3):
            read.append(len(batch))
            yield batch

    with forward_pass(nn.Linear(4, 2), stream(), what="look", max_images=max_images) as run:
        assert [(len(batch.images), len(output)) for batch, output in run] == [(n, n) for n in expected]
        assert run.images == sum(expected)
    assert len(read) == len(expected)


def test_a_batch_may_run_more_than_once_or_not_at_all():
    calls = []
    model = nn.Linear(4, 2)
    with forward_pass(model, rows(3, 2), what="look") as run:
        run.hook(model, lambda *_: calls.append(1))
        for batch in run.batches:
            if batch.number == 1:
                assert torch.equal(run(batch), run(batch))
    assert (len(calls), run.images) == (2, 5)


def test_hooks_see_the_pass_and_only_it():
    model, seen = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), []
    with forward_pass(model, rows(2), what="look") as run:
        run.hook(model[0], lambda layer, inputs: seen.append(("before", inputs[0].shape)), before=True)
        run.hook(model[0], lambda layer, inputs, output: seen.append(("after", output.shape)))
        run.hook(model[1], lambda layer, inputs, kwargs, output: seen.append(("keywords", kwargs)), with_kwargs=True)
        list(run)
    model(rows(2)[0])
    assert seen == [("before", (2, 4)), ("after", (2, 3)), ("keywords", {})]


# labels


def test_labels_are_given_where_they_are_wanted():
    plain, labelled = rows(2), [(rows(2)[0], torch.tensor([0, 1]))]
    model = nn.Linear(4, 2)

    def labels_of(loader, labels):
        with forward_pass(model, loader, what="accuracy", labels=labels) as run:
            return [None if batch.labels is None else batch.labels.tolist() for batch, _ in run]

    assert labels_of(labelled, False) == [None]
    assert labels_of(labelled, True) == labels_of(labelled, "required") == [[0, 1]]
    assert labels_of(plain, True) == [None]
    with pytest.raises(TwoAxisError, match=r"accuracy: expected labels, batch 1 has none; yield \(images, labels\)"):
        labels_of([*labelled, *plain], "required")


# compiled models


class NeverCalled:
    """A compiler backend that must not run."""

    def __call__(self, graph, example_inputs):
        raise AssertionError("compiled")


@pytest.mark.parametrize("how", ["outside", "in place", "a part", "a part in place"])
def test_compiled_models_run_eagerly_and_stay_compiled(how):
    seen, inner = [], nn.Linear(4, 3)
    model = nn.Sequential(inner, nn.ReLU())
    compiled = model
    if how == "outside":
        compiled = torch.compile(model, backend=NeverCalled())
    elif how == "in place":
        model.compile(backend=NeverCalled())
    elif how == "a part":
        model[0] = torch.compile(inner, backend=NeverCalled())
    else:
        inner.compile(backend=NeverCalled())
    with forward_pass(compiled, rows(2), what="look") as run:
        run.hook(inner, lambda *_: seen.append(1))
        (_, output), *_ = run
    assert seen == [1]
    torch.testing.assert_close(output, nn.functional.linear(rows(2)[0], inner.weight, inner.bias).relu().detach())
    with pytest.raises(Exception, match="compiled"):
        compiled(rows(2)[0])


# what it refuses


@pytest.mark.parametrize(("loader", "max_images"), [([], None), ([torch.zeros(0, 4)], None), (rows(3), 0)])
def test_a_pass_without_images_is_an_error(loader, max_images):
    message = "expected at least one batch of images, got none; check the data path and split"
    for through_model in (True, False):
        with (
            pytest.raises(TwoAxisError, match=message),
            forward_pass(nn.Linear(4, 2), loader, what="look", max_images=max_images) as run,
        ):
            list(run if through_model else run.batches)


def test_stopping_early_is_no_error():
    with forward_pass(nn.Linear(4, 2), rows(3, 3), what="look") as run:
        next(iter(run))
    assert run.images == 3


def test_errors_of_model_and_loader_name_the_batch():
    model = nn.Linear(4, 2)
    loader = [torch.zeros(2, 4), torch.zeros(3, 5)]
    message = r"Linear does not run on batch 1 of shape \[3, 5\] \(RuntimeError: .*\); .*; the model is as it was"
    with pytest.raises(TwoAxisError, match=message), forward_pass(model, loader, what="look") as run:
        list(run)
    message = "loader: batch 1 raised OSError: disk gone; the model is as it was"
    with (
        pytest.raises(TwoAxisError, match=message),
        forward_pass(model, failing(rows(2), OSError("disk gone")), what="look") as run,
    ):
        list(run)
    with (
        pytest.raises(TwoAxisError, match="NaN or infinite pixels"),
        forward_pass(model, [torch.full((1, 4), torch.nan)], what="look") as run,
    ):
        list(run)


def test_an_error_of_our_own_keeps_its_text():
    model = Noisy()
    model.error = TwoAxisError("as it is")
    with pytest.raises(TwoAxisError, match=r"^as it is$"), forward_pass(model, rows(2), what="look") as run:
        list(run)


def test_torchscript_is_refused(recwarn):
    scripted = torch.jit.script(nn.Linear(4, 2))
    with pytest.raises(TwoAxisError, match="TorchScript"), forward_pass(scripted, rows(2), what="look"):
        pass


# logits


LOGITS = torch.tensor([[1.0, 2.0]])


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, torch.zeros(3)),
        [LOGITS],
        {"loss": torch.zeros(()), "logits": LOGITS},
        SimpleNamespace(logits=(LOGITS,)),
    ],
    ids=["tensor", "tuple", "list", "dict with logits", "object"],
)
def test_logits_are_found_in_what_models_return(output):
    assert find_logits(output, nn.Identity()) is LOGITS

    class Model(nn.Module):
        def forward(self, x):
            return output

    with forward_pass(Model(), rows(2), what="look") as run:
        assert [run.logits(batch) for batch in run.batches] == [LOGITS]


@pytest.mark.parametrize(
    "output", [None, 3.0, (), {}, [{"logits": None}], {"out": LOGITS, "aux": LOGITS}, {"z": LOGITS}]
)
def test_no_logits(output):
    with pytest.raises(TwoAxisError, match="expected logits from Identity, got"):
        find_logits(output, nn.Identity())


def test_progress_bar_carries_the_name(capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "INTERVAL", 0.0)
    with forward_pass(nn.Linear(4, 2), rows(2), what="looking", progress=True) as run:
        list(run)
    assert "looking" in capsys.readouterr().err
    with forward_pass(nn.Linear(4, 2), rows(2), what="looking") as run:
        list(run)
    assert capsys.readouterr().err == ""
