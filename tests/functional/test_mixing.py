"""The maths of the mixers against hand-computed values (ALGORITHMS C1-C8), brute force and their laws."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from dataflex.functional.mixing import (
    AdoState,
    ScalingLaw,
    ado_preference,
    ado_step,
    doremi_excess,
    doremi_token_weights,
    doremi_update,
    fit_scaling_law,
    interleave,
    odm_epsilon,
    odm_policy,
    odm_rewards,
    proportions,
    quotas,
    random_proportions,
    regmix_fit,
    regmix_mixtures,
    static_proportions,
)

THIRDS = np.full(3, 1 / 3)
shares = st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(lambda values: sum(values) > 1e-3)
vectors = st.lists(st.floats(-20, 20), min_size=1, max_size=40).map(np.array)


def is_mixture(values):
    return bool((values >= 0).all()) and values.sum() == pytest.approx(1)


# --- shares and whole rows ---


@given(shares)
def test_proportions_sum_to_one_and_keep_ratios(values):
    result = proportions(values, len(values))
    assert is_mixture(result) and result.dtype == np.float64
    assert_allclose(result * sum(values), values, atol=1e-9)


def test_proportions_do_not_change_their_input():
    values = np.array([1.0, 3.0])
    assert proportions(values, 2).tolist() == [0.25, 0.75] and values.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "expected 3 proportions"),
        ([[1, 2, 3]], r"shape \(1, 3\)"),
        ([1, -1e-9, 1], "not negative"),
        ([1, math.nan, 1], "finite"),
        ([1, math.inf, 1], "finite"),
        ([0, 0, 0], "sum above 0"),
        ([1e308, 1e308, 1e308], "sum above 0 that is finite"),
    ],
)
def test_bad_proportions(values, message):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=message):
        proportions(values, 3)


@pytest.mark.parametrize(
    ("values", "n", "expected"),
    [
        ((0.55, 0.30, 0.15), 10, [6, 3, 1]),  # not (5, 3, 2), which giving what is left to the last domain would
        ((0.15, 0.30, 0.55), 10, [2, 3, 5]),
        ((0.29, 0.71), 100, [29, 71]),  # 0.29 * 100 is 28.999999999999996
        ((1, 1, 7), 12, [2, 1, 9]),  # remainders 1/3 thrice
        ((1, 4, 1), 10, [2, 7, 1]),  # 2/3 thrice
        ((0.1,) * 10, 3, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
        ((1, 1, 1), 10**9, [333333334, 333333333, 333333333]),
        ((0, 1), 5, [0, 5]),
        ((1, 1), 0, [0, 0]),
    ],
)
def test_quotas_oracle(values, n, expected):
    assert quotas(values, n).tolist() == expected


@given(shares, st.integers(0, 10**7))
def test_quotas_sum_to_n_and_are_off_by_less_than_a_row(values, n):
    counts, exact = quotas(values, n), proportions(values, len(values)) * n
    assert counts.dtype == np.int64 and counts.sum() == n and (counts >= 0).all()
    assert (np.abs(counts - exact) < 1 + 1e-5).all()
    assert (counts[exact == 0] == 0).all()


@given(st.lists(st.integers(0, 12), min_size=2, max_size=4).filter(any), st.integers(0, 12))
def test_quotas_are_the_nearest_whole_numbers(weights, n):
    """Largest remainder minimises the squared distance; in exact arithmetic, among the nearest the first by index gets more."""
    total = sum(weights)
    candidates = [counts for counts in itertools.product(range(n + 1), repeat=len(weights)) if sum(counts) == n]
    distance = {counts: sum((count * total - n * weight) ** 2 for count, weight in zip(counts, weights, strict=True)) for counts in candidates}
    nearest = [counts for counts in candidates if distance[counts] == min(distance.values())]
    assert tuple(quotas(weights, n).tolist()) == max(nearest)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_interleaving_is_a_permutation_that_keeps_each_domains_order(counts):
    order = interleave(np.array(counts))
    assert sorted(order.tolist()) == list(range(sum(counts)))
    domains = np.repeat(np.arange(len(counts)), counts)
    for domain in range(len(counts)):
        own = order[domains[order] == domain]
        assert (np.diff(own) > 0).all()


# --- fixed and random mixtures ---


def test_static_mixtures():
    sizes = [100, 400, 0]
    assert static_proportions(sizes, "uniform").tolist() == pytest.approx([1 / 3] * 3)
    assert static_proportions(sizes).tolist() == pytest.approx([0.2, 0.8, 0])
    assert static_proportions(sizes, temperature=0.5).tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert static_proportions(sizes, temperature=0).tolist() == [0.5, 0.5, 0]
    assert static_proportions([1e300, 1e300], temperature=2).tolist() == [0.5, 0.5]


def test_unimax_oracle():
    # Budget 90: the smallest may give 2 * 10 of its 30; 70 are left for two, 35 each; the last is not short.
    assert_allclose(static_proportions([1000, 10, 50], "unimax", budget=90, max_epochs=2), np.array([35, 20, 35]) / 90)
    assert_allclose(static_proportions([5, 5], "unimax", budget=1000, max_epochs=1), [0.5, 0.5])
    with pytest.raises(ValueError, match="budget"):
        static_proportions([1, 2], "unimax")


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.floats(1, 2000), st.floats(0.5, 5))
def test_unimax_repeats_no_domain_too_often_and_prefers_none(sizes, budget, max_epochs):
    sizes = np.array(sizes)
    budget = min(budget, sizes.sum() * max_epochs)
    given_rows = static_proportions(sizes, "unimax", budget=budget, max_epochs=max_epochs) * budget
    assert (given_rows <= sizes * max_epochs * (1 + 1e-9)).all()
    free = given_rows < sizes * max_epochs * (1 - 1e-9)
    assert not free.any() or given_rows[free] == pytest.approx(given_rows.max())


@pytest.mark.parametrize("concentration", [0.5, 1.0, 10.0])
def test_random_mixtures_have_the_moments_of_a_dirichlet_distribution(concentration):
    k = 4
    drawn = np.stack([random_proportions(k, concentration, 0, update) for update in range(4000)])
    assert_allclose(drawn.sum(1), 1)
    assert_allclose(drawn.mean(0), 1 / k, atol=0.02)
    assert_allclose(drawn.var(0), (k - 1) / (k**2 * (k * concentration + 1)), rtol=0.1)


def test_random_mixtures_depend_on_the_key_alone():
    assert random_proportions(3, 1.0, 0, 5).tolist() == random_proportions(3, 1.0, 0, 5).tolist()
    assert random_proportions(3, 1.0, 0, 5).tolist() != random_proportions(3, 1.0, 0, 6).tolist()


# --- DoReMi ---


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


EQUAL = tensor(1, 1, 1) / 3


def test_doremi_oracle():
    assert_allclose(doremi_update(EQUAL.log(), tensor(0.6, 0.3, 0.0)).exp(), [0.436648, 0.323563, 0.239788], atol=1e-6)


def test_a_domain_without_tokens_keeps_its_excess():
    excess = doremi_excess(tensor(6, 3, 0), tensor(10, 10, 0), previous=tensor(9, 9, 0.2))
    assert excess.tolist() == [0.6, 0.3, 0.2]
    assert_allclose(doremi_update(EQUAL.log(), excess).exp(), [0.414660, 0.307274, 0.278065], atol=1e-6)


def test_an_excess_that_is_not_finite_decides_nothing():
    assert doremi_excess(tensor(math.nan, math.inf, 1), tensor(1, 1, 2), tensor(0.1, 0.2, 0.3)).tolist() == [0.1, 0.2, 0.5]


@given(vectors, st.floats(0, 5), st.sampled_from([0.0, 1e-3, 0.5, 1.0]))
def test_doremi_keeps_a_mixture_with_a_floor(excess, eta, smoothing):
    excess = torch.from_numpy(np.asarray(excess, dtype=np.float64))
    k = len(excess)
    start = torch.full((k,), -math.log(k), dtype=torch.float64)
    alpha = doremi_update(start, excess, eta, smoothing).exp().numpy()
    assert is_mixture(alpha) and alpha.min() >= smoothing / k * (1 - 1e-9)
    assert_allclose(alpha, doremi_update(start, excess + 3, eta, smoothing).exp(), atol=1e-9)


def test_doremi_survives_an_extreme_excess():
    log_alpha = doremi_update(EQUAL.log(), tensor(1e4, 0, 0))
    assert torch.isfinite(log_alpha).all() and log_alpha.exp()[0].item() == pytest.approx(1 - 1e-3 * 2 / 3)


def test_doremi_token_weights():
    assert doremi_token_weights(tensor(0.6, 0.2, 0.2), tensor(0.3, 0.7, 0)).tolist() == pytest.approx([0.875, 0.125, 0])
    assert doremi_token_weights(EQUAL, EQUAL).tolist() == pytest.approx([1 / 3] * 3)


# --- ODM ---


def test_odm_epsilon_oracle():
    expected = {1: 1 / 3, 2: 1 / 3, 3: 1 / 3, 4: 0.302574, 5: 0.270630, 10: 0.191365, 100: 0.060515, 1000: 0.019136}
    assert {t: odm_epsilon(t, 3) for t in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("variant", ["paper", "exp3"])
def test_odm_policy_oracle(variant):
    assert_allclose(odm_policy(np.array([3.0, 2.0, 1.0]), 10, variant), [0.362731, 0.331427, 0.305842], atol=1e-6)


def test_odm_linear_policy_oracle():
    epsilon = odm_epsilon(10, 3)
    expected = (1 - 3 * epsilon) * np.array([3, 2, 1]) / 6 + epsilon
    assert_allclose(odm_policy(np.array([3.0, 2.0, 1.0]), 10, "code_linear"), expected)
    assert odm_policy(np.zeros(4), 1000, "code_linear").tolist() == [0.25] * 4


@pytest.mark.parametrize("variant", ["paper", "code_linear", "exp3"])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_odm_starts_uniform(variant, t):
    assert_allclose(odm_policy(np.array([9.0, 2.0, 1.0]), t, variant), THIRDS)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40).map(np.array), st.integers(1, 10**6), st.sampled_from(["paper", "code_linear", "exp3"]))
def test_odm_policies_explore_every_domain(rewards, t, variant):
    policy = odm_policy(rewards, t, variant)
    assert is_mixture(policy) and policy.min() >= odm_epsilon(t, len(rewards)) * (1 - 1e-9)
    assert (np.diff(policy[np.argsort(rewards)]) >= -1e-12).all()


def test_odm_rewards_oracle():
    before, sums, counts, policy = np.array([1.0, 2.0, 3.0]), np.array([6.0, 4.0, 0.0]), np.array([3, 1, 0]), np.array([0.5, 0.25, 0.25])
    # Mean losses 2, 4 and none; over the shares 4 and 16.
    assert_allclose(odm_rewards(before, sums, counts, policy), [0.9 + 0.4, 1.8 + 1.6, 3])
    assert_allclose(odm_rewards(before, sums, counts, policy, "code_linear"), [0.9 + math.exp(2) / 10, 1.8 + math.exp(4) / 10, 3])
    assert_allclose(odm_rewards(before, sums, counts, policy, "exp3"), [1.4, 3.6, 3])


@pytest.mark.parametrize("variant", ["paper", "code_linear", "exp3"])
def test_a_loss_that_is_not_finite_leaves_the_reward(variant):
    rewards = odm_rewards(np.array([1.0, 2.0]), np.array([math.nan, 1e6]), np.array([1, 1]), np.array([0.5, 0.0]), variant)
    assert rewards.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("variant", ["paper", "code_linear", "exp3"])
def test_odm_ranks_domains_by_loss(variant):
    losses, policy, rewards = np.array([3.0, 2.0, 1.0, 0.5]), np.full(4, 0.25), np.zeros(4)
    rng, total = np.random.default_rng(0), np.zeros(4)
    for t in range(1, 3000):
        counts = np.bincount(rng.choice(4, size=8, p=policy), minlength=4)
        rewards = odm_rewards(rewards, losses * counts, counts, policy, variant)
        policy = odm_policy(rewards, t, variant)
        total += policy
    assert (np.diff(total) < 0).all() and total[0] > 1.1 * total[3]


# --- ADO ---

LAWS = [ScalingLaw(math.log(4), 0.0, 0.5), ScalingLaw(math.log(2), math.log(1.5), 0.2)]
HALVES = np.full(2, 0.5)


def test_scaling_law_oracle():
    assert [float(law.loss(100)) for law in LAWS] == pytest.approx([1.4, 2.2962], abs=1e-4)
    assert [law.speed(100) for law in LAWS] == pytest.approx([0.002, 0.001592], abs=1e-6)
    for law in LAWS:  # the speed is the slope
        assert law.speed(100) == pytest.approx(float(law.loss(99.99) - law.loss(100.01)) / 0.02, rel=1e-6)


def test_the_exponent_has_a_floor_in_the_speed_only():
    flat = ScalingLaw(math.log(4), 0.0, 0.0)
    assert float(flat.loss(100)) == 5 and flat.speed(100) == pytest.approx(0.05 * 4 / 100)


def test_ado_preference_oracle():
    assert_allclose(ado_preference(LAWS, 100, HALVES, HALVES), [0.5567, 0.4433], atol=1e-4)


def test_ado_preference_follows_prior_and_square_root_of_recent_share():
    same = [LAWS[0]] * 2
    assert_allclose(ado_preference(same, 100, np.array([0.3, 0.7]), HALVES), [0.3, 0.7])
    assert_allclose(ado_preference(same, 100, HALVES, np.array([0.2, 0.8])), [1 / 3, 2 / 3])


def test_ado_keeps_domains_without_a_law_at_their_prior_and_every_domain_above_the_floor():
    prior = np.array([0.5, 0.3, 0.2])
    assert_allclose(ado_preference([LAWS[0], None, LAWS[0]], 100, prior, THIRDS), prior)
    assert_allclose(ado_preference([None] * 3, 100, prior, THIRDS), prior)
    stopped = ScalingLaw(-20, 0.0, 0.8)
    assert_allclose(ado_preference([LAWS[0], stopped], 100, HALVES, HALVES), np.array([1, 0.01]) / 1.01, rtol=1e-6)


def test_ado_step_oracle():
    """As the authors' code: at step t, policy = 0.9 average + 0.1 rho, then average += (rho - average) / (t + 1)."""
    drawn = np.array([[1.0, 1.0], [3.0, 0.0], [2.0, 6.0], [0.0, 0.0]])
    recent, average, state = HALVES, HALVES, AdoState.start(HALVES)
    for t in range(1, 5):
        if drawn[t - 1].any():
            recent = 0.9 * recent + 0.1 * drawn[t - 1] / drawn[t - 1].sum()
        rho = ado_preference(LAWS, 100 * t, HALVES, recent)
        state = ado_step(state, LAWS, 100 * t, drawn[t - 1 : t], HALVES)
        assert_allclose(state.recent, recent)
        assert_allclose(state.policy, 0.9 * average + 0.1 * rho)
        average = average + (rho - average) / (t + 1)


def test_ado_updates_that_come_less_often_count_every_step():
    drawn = np.array([[1.0, 1.0], [3.0, 0.0], [2.0, 6.0]])
    state = ado_step(AdoState.start(HALVES), LAWS, 100, drawn[:2], HALVES)
    assert_allclose(state.recent, [0.55, 0.45])
    rho = state.preference
    assert_allclose(state.average, HALVES)  # two steps, both on the prior
    state = ado_step(state, LAWS, 200, drawn[2:], HALVES)
    assert state.steps == 3
    assert_allclose(state.average, HALVES * 2 / 3 + rho / 3)
    before = state
    state = ado_step(state, LAWS, 300, drawn[:2], HALVES)
    assert_allclose(state.average, before.average * 3 / 5 + before.preference * 2 / 5)


@pytest.mark.parametrize("points", [50, 300, 10_000])
@pytest.mark.parametrize(("eps", "beta", "a"), [(1.0, 4.0, 0.5), (1.5, 2.0, 0.2), (0.2, 3.0, 0.3), (2.0, 30.0, 0.7)])
def test_the_fit_recovers_noiseless_curves(eps, beta, a, points):
    n = np.linspace(1, 10_000, points)
    law = fit_scaling_law(n, eps + beta * n**-a)
    assert law is not None
    assert [math.exp(law.log_eps), math.exp(law.log_beta), law.a] == pytest.approx([eps, beta, a], rel=0.01)


def test_the_fit_stands_noise_and_a_few_wild_losses():
    n = np.arange(1, 5001) * 64.0
    rng = np.random.default_rng(0)
    clean = 0.8 + 6 * n**-0.3
    losses = clean * np.exp(0.02 * rng.standard_normal(len(n)))
    losses[rng.choice(len(n), 20)] = math.nan
    losses[rng.choice(len(n), 5)] = 50
    law = fit_scaling_law(n, losses)
    assert law is not None
    assert_allclose(law.loss(n[500:]), clean[500:], rtol=0.03)


def test_smoothing_helps_against_noise():
    n = np.arange(1, 5001.0)
    clean = 0.8 + 6 * n**-0.3
    errors = {True: [], False: []}
    for seed in range(6):
        losses = clean * np.random.default_rng(seed).uniform(0.7, 1.3, len(n))
        for smooth in errors:
            law = fit_scaling_law(n, losses, smooth=smooth)
            errors[smooth].append(np.abs(law.loss(n[500:]) / clean[500:] - 1).mean())
    assert np.mean(errors[True]) < np.mean(errors[False])


def test_the_floor_of_eps_can_be_set():
    n = np.linspace(1, 5000, 300)
    losses = 0.3 + 2 * n**-0.4
    assert math.exp(fit_scaling_law(n, losses).log_eps) == pytest.approx(0.3, rel=0.01)
    floored = fit_scaling_law(n, losses, min_log_eps=0.5)
    assert floored.log_eps == pytest.approx(0.5, abs=0.01)
    assert fit_scaling_law(n, losses, min_log_eps=-1).log_eps == pytest.approx(-1, abs=0.01)


def test_a_steady_loss_is_not_learned_fast():
    n = np.arange(1, 301.0)
    for losses in (np.full(300, 2.0), np.linspace(1, 2, 300)):
        law = fit_scaling_law(n, losses)
        assert law is not None and law.speed(300) < 1e-4
        assert np.isfinite([law.log_beta, law.log_eps, law.a]).all()


@pytest.mark.parametrize("losses", [[], [1.0, 0.9, 0.8], [math.nan] * 50, [math.inf] * 50, [0.0, -1.0] * 20, [1.0, math.nan] + [math.nan] * 20])
def test_too_few_usable_losses_have_no_law(losses):
    assert fit_scaling_law(np.arange(1, len(losses) + 1), losses) is None


# --- RegMix ---


@pytest.fixture(scope="module")
def runs():
    return regmix_mixtures(256, np.full(4, 0.25), "runs")


def test_regmix_finds_the_corner_of_a_linear_loss(runs):
    result = regmix_fit(runs, runs @ np.array([1.0, 0.5, 2.0, 0.7]), np.full(4, 0.25), 0, degree=1)
    assert is_mixture(result.proportions) and result.proportions[1] > 0.99
    assert result.predicted_loss == pytest.approx(0.5, abs=0.01)
    assert result.spearman == pytest.approx(1, abs=1e-3) and result.num_runs == 256


def test_regmix_finds_the_bottom_of_a_bowl(runs):
    bottom = np.array([0.4, 0.3, 0.2, 0.1])
    losses = 1 + ((runs - bottom) ** 2).sum(1)
    losses[:3] = math.nan, math.inf, -math.inf
    result = regmix_fit(runs, losses, np.full(4, 0.25), 0)
    assert_allclose(result.proportions, bottom, atol=0.02)
    assert result.spearman > 0.999 and result.num_runs == 253


def test_regmix_agrees_with_the_closed_form_of_ridge(runs, monkeypatch):
    from sklearn import linear_model

    losses = runs @ np.array([1.0, 0.5, 2.0, 0.7]) + 0.1 * np.random.default_rng(0).standard_normal(len(runs))
    strength = 5.0
    monkeypatch.setattr(linear_model, "RidgeCV", lambda alphas: linear_model.Ridge(strength))
    result = regmix_fit(runs, losses, np.full(4, 0.25), 0, degree=1)
    mean, deviation = runs.mean(0), runs.std(0)
    x = (runs - mean) / deviation
    weights = np.linalg.solve(x.T @ x + strength * np.eye(4), x.T @ (losses - losses.mean()))
    expected = losses.mean() + (result.proportions - mean) / deviation @ weights
    assert result.predicted_loss == pytest.approx(expected, abs=1e-9)


def test_regmix_reports_when_losses_cannot_be_predicted(runs):
    noise = np.random.default_rng(0).standard_normal(len(runs))
    assert abs(regmix_fit(runs, noise, np.full(4, 0.25), 0, draws=1000).spearman) < 0.25
    assert math.isnan(regmix_fit(runs, np.ones(len(runs)), np.full(4, 0.25), 0, draws=1000).spearman)


def test_regmix_keeps_to_the_limit(runs):
    limit = np.array([1.0, 0.3, 1.0, 1.0])
    losses = runs @ np.array([1.0, 0.5, 2.0, 0.7])
    result = regmix_fit(runs, losses, np.full(4, 0.25), 0, degree=1, draws=20_000, limit=limit)
    assert 0.2 < result.proportions[1] <= 0.3
    assert (regmix_mixtures(500, np.full(4, 0.25), 1, limit=limit) <= limit).all()
    with pytest.raises(ValueError, match="limit"):
        regmix_mixtures(10, np.full(4, 0.25), 1, limit=np.full(4, 0.2))


def test_regmix_is_keyed_and_needs_runs(runs):
    losses = ((runs - 0.25) ** 2).sum(1)
    one, two, other = (regmix_fit(runs, losses, np.full(4, 0.25), key, draws=5000) for key in (0, 0, 1))
    assert one.proportions.tolist() == two.proportions.tolist() != other.proportions.tolist()
    with pytest.raises(ValueError, match="at least 10 runs"):
        regmix_fit(runs[:9], losses[:9], np.full(4, 0.25), 0)


@pytest.mark.parametrize("number", [1, 15, 16, 100])
def test_regmix_mixtures_reach_from_the_corners_to_the_prior(number):
    drawn = regmix_mixtures(number, np.array([0.7, 0.2, 0.1]), 0)
    assert drawn.shape == (number, 3)
    assert_allclose(drawn.sum(1), 1)
    if number == 100:
        assert drawn.max() > 0.99 and np.abs(drawn - [0.7, 0.2, 0.1]).max(1).min() < 0.1
        assert_allclose(drawn.mean(0), [0.7, 0.2, 0.1], atol=0.1)


@given(st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_functions_leave_the_global_generator_alone(key):
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    random_proportions(3, 1.0, key)
    regmix_mixtures(20, THIRDS, key)
    assert np.random.get_state()[1].tolist() == before
