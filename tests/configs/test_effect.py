"""Keys of DataFlex that the chosen train type does not look at are problems of the file, not silence."""

import pytest
from pydantic import ValidationError
from transformers import Trainer

from dataflex.configs.loading import load_run
from dataflex.configs.schema import EFFECTIVE_WITH, DataflexConfig
from dataflex.train.trainer.weight_trainer import WeightTrainer

TYPES = ("static", "dynamic_weight", "dynamic_select", "dynamic_mix")
EVERYWHERE = {"train_type", "train_step", "backend"}
VALID = {
    "component_name": "loss",
    "component_params": {"r": 0.5},
    "components_cfg_file": "my.yaml",
    "plugins": ["a.py"],
    "warmup_step": 0,
    "update_step": 2,
    "update_times": 1,
    "loss_normalization": "sample",
    "project_targets_only": True,
    "scoring_tokens": 4096,
    "allow_changed_resume": False,
    "static_mix": False,
    "mixture_sample_rule": "mixture",
    "init_mixture_proportions": [1, 1],
    "mixture_unit": "sample",
}
NEEDED = {"dynamic_weight": {"component_name": "loss"}, "dynamic_select": {"component_name": "loss", "update_step": 1}}
NEEDED["dynamic_mix"] = {"component_name": "odm", "update_step": 1}


def problems(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return [str(problem).replace(f"{tmp_path}/", "") for problem in load_run(path).problems]


def test_every_key_has_its_place():
    assert set(EFFECTIVE_WITH) | EVERYWHERE == set(DataflexConfig.model_fields) and not set(EFFECTIVE_WITH) & EVERYWHERE
    assert set(VALID) == set(EFFECTIVE_WITH)


@pytest.mark.parametrize("train_type", TYPES)
@pytest.mark.parametrize("key", EFFECTIVE_WITH)
def test_a_key_is_refused_where_it_has_no_effect(train_type, key):
    settings = {**NEEDED.get(train_type, {}), "train_type": train_type, key: VALID[key]}  # defaults count: they were written down
    if train_type in EFFECTIVE_WITH[key]:
        assert key in DataflexConfig(**settings).model_fields_set
        return
    with pytest.raises(ValidationError, match=f"{key}: has no effect with train_type: {train_type}, only with"):
        DataflexConfig(**settings)


def test_a_forgotten_train_type(tmp_path):
    assert problems(tmp_path, "component_name: loss\nwarmup_step: 1\ntrain_step: 3\n") == [
        f"c.yaml:{line}: {key}: has no effect with train_type: static, only with dynamic_weight, dynamic_select or dynamic_mix; "
        f"static is what a file without train_type means. Set train_type, or leave {key} out (on the command line: {key}=null)"
        for line, key in ((1, "component_name"), (2, "warmup_step"))
    ]
    assert [line.split(":")[2] for line in problems(tmp_path, "train_type: null\nupdate_step: 1\n")] == [" update_step"]


def test_several_keys_of_another_train_type(tmp_path):
    text = "train_type: dynamic_weight\ncomponent_name: loss\nupdate_step: 0\nstatic_mix: false\nmixture_unit: token\n"
    assert [line.split(": ")[1] for line in problems(tmp_path, text)] == ["update_step", "static_mix", "mixture_unit"]


def test_null_and_nothing_leave_a_key_out(tmp_path):
    assert problems(tmp_path, "component_name: null\ncomponent_params: {}\nplugins: []\nupdate_step: null\n") == []


def test_rows_that_are_only_scored_may_have_any_train_type(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train_type: dynamic_mix\ncomponent_name: odm\nupdate_step: 2\nscoring_tokens: 99\n")
    run = load_run(path, scoring=True)
    assert run.problems == [] and (run.dataflex.train_type, run.dataflex.scoring_tokens) == ("static", 99)


def test_as_a_library_the_class_is_the_train_type():
    settings = DataflexConfig(component_name="loss", static_mix=False)  # no train type yet
    with pytest.raises(ValidationError, match="static_mix: has no effect with train_type: dynamic_weight, only with dynamic_mix"):
        WeightTrainer.over(Trainer)(dataflex=settings)
    with pytest.raises(ValidationError, match="update_step: has no effect with train_type: dynamic_weight"):
        WeightTrainer.over(Trainer)(dataflex={"component_name": "loss", "update_step": 3})


def test_a_mixture_that_stays_says_what_it_does_not_use():
    stays = DataflexConfig(train_type="dynamic_mix", static_mix=True, component_name="odm", warmup_step=3, update_step=2, mixture_unit="token")
    assert stays.unused == ["component_name", "warmup_step", "update_step"]
    assert DataflexConfig(train_type="dynamic_mix", component_name="odm", update_step=2).unused == []
