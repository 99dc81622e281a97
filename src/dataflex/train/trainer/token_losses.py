"""Per-token losses with one forward pass and one cross-entropy, and the weighted loss built from them.

Legend: B rows, L tokens per row, V vocabulary, n samples, N target tokens (of this micro-batch on this rank).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dataflex.errors import TrainingError
from dataflex.train.data.sample_meta import BatchMeta

_CHUNK_BYTES = 2**25


class _TargetCrossEntropy(torch.autograd.Function):
    """Cross-entropy (N,), in fp32 at least, of logits (N, V) that only this function uses: the backward pass turns them into their gradient in place.

    Beside the logits nothing of size N * V is kept, where `F.cross_entropy` holds the log-softmax and the gradient too.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = torch.empty(len(targets), dtype=at_least_fp32(logits[:0]).dtype, device=logits.device)
        normalizer = torch.empty_like(losses)
        for part in _chunks(logits):
            x = at_least_fp32(logits[part])
            normalizer[part] = torch.logsumexp(x, 1)
            losses[part] = normalizer[part] - x.gather(1, targets[part, None])[:, 0]
        ctx.save_for_backward(logits, targets, normalizer)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, normalizer = ctx.saved_tensors
        for part in _chunks(logits):
            g = grad[part, None]
            p = at_least_fp32(logits[part]).sub_(normalizer[part, None]).exp_()  # in place for fp32 logits
            p.scatter_add_(1, targets[part, None], torch.full_like(g, -1.0))
            p.mul_(g).masked_fill_(g == 0, 0.0)  # a sample of weight 0 adds nothing, also when its loss is not finite
            logits[part] = p
        return logits, None


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """bf16 losses near 1.3 lie on a grid of 0.008: ties everywhere. fp64 stays, for tests that want to see more digits."""
    return x if x.dtype == torch.float64 else x.float()


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    size = max(16, _CHUNK_BYTES // (4 * logits.shape[1]))
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))


def per_sample_loss_from_logits(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Mean loss (B,) over the target tokens of each row, fp32; 0 for a row without targets.

    Args:
        logits: (B, L, V).
        labels: (B, L), not shifted.
    """
    shifted = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    tokens = F.cross_entropy(at_least_fp32(logits).flatten(0, 1), shifted.flatten(), ignore_index=ignore_index, reduction="none").view_as(shifted)
    return tokens.sum(1) / (shifted != ignore_index).sum(1).clamp(min=1)


def segment_means(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Means (n,) of consecutive pieces of `values` (N,) with the given `lengths` (n,), none of them 0."""
    return torch.segment_reduce(values, "mean", lengths=lengths, unsafe=True)  # its checks would synchronise a GPU


def _plain_sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum()


@dataclass
class TokenLosses:
    """Losses as the forward pass gave them.

    Attributes:
        values: fp32, any shape, graph attached.
        index: where the target tokens stand in the flattened `values` (N,), sample by sample.
        total: adds up a tensor shaped like `values` in the order the host does, so that equal weights give the host's very bits.
        auxiliary: a loss to add as it is, such as a mixture-of-experts router's.
        plain: gives the cross-entropies of the target tokens (N,) where `values` are something else, such as smoothed ones.
    """

    values: torch.Tensor
    index: torch.Tensor
    total: Callable[[torch.Tensor], torch.Tensor] = _plain_sum
    auxiliary: torch.Tensor | None = None
    plain: Callable[[], torch.Tensor] | None = None

    def of_targets(self) -> torch.Tensor:
        """Losses of the target tokens (N,)."""
        return self.values.reshape(-1)[self.index]

    def cross_entropies(self) -> torch.Tensor:
        """-log p (N,) of the target tokens, without label smoothing."""
        return self.of_targets() if self.plain is None else self.plain()

    def weighted_total(self, weights: torch.Tensor) -> torch.Tensor:
        """sum_t weights_t * loss_t over the target tokens (N,); a weight of 0 silences a loss that is not finite."""
        spread = torch.zeros(self.values.numel(), dtype=self.values.dtype, device=self.values.device).index_copy(0, self.index, weights)
        spread = spread.view_as(self.values)
        return self.total(torch.where(spread == 0, torch.zeros_like(self.values), self.values * spread))


@dataclass
class MicroStep:
    """One micro-batch on one rank, on its way to a loss whose gradient, summed over ranks and micro-batches, is the optimizer step's.

    Attributes:
        tokens: its token losses.
        meta: its samples.
        num_tokens, num_samples: targets and samples of the whole optimizer step, over all micro-batches and ranks; 0-dim tensors.
        mean_tokens: num_tokens / num_samples.
        world: number of ranks; the host averages gradients over them.
        num_micro_steps: micro-batches of the optimizer step.
        per_token: whether every target token counts equally, or every sample.
    """

    tokens: TokenLosses
    meta: BatchMeta
    num_tokens: torch.Tensor
    num_samples: torch.Tensor
    mean_tokens: float
    world: int
    num_micro_steps: int
    per_token: bool

    @cached_property
    def token_losses(self) -> torch.Tensor:
        """(N,) with graph."""
        return self.tokens.of_targets()

    @cached_property
    def token_cross_entropies(self) -> torch.Tensor:
        """-log p (N,) with graph: the token losses, unless labels are smoothed."""
        return self.token_losses if self.tokens.plain is None else self.tokens.cross_entropies()

    @cached_property
    def sample_losses(self) -> torch.Tensor:
        """Mean token loss of each sample (n,) with graph."""
        if self.meta.num_samples == 0:
            return self.token_losses
        return segment_means(self.token_losses, self.counts)

    @cached_property
    def counts(self) -> torch.Tensor:
        """Target tokens of each sample (n,), on the losses' device."""
        return self.meta.counts.to(self.tokens.values.device, non_blocking=True)

    def weight_samples(self, weights: torch.Tensor) -> torch.Tensor:
        """sum_i w_i l_i / M over the step's M samples, or with `per_token` sum_i w_i T_i l_i / sum_i T_i; `weights` (n,) detached."""
        if not self.per_token:
            # Exactly 1 when all samples are equally long, so that equal weights then give the host's very bits.
            weights = weights * (self.mean_tokens / self.meta.counts.double()).to(weights, non_blocking=True)
        return self.weight_tokens(weights.repeat_interleave(self.counts, output_size=self.meta.num_targets))

    def weight_tokens(self, weights: torch.Tensor) -> torch.Tensor:
        """sum_t w_t l_t / number of target tokens of the step; `weights` (N,)."""
        return self._scaled(self.tokens.weighted_total(weights) / self.num_tokens)

    def from_mean(self, mean_loss: torch.Tensor) -> torch.Tensor:
        """The step's share of a scalar that a component gave as the mean over this micro-batch's samples."""
        if self.meta.num_samples == 0:
            return self.tokens.values.sum() * 0.0
        return self._scaled(mean_loss * self.meta.num_samples / self.num_samples)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        loss = loss * self.world if self.world > 1 else loss
        return loss if self.tokens.auxiliary is None else loss + self.tokens.auxiliary / self.num_micro_steps


def losses_from_logits(
    model: nn.Module, inputs: dict[str, Any], meta: BatchMeta, *, head: nn.Module | None, smoothing: float = 0.0, router_coefficient: float = 0.0
) -> TokenLosses:
    """Run the (wrapped) model without its own loss and take the cross-entropy of its logits.

    Args:
        head: output layer; it is then run only where a token has a label. None: all logits, and the very bits of the model's own loss.
        smoothing: label smoothing.
        router_coefficient: weight of the model's auxiliary loss, which it leaves out when it gets no labels.

    Raises:
        TrainingError: the model returned no logits (a fused loss replaced them).
    """
    forward_inputs = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}
    device = inputs["input_ids"].device
    targets = meta.targets.to(device, non_blocking=True)
    with _targets_only(head, meta, device) as projected:
        outputs = model(**forward_inputs)
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if not torch.is_tensor(logits) or logits.dim() != 3:
        raise TrainingError(
            "the model returned no logits, so there are no per-sample losses. A fused loss (Liger's fused_linear_cross_entropy?) may have "
            "replaced them: switch it off, e.g. liger_kernel_config: {fused_linear_cross_entropy: false}"
        )
    auxiliary = outputs.get("aux_loss") if isinstance(outputs, dict) else None
    auxiliary = None if auxiliary is None or not router_coefficient else router_coefficient * auxiliary
    if projected:
        flat = logits[0]
        values = F.cross_entropy(at_least_fp32(flat), targets, label_smoothing=smoothing, reduction="none") if smoothing else None
        values = _TargetCrossEntropy.apply(flat, targets) if values is None else values
        plain = _plain_cross_entropies(flat, targets) if smoothing else None
        return TokenLosses(values, torch.arange(meta.num_targets, device=device), auxiliary=auxiliary, plain=plain)
    labels, index = _full_labels(logits, meta, targets)
    flat = at_least_fp32(logits).flatten(0, 1)
    values = F.cross_entropy(flat, labels, reduction="none", label_smoothing=smoothing)
    plain = _plain_cross_entropies(flat, targets, index) if smoothing else None
    return TokenLosses(values, index, total=lambda summands: _sum_as_cross_entropy(summands, labels), auxiliary=auxiliary, plain=plain)


def _plain_cross_entropies(logits: torch.Tensor, targets: torch.Tensor, index: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
    """What gives the unsmoothed losses (N,) of the targets, if somebody asks: from logits (N, V), or from rows `index` of more."""
    return lambda: F.cross_entropy(at_least_fp32(logits if index is None else logits[index]), targets, reduction="none")


@contextmanager
def _targets_only(head: nn.Module | None, meta: BatchMeta, device: torch.device) -> Iterator[list[bool]]:
    """Within the block `head` sees only the hidden states that predict a target: (1, N, D) instead of (B, L, D).

    Yields a list that is non-empty once that has happened; a head called with another shape is left alone.
    """
    happened: list[bool] = []
    if head is None or meta.num_targets == 0:
        yield happened
        return
    rows, positions = meta.rows.to(device, non_blocking=True), meta.positions.to(device, non_blocking=True)

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        extra = hidden.shape[1] - meta.width if hidden.dim() == 3 else -1  # prompt tuning puts virtual tokens in front
        if extra < 0 or happened:
            return None
        happened.append(True)
        return hidden.flatten(0, 1).index_select(0, rows * hidden.shape[1] + positions + extra)[None], *args[1:]

    handle = head.register_forward_pre_hook(select)
    try:
        yield happened
    finally:
        handle.remove()


def _full_labels(logits: torch.Tensor, meta: BatchMeta, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Label of each logit (-100: none), flattened, and the flat index of the targets."""
    width, device = logits.shape[1], logits.device
    index = meta.rows.to(device, non_blocking=True) * width + meta.positions.to(device, non_blocking=True) + (width - meta.width)
    labels = torch.full((logits.shape[0] * width,), -100, device=device).index_copy(0, index, targets)
    return labels, index


def _sum_as_cross_entropy(summands: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum, added up in the order in which `F.cross_entropy(reduction="sum")` adds the same rows: that is the host's loss, bit for bit."""
    return F.nll_loss(-summands[:, None], torch.where(labels == -100, labels, torch.zeros_like(labels)), reduction="sum")
