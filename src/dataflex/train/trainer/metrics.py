"""What DataFlex adds to the Trainer's log lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dataflex.errors import TrainingError
from dataflex.utils.distributed import gather_rows
from dataflex.utils.printable import one_line

_SUMS = ("samples", "weight", "weight_squared", "loss", "nonfinite", "without_targets")


def metric_name(name: str) -> str:
    """As trackers and log lines get it; names of domains are data and may hold anything."""
    return f"dataflex/{one_line(name)}"


class WeightMetrics:
    """Statistics of the weights since the last log line, summed on the device without a synchronisation per step.

    The sums are over this rank's samples; `merged` adds up the ranks.
    """

    def __init__(self, domains: Sequence[str] | None = None):
        self.domains = list(domains or [])
        self._sums: torch.Tensor | None = None
        self._range: torch.Tensor | None = None

    def add(self, weights: torch.Tensor, losses: torch.Tensor, domain_ids: torch.Tensor | None, without_targets: int) -> None:
        """Count one micro-batch: detached `weights` and `losses` (n,), the samples' domains (n,) and the samples that had no target."""
        device, size = losses.device, len(_SUMS) + 2 * len(self.domains)
        if self._sums is None or self._range is None:
            self._sums = torch.zeros(size, dtype=torch.float64, device=device)
            self._range = torch.full((2,), -math.inf, dtype=torch.float64, device=device)  # of -w and w: both are maxima
        weights, losses = weights.double(), losses.double()
        finite = torch.isfinite(losses)
        counts = torch.ones_like(losses)
        rows = [counts, weights, weights.square(), torch.where(finite, losses, 0.0), (~finite).double(), torch.zeros_like(losses)]
        self._sums[: len(_SUMS)] += torch.stack(rows).sum(1)
        self._sums[_SUMS.index("without_targets")] += without_targets
        if len(weights):
            self._range = torch.maximum(self._range, torch.stack([(-weights).max(), weights.max()]))
        if self.domains and domain_ids is not None:
            member = torch.nn.functional.one_hot(domain_ids, len(self.domains)).double().to(device, non_blocking=True)
            self._sums[len(_SUMS) :] += torch.cat([member.T @ weights, member.sum(0)])

    def merged(self) -> dict[str, list[float]] | None:
        """Sums and range over all ranks, as JSON-ready lists; None when nothing was counted. All ranks must call."""
        size = len(_SUMS) + 2 * len(self.domains)
        sums = torch.zeros(size, dtype=torch.float64) if self._sums is None else self._sums.cpu()
        extremes = torch.full((2,), -math.inf, dtype=torch.float64) if self._range is None else self._range.cpu()
        sums, extremes = gather_rows(sums, "the metrics").sum(0), gather_rows(extremes, "the metrics").amax(0)
        return {"sums": sums.tolist(), "range": extremes.tolist()} if sums[0] else None

    def restore(self, state: dict[str, list[float]] | None, device: torch.device, keep: bool) -> None:
        """Go on from `merged()`; only the rank with `keep` takes it, the others start from nothing."""
        self._sums = self._range = None
        if state is not None and keep:
            self._sums = torch.tensor(state["sums"], dtype=torch.float64, device=device)
            self._range = torch.tensor(state["range"], dtype=torch.float64, device=device)

    def drain(self) -> dict[str, float]:
        """The metrics for a log line, over all ranks; starts anew. All ranks must call."""
        merged = self.merged()
        self._sums = self._range = None
        if merged is None:
            return {}
        total = dict(zip(_SUMS, merged["sums"], strict=False))
        if not math.isfinite(total["weight"]):
            raise TrainingError("the component gave weights that are not finite since the last log line")
        samples, finite = total["samples"], max(total["samples"] - total["nonfinite"], 1)
        lowest, highest = merged["range"]
        metrics = {
            "weight_mean": total["weight"] / samples,
            "weight_min": -lowest + 0.0,
            "weight_max": highest,
            # Share of the samples that would carry the same information at equal weights: 1 when all weights are equal.
            "effective_sample_size": total["weight"] ** 2 / (samples * total["weight_squared"]) if total["weight_squared"] else 0.0,
            "sample_loss": total["loss"] / finite,
        }
        per_domain = merged["sums"][len(_SUMS) :]
        for k, domain in enumerate(self.domains):
            if total["weight"] and len(self.domains) > 1:
                metrics[f"weight_share/{domain}"] = per_domain[k] / total["weight"]
        rare = {"nonfinite_losses": total["nonfinite"], "samples_without_targets": total["without_targets"]}
        return {metric_name(name): value for name, value in {**metrics, **{k: v for k, v in rare.items() if v}}.items()}


class BoundaryMetrics:
    """Values that a boundary leaves for the next log line; the same on all ranks."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def set(self, **values: float) -> None:
        self._values.update(values)

    def merged(self) -> dict[str, Any] | None:
        """What waits for the next log line, as JSON values, or None."""
        return dict(self._values) or None

    def restore(self, state: dict[str, Any] | None, device: torch.device, keep: bool) -> None:
        """Go on from `merged()`."""
        self._values = dict(state or {})

    def drain(self) -> dict[str, float]:
        """The metrics for a log line; starts anew."""
        values, self._values = self._values, {}
        return {metric_name(name): value for name, value in values.items()}


class DomainMetrics(BoundaryMetrics):
    """Also the mean loss of each domain's target tokens since the last log line, summed on the device without a synchronisation per step."""

    def __init__(self, domains: Sequence[str]):
        super().__init__()
        self.domains = list(domains)
        self._sums: torch.Tensor | None = None

    def add(self, sums: torch.Tensor) -> None:
        """Count an optimizer step: columns 0 and 1 of `sums` (k, ...) are this rank's sum of token losses and their number."""
        part = sums[:, :2]
        self._sums = part.clone() if self._sums is None else self._sums + part

    def merged(self) -> dict[str, Any] | None:
        own = torch.zeros(len(self.domains), 2, dtype=torch.float64) if self._sums is None else self._sums.cpu()
        return {"values": super().merged(), "sums": gather_rows(own, "the metrics").sum(0).tolist()}

    def restore(self, state: dict[str, Any] | None, device: torch.device, keep: bool) -> None:
        state = state or {"values": None, "sums": None}
        super().restore(state["values"], device, keep)
        self._sums = torch.tensor(state["sums"], dtype=torch.float64, device=device) if state["sums"] and keep else None

    def drain(self) -> dict[str, float]:
        merged, self._sums = self.merged(), None
        assert merged is not None
        losses = {name: sums[0] / sums[1] for name, sums in zip(self.domains, merged["sums"], strict=True) if sums[1]}
        return {**super().drain(), **{metric_name(f"loss/{name}"): loss for name, loss in losses.items()}}
