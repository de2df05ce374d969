"""The losses against sums by hand, and where no gradient may go."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from cllm_export.training.losses import autoregressive_loss, consistency_loss  # noqa: E402 - after the skip

EXACT = {"rtol": 0, "atol": 1e-6}
"""A handful of float32 exponentials and logarithms of numbers near 1, rounded at 6e-8 each."""


def logits_of(*rows: list[float]):
    """Logits whose softmax is these probabilities."""
    return torch.tensor(rows).log()


def test_the_consistency_loss_is_the_mean_divergence_over_the_rows_that_count():
    teacher = logits_of([0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05])
    student = logits_of([0.25, 0.25, 0.5], [0.1, 0.3, 0.6], [0.05, 0.9, 0.05])
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.2 * math.log(2) + 0.2 * math.log(2 / 3)
    loss = consistency_loss(student, teacher, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor((first + second) / 2), **EXACT)


def test_it_goes_from_the_teacher_to_the_student_and_not_back():
    one, two = logits_of([0.9, 0.1]), logits_of([0.5, 0.5])
    weight = torch.ones(1)
    assert consistency_loss(two, one, weight) != consistency_loss(one, two, weight)
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    torch.testing.assert_close(consistency_loss(two, one, weight), torch.tensor(expected), **EXACT)


def test_constants_added_to_logits_change_nothing():
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(4, 9), torch.randn(4, 9), torch.ones(4)
    shifted = consistency_loss(student + torch.randn(4, 1), teacher + torch.randn(4, 1), weight)
    torch.testing.assert_close(shifted, consistency_loss(student, teacher, weight), **EXACT)


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient():
    torch.manual_seed(0)
    student = torch.randn(5, 11, requires_grad=True)
    loss = consistency_loss(student, student.detach().clone(), torch.ones(5))
    loss.backward()
    assert loss.item() == 0
    torch.testing.assert_close(student.grad, torch.zeros(5, 11), **EXACT)


@pytest.mark.parametrize("rows", [0, 4])
def test_where_no_row_counts_there_is_no_loss_and_no_gradient(rows):
    student = torch.randn(rows, 7, requires_grad=True)
    loss = consistency_loss(student, torch.randn(rows, 7), torch.zeros(rows))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_a_row_that_does_not_count_gets_no_gradient():
    student = torch.randn(3, 7, requires_grad=True)
    consistency_loss(student, torch.randn(3, 7), torch.tensor([1.0, 0.0, 1.0])).backward()
    assert [bool(row.any()) for row in student.grad] == [True, False, True]


def test_the_teacher_gets_no_gradient():
    shared = torch.randn(4, 7, requires_grad=True)
    other = torch.randn(4, 7, requires_grad=True)
    consistency_loss(other, shared, torch.ones(4)).backward()
    assert shared.grad is None
    assert other.grad.any()


def test_the_autoregressive_loss_is_the_mean_surprise():
    logits, targets = logits_of([0.5, 0.25, 0.25], [0.1, 0.8, 0.1]), torch.tensor([0, 2])
    expected = torch.tensor(-(math.log(0.5) + math.log(0.1)) / 2)
    torch.testing.assert_close(autoregressive_loss(logits, targets), expected, **EXACT)


def test_label_smoothing_spreads_its_share_over_the_whole_vocabulary():
    logits, targets = logits_of([0.5, 0.25, 0.25]), torch.tensor([0])
    sharp, flat = -math.log(0.5), -(math.log(0.5) + 2 * math.log(0.25)) / 3
    expected = torch.tensor(0.9 * sharp + 0.1 * flat)
    torch.testing.assert_close(autoregressive_loss(logits, targets, label_smoothing=0.1), expected, **EXACT)


def test_two_forwards_of_half_a_batch_have_the_gradient_of_one_where_they_hold_as_many_tokens():
    """Each forward's loss is a mean over its own tokens. With other counts, the tokens of the smaller weigh more."""
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9), torch.randint(9, (6,))

    def gradient(parts: list[slice]):
        given = logits.clone().requires_grad_()
        for part in parts:
            (autoregressive_loss(given[part], targets[part]) / len(parts)).backward()
        return given.grad

    whole = gradient([slice(0, 6)])
    torch.testing.assert_close(gradient([slice(0, 3), slice(3, 6)]), whole, **EXACT)
    uneven = gradient([slice(0, 2), slice(2, 6)])
    torch.testing.assert_close(uneven[:2], whole[:2] * 6 / (2 * 2), **EXACT)
    torch.testing.assert_close(uneven[2:], whole[2:] * 6 / (2 * 4), **EXACT)
