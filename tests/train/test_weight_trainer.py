"""What a weighter sees and what the trainer makes of it, in front of a plain Trainer and of TRL's SFTTrainer."""

import math
import textwrap

import pytest
import torch
from harness import HOSTS, SPEC_EQUAL, make_trainer, relative, run
from transformers import Trainer, TrainingArguments

from dataflex import DataflexConfig, SampleWeighter, TokenWeighter, Weighter, WeightTrainer
from dataflex.core.registry import REGISTRY
from dataflex.errors import ComponentError, ConfigError, TrainingError
from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows

TUTORIAL = textwrap.dedent("""
    from dataflex.core.registry import register_weighter
    from dataflex.utils.logging import logger
    from typing import Any, Union
    from torch import nn
    import torch
    from dataflex.train.weighter.base_weighter import Weighter

    @register_weighter("NAME")
    class CustomWeighter(Weighter):
        def __init__(self, strategy: str = "uniform", **kwargs):
            super().__init__(**kwargs)
            self.strategy = strategy
            logger.info(f"CustomWeighter initialized with strategy: {strategy}")

        def get_weighted_loss(
            self,
            losses: torch.Tensor,
            *,
            ctx: Any = None,
            model: nn.Module | None = None,
            inputs: dict[str, Union[torch.Tensor, Any]] | None = None,
        ) -> torch.Tensor:
            if not torch.is_tensor(losses) or losses.dim() == 0:
                return losses
            weights = torch.ones_like(losses) / losses.numel()
            weighted_loss = torch.sum(weights * losses)
            return weighted_loss
""")


def trainer_with(component, out, *, base=Trainer, rows=8, batch=4, dataflex=None, model=None, **args):
    arguments = {"max_steps": 2, "per_device_train_batch_size": batch, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    settings = TrainingArguments(str(out), **{**arguments, "save_strategy": "no", **args})
    data = tiny_rows(rows) if isinstance(rows, int) else rows
    return WeightTrainer.over(base)(
        model=model or tiny_model(), args=settings, train_dataset=data, data_collator=pad_collator, component=component, dataflex=dataflex or {}
    )


class Halves(SampleWeighter):
    """Weight 0 or 2 by the parity of the sample's row."""

    def sample_weights(self, losses, *, ctx, model, inputs):
        return 2.0 * (ctx.sample_ids % 2).to(losses)


class Recording(Weighter):
    def __init__(self):
        super().__init__()
        self.seen = []

    def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
        self.seen.append((ctx.sample_ids.tolist(), losses.detach().tolist(), sorted(inputs)))
        return losses.mean()


# ------------------------------------------------------------------------------------------------ the tutorial


def test_the_tutorials_text_runs_from_a_file_outside_the_package(tmp_path):
    (tmp_path / "my_weighter.py").write_text(TUTORIAL.replace("NAME", "from_a_file"))
    (tmp_path / "components.yaml").write_text("weighters:\n  from_a_file:\n    name: from_a_file\n    params:\n      strategy: uniform\n")
    spec = {**SPEC_EQUAL, "component": "from_a_file", "dataflex": {"plugins": ["my_weighter.py"], "components_cfg_file": "components.yaml"}}
    ours = run(spec, tmp_path / "plugin")
    packaged = run({**SPEC_EQUAL, "component": "custom"}, tmp_path / "packaged")
    assert ours.parameters.equal(packaged.parameters)


def test_the_tutorials_components_path_names_the_packaged_file(tmp_path):
    spec = {**SPEC_EQUAL, "component": "custom", "dataflex": {"components_cfg_file": "src/dataflex/configs/components.yaml"}}
    assert run(spec, tmp_path).log


def test_train_step_counts_the_warmup(tmp_path):
    trainer, _ = make_trainer({"component": "loss", "dataflex": {"warmup_step": 1, "train_step": 3}, "batch": 2}, str(tmp_path))
    trainer.train()
    assert trainer.state.global_step == 3
    weighted = [entry["step"] for entry in trainer.state.log_history if entry.get("dataflex/weight_max", 1.0) > 1.0]
    assert weighted == [2, 3]


# ------------------------------------------------------------------------------------------------ what a weighter sees


def test_losses_are_the_samples_mean_token_losses(tmp_path):
    weighter, model = Recording(), tiny_model()
    rows = tiny_rows(8)
    reference = tiny_model().train()
    trainer = trainer_with(weighter, tmp_path, rows=rows, model=model, max_steps=1)
    trainer.train()
    ids, losses, names = weighter.seen[0]
    for index, loss in zip(ids, losses, strict=True):
        row = {name: torch.tensor([value]) for name, value in rows[index].items()}
        assert loss == pytest.approx(float(reference(**row).loss), rel=1e-5)
    assert names == ["attention_mask", "input_ids", "labels"]


def test_samples_without_targets_are_left_out_and_counted(tmp_path):
    rows = tiny_rows(8)
    for row in rows[:3]:
        row["labels"] = [-100] * len(row["labels"])
    weighter = Recording()
    trainer = trainer_with(weighter, tmp_path, rows=rows, batch=8, max_steps=1)
    trainer.train()
    assert sorted(weighter.seen[0][0]) == [3, 4, 5, 6, 7]
    assert trainer.state.log_history[0]["dataflex/samples_without_targets"] == 3


def test_a_step_without_any_target_is_an_error(tmp_path):
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in tiny_rows(4)]
    with pytest.raises(TrainingError, match="no token of the 1 micro-batches at step 0 has a label"):
        trainer_with(Recording(), tmp_path, rows=rows).train()


def test_weights_scale_the_samples_gradients(tmp_path):
    rows, reference = tiny_rows(4), tiny_model().train()
    trainer = trainer_with(
        Halves(), tmp_path, rows=rows, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant"
    )
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    step = before - torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    losses = [reference(**{name: torch.tensor([value]) for name, value in row.items()}).loss for row in rows]
    (2 * (losses[1] + losses[3]) / 4).backward()
    assert relative(step, torch.cat([p.grad.flatten() for p in reference.parameters()])) < 1e-5


def test_one_forward_pass_per_weighted_micro_step(tmp_path):
    for component in ("loss", "adapt", "joint_update_aware", "dft", "custom"):
        trainer, _ = make_trainer({"component": component, "batch": 4, "accumulation": 2, "max_steps": 1}, str(tmp_path / component))
        training, other = [], []
        trainer.model.register_forward_hook(lambda module, *_, a=training, b=other: (a if module.training else b).append(1))
        trainer.train()
        assert (len(training), len(other)) == (2, 0), component  # adapt and joint encode evaluation data through the backbone alone


def test_evaluation_is_never_weighted(tmp_path):
    plain, _ = make_trainer({}, str(tmp_path / "plain"))
    trainer, _ = make_trainer({"component": "loss"}, str(tmp_path / "weighted"))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


# ------------------------------------------------------------------------------------------------ laws of every weighter


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", REGISTRY.names("weighter"))
def test_every_weighter_trains_and_logs_its_weights(tmp_path, host, name):
    result = run({"host": host, "component": name, "rows": 12, "batch": 4, "domains": 3}, tmp_path)
    for entry in result.logged("loss", "dataflex/weight_mean", "dataflex/weight_min", "dataflex/effective_sample_size"):
        assert math.isfinite(entry["loss"]) and entry["dataflex/weight_min"] >= 0
        assert 0 < entry["dataflex/effective_sample_size"] <= 1 + 1e-6
        if name not in ("dft", "focal"):
            assert entry["dataflex/weight_mean"] == pytest.approx(1, abs=1e-5)
    shares = [sum(entry[f"dataflex/weight_share/{k}"] for k in range(3)) for entry in result.log if "loss" in entry]
    assert shares == pytest.approx([1.0] * len(shares))


@pytest.mark.parametrize("name", REGISTRY.names("weighter"))
def test_a_single_sample_has_the_gradient_of_ordinary_training(tmp_path, name):
    if name in ("dft", "focal"):
        params = {"dft": {"power": 0}, "focal": {"gamma": 0}}[name]
    else:
        params = {}
    spec = {"rows": 1, "batch": 1}
    weighted = run({**spec, "component": name, "params": params}, tmp_path / "weighted")
    assert relative(weighted.gradients[0], run(spec, tmp_path / "plain").gradients[0]) < 1e-5


def test_scalar_components_log_the_weights_they_imply(tmp_path):
    class Weighted(Weighter):
        def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
            return (torch.linspace(0, 2, len(losses)) * losses).mean()

    trainer = trainer_with(Weighted(), tmp_path, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert (logged["dataflex/weight_min"], logged["dataflex/weight_max"]) == (0.0, 2.0)
    assert logged["dataflex/weight_mean"] == pytest.approx(1)


def test_nonfinite_losses_get_weight_zero_and_are_counted(tmp_path):
    class Blind(SampleWeighter):
        def sample_weights(self, losses, *, ctx, model, inputs):
            return torch.ones_like(losses)

    model = tiny_model(vocab_size=300, tie_word_embeddings=False)
    # Token 299, which only row 0 contains, has probability 0: an infinite loss.
    model.lm_head.register_forward_hook(lambda m, args, out: torch.cat([out[..., :299], torch.full_like(out[..., 299:], -math.inf)], -1))
    rows = tiny_rows(4)
    rows[0]["input_ids"][-1] = rows[0]["labels"][-1] = 299
    trainer = trainer_with(Blind(), tmp_path, rows=rows, model=model, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["dataflex/nonfinite_losses"] == 1 and logged["dataflex/weight_min"] == 0
    assert math.isfinite(logged["loss"]) and math.isfinite(logged["grad_norm"])


def test_a_token_weighter_of_ones_own(tmp_path):
    class Last(TokenWeighter):
        def token_weights(self, token_losses):
            return torch.full_like(token_losses, 0.5)

    half = trainer_with(Last(), tmp_path / "half", max_steps=1)
    half.train()
    whole = trainer_with(REGISTRY.build("weighter", "dft", runtime={}, cfg={"power": 0}), tmp_path / "whole", max_steps=1)
    whole.train()
    assert half.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"] / 2, rel=1e-6)


# ------------------------------------------------------------------------------------------------ components with a mind of their own


def test_a_weighter_that_overrides_training_step_as_for_the_peer(tmp_path):
    class Own(Weighter):
        used = 0

        def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
            return losses.mean()

        def training_step(self, ctx, model, inputs, num_items_in_batch=None, use_weighter=False):
            model.train()
            inputs = ctx._prepare_inputs(inputs)
            if not use_weighter:
                loss = ctx.compute_loss(model, inputs)
            else:
                Own.used += 1
                outputs = model(**inputs)
                losses = self._per_sample_loss_from_logits(outputs.logits, inputs["labels"])
                loss = self.get_weighted_loss(losses, ctx=ctx, model=model, inputs=inputs)
            ctx.accelerator.backward(loss)
            return loss.detach()

    trainer = trainer_with(Own(), tmp_path, max_steps=3, dataflex={"warmup_step": 1})
    trainer.train()
    assert Own.used == 2 and trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda losses: losses, r"must return a scalar tensor, not \(4,\)"),
        (lambda losses: 1.0, "must return a scalar tensor, not float"),
        (lambda losses: losses.detach().mean(), "does not depend on the samples' losses"),
    ],
)
def test_a_wrong_weighted_loss_is_an_error(tmp_path, returned, message):
    class Wrong(Weighter):
        def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
            return returned(losses)

    with pytest.raises(ComponentError, match=message):
        trainer_with(Wrong(), tmp_path).train()


def test_a_state_that_cannot_be_saved_is_an_error_before_the_first_step(tmp_path):
    class Wrong(Recording):
        def state_dict(self):
            return {"seen": torch.zeros(2), "table": {1, 2}}

    weighter = Wrong()
    with pytest.raises(ComponentError, match=r"state_dict\(\)\['table'\] cannot be saved .*set"):
        trainer_with(weighter, tmp_path).train()
    assert not weighter.seen


def test_a_diverged_loss_does_not_stop_a_save(tmp_path):
    class Nan(Weighter):
        def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
            return losses.mean() * math.nan

    trainer = trainer_with(Nan(), tmp_path, logging_nan_inf_filter=False, save_strategy="steps", save_steps=1, logging_steps=5)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "dataflex" / "state.json").is_file()


@pytest.mark.parametrize("name", REGISTRY.names("weighter"))
def test_a_micro_batch_without_any_target(tmp_path, name):
    rows = tiny_rows(4)
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    settings = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1, report_to="none", use_cpu=True, logging_steps=1
    )
    trainer = WeightTrainer.over(Trainer)(
        model=tiny_model(),
        args=settings,
        train_dataset=rows,
        eval_dataset=tiny_rows(2),
        data_collator=pad_collator,
        dataflex={"component_name": name},
    )
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    class Wrong(SampleWeighter):
        def sample_weights(self, losses, *, ctx, model, inputs):
            return losses * math.nan

    with pytest.raises(TrainingError, match="weights that are not finite"):
        trainer_with(Wrong(), tmp_path).train()


def test_a_compute_loss_of_ones_own_is_refused(tmp_path):
    class Mine(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(ConfigError, match="the compute_loss of Mine"):
        trainer_with(Recording(), tmp_path, base=Mine)


def test_a_second_call_of_train_starts_like_the_first(tmp_path):
    trainer, _ = make_trainer({"component": "adapt", "params": {"refresh_steps": 2}, "batch": 2}, str(tmp_path))
    refreshes = []
    trainer.events.write = lambda step, event, **details: refreshes.append(step) if event == "target refreshed" else None
    trainer.train()
    trainer.train()
    assert refreshes == [0, 2, 0, 2]


def test_fewer_rows_than_a_micro_batch_with_drop_last_are_an_error(tmp_path):
    with pytest.raises(TrainingError, match="dataloader_drop_last"):
        trainer_with(Recording(), tmp_path, rows=3, dataloader_drop_last=True).train()


@pytest.mark.parametrize("wrong", [Recording, object()])
def test_components_that_are_no_weighters(tmp_path, wrong):
    with pytest.raises(ComponentError, match=r"must be an object, not the class|is no weighter"):
        trainer_with(wrong, tmp_path)


def test_train_loss_of_a_resumed_run_is_that_of_the_whole_run(tmp_path):
    spec = {"batch": 1, "component": "loss", "args": {"save_strategy": "steps", "save_steps": 7, "logging_steps": 10}}
    whole = run(spec, tmp_path / "whole")
    resumed = run({**spec, "resume": str(tmp_path / "whole" / "checkpoint-7")}, tmp_path / "resumed")
    assert resumed.log[-1]["train_loss"] == whole.log[-1]["train_loss"]  # the host's, over the steps since, depends on its version


def test_random_rows_and_random_samplers_resume_exactly(tmp_path):
    class Masked(torch.utils.data.Dataset):
        rows = tiny_rows(12)

        def __len__(self):
            return 12

        def __getitem__(self, index):
            row = self.rows[index]
            hidden = torch.rand(len(row["labels"])) < 0.3
            return {**row, "labels": [-100 if hide else label for hide, label in zip(hidden.tolist(), row["labels"], strict=True)]}

    class Sampled(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.WeightedRandomSampler(torch.ones(12), 12, replacement=False, generator=torch.Generator().manual_seed(1))

    def trained(resume=None, **extra):
        trainer = trainer_with(
            Recording(), tmp_path, base=Sampled, rows=Masked(), max_steps=8, save_strategy="steps", save_steps=1, save_total_limit=None, **extra
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    whole, expected = trained()
    for epoch in range(2):
        ids = [sample for batch, _, _ in whole.component.seen[3 * epoch : 3 * epoch + 3] for sample in batch]
        assert len(set(ids)) == len(ids) >= 11
    assert trained(resume=str(tmp_path / "checkpoint-7"))[1].equal(expected)
    assert trained(resume=str(tmp_path / "checkpoint-4"), dataloader_num_workers=1)[1].equal(expected)


def test_a_wrong_number_of_weights_is_an_error(tmp_path):
    class Wrong(SampleWeighter):
        def sample_weights(self, losses, *, ctx, model, inputs):
            return losses[:2]

    with pytest.raises(ComponentError, match=r"one weight per sample \(4,\), not \(2,\)"):
        trainer_with(Wrong(), tmp_path).train()


# ------------------------------------------------------------------------------------------------ refusals


def test_hosts_that_would_give_wrong_results_are_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    common = {"model": tiny_model(), "args": arguments, "train_dataset": tiny_rows(4), "data_collator": pad_collator}
    with pytest.raises(ConfigError, match="compute_loss_func"):
        WeightTrainer.over(Trainer)(**common, compute_loss_func=lambda *a, **k: None, dataflex={"component_name": "loss"})

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from tiny_rows(4)

    arguments.max_steps = 1
    with pytest.raises(ConfigError, match="streaming data set"):
        WeightTrainer.over(Trainer)(**{**common, "train_dataset": Stream()}, dataflex={"component_name": "loss"})


def test_a_component_that_needs_evaluation_data(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ComponentError, match="set eval_dataset or val_size"):
        WeightTrainer.over(Trainer)(
            model=tiny_model(), args=arguments, train_dataset=tiny_rows(4), data_collator=pad_collator, dataflex={"component_name": "adapt"}
        )


def test_contradictory_step_counts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="train_step: is 3 but max_steps is 5"):
        make_trainer({"component": "loss", "max_steps": 5, "dataflex": {"train_step": 3}}, str(tmp_path))


def test_config_objects_and_dictionaries_are_the_same(tmp_path):
    for dataflex in ({"component_name": "loss", "warmup_step": 1}, DataflexConfig(component_name="loss", warmup_step=1)):
        trainer = WeightTrainer.over(Trainer)(
            model=tiny_model(),
            args=TrainingArguments(str(tmp_path), use_cpu=True),
            train_dataset=tiny_rows(4),
            data_collator=pad_collator,
            dataflex=dataflex,
        )
        assert (trainer.dataflex.train_type, trainer.dataflex.warmup_step) == ("dynamic_weight", 1)


def test_nothing_is_logged_per_step(tmp_path, capsys):
    trainer, _ = make_trainer({"component": "loss", "batch": 1, "args": {"logging_steps": 4}}, str(tmp_path))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [4, 8]
