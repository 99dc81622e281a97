"""Domain weights by group distributionally robust optimisation against a reference model (DoReMi, its second step).

After every optimizer step, with x_j the mean over domain j's tokens of max(loss - reference loss, 0) on all ranks:
log alpha_j += eta * x_j, alpha = (1 - c) softmax(log alpha) + c / k. The loss of a token of domain j is weighted by alpha_j over the share by
which the domain is sampled, so that the proxy model is trained on the mixture alpha while sampling stays as it is. The mean of alpha over all
steps is the mixture to train the final model on: `output_dir/dataflex/doremi_weights.json` and `doremi_proportions.yaml`.
Paper: Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", NeurIPS 2023, arXiv 2305.10429.
The weights used in a step are those after the step before, so that results do not depend on how a step is split into micro-batches.
Cost: a forward pass of the reference model at every step, and its memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, DirectoryPath

from dataflex.core.registry import register_mixer
from dataflex.errors import ComponentError
from dataflex.functional.mixing import doremi_excess, doremi_token_weights, doremi_update
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.trainer.hosts import causal_lm
from dataflex.train.trainer.token_losses import losses_from_logits
from dataflex.utils.distributed import sum_over_ranks
from dataflex.utils.files import write_json_atomically, write_text_atomically
from dataflex.utils.printable import one_line


def _model_folder(path: Path) -> Path:
    described = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not described or not (any(path.glob("*.safetensors")) or any(path.glob("*.bin"))):
        raise ValueError("the folder holds no model: it needs config.json and weights (*.safetensors or *.bin)")
    return path


@register_mixer("doremi")
class DoremiMixer(Mixer):
    """Domain weights against a reference model, for a proxy model to find (DoReMi, arXiv 2305.10429)."""

    def __init__(
        self,
        mixture_manager: Any = None,
        *,
        reference_model: Annotated[DirectoryPath, AfterValidator(_model_folder)],
        eta: Annotated[float, Gt(0)] = 1.0,
        smoothing: Annotated[float, Ge(0), Le(1)] = 1e-3,
        **kwargs: Any,
    ):
        """
        Args:
            reference_model: folder of the model trained on the reference mixture (DoReMi's first step), with the same tokenizer.
            eta: step size of the weights.
            smoothing: share of the weights that is spread equally.
        """
        super().__init__(mixture_manager, **kwargs)
        self.reference_model, self.eta, self.smoothing = reference_model, eta, smoothing
        self.steps = 0
        self._step: torch.Tensor | None = None  # clipped excess losses and tokens of the step under way (2, k)
        self._reference: Any = None
        if mixture_manager is not None:
            self.prepare()

    def prepare(self) -> None:
        k = self.mixture_manager.k
        self.log_alpha = torch.full((k,), 1 / k, dtype=torch.float64).log()
        self.excess = torch.zeros(k, dtype=torch.float64)
        self.total_alpha = torch.zeros(k, dtype=torch.float64)

    @classmethod
    def costs(cls, params: Mapping[str, Any]) -> list[str]:
        return ["a forward pass of the reference model at every step"]

    @property
    def average_weights(self) -> np.ndarray:
        """Mean of the weights (k,) over all steps so far."""
        mean = self.total_alpha / self.steps if self.steps else self.log_alpha.exp()
        return mean.cpu().numpy()

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        weights = self.log_alpha.exp().tolist()
        kwargs["ctx"].metrics.set(**{f"weight/{name}": weight for name, weight in zip(self.mixture_manager.names, weights, strict=True)})
        return self.mixture_manager.proportions  # sampling stays; the loss is reweighted

    def token_weights(self, ctx: Any) -> torch.Tensor:
        sampling = torch.as_tensor(ctx.token_proportions, device=self.log_alpha.device)
        return doremi_token_weights(self.log_alpha.exp(), sampling)

    def observe(self, losses: torch.Tensor, domains: torch.Tensor, *, ctx: Any, inputs: dict[str, Any]) -> None:
        excess = (losses - self._reference_losses(ctx, inputs)).clamp(min=0).double()
        finite = torch.isfinite(excess)
        member = torch.nn.functional.one_hot(domains, len(self.log_alpha)).double()
        found = torch.stack([torch.where(finite, excess, 0.0), finite.double()]) @ member  # products, not scattered sums: the same bits every time
        self._step = found if self._step is None else self._step + found

    @torch.no_grad()
    def _reference_losses(self, ctx: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._reference is None:
            self._reference = _load(self.reference_model, ctx)
        with ctx.accelerator.autocast():
            head = self._reference.get_output_embeddings() if ctx.dataflex.project_targets_only else None
            smoothing = ctx.args.label_smoothing_factor  # as the losses it is compared with
            return losses_from_logits(self._reference, inputs, ctx.step.meta, head=head, smoothing=smoothing).of_targets()

    def end_step(self, ctx: Any) -> None:
        assert self._step is not None
        sums, tokens = sum_over_ranks(self._step)
        self._step = None
        self.log_alpha, self.excess = self.log_alpha.to(sums.device), self.excess.to(sums.device)
        self.excess = doremi_excess(sums, tokens, self.excess)
        self.log_alpha = doremi_update(self.log_alpha, self.excess, self.eta, self.smoothing)
        self.total_alpha = self.total_alpha.to(sums.device) + self.log_alpha.exp()
        self.steps += 1

    def save_artifacts(self, folder: Path) -> None:
        weights = [float(weight) for weight in self.average_weights]
        names = self.mixture_manager.names
        write_json_atomically(folder / "doremi_weights.json", {"names": names, "average_weights": weights, "steps": self.steps})
        text = ", ".join(f"{weight:.6f}" for weight in weights)
        lines = [f"# {one_line(', '.join(names))}: mean over {self.steps} steps", "mixture_unit: token", f"init_mixture_proportions: [{text}]"]
        write_text_atomically(folder / "doremi_proportions.yaml", "\n".join(lines) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "log_alpha": self.log_alpha, "excess": self.excess, "total_alpha": self.total_alpha}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.log_alpha, self.excess, self.total_alpha = state["log_alpha"], state["excess"], state["total_alpha"]
        self._step = None  # of a step that was interrupted


def _load(folder: Path, ctx: Any) -> Any:
    """The reference model beside the one being trained, with the type of its weights."""
    from transformers import AutoModelForCausalLM

    dtype = next((p.dtype for p in ctx.model.parameters() if p.is_floating_point()), None)
    attention = getattr(ctx.model.config, "_attn_implementation", None)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, attn_implementation=attention)
    sizes = [config.get_text_config().vocab_size for config in (model.config, causal_lm(ctx).config)]
    if sizes[0] != sizes[1]:
        raise ComponentError(f"the reference model in {folder} has a vocabulary of {sizes[0]}, the model one of {sizes[1]}: not the same tokenizer")
    return model.to(ctx.args.device).eval().requires_grad_(False)
