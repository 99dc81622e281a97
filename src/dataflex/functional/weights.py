"""The maths of the weighters: pure functions from losses, similarities or probabilities to weights.

Non-finite inputs never decide a weight: they get weight 0 and are left out of every minimum, maximum and mean.
Legend: n samples in scope, D feature size.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Strategy = Literal["linupper", "uniform", "quadratic", "extremes"]
Anneal = Literal["step", "linear", "exponential"]


def loss_strategy(losses: torch.Tensor, low: torch.Tensor, high: torch.Tensor, strategy: Strategy, delta: float) -> torch.Tensor:
    """Preference f (n,) of each loss, from its position h in [-delta, delta] between `low` and `high` (Sow et al., arXiv 2502.06733)."""
    position = 2 * delta * (losses - (low + high) / 2) / (high - low).clamp(min=1e-6)
    h = position.clamp(-delta, delta)
    if strategy == "uniform":
        return torch.zeros_like(h)
    if strategy == "linupper":
        return (h + delta).clamp(max=delta)
    if strategy == "quadratic":
        return 1 - h.square() / delta**2
    return h.abs()


def loss_weights(losses: torch.Tensor, *, strategy: Strategy = "linupper", delta: float = 1.0, r: float = 1.0) -> torch.Tensor:
    """Weights n * softmax(f / r) of the losses (n,): mean 1 over the finite ones, 0 for the others.

    r is a temperature: the largest weight is at most exp((max f - min f) / r) times the smallest.
    """
    if not losses.numel():
        return losses
    finite = torch.isfinite(losses)
    low = losses.masked_fill(~finite, math.inf).min()
    high = losses.masked_fill(~finite, -math.inf).max()
    preference = loss_strategy(losses, low, high, strategy, delta).masked_fill(~finite, -math.inf)
    return torch.softmax(preference / r, 0).nan_to_num(nan=0.0) * finite.sum()  # not a number: none is finite


def annealed(r: float, r_init: float, step: int, steps: int, anneal: Anneal) -> float:
    """The temperature at `step`: `r_init` at step 0, `r` from `steps` on, in between by `anneal`."""
    if step >= steps:
        return r
    progress = step / steps
    if anneal == "linear":
        return r_init + (r - r_init) * progress
    if anneal == "exponential":
        return r_init * (r / r_init) ** progress
    return r_init


def mean_one(weights: torch.Tensor) -> torch.Tensor:
    """`weights` divided by the mean of the non-zero ones; all zero stays all zero."""
    total = weights.sum()
    return weights * ((weights > 0).sum() / total.clamp(min=torch.finfo(weights.dtype).tiny))


def similarity_weights(
    similarity: torch.Tensor, *, tau: float = 1.0, center: bool = False, standardize: bool = False, clip: float | None = None
) -> torch.Tensor:
    """Weights sigmoid(s / tau) of the similarities s (n,), not normalised; 0 where s is not finite (ADAPT, arXiv 2605.05227).

    `center` subtracts the mean of s, `standardize` also divides by its standard deviation: last-layer features are anisotropic, so
    their raw cosines lie close together and the weights hardly differ.
    """
    finite = torch.isfinite(similarity)
    s = similarity.masked_fill(~finite, 0.0)
    count = finite.sum().clamp(min=1)
    if center or standardize:
        s = (s - s.sum() / count).masked_fill(~finite, 0.0)
    if standardize:
        s = s / (s.square().sum() / count).sqrt().clamp(min=1e-6)
    weights = torch.sigmoid((s / tau).clamp(-30, 30))
    return (weights if clip is None else weights.clamp(max=clip)).masked_fill(~finite, 0.0)


def joint_update_weights(
    features: torch.Tensor, target: torch.Tensor, *, beta: float = 0.1, tau: float = 0.05, tolerance: float = 1e-6, max_iterations: int = 2000
) -> torch.Tensor:
    """Weights n * w* (n,), mean 1, with w* = argmax over the simplex of s.w - beta/2 w'Sw + tau H(w).

    s is the cosine of each row of `features` (n, D) with `target` (D,), S the rows' Gram matrix, H the entropy. The objective is
    strictly concave; the damped mirror step below increases it monotonically, where iterating the fixed point undamped does not converge
    once beta * lambda_max(S) / tau is not small. Rows that are not finite get weight 0.
    """
    finite = torch.isfinite(features).all(1)
    z = torch.nn.functional.normalize(features.float().masked_fill(~finite[:, None], 0.0), dim=1, eps=1e-12)
    s = z @ torch.nn.functional.normalize(target.float(), dim=0, eps=1e-12)
    gram = z @ z.T
    rho = tau / (tau + beta)  # tau / (tau + beta * max |S|): unit rows, so the largest entry is 1
    # The error shrinks by 1 - rho per step, so the number of steps is known without looking at it (a look would synchronise a GPU).
    steps = 1 if rho == 1 else min(max_iterations, math.ceil(math.log(tolerance) / math.log1p(-rho)))
    floor = torch.where(finite, 0.0, -math.inf)
    log_w = torch.log_softmax(floor, 0)
    for _ in range(steps):
        gradient = (s - beta * (gram @ log_w.exp())) / tau
        log_w = torch.log_softmax((1 - rho) * log_w.clamp(min=-60) + rho * gradient + floor, 0)
    return torch.where(finite, log_w.exp(), 0.0).nan_to_num(nan=0.0) * finite.sum()


def token_gate(token_losses: torch.Tensor, kind: Literal["dft", "focal"], power: float) -> torch.Tensor:
    """Gate of each token from the probability p = exp(-loss) the model gives its target: p^power (DFT) or (1 - p)^power (focal)."""
    probability = torch.exp(-token_losses)
    return probability.pow(power) if kind == "dft" else (1 - probability).clamp(min=torch.finfo(probability.dtype).tiny).pow(power)
