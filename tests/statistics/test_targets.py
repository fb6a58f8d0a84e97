"""Task variables against their definitions, image by image."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis import TwoAxisError
from tp_twoaxis.statistics.targets import LABEL_FREE, LABELLED, TARGETS, task_variables


def draw(n=20, classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_every_variable_equals_its_definition(classes, dtype):
    logits, labels = draw(classes=classes, dtype=dtype)
    variables = task_variables(logits, labels)
    expected = reference.task_variables(logits.double().numpy(), labels.numpy())
    assert set(variables) == set(expected) == set(TARGETS)
    for name, value in variables.items():
        assert value.dtype == torch.float64
        assert value.shape == (20, classes if name == "one_vs_rest" else 1)
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_without_labels_only_the_label_free():
    logits, labels = draw()
    variables = task_variables(logits)
    assert set(variables) == set(LABEL_FREE)
    assert set(LABELLED).isdisjoint(LABEL_FREE)
    for name, value in variables.items():
        assert torch.equal(value, task_variables(logits, labels)[name])


def test_ties_have_margin_zero():
    variables = task_variables(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([1]))
    assert variables["margin"].item() == variables["predicted_margin"].item() == 0.0


def test_far_logits_stay_finite():
    variables = task_variables(torch.tensor([[0.0, 3e4], [3e4, 0.0]], dtype=torch.float16), torch.tensor([0, 0]))
    assert variables["negative_loss"][:, 0].tolist() == [-3e4, 0.0]


def test_gradients_and_inputs_are_left_alone():
    logits, labels = draw()
    logits.requires_grad_()
    before = logits.detach().clone()
    assert not any(value.requires_grad for value in task_variables(logits, labels).values())
    assert torch.equal(logits.detach(), before)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_what_the_definitions_imply(seed, shift):
    logits, labels = draw(seed=seed)
    variables = task_variables(logits, labels)
    correct = logits.argmax(1) == labels
    margin, predicted = variables["margin"][:, 0], variables["predicted_margin"][:, 0]
    assert torch.equal(margin > 0, correct)
    torch.testing.assert_close(margin[correct], predicted[correct])
    assert bool((variables["negative_loss"] <= 0).all())
    assert torch.equal(variables["one_vs_rest"].argmax(1), labels)
    assert torch.equal(variables["one_vs_rest"].sum(1), torch.ones(20, dtype=torch.float64))
    moved = task_variables(logits + shift, labels)
    for name in ("margin", "predicted_margin", "negative_loss"):
        torch.testing.assert_close(moved[name], variables[name])
    for name in ("correct_logit", "predicted_logit"):
        torch.testing.assert_close(moved[name], variables[name] + shift)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = draw()
    assert torch.equal(task_variables(logits, labels.to(dtype))["margin"], task_variables(logits, labels)["margin"])


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 5, 2, 2), ()])
def test_outputs_that_are_no_logits(shape):
    with pytest.raises(TwoAxisError, match=r"expected class logits \[n, K >= 2\].*target=None"):
        task_variables(torch.zeros(shape))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(20), r"class indices \[20\], got torch.float32 \[20\]"),
        (torch.zeros(19, dtype=torch.int64), r"class indices \[20\], got torch.int64 \[19\]"),
        (torch.zeros(20, 5, dtype=torch.int64), r"got torch.int64 \[20, 5\]"),
        (torch.full((20,), 5), r"labels in \[0, 5\), got 5 to 5"),
        (torch.full((20,), -100), r"labels in \[0, 5\), got -100 to -100"),
    ],
)
def test_labels_that_are_no_class_indices(labels, message):
    with pytest.raises(TwoAxisError, match=message):
        task_variables(draw()[0], labels)
