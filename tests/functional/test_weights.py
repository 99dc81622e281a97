"""The maths of the weighters against hand-computed values (ALGORITHMS A1-A4) and their laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataflex.functional.weights import annealed, joint_update_weights, loss_weights, mean_one, similarity_weights, token_gate

FIVE = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
STRATEGIES = ("linupper", "uniform", "quadratic", "extremes")
losses = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=12).map(torch.tensor)


@pytest.mark.parametrize(
    ("strategy", "r", "shares"),
    [
        ("linupper", 1.0, [0.092562, 0.152609, 0.251610, 0.251610, 0.251610]),
        ("linupper", 0.4, [0.024368, 0.085052, 0.296860, 0.296860, 0.296860]),
        ("linupper", 100.0, [0.198603, 0.199599, 0.200599, 0.200599, 0.200599]),
        ("quadratic", 1.0, [0.111703, 0.236476, 0.303641, 0.236476, 0.111703]),
        ("extremes", 1.0, [0.279256, 0.169377, 0.102733, 0.169377, 0.279256]),
        ("uniform", 0.1, [0.2] * 5),
    ],
)
def test_loss_weights_oracle(strategy, r, shares):
    assert torch.allclose(loss_weights(FIVE, strategy=strategy, r=r) / 5, torch.tensor(shares), atol=1e-6)


@given(losses, st.sampled_from(STRATEGIES), st.floats(0.05, 100), st.floats(0.1, 3))
def test_loss_weights_are_non_negative_with_mean_one(values, strategy, r, delta):
    weights = loss_weights(values, strategy=strategy, r=r, delta=delta)
    assert bool((weights >= 0).all()) and bool(torch.isfinite(weights).all())
    assert float(weights.mean()) == pytest.approx(1, abs=1e-4)


@given(losses, st.sampled_from(STRATEGIES), st.randoms(use_true_random=False))
def test_loss_weights_follow_a_permutation(values, strategy, random):
    order = list(range(len(values)))
    random.shuffle(order)
    assert torch.allclose(loss_weights(values[order], strategy=strategy), loss_weights(values, strategy=strategy)[order], atol=1e-5)


@given(losses, st.sampled_from(STRATEGIES), st.sampled_from([math.nan, math.inf]))
def test_a_loss_that_is_not_finite_gets_no_weight_and_changes_no_other(values, strategy, bad):
    weights = loss_weights(torch.cat([values, torch.tensor([bad])]), strategy=strategy)
    assert weights[-1] == 0
    assert torch.allclose(weights[:-1], loss_weights(values, strategy=strategy), atol=1e-5)


def test_no_finite_loss_gives_no_weight():
    assert loss_weights(torch.tensor([math.nan, math.inf])).tolist() == [0.0, 0.0]


@given(losses, st.floats(0.2, 10))
def test_the_largest_linupper_weight_is_at_most_exp_1_over_r_times_the_smallest(values, r):
    weights = loss_weights(values, strategy="linupper", r=r)
    assert float(weights.max() / weights.min()) <= math.exp(1 / r) * (1 + 1e-4)


def test_temperature_schedule():
    assert [annealed(1.0, 100.0, step, 4, "step") for step in (0, 3, 4, 9)] == [100.0, 100.0, 1.0, 1.0]
    assert [annealed(1.0, 5.0, step, 4, "linear") for step in (0, 2, 4)] == [5.0, 3.0, 1.0]
    assert annealed(1.0, 100.0, 2, 4, "exponential") == pytest.approx(10.0)


def test_similarity_weights_oracle():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).mean(0)
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert torch.allclose(similarity_weights(features @ anchors), torch.tensor([0.622459, 0.377541]), atol=1e-6)
    assert mean_one(similarity_weights(torch.full((3,), 0.7))).tolist() == pytest.approx([1.0] * 3)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=9).map(torch.tensor), st.booleans(), st.booleans())
def test_similarity_weights_rise_with_similarity_and_ignore_what_is_not_finite(similarity, center, standardize):
    weights = mean_one(similarity_weights(torch.cat([similarity, torch.tensor([math.nan])]), center=center, standardize=standardize))
    assert weights[-1] == 0 and float(weights[:-1].mean()) == pytest.approx(1, abs=1e-4)
    order = similarity.argsort()
    assert bool((weights[:-1][order].diff() >= -1e-6).all())


@pytest.mark.parametrize(("beta", "share"), [(0.0, None), (0.1, 0.739351), (0.5, 0.583203), (1.0, 0.545443)])
def test_joint_update_oracle_of_two_orthogonal_samples(beta, share):
    # s = (.1, 0) with S = I: the target's cosines with the two samples are .1 and 0.
    features = torch.eye(3)[:2]
    target = torch.tensor([0.1, 0.0, math.sqrt(1 - 0.01)])
    weights = joint_update_weights(features, target, beta=beta, tau=0.05) / 2
    expected = share if share is not None else float(torch.sigmoid(torch.tensor(0.1 / 0.05)))
    assert float(weights[0]) == pytest.approx(expected, abs=1e-5)


def test_joint_update_maximises_its_objective_on_a_grid():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(3, 4, generator=generator), dim=1)
    target = torch.randn(4, generator=generator)
    beta, tau = 2.0, 0.3
    s, gram = features @ torch.nn.functional.normalize(target, dim=0), features @ features.T
    grid = torch.tensor([(a, b, 200 - a - b) for a in range(1, 199) for b in range(1, 200 - a)]) / 200
    objective = grid @ s - beta / 2 * ((grid @ gram) * grid).sum(1) - tau * (grid * grid.log()).sum(1)
    best = grid[objective.argmax()]
    assert torch.allclose(joint_update_weights(features, target, beta=beta, tau=tau) / 3, best, atol=0.01)


@given(st.integers(1, 8), st.floats(0, 5), st.floats(0.05, 2), st.integers(0, 99))
def test_joint_update_weights_satisfy_their_fixed_point(n, beta, tau, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1)
    target = torch.nn.functional.normalize(torch.randn(5, generator=generator), dim=0)
    share = joint_update_weights(features, target, beta=beta, tau=tau, max_iterations=20000, tolerance=1e-9) / n
    fixed = torch.softmax((features @ target - beta * (features @ features.T @ share)) / tau, 0)
    assert torch.allclose(share, fixed, atol=1e-4)


def test_joint_update_leaves_out_rows_that_are_not_finite():
    features = torch.cat([torch.eye(3)[:2], torch.full((1, 3), math.nan)])
    weights = joint_update_weights(features, torch.tensor([1.0, 0.0, 0.0]))
    assert weights[-1] == 0 and float(weights.sum()) == pytest.approx(2)
    assert torch.allclose(weights[:2], joint_update_weights(features[:2], torch.tensor([1.0, 0.0, 0.0])), atol=1e-6)


def test_token_gates_oracle():
    tokens = -torch.tensor([0.5, 0.25]).log()
    assert float(tokens.mean()) == pytest.approx(1.039721, abs=1e-6)
    assert float((tokens * token_gate(tokens, "dft", 1.0)).mean()) == pytest.approx(0.346574, abs=1e-6)
    assert float((tokens * token_gate(tokens, "focal", 2.0)).mean()) == pytest.approx(0.476539, abs=1e-6)


def test_dft_gradient_of_the_target_logit_is_minus_p_times_one_minus_p():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(6)
    tokens = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (tokens * token_gate(tokens.detach(), "dft", 1.0)).sum().backward()
    p = logits.detach().softmax(1)[torch.arange(6), targets]
    assert torch.allclose(logits.grad[torch.arange(6), targets], -p * (1 - p), atol=1e-6)
