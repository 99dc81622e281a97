"""DataFlex's own keys, checked and typed. Everything else in a YAML file belongs to the backend. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PACKAGED_COMPONENTS = "src/dataflex/configs/components.yaml"

TrainType = Literal["static", "dynamic_weight", "dynamic_select", "dynamic_mix"]

# Where a key has an effect. A key that is not listed has one with every train type.
_DYNAMIC: tuple[TrainType, ...] = ("dynamic_weight", "dynamic_select", "dynamic_mix")
_PLANNED: tuple[TrainType, ...] = ("dynamic_select", "dynamic_mix")
EFFECTIVE_WITH: dict[str, tuple[TrainType, ...]] = {
    "component_name": _DYNAMIC,
    "component_params": _DYNAMIC,
    "components_cfg_file": _DYNAMIC,
    "plugins": _DYNAMIC,
    "warmup_step": _DYNAMIC,
    "update_step": _PLANNED,
    "update_times": _PLANNED,
    "loss_normalization": ("dynamic_weight",),
    "project_targets_only": _DYNAMIC,
    "scoring_tokens": ("dynamic_weight", "dynamic_select"),
    "allow_changed_resume": _DYNAMIC,
    "static_mix": ("dynamic_mix",),
    "mixture_sample_rule": ("dynamic_mix",),
    "init_mixture_proportions": ("dynamic_mix",),
    "mixture_unit": ("dynamic_mix",),
}
_OF_A_COMPONENT = ("component_name", "component_params", "warmup_step", "update_step", "update_times", "plugins")  # unused by a mixture that stays

MOST_STEPS = 10**12


def _numbers(value: Any) -> Any:
    """`0.2, 0.8` as LLaMA-Factory writes lists."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class DataflexConfig(BaseModel):
    """How the data is optimised while the model trains."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    train_type: TrainType = Field("static", description="`static` trains as the backend does; the others optimise the data during training.")
    component_name: str | None = Field(None, description="Algorithm, an entry of the components file; required unless `train_type: static`.")
    component_params: dict[str, Any] = Field(
        default_factory=dict, description="Parameters that override those of the components file, e.g. `component_params.r=0.4`."
    )
    components_cfg_file: str = Field(
        PACKAGED_COMPONENTS, description="YAML file with the components and their parameters. If absent there, the default names the packaged file."
    )
    warmup_step: int = Field(0, ge=0, le=MOST_STEPS, description="Optimizer steps of ordinary training before the algorithm sets in.")
    update_step: int = Field(0, ge=0, le=MOST_STEPS, description="Select and mix: optimizer steps from one decision to the next.")
    update_times: int = Field(
        1,
        ge=-1,
        le=MOST_STEPS,
        description="Select and mix: decisions in a stage of `warmup_step + update_step * update_times` steps, which `num_train_epochs` repeats; "
        "`-1`: decide until training ends, and `num_train_epochs` counts passes over the data.",
    )
    train_step: int = Field(0, ge=0, le=MOST_STEPS, description="Total optimizer steps, warm-up included; wins over epochs when above 0.")
    loss_normalization: Literal["sample", "token"] = Field(
        "sample",
        description="`sample`: every sample counts equally, as in the tutorial; `token`: every target token does, as in ordinary training. "
        "Token gates always use `token`.",
    )
    project_targets_only: bool = Field(
        True,
        description="Run the output layer only where a token has a label. Saves time and memory; gradients agree to rounding. "
        "`false` computes all logits, with the very bits of ordinary training.",
    )
    static_mix: bool = Field(False, description="Mix: keep the initial proportions; no component decides.")
    mixture_sample_rule: Literal["mixture", "stratified", "uniform"] = Field(
        "mixture",
        description="Mix: `mixture` follows the mixer's proportions, `stratified` the sizes of the domains (a pass holds every row once), "
        "`uniform` gives every domain the same.",
    )
    init_mixture_proportions: Annotated[list[float], BeforeValidator(_numbers)] | None = Field(
        None, description="Mix: proportions at the start, one for each domain in the order of `dataset`; equal if left out. Scaled to sum to 1."
    )
    mixture_unit: Literal["sample", "token"] = Field("sample", description="Mix: whether proportions count samples or tokens.")
    scoring_tokens: int = Field(
        4096,
        ge=1,
        le=MOST_STEPS,
        description="Tokens, padding included, in a batch when rows are scored outside the training step. Lower it if memory runs out.",
    )
    allow_changed_resume: bool = Field(False, description="Resume although data, component or settings differ from those of the checkpoint.")
    backend: Literal["auto", "trl", "llamafactory"] = Field(
        "auto", description="The library that trains; `auto` takes LLaMA-Factory where it is installed, else TRL."
    )
    plugins: list[str] = Field(default_factory=list, description="Python files or modules with your own components.")

    @model_validator(mode="after")
    def _consistent(self) -> DataflexConfig:
        problems = self._without_effect() if "train_type" in self.model_fields_set else []  # a Trainer's class may set it later
        if self.train_type != "static" and self.component_name is None and not self.keeps_mixture:
            problems.append(f"component_name: is required with train_type: {self.train_type}; `dataflex-cli components` lists the algorithms")
        if 0 < self.train_step < self.warmup_step:
            problems.append(
                f"warmup_step: is {self.warmup_step} but train_step, which includes the warm-up, is {self.train_step}; "
                "the algorithm would never set in. Allowed: warmup_step <= train_step"
            )
        if self.train_type in ("dynamic_select", "dynamic_mix") and not self.keeps_mixture:
            problems += self._schedule_problems()
        if self.train_type == "dynamic_mix":
            problems += self._mixture_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def keeps_mixture(self) -> bool:
        """Whether the run mixes by its initial proportions throughout."""
        return self.train_type == "dynamic_mix" and self.static_mix

    @property
    def algorithm(self) -> str | None:
        """The component that the run has, whatever `component_name` says: a mixture that stays needs none."""
        return "static" if self.keeps_mixture else self.component_name

    def given(self, key: str) -> bool:
        """Whether `key` was set, to more than nothing."""
        return key in self.model_fields_set and getattr(self, key) not in (None, [], {})

    @property
    def unused(self) -> list[str]:
        """Keys that were set for a component, although the mixture stays."""
        return [key for key in _OF_A_COMPONENT if self.keeps_mixture and self.given(key)]

    def _without_effect(self) -> list[str]:
        problems = []
        for key, types in EFFECTIVE_WITH.items():
            if self.given(key) and self.train_type not in types:
                wanted = " or ".join([", ".join(types[:-1]), types[-1]] if types[1:] else types)
                found = "; static is what a file without train_type means" if self.train_type == "static" else ""
                use = f"has no effect with train_type: {self.train_type}, only with {wanted}{found}"
                problems.append(f"{key}: {use}. Set train_type, or leave {key} out (on the command line: {key}=null)")
        return problems

    def _mixture_problems(self) -> list[str]:
        given, problems = self.init_mixture_proportions, []
        if given is not None and (not all(math.isfinite(p) and p >= 0 for p in given) or not sum(given) > 0):
            problems.append(f"init_mixture_proportions: must be numbers of at least 0 with one above 0, not {given}")
        if given is not None and self.mixture_sample_rule != "mixture":
            problems.append(f"init_mixture_proportions: has no effect with mixture_sample_rule: {self.mixture_sample_rule}; leave one of the two out")
        return problems

    def _schedule_problems(self) -> list[str]:
        problems = []
        if self.update_step == 0:
            problems.append(f"update_step: must be at least 1 with train_type: {self.train_type}; it is the number of steps between decisions")
        if self.update_times == 0:
            problems.append("update_times: must be at least 1, or -1 to decide until training ends; with 0 the algorithm would never set in")
        return problems


COMPONENT_KIND = {"dynamic_weight": "weighter", "dynamic_select": "selector", "dynamic_mix": "mixer"}
COMPONENT_BUCKETS = {"weighter": "weighters", "selector": "selectors", "mixer": "mixers", "reorder": "reorders"}
