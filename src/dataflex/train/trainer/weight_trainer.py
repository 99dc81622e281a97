"""Dynamic sample weighting: the loss of every sample enters the backward pass with a weight that a `Weighter` decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from dataflex.errors import ComponentError, ConfigError, Problem, TrainingError
from dataflex.signals.signals import Signals
from dataflex.train.trainer import hosts
from dataflex.train.trainer.contract import WeightContract
from dataflex.train.trainer.features import captured_hidden_states, pooled_features
from dataflex.train.trainer.loss_trainer import LossTrainer
from dataflex.train.trainer.metrics import WeightMetrics
from dataflex.train.weighter.base_weighter import SampleWeighter, TokenWeighter, Weighter
from dataflex.utils.distributed import gather_ragged
from dataflex.utils.logging import logger

Signal = Callable[[torch.Tensor], torch.Tensor]


class WeightTrainer(LossTrainer):
    """`WeightTrainer.over(AnyTrainer)(..., dataflex=DataflexConfig(component_name="loss", warmup_step=100))`.

    Components see it as `ctx`. From `warmup_step` on it calls the weighter's `training_step` with `use_weighter=True`; before, the same
    code runs with weight 1, so that the scale of the loss does not jump.
    """

    train_type = "dynamic_weight"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.component, Weighter):
            raise ComponentError(f"{type(self.component).__name__} is no weighter: derive it from dataflex.Weighter or dataflex.SampleWeighter")
        if self.component.needs_features and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            name = self.dataflex.component_name
            raise ConfigError(
                Problem("", "component_name", f"{name} reads hidden states, which FSDP and DeepSpeed shard; use DDP or another component")
            )

    def _make_metrics(self) -> WeightMetrics:
        return WeightMetrics(self.domain_names)

    # ---------------------------------------------------------------- one micro-batch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        use_weighter = self.state.global_step >= self.dataflex.warmup_step
        if use_weighter and self.step.position == 0:
            if self.state.global_step == self.dataflex.warmup_step:
                self.events.write(self.state.global_step, "weighting starts", component=self.dataflex.component_name)
            self.component.begin_step(self, model)
        loss = self.component.training_step(self, model, inputs, num_items_in_batch, use_weighter=use_weighter)
        self.step.position += 1
        if use_weighter:
            self.contract.close("micro_batch")
        if use_weighter and self.step.position == len(self.step.batches):
            self.component.end_step(self)
            self.contract.close("step")
            self.contract.verify_first(self.state.global_step + 1)
        return loss

    def _make_contract(self) -> WeightContract:
        return WeightContract(type(self.component).__name__, getattr(self.component, "mean_scope", None), first_step=self.state.global_step)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        mean = logs.get("dataflex/weight_mean", 1.0)
        if not 0.1 <= mean <= 10 and not isinstance(self.component, TokenWeighter) and not self._dataflex.said_mean:
            self._dataflex.said_mean = True
            logger.warning(
                "step %d: the weights of %s have mean %.3g, so the learning rate is in effect multiplied by that; weights of mean 1 are expected",
                self.state.global_step,
                type(self.component).__name__,
                mean,
            )

    def run_training_step(self, weighter: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any, use_weighter: bool) -> torch.Tensor:
        """The host's own training step (autocast, backward, ...) with `weighter` building the loss. What `Weighter.training_step` does."""
        self._dataflex.active = (weighter, use_weighter)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._dataflex.active = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if self._dataflex.active is None:  # evaluation, or a weighter with a training step of its own
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        weighter, use_weighter = self._dataflex.active
        with self._capturing(weighter if use_weighter else None):
            tokens = self._token_losses(model, inputs, num_items_in_batch)
        micro = self._micro_step(tokens, self.step.meta)
        loss = weighter.weighted_loss(micro, ctx=self, model=model, inputs=inputs) if use_weighter else weighter.plain_loss(micro)
        loss = loss * self._host_divisor(num_items_in_batch)
        return (loss, None) if return_outputs else loss

    # ---------------------------------------------------------------- what weighters may use

    @property
    def num_micro_steps(self) -> int:
        """Micro-batches of the optimizer step under way."""
        return len(self.step.batches)

    @property
    def features(self) -> torch.Tensor:
        """Unit feature (n, D) of each sample of the micro-batch, pooled from the training forward. Only for weighters with `needs_features`."""
        if self._dataflex.features is None:
            if not self._dataflex.hidden:
                raise TrainingError(f"{type(self.component).__name__} asks for features but does not set needs_features = True")
            self._dataflex.features = pooled_features(self._dataflex.hidden[0], self.step.meta, self.component.pooling)
        return self._dataflex.features

    @contextmanager
    def _capturing(self, weighter: Any) -> Iterator[None]:
        self._dataflex.hidden, self._dataflex.features = [], None
        wanted = weighter is not None and weighter.needs_features
        with captured_hidden_states(hosts.causal_lm(self), self._dataflex.hidden) if wanted else nullcontext():
            yield

    def gather_samples(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of `values` (n, ...), one per sample of this rank's micro-batch, of all ranks in rank order. All ranks must call."""
        lengths = self.step.samples[self.step.position].tolist()
        if 0 in lengths and not isinstance(self.component, SampleWeighter):
            raise TrainingError(
                f"{type(self.component).__name__} gathers samples over the ranks, but a rank without samples does not call get_weighted_loss; "
                "derive from SampleWeighter, whose sample_weights is called there too"
            )
        return gather_ragged(values, lengths, f"what {type(self.component).__name__} gathers")

    def own_part(self, gathered: torch.Tensor) -> torch.Tensor:
        """This rank's rows of what `gather_samples` returned."""
        return gathered[self.step.own_part(self.accelerator.process_index, self.step.position)]

    def own_part_of_step(self, gathered: torch.Tensor) -> torch.Tensor:
        """This rank's rows, for the micro-batch under way, of what `gather_step` returned."""
        position, before = self.step.position, int(self.step.samples[: self.step.position].sum())
        part = self.step.own_part(self.accelerator.process_index, position)
        return gathered[before + part.start : before + part.stop]

    def gather_step(self, model: nn.Module, signal: Signal) -> torch.Tensor:
        """`signal` of every sample of the whole optimizer step, micro-batch after micro-batch, each in rank order.

        Costs one forward pass without gradient over the step's micro-batches, in evaluation mode. All ranks must call.

        Args:
            model: the model that `begin_step` was given.
            signal: from a micro-batch's sample losses (n,) to its rows (n, ...); it may use `features`.
        """
        position, was_training = self.step.position, model.training
        model.eval()
        rows = []
        try:
            for micro_step, batch in enumerate(self.step.batches):
                self.step.position = micro_step
                inputs = self._prepare_inputs(dict(batch))
                with torch.no_grad(), self.compute_loss_context_manager(), self._capturing(self.component):
                    tokens = self._losses_from_logits(model, inputs, self.step.meta)
                losses = self._micro_step(tokens, self.step.meta).sample_losses
                rows.append(self.gather_samples(signal(losses)))
        finally:
            self.step.position = position
            model.train(was_training)
        return torch.cat(rows)

    def encode(self, dataset: Any, pooling: str, max_rows: int | None = None) -> torch.Tensor:
        """Mean unit feature (D,), fp32, of the first `max_rows` rows of a data set, or of several by name, under the current model.

        Raises:
            TrainingError: no row has a target token.
        """
        parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
        left, features = max_rows, []
        for part in parts:
            rows = np.arange(len(part))[:left]
            left = None if left is None else left - len(rows)
            features.append(Signals(self).embeddings(part, rows, pooling))
        found = np.concatenate(features)
        found = found[np.isfinite(found).all(1)]
        if not len(found):
            raise TrainingError("no row of the evaluation data has a target token, so there is nothing to compare the samples with")
        return torch.from_numpy(found).double().mean(0).float().to(self.args.device)

    def record_weights(self, weights: torch.Tensor, losses: torch.Tensor, token_weights: torch.Tensor | None = None) -> None:
        """Count detached `weights` and `losses` (n,) of the micro-batch for the next log line.

        Args:
            token_weights: weights of its target tokens (N,), whose means `weights` are.
        """
        meta = self.step.meta
        self.contract.add(weights if token_weights is None else token_weights, losses)
        assert isinstance(self.metrics, WeightMetrics)
        self.metrics.add(weights, losses, meta.domain_ids, meta.num_without_targets)
