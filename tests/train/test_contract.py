"""What a component promises about its weights is checked: the sign always, the mean where it is declared."""

import logging
import math

import pytest
import torch
from harness import HOSTS, make_trainer, run
from test_hosts import build
from test_weight_trainer import trainer_with
from transformers import Trainer

from dataflex import Mixer, SampleWeighter, TokenWeighter, Weighter
from dataflex.core.registry import REGISTRY
from dataflex.errors import ComponentError
from dataflex.functional.weights import token_gate
from dataflex.testing.tiny import tiny_rows
from dataflex.train.trainer.contract import WeightContract
from dataflex.train.weighter.base_weighter import PopulationWeighter


class Fixed(SampleWeighter):
    """The same weight for every sample, or by the optimizer step."""

    def __init__(self, weight, mean_scope=None):
        super().__init__()
        self.weight, self.mean_scope = weight, mean_scope

    def sample_weights(self, losses, *, ctx, model, inputs):
        weight = self.weight(ctx.state.global_step) if callable(self.weight) else self.weight
        return torch.full_like(losses, weight)


class Scalar(Weighter):
    def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
        return (torch.linspace(-1, 3, len(losses)) * losses).mean()


class Gate(TokenWeighter):
    """One token of many has a negative weight: the mean of every sample stays positive."""

    def token_weights(self, token_losses):
        weights = torch.ones_like(token_losses)
        weights[0] = -1.0
        return weights


def parameters(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


# ------------------------------------------------------------------------------------------------ the sign


@pytest.mark.parametrize("component", [Fixed(-1.0), Scalar(), Gate()], ids=["sample", "scalar", "token"])
def test_a_negative_weight_is_an_error_before_it_changes_anything(tmp_path, component):
    trainer = trainer_with(component, tmp_path, logging_steps=100)
    before = parameters(trainer)
    with pytest.raises(ComponentError, match=rf"{type(component).__name__} gave weights down to -1 in step 1: a weight must be 0 or more"):
        trainer.train()
    assert parameters(trainer).equal(before)


def test_a_weight_that_turns_negative_is_an_error_at_the_next_log_line(tmp_path):
    trainer = trainer_with(Fixed(lambda step: -1.0 if step == 4 else 1.0), tmp_path, max_steps=12, logging_steps=3)
    with pytest.raises(ComponentError, match="Fixed gave weights down to -1 in steps 4 to 6"):
        trainer.train()
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("logging", [{"logging_steps": 100}, {"logging_strategy": "no"}], ids=["rarely", "never"])
def test_without_log_lines_the_end_of_training_tells(tmp_path, logging):
    trainer = trainer_with(Fixed(lambda step: -1.0 if step == 2 else 1.0), tmp_path, max_steps=5, **logging)
    with pytest.raises(ComponentError, match="in steps 2 to 5"):
        trainer.train()


def test_no_checkpoint_is_written_of_wrong_weights(tmp_path):
    trainer = trainer_with(Fixed(lambda step: 1.0 - 2 * step), tmp_path, max_steps=5, logging_steps=100, save_strategy="steps", save_steps=2)
    with pytest.raises(ComponentError, match="down to -1 in step 2"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_weight_of_zero_is_no_mistake(tmp_path):
    trainer_with(Fixed(lambda step: float(step % 2)), tmp_path).train()


# ------------------------------------------------------------------------------------------------ the mean


@pytest.mark.parametrize("scope", ["micro_batch", "step"])
@pytest.mark.parametrize("weight", [100.0, 0.5])
def test_a_declared_mean_is_checked(tmp_path, scope, weight):
    trainer = trainer_with(Fixed(weight, scope), tmp_path)
    with pytest.raises(ComponentError, match=rf"Fixed gave weights of mean {weight:g} in step 1, where mean_scope = '{scope}' promises mean 1"):
        trainer.train()


def test_the_mean_of_a_step_may_differ_between_its_micro_batches(tmp_path):
    class Turns(SampleWeighter):
        def sample_weights(self, losses, *, ctx, model, inputs):
            return torch.full_like(losses, 2.0 * (ctx.step.position % 2))

    for scope in ("step", "micro_batch"):
        Turns.mean_scope = scope
        trainer = trainer_with(Turns(), tmp_path / scope, batch=2, gradient_accumulation_steps=2)
        if scope == "step":
            trainer.train()
        else:
            with pytest.raises(ComponentError, match="of mean 0 in step 1"):
                trainer.train()


def test_a_population_weighter_promises_its_mean(tmp_path):
    class Much(PopulationWeighter):
        def signal(self, losses, *, ctx):
            return losses

        def decide(self, signals, *, ctx):
            return torch.full_like(signals, 100.0)

    for scope in ("micro", "window"):
        with pytest.raises(ComponentError, match="Much gave weights of mean 100"):
            trainer_with(Much(scope=scope), tmp_path / scope, batch=2, gradient_accumulation_steps=2).train()


def test_a_mean_that_is_not_promised_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="dataflex"):
        trainer_with(Fixed(100.0), tmp_path, max_steps=4, logging_steps=1).train()
    said = [record.getMessage() for record in caplog.records if "mean" in record.getMessage()]
    assert len(said) == 1 and "step 1: the weights of Fixed have mean 100, so the learning rate is in effect multiplied" in said[0]


def test_losses_that_are_not_finite_break_no_promise(tmp_path):
    class Some(SampleWeighter):
        mean_scope = "micro_batch"

        def sample_weights(self, losses, *, ctx, model, inputs):
            finite = torch.isfinite(losses)
            return finite.float() * len(losses) / finite.sum()

    rows = tiny_rows(4)
    trainer = trainer_with(Some(), tmp_path, rows=rows, logging_steps=1, max_steps=1)
    trainer.model.lm_head.register_forward_hook(lambda m, args, out: torch.where(torch.arange(out.shape[0])[:, None, None] == 0, math.nan, out))
    trainer.train()


@pytest.mark.parametrize("component", REGISTRY.names("weighter"))
def test_every_built_in_weighter_keeps_its_promise(tmp_path, component):
    for scope in ({}, {"scope": "window"}) if component in ("loss", "adapt", "joint_update_aware") else ({},):
        run({"component": component, "params": scope, "rows": 9, "batch": 2, "accumulation": 2, "args": {"logging_steps": 2}}, tmp_path / str(scope))
    if component == "loss":
        run({"component": "loss", "params": {"scope": "ema"}, "batch": 2}, tmp_path / "ema")
    if component == "adapt":
        run({"component": "adapt", "params": {"normalize": "none"}, "batch": 2}, tmp_path / "none")


def test_no_step_but_the_first_waits_for_the_device(tmp_path, monkeypatch):
    trainer, _ = make_trainer({"component": "loss", "batch": 1, "args": {"logging_steps": 4}}, str(tmp_path))
    looked, verify = [], WeightContract.verify
    monkeypatch.setattr(WeightContract, "verify", lambda self, step: (looked.append(step), verify(self, step)))
    trainer.train()
    assert looked == [1, 4, 8, 8]


# ------------------------------------------------------------------------------------------------ weights of domains


class Weighing(Mixer):
    weights: torch.Tensor = torch.ones(2)

    def mix(self, model, step_id, **kwargs):
        return [0.5, 0.5]

    def token_weights(self, ctx):
        return self.weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([-1.0, 3.0]), "Weighing.token_weights gave weights down to -1 in step 1"),
        (torch.tensor([math.nan, 1.0]), "Weighing.token_weights gave weights that are not finite in step 1"),
        (torch.ones(3), r"Weighing.token_weights must return one weight per domain \(2,\), not \(3,\)"),
        ([1.0, 1.0], "must return one weight per domain"),
    ],
)
def test_wrong_weights_of_domains_are_an_error(tmp_path, weights, message):
    mixer = Weighing()
    mixer.weights = weights
    trainer = build("mix", Trainer, tmp_path, component=mixer)
    before = parameters(trainer)
    with pytest.raises(ComponentError, match=message):
        trainer.train()
    assert parameters(trainer).equal(before)


# ------------------------------------------------------------------------------------------------ gates under label smoothing


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("gate", ["dft", "focal"])
def test_gates_read_p_from_the_plain_cross_entropy(tmp_path, gate, host, project):
    """The gate multiplies the smoothed loss, and is the same with and without smoothing."""
    seen = {}
    for smoothing in (0.0, 0.3):
        spec = {"component": gate, "host": host, "batch": 4, "max_steps": 1, "dataflex": {"project_targets_only": project}}
        trainer, _ = make_trainer({**spec, "args": {"label_smoothing_factor": smoothing}}, str(tmp_path / str(smoothing)))
        given, weights = [], trainer.component.token_weights
        trainer.component.token_weights = lambda losses, given=given, weights=weights: (given.append(losses.detach()), weights(losses))[1]
        trainer.train()
        seen[smoothing] = given[0]
    assert torch.allclose(seen[0.3], seen[0.0], rtol=1e-5, atol=1e-6)


def test_p_of_a_confident_token_is_read_as_it_is(tmp_path):
    logits = torch.tensor([[0.0, 0.0, 0.0, math.log(99 * 3)]])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([3]), reduction="none")
    assert float(token_gate(loss, "dft", 1.0)) == pytest.approx(0.99)


def test_focal_without_detaching_differentiates_the_plain_gate(tmp_path):
    for detach in (True, False):
        spec = {"component": "focal", "params": {"detach_gate": detach}, "batch": 4, "max_steps": 1, "args": {"label_smoothing_factor": 0.3}}
        assert run(spec, tmp_path / str(detach)).gradients[0].isfinite().all()
    spec = {"component": "focal", "params": {"gamma": 0}, "batch": 4, "max_steps": 1}
    ones = [run({**spec, "args": {"label_smoothing_factor": smoothing}}, tmp_path / f"{smoothing}") for smoothing in (0.0, 0.3)]
    assert not ones[0].gradients[0].equal(ones[1].gradients[0])  # the loss itself stays smoothed
