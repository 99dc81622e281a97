"""DataFlex's own keys, checked and typed. Everything else in a YAML file belongs to the backend. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PACKAGED_COMPONENTS = "src/dataflex/configs/components.yaml"

TrainType = Literal["static", "dynamic_weight", "dynamic_select", "dynamic_mix"]


class DataflexConfig(BaseModel):
    """How the data is optimised while the model trains."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    train_type: TrainType = Field("static", description="`static` trains as the backend does; the others optimise the data during training.")
    component_name: str | None = Field(None, description="Algorithm, an entry of the components file; required unless `train_type: static`.")
    component_params: dict[str, Any] = Field(
        default_factory=dict, description="Parameters that override those of the components file, e.g. `component_params.r=0.4`."
    )
    components_cfg_file: str = Field(
        PACKAGED_COMPONENTS, description="YAML file with the components and their parameters. If absent there, the default names the packaged file."
    )
    warmup_step: int = Field(0, ge=0, description="Optimizer steps of ordinary training before the algorithm sets in.")
    train_step: int = Field(0, ge=0, description="Total optimizer steps, warm-up included; wins over epochs when above 0.")
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
    allow_changed_resume: bool = Field(False, description="Resume although data, component or settings differ from those of the checkpoint.")
    backend: Literal["auto", "trl", "llamafactory"] = Field(
        "auto", description="The library that trains; `auto` takes LLaMA-Factory where it is installed, else TRL."
    )
    plugins: list[str] = Field(default_factory=list, description="Python files or modules with your own components.")

    @model_validator(mode="after")
    def _consistent(self) -> DataflexConfig:
        problems = []
        if self.train_type != "static" and self.component_name is None:
            problems.append(f"component_name: is required with train_type: {self.train_type}; `dataflex-cli components` lists the algorithms")
        if 0 < self.train_step < self.warmup_step:
            problems.append(
                f"warmup_step: is {self.warmup_step} but train_step, which includes the warm-up, is {self.train_step}; "
                "the algorithm would never set in. Allowed: warmup_step <= train_step"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


COMPONENT_KIND = {"dynamic_weight": "weighter", "dynamic_select": "selector", "dynamic_mix": "mixer"}
COMPONENT_BUCKETS = {"weighter": "weighters", "selector": "selectors", "mixer": "mixers", "reorder": "reorders"}
