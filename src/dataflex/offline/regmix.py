"""A mixture from finished small runs by regression (RegMix, Liu et al., ICLR 2025, arXiv 2407.01492)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataflex.errors import ConfigError, Problem, listing
from dataflex.functional.mixing import RegmixResult, regmix_fit


class Runs(NamedTuple):
    """What the runs were trained on and what came of it.

    Attributes:
        names: the domains.
        unit: what the mixtures count, `sample` or `token`.
        mixtures: mean proportions of each run (runs, k).
        losses: of each run (runs,).
    """

    names: list[str]
    unit: str
    mixtures: np.ndarray
    losses: np.ndarray


def read_runs(folders: Sequence[Path], metric: str) -> Runs:
    """Mixtures and losses of runs with `train_type: dynamic_mix`.

    Args:
        metric: a key of `all_results.json`, such as eval_loss or eval_wiki_loss.

    Raises:
        ConfigError: every run that cannot be read, or has other domains or another unit than the first.
    """
    names: list[str] = []
    units: list[str] = []
    problems, mixtures, losses = [], [], []
    for folder in folders:
        try:
            unit, mixture = _mean_mixture(folder)
            results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(Problem(str(folder), "", f"is not a finished run with dynamic_mix: {error}"))
            continue
        names, units = names or list(mixture), units or [unit]
        if mixture.keys() != set(names):
            problems.append(Problem(str(folder), "", f"mixes {listing(mixture)}; the runs before it {listing(names)}"))
        elif unit != units[0]:
            problems.append(Problem(str(folder), "mixture_unit", f"is {unit}; that of the runs before it {units[0]}"))
        elif metric not in results:
            measured = [key for key in results if key.endswith("loss")]
            problems.append(Problem(str(folder), metric, f"is not in all_results.json, which has {listing(measured)}"))
        else:
            mixtures.append([mixture[name] for name in names])
            losses.append(float(results[metric]))
    if problems:
        raise ConfigError(problems)
    return Runs(names, (units or ["sample"])[0], np.array(mixtures), np.array(losses))


def _mean_mixture(folder: Path) -> tuple[str, dict[str, float]]:
    """What a run's proportions count, and their mean over its samples."""
    lines = (folder / "dataflex" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "mixture"]
    total = sum(event["samples"] for event in events)
    if not total:
        raise ValueError("dataflex/events.jsonl holds no mixture")
    names = events[0]["proportions"]
    return events[0]["unit"], {name: sum(event["proportions"][name] * event["samples"] for event in events) / total for name in names}


def fit(runs: Runs, prior: Sequence[float] | None, seed: int) -> RegmixResult:
    """The mixture with the lowest loss that the regression predicts.

    Args:
        prior: mixtures are tried around this one; equal shares if None.

    Raises:
        ConfigError: there are too few runs.
    """
    k = len(runs.names)
    if prior is not None and len(prior) != k:
        raise ConfigError(Problem("command line", "--prior", f"has {len(prior)} numbers and there are {k} domains: {', '.join(runs.names)}"))
    try:
        return regmix_fit(runs.mixtures, runs.losses, np.ones(k) / k if prior is None else np.asarray(prior), seed)
    except ValueError as error:
        raise ConfigError(Problem("command line", "RUN", str(error))) from None
