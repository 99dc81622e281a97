"""The maths of the mixers: pure functions from sizes, losses or past runs to the shares of k domains.

Shares are float64 arrays (k,) that are >= 0 and sum to 1. Random ones depend on their key alone. A loss that is not finite decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from dataflex.utils.seeding import derive_seed

StaticRule = Literal["uniform", "size", "unimax"]
OdmVariant = Literal["paper", "code_linear", "exp3"]

# --- shares and whole rows ---


def proportions(values: ArrayLike, k: int) -> np.ndarray:
    """`values` (k,) divided by their sum.

    Raises:
        ValueError: a wrong number of them, or one that is negative or not finite, or none above 0.
    """
    shares = np.array(values, dtype=np.float64)
    if shares.shape != (k,):
        raise ValueError(f"expected {k} proportions, one per domain, got {_shown(shares)} of shape {shares.shape}")
    if not np.isfinite(shares).all() or (shares < 0).any():
        raise ValueError(f"proportions must be finite and not negative, got {_shown(shares)}")
    total = shares.sum()
    if not 0 < total < math.inf:
        raise ValueError(f"proportions must have a sum above 0 that is finite, got {_shown(shares)}")
    return shares / total


def _shown(values: np.ndarray) -> str:
    return np.array2string(values, threshold=20, separator=", ")


def quotas(shares: ArrayLike, n: int) -> np.ndarray:
    """How many of n rows each domain gets, int64 (k,) summing to n, by largest remainder; equal remainders go to the lower index.

    Remainders are compared to a millionth of a row: below is rounding noise (0.29 * 100 is 28.999999999999996), which must not break a tie.
    """
    exact = proportions(shares, np.size(shares)) * n
    counts = np.floor(exact)
    remainders = np.round(exact - counts, 6)
    counts[np.argsort(-remainders, kind="stable")[: n - int(counts.sum())]] += 1
    return counts.astype(np.int64)


def interleave(counts: np.ndarray) -> np.ndarray:
    """The order (n,) in which to take sum(counts) rows that are listed domain by domain, so that every stretch has about the same mixture.

    Row i of c comes at time (i + phase) / c. Each domain is thus spread evenly. The phases, multiples of the golden ratio, spread domains
    of equal counts over each other's gaps; with one phase for all, fifty domains of a single row would come one right after the other.
    """
    phases = (np.arange(1, len(counts) + 1) * ((math.sqrt(5) - 1) / 2)) % 1
    times = [(np.arange(count) + phase) / count for count, phase in zip(counts.tolist(), phases.tolist(), strict=True) if count]
    return np.argsort(np.concatenate(times), kind="stable") if times else np.zeros(0, dtype=np.int64)


# --- fixed and random mixtures ---


def static_proportions(
    sizes: ArrayLike, rule: StaticRule = "size", temperature: float = 1.0, *, budget: float | None = None, max_epochs: float | None = None
) -> np.ndarray:
    """Shares from the domains' `sizes` (k,).

    Args:
        rule: `uniform`; `size` for size^temperature, so 1 is proportional and 0 uniform; `unimax`, as uniform as `budget` rows allow without
            repeating any domain more than `max_epochs` times (Chung et al., arXiv 2304.09151).
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    if rule == "uniform":
        return proportions(np.ones(len(sizes)), len(sizes))
    if rule == "size":
        present = sizes > 0
        logs = temperature * np.log(np.where(present, sizes, 1.0))
        return proportions(np.where(present, np.exp(logs - logs[present].max(initial=-math.inf)), 0.0), len(sizes))
    if budget is None or max_epochs is None:
        raise ValueError("rule 'unimax' needs budget, the rows of the whole training, and max_epochs, how often a row may come up")
    return _unimax(sizes, budget, max_epochs)


def _unimax(sizes: np.ndarray, budget: float, max_epochs: float) -> np.ndarray:
    """The smallest domain gets an equal part of the budget or all it may give; the others share what is left in the same way."""
    given, left = np.zeros(len(sizes)), budget
    for visited, domain in enumerate(np.argsort(sizes, kind="stable")):
        given[domain] = min(left / (len(sizes) - visited), sizes[domain] * max_epochs)
        left -= given[domain]
    return proportions(given, len(sizes))


def random_proportions(k: int, concentration: float, *key: object) -> np.ndarray:
    """Shares from a symmetric Dirichlet distribution: uniform over all mixtures at concentration 1, nearer to equal shares above."""
    return np.random.default_rng(derive_seed("random proportions", *key)).dirichlet(np.full(k, concentration))


# --- DoReMi (Xie et al., NeurIPS 2023, arXiv 2305.10429) ---


def doremi_excess(clipped_sums: torch.Tensor, tokens: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Mean excess loss (k,) of each domain; one without tokens keeps its `previous` one.

    Args:
        clipped_sums: sums (k,) over a domain's tokens, on all ranks, of max(loss - reference loss, 0), clipped token by token.
        tokens: numbers (k,) of those tokens.
    """
    means = clipped_sums / tokens
    return torch.where(torch.isfinite(means), means, previous)


def doremi_update(log_alpha: torch.Tensor, excess: torch.Tensor, eta: float = 1.0, smoothing: float = 1e-3) -> torch.Tensor:
    """The next log alpha (k,): alpha = (1 - smoothing) * softmax(log_alpha + eta * excess) + smoothing / k."""
    alpha = (1 - smoothing) * torch.softmax(log_alpha + eta * excess, 0) + smoothing / len(excess)
    return alpha.log()


def doremi_token_weights(alpha: torch.Tensor, sampling: torch.Tensor) -> torch.Tensor:
    """Weights (k,), summing to 1, of the proxy's token losses: alpha over the shares by which tokens are sampled; 0 where none are."""
    ratio = torch.where(sampling > 0, alpha / sampling, 0.0)
    return ratio / ratio.sum()


# --- online data mixing, ODM (Albalak et al., arXiv 2312.02406) ---


def odm_epsilon(t: int, k: int) -> float:
    """Smallest share of a domain at update t, counted from 1."""
    return min(1 / k, math.sqrt(math.log(k) / (k * max(t, 1))))


def odm_policy(rewards: np.ndarray, t: int, variant: OdmVariant = "paper") -> np.ndarray:
    """Shares (k,) at update t, counted from 1, each at least `odm_epsilon(t, k)`.

    They rise with the exponential of the rewards, or, as in the training class of the released code, linearly (`code_linear`).
    """
    k, epsilon = len(rewards), odm_epsilon(t, len(rewards))
    if variant == "code_linear":
        preference = proportions(rewards, k) if np.any(rewards) else np.full(k, 1 / k)
    else:
        preference = proportions(np.exp(odm_epsilon(t - 1, k) * (rewards - np.max(rewards))), k)
    return (1 - k * epsilon) * preference + epsilon


def odm_rewards(
    rewards: np.ndarray, loss_sums: np.ndarray, counts: np.ndarray, policy: np.ndarray, variant: OdmVariant = "paper", decay: float = 0.9
) -> np.ndarray:
    """The next rewards (k,), from the sums of losses and the numbers of samples of each domain over all ranks; one not seen keeps its own.

    `paper` averages loss / share, `code_linear` the perplexity, both with `decay`; `exp3` adds up loss / share / 10.

    Args:
        policy: the shares by which the samples were drawn.
    """
    means = np.divide(loss_sums, counts, out=np.full(len(rewards), np.nan), where=np.asarray(counts) > 0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # what is not finite is left out below
        if variant == "exp3":
            changed = rewards + means / policy / 10
        else:
            changed = decay * rewards + (1 - decay) * (means / policy if variant == "paper" else np.exp(means))
    return np.where(np.isfinite(changed), changed, rewards)


# --- adaptive data optimization, ADO (Jiang et al., ICLR 2025, arXiv 2410.11820) ---

SMALLEST_EXPONENT = 0.05  # a domain whose loss looks flat keeps a little of its share
FITTED_POINTS = 400
SMOOTHING_WINDOW = 101


@dataclass(frozen=True)
class ScalingLaw:
    """loss(n) = exp(log_eps) + exp(log_beta) * n^-a after n training samples."""

    log_beta: float
    log_eps: float
    a: float

    def loss(self, n: ArrayLike) -> np.ndarray:
        return np.exp(self.log_eps) + self._reducible(n)

    def speed(self, n: float) -> float:
        """How much the loss falls per sample, a * (loss - eps) / n."""
        return float(max(self.a, SMALLEST_EXPONENT) * self._reducible(n) / n)

    def _reducible(self, n: ArrayLike) -> np.ndarray:
        return np.exp(self.log_beta - self.a * np.log(n))


def fit_scaling_law(
    n: ArrayLike,
    loss: ArrayLike,
    *,
    min_log_eps: float = -3.0,
    max_log_beta: float = 6.5,
    max_a: float = 0.8,
    huber: float = 1e-3,
    smooth: bool = True,
) -> ScalingLaw | None:
    """The law through a domain's losses, or None when fewer than four are finite and above 0, or no fit is.

    Minimises the Huber loss of the errors in log loss within the bounds, from the least-squares curve of each of a grid of exponents.

    Args:
        n: samples seen (points,) > 0, rising, about evenly spaced; leave out the first few hundred steps of a run.
        loss: losses (points,) at those.
        min_log_eps: lower bound. The paper's 0.5 supposes losses above 1.65, which those of instruction data are not.
        huber: errors beyond it count linearly.
        smooth: of 404 losses or more, take those of a Savitzky-Golay filter instead.
    """
    from scipy.optimize import least_squares
    from scipy.signal import savgol_filter
    from scipy.special import expit

    counts, losses = np.asarray(n, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    usable = np.isfinite(losses) & (losses > 0)
    counts, losses = counts[usable], losses[usable]
    if len(losses) < 4:
        return None
    if smooth and len(losses) >= 4 * SMOOTHING_WINDOW:
        smoothed = np.maximum(savgol_filter(losses, SMOOTHING_WINDOW, 3), losses.min())  # a cubic may dip below 0
        counts, losses = counts[SMOOTHING_WINDOW:], smoothed[SMOOTHING_WINDOW:]  # the first ones fall too fast for a cubic to follow
    kept = np.unique(np.linspace(0, len(losses) - 1, FITTED_POINTS).round().astype(int))
    log_n, log_loss = np.log(counts[kept]), np.log(losses[kept])

    def residuals(parameters: np.ndarray) -> np.ndarray:
        return np.logaddexp(parameters[0] - parameters[2] * log_n, parameters[1]) - log_loss

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        reducible = expit(parameters[0] - parameters[2] * log_n - parameters[1])
        return np.stack([reducible, 1 - reducible, -log_n * reducible], axis=1)

    lower, upper = np.array([-20.0, min_log_eps, 0.0]), np.array([max_log_beta, np.inf, max_a])
    starts = sorted(_scaling_starts(log_n, log_loss, lower, upper), key=lambda start: float(np.abs(residuals(start)).sum()))
    fits = [
        least_squares(residuals, start, jacobian, bounds=(lower, upper), loss="huber", f_scale=huber, x_scale="jac", max_nfev=100)
        for start in starts[:3]
    ]
    best = min(fits, key=lambda fit: fit.cost)
    return ScalingLaw(*map(float, best.x)) if np.isfinite(best.x).all() else None


def _scaling_starts(log_n: np.ndarray, log_loss: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> list[np.ndarray]:
    """For each of a grid of exponents, the least-squares (log_beta, log_eps, a); for a given exponent the law is linear in beta and eps."""
    starts, losses = [], np.exp(log_loss)
    for a in np.linspace(0, upper[2], 18)[1:-1]:
        power = np.exp(-a * log_n)
        centred = power - power.mean()
        beta = max(centred @ losses / max(centred @ centred, 1e-300), 1e-6)
        eps = max((losses - beta * power).mean(), 1e-6)
        margin = 1e-3  # the search has to start inside its bounds
        starts.append(np.clip([np.log(beta), np.log(eps), a], lower + margin, upper - margin))
    return starts


class AdoState(NamedTuple):
    """What ADO keeps between updates; all arrays (k,).

    Attributes:
        steps: optimizer steps so far.
        recent: moving average of the domains' shares of the training data.
        average: mean over those steps of the preference that held in each; before the first one, the prior.
        preference: the one that holds now.
        policy: the mixture to train on.
    """

    steps: int
    recent: np.ndarray
    average: np.ndarray
    preference: np.ndarray
    policy: np.ndarray

    @classmethod
    def start(cls, prior: np.ndarray) -> AdoState:
        return cls(0, prior, prior, prior, prior)


def ado_preference(laws: Sequence[ScalingLaw | None], n: float, prior: np.ndarray, recent: np.ndarray, min_share: float = 0.01) -> np.ndarray:
    """Shares (k,) proportional to prior * sqrt(recent) * speed of learning after n samples, raised to `min_share` and scaled again.

    A domain without a law keeps its prior share.
    """
    fitted = np.array([law is not None for law in laws])
    speeds = np.array([0.0 if law is None else law.speed(n) for law in laws])
    wanted = prior * np.sqrt(recent) * speeds
    if wanted.sum() > 0:
        shares = np.where(fitted, wanted / wanted.sum() * prior[fitted].sum(), prior)
    else:
        shares = prior
    return proportions(np.maximum(shares, min_share), len(prior))


def ado_step(
    state: AdoState,
    laws: Sequence[ScalingLaw | None],
    n: float,
    drawn: np.ndarray,
    prior: np.ndarray,
    *,
    decay: float = 0.9,
    inertia: float = 0.9,
    min_share: float = 0.01,
) -> AdoState:
    """One update of the mixture.

    Args:
        laws: of each domain; None where none could be fitted.
        n: training samples so far, of all domains together, as `fit_scaling_law` was given.
        drawn: how much of each domain (S, k) each of the S optimizer steps since the last update held.
        prior: the natural mixture (k,).
        decay: of the moving average of the domains' shares of a step.
        inertia: weight of the average of earlier preferences in the policy.
    """
    recent, held = state.recent, len(drawn)
    for amounts in drawn[drawn.sum(1) > 0]:
        recent = decay * recent + (1 - decay) * amounts / amounts.sum()
    steps = state.steps + held
    average = state.average + (state.preference - state.average) * held / max(steps, 1)
    preference = ado_preference(laws, n, prior, recent, min_share)
    return AdoState(steps, recent, average, preference, policy=inertia * average + (1 - inertia) * preference)


# --- RegMix (Liu et al., ICLR 2025, arXiv 2407.01492) ---

FOLDS = 5


@dataclass(frozen=True)
class RegmixResult:
    """A mixture from a regression on finished runs.

    Attributes:
        proportions: the mixture (k,).
        predicted_loss: the regression's loss of it.
        spearman: rank correlation of losses and predictions, each run predicted from those of other folds. Near 0: do not trust the mixture.
        num_runs: runs used; those whose loss is not finite are not.
    """

    proportions: np.ndarray
    predicted_loss: float
    spearman: float
    num_runs: int


def regmix_mixtures(
    number: int, prior: np.ndarray, *key: object, strength: tuple[float, float] = (0.1, 5.0), limit: np.ndarray | None = None
) -> np.ndarray:
    """Mixtures (number, k) from Dirichlet(s * k * prior), with s over a logarithmic range: small ones lie near the corners, large near `prior`.

    Args:
        strength: least and greatest s.
        limit: greatest share (k,) of each domain, such as max_epochs * size / budget; a mixture beyond it is drawn again.

    Raises:
        ValueError: hardly any mixture keeps to the limit.
    """
    rng = np.random.default_rng(derive_seed("regmix", *key))
    prior = proportions(prior, np.size(prior))
    strengths = np.geomspace(*strength, 16)
    kept = np.zeros((0, len(prior)))
    for _ in range(100):
        per_strength = [rng.dirichlet(s * len(prior) * prior, size=-(-number // len(strengths))) for s in strengths]
        drawn = np.stack(per_strength, axis=1).reshape(-1, len(prior))  # every strength early on, since the rest is cut off
        kept = np.concatenate([kept, drawn if limit is None else drawn[(drawn <= limit).all(1)]])
        if len(kept) >= number:
            return kept[:number]
    raise ValueError(f"only {len(kept)} of {100 * number} random mixtures keep to the limit {_shown(np.asarray(limit))}")


def regmix_fit(
    mixtures: np.ndarray,
    losses: np.ndarray,
    prior: np.ndarray,
    *key: object,
    degree: int = 2,
    draws: int = 100_000,
    best: int = 128,
    limit: np.ndarray | None = None,
) -> RegmixResult:
    """The mean of the `best` of many random mixtures by a ridge regression from mixtures (m, k) to losses (m,).

    Args:
        degree: of the polynomial in the shares; the ridge's strength is chosen by leave-one-out error.
        limit: see `regmix_mixtures`.

    Raises:
        ValueError: fewer than ten runs have a finite loss.
    """
    from scipy.stats import spearmanr
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    usable = np.isfinite(losses)
    mixtures, losses = np.asarray(mixtures)[usable], np.asarray(losses)[usable]
    if len(losses) < 2 * FOLDS:
        raise ValueError(f"needs at least {2 * FOLDS} runs with a finite loss, got {len(losses)}")
    model = make_pipeline(PolynomialFeatures(degree, include_bias=False), StandardScaler(), RidgeCV(np.logspace(-6, 3, 19)))
    folds = KFold(FOLDS, shuffle=True, random_state=derive_seed("regmix folds", *key) % 2**32)
    spearman = spearmanr(losses, cross_val_predict(model, mixtures, losses, cv=folds)).statistic if np.ptp(losses) else math.nan
    model.fit(mixtures, losses)
    drawn = regmix_mixtures(draws, prior, *key, limit=limit)
    predicted = np.concatenate([model.predict(drawn[start : start + 4096]) for start in range(0, len(drawn), 4096)])
    chosen = proportions(drawn[np.argsort(predicted, kind="stable")[:best]].mean(0), drawn.shape[1])
    return RegmixResult(chosen, float(model.predict(chosen[None])[0]), float(spearman), len(losses))
