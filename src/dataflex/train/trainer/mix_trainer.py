"""Dynamic domain mixing: at boundaries a `Mixer` decides in which proportions the next optimizer steps draw from the domains."""

from __future__ import annotations

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from dataflex.core.schedule import WITHOUT_END, Interval
from dataflex.errors import ComponentError, ConfigError, Problem
from dataflex.functional.mixing import proportions
from dataflex.signals.batches import target_counts
from dataflex.train.data.mixture_manager import MixtureManager
from dataflex.train.data.sample_meta import MetaCollator
from dataflex.train.mixer.base_mixer import DomainLosses, Mixer
from dataflex.train.trainer.contract import WeightContract
from dataflex.train.trainer.loss_trainer import LossTrainer
from dataflex.train.trainer.metrics import DomainMetrics
from dataflex.train.trainer.planned_trainer import PlannedTrainer
from dataflex.train.trainer.token_losses import TokenLosses, segment_means
from dataflex.utils.distributed import broadcast_array, gather_rows


class MixTrainer(PlannedTrainer, LossTrainer):
    """`MixTrainer.over(AnyTrainer)(..., dataflex=DataflexConfig(component_name="odm", warmup_step=50, update_step=10, update_times=-1))`.

    The domains are the numbers in the training data's `domain_id` column. Every target token counts equally in the loss, as in ordinary
    training, unless the mixer weights domains. Mixers see the trainer as `ctx`.
    """

    train_type = "dynamic_mix"
    own_settings: ClassVar[tuple[str, ...]] = (
        *PlannedTrainer.own_settings,
        "static_mix",
        "mixture_sample_rule",
        "init_mixture_proportions",
        "mixture_unit",
        "project_targets_only",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not callable(getattr(self.component, "mix", None)):
            raise ComponentError(f"{type(self.component).__name__} is no mixer: derive it from dataflex.Mixer")
        self._dataflex.reweights = getattr(type(self.component), "token_weights", Mixer.token_weights) is not Mixer.token_weights
        self._dataflex.first_mixture = self.mixture_manager.state_dict()

    def _start_over(self) -> None:
        super()._start_over()
        self.mixture_manager.load_state_dict(self._dataflex.first_mixture)
        self._dataflex.history, self._dataflex.current = [], None

    @cached_property
    def mixture_manager(self) -> MixtureManager:
        """The mixture, and the position in each domain."""
        if self.domains is None or len(self.domain_names) < 2:
            found = f", and there is only {self.domain_names[0]}" if self.domain_names else ""
            message = f"mixing needs domains: several data sets, domain_column, or a column domain_id of whole numbers in the training data{found}"
            raise ConfigError(Problem("", "train_type", message))
        config = self.dataflex
        return MixtureManager(
            self.domain_names,
            domain_ids=self.domains,
            sample_rule=config.mixture_sample_rule,
            initial_proportions=config.init_mixture_proportions,
            mixture_unit=config.mixture_unit,
            mean_tokens=self.mean_tokens if config.mixture_unit == "token" else None,
            dataset=self.train_dataset,
            seed=self.args.seed,
        )

    @cached_property
    def mean_tokens(self) -> np.ndarray:
        """Mean target tokens of a row of each domain (k,): those that are trained on."""
        assert self.domains is not None
        k = len(self.domain_names)
        return np.bincount(self.domains, target_counts(self.train_dataset), minlength=k) / np.bincount(self.domains, minlength=k)

    @property
    def token_proportions(self) -> np.ndarray:
        """Each domain's share (k,) of the tokens that the current mixture draws."""
        return proportions(self.mixture_manager.sample_proportions * self.mean_tokens, self.mixture_manager.k)

    def _adopt(self, component: Any) -> tuple[Any, dict[str, Any]]:
        if self.dataflex.static_mix:
            raise ConfigError(Problem("", "static_mix", f"keeps the mixture, so {type(component).__name__} would decide nothing; leave one out"))
        return super()._adopt(component)

    def _runtime(self) -> dict[str, Any]:
        return {**super()._runtime(), "mixture_manager": self.mixture_manager}

    def _make_metrics(self) -> DomainMetrics:
        return DomainMetrics(self.domain_names)

    def _make_collator(self, loader: DataLoader[Any]) -> MetaCollator:
        return MetaCollator(loader.collate_fn, self.domains, self.args.seed)

    def _periods(self, steps_per_pass: int) -> tuple[int, int, int]:
        return (0, steps_per_pass, WITHOUT_END) if self.dataflex.static_mix else super()._periods(steps_per_pass)

    # ---------------------------------------------------------------- a boundary

    def _next_rows(self, interval: Interval, number: int) -> np.ndarray:
        step = self.state.global_step
        self.component.step_id = step
        if not interval.is_warmup and not self.dataflex.static_mix:
            decided = self._mix(interval)
            own = self._as_array(decided) if self.accelerator.is_main_process else np.zeros(0)
            self.mixture_manager.set_proportions(broadcast_array(own, "the mixture"))
        return self.mixture_manager.plan(number)

    def _as_array(self, decided: Any) -> np.ndarray:
        try:
            return np.asarray(decided, dtype=np.float64)
        except (TypeError, ValueError):
            message = f"{type(self.component).__name__}.mix must return {self.mixture_manager.k} numbers, not {type(decided).__name__}"
            raise ComponentError(message) from None

    def _mix(self, interval: Interval) -> Any:
        offered = {
            "ctx": self,
            "losses": self._drain_history(),
            "current_update_times": interval.update,
            "update_times": self.dataflex.update_times,
            "tokenizer": self.processing_class,
            "data_collator": self.data_collator,
            "dataset": self.train_dataset,
            "domain_ids": None if self._dataflex.step is None else self._dataflex.step.metas[-1].domain_ids,
            "batch": None if self._dataflex.step is None else self._dataflex.step.batches[-1],
        }
        parameters = inspect.signature(self.component.mix).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            offered = {name: value for name, value in offered.items() if name in parameters}
        return self.component.mix(self.model_wrapped, self.state.global_step, **offered)

    def _drain_history(self) -> DomainLosses:
        history, self._dataflex.history = self._reduced_history(), []
        return DomainLosses(*np.moveaxis(history.numpy(), -1, 0))

    def _reduced_history(self) -> torch.Tensor:
        """(steps, k, 4) over all ranks, on the CPU. All ranks must call."""
        own = torch.stack(self._dataflex.history).cpu() if self._dataflex.history else torch.zeros(0, self.mixture_manager.k, 4, dtype=torch.float64)
        return gather_rows(own, "the domains' losses").sum(0)

    def _record(self, interval: Interval, rows: np.ndarray, before: np.ndarray, seconds: float) -> None:
        shares = dict(zip(self.domain_names, self.mixture_manager.proportions.tolist(), strict=True))
        counts = np.bincount(self.domains[rows], minlength=len(shares)).tolist()  # type: ignore[index]
        assert isinstance(self.metrics, DomainMetrics)
        self.metrics.set(**{f"proportion/{name}": share for name, share in shares.items()})
        self.events.write(
            self.state.global_step,
            "mixture",
            component=self.dataflex.algorithm,
            unit=self.dataflex.mixture_unit,
            kind="warm-up" if interval.is_warmup else "mixture",
            stage=interval.stage,
            update=interval.update,
            proportions=shares,
            samples=len(rows),
            domains=dict(zip(self.domain_names, counts, strict=True)),
            seconds=round(seconds, 4),
        )

    # ---------------------------------------------------------------- one micro-batch

    def _describe(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        super()._describe(batches, device)
        self._dataflex.domain_weights = self._scaled_weights(device) if self._dataflex.reweights else None

    def _make_contract(self) -> WeightContract:
        return WeightContract(f"{type(self.component).__name__}.token_weights", finite=True, first_step=self.state.global_step)

    def _scaled_weights(self, device: torch.device) -> torch.Tensor | None:
        """The mixer's weight of each domain's tokens (k,), scaled to mean 1 over the target tokens of the optimizer step on all ranks."""
        weights = self.component.token_weights(self)
        if weights is None:
            return None
        if not torch.is_tensor(weights) or weights.shape != (self.mixture_manager.k,):
            found = tuple(weights.shape) if torch.is_tensor(weights) else type(weights).__name__
            raise ComponentError(
                f"{type(self.component).__name__}.token_weights must return one weight per domain ({self.mixture_manager.k},), not {found}"
            )
        self.contract.add(weights.detach())
        self.contract.verify_first(self.state.global_step + 1)
        own = torch.zeros(self.mixture_manager.k, dtype=torch.float64)
        for meta in self.step.metas:
            assert meta.domain_ids is not None
            own.index_add_(0, meta.domain_ids, meta.counts.double())
        tokens = gather_rows(own).sum(0).to(device, non_blocking=True)
        weights = weights.to(device, torch.float64)
        return weights * (tokens.sum() / (weights * tokens).sum())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._dataflex.in_step = True
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._dataflex.in_step = False
        self._tell_peers_mixer(loss)
        self.step.position += 1
        if self.step.position == len(self.step.batches):
            self._end_step()
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if not self._dataflex.in_step:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        tokens = self._token_losses(model, inputs, num_items_in_batch)
        micro = self._micro_step(tokens, self.step.meta)
        losses, domains = self._observe(tokens, inputs)
        weights = torch.ones_like(losses) if self._dataflex.domain_weights is None else self._dataflex.domain_weights[domains].to(losses)
        loss = micro.weight_tokens(weights) * self._host_divisor(num_items_in_batch)
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def _observe(self, tokens: TokenLosses, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the micro-batch's losses by domain, on the device; the token losses (N,) and the domain of each (N,)."""
        meta, losses = self.step.meta, tokens.values.detach().reshape(-1)[tokens.index]
        assert meta.domain_ids is not None
        device, k = losses.device, self.mixture_manager.k
        counts = meta.counts.to(device, non_blocking=True)
        sample_domains = meta.domain_ids.to(device, non_blocking=True)
        if meta.num_samples:
            means = segment_means(losses.double(), counts)
            finite = torch.isfinite(means)
            means = torch.where(finite, means, 0.0)
            member = nn.functional.one_hot(sample_domains, k).double() * finite[:, None]
            rows = torch.stack([means * counts, counts.double(), means, torch.ones_like(means)], 1)
            found = member.T @ rows  # a product, not scattered sums: the same bits every time
            self._dataflex.current = found if self._dataflex.current is None else self._dataflex.current + found
        domains = sample_domains.repeat_interleave(counts, output_size=meta.num_targets)
        if hasattr(self.component, "observe"):
            self.component.observe(losses, domains, ctx=self, inputs=inputs)
        return losses, domains

    def _end_step(self) -> None:
        if self._dataflex.current is None:
            self._dataflex.current = torch.zeros(self.mixture_manager.k, 4, dtype=torch.float64, device=self.args.device)
        assert isinstance(self.metrics, DomainMetrics)
        self.metrics.add(self._dataflex.current)
        if not self.dataflex.static_mix:
            self._dataflex.history.append(self._dataflex.current)
        self._dataflex.current = None
        if hasattr(self.component, "end_step"):
            self.component.end_step(self)

    def _tell_peers_mixer(self, loss: torch.Tensor) -> None:
        """Mixers written for OpenDCAI/DataFlex may ask for the loss of every micro-batch and its first sample's domain."""
        tell = getattr(self.component, "update_batch_info", None)
        if tell is not None and self.domain_ids is not None and len(self.domain_ids):
            tell(float(loss), int(self.domain_ids[0]))

    # ---------------------------------------------------------------- what is left of it

    def _after_training(self) -> None:
        super()._after_training()
        if self.accelerator.is_main_process:
            self._save_artifacts()
            finish = getattr(self.component, "save_average_weights", None)  # of a mixer written for OpenDCAI/DataFlex
            if finish is not None:
                finish(str(self.args.output_dir))

    def _cannot_change(self, changed: dict[str, Any]) -> list[str]:
        fixed = ("init_mixture_proportions", "mixture_sample_rule", "mixture_unit")  # the checkpoint holds what has become of them
        return [*super()._cannot_change(changed), *(name for name in fixed if name in changed)]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            self._save_artifacts()
        super()._save_checkpoint(model, trial)

    def _save_artifacts(self) -> None:
        if hasattr(self.component, "save_artifacts"):
            self.component.save_artifacts(Path(str(self.args.output_dir)) / "dataflex")

    def _own_state(self) -> dict[str, Any]:
        return {"mixture": self.mixture_manager.state_dict(), "history": self._reduced_history()}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.mixture_manager.load_state_dict(state["mixture"])
        history = state["history"] if self.accelerator.is_main_process else torch.zeros_like(state["history"])
        self._dataflex.history, self._dataflex.current = list(history.to(self.args.device)), None
