"""What `MixTrainer` draws, what mixers are told, and what each makes of it."""

import copy
import json
import math
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import HOSTS, make_trainer, relative, run, run_in_turn, train
from transformers import Trainer, TrainerCallback, TrainingArguments

from dataflex import Mixer, MixTrainer
from dataflex.core.registry import register_mixer
from dataflex.errors import ComponentError, ConfigError, ResumeError
from dataflex.functional.mixing import doremi_update, odm_policy
from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows
from dataflex.train.mixer.ado_mixer import AdoMixer
from dataflex.train.mixer.doremi_mixer import DoremiMixer
from dataflex.train.mixer.static_mixer import StaticMixer

# 24 rows in three domains (row % 3), 4 to a step.
SPEC = {
    "train_type": "dynamic_mix",
    "component": "odm",
    "rows": 24,
    "domains": 3,
    "batch": 2,
    "accumulation": 2,
    "optim": "adamw_torch",
    "dataflex": {"warmup_step": 1, "update_step": 2, "update_times": 3},
}
MIXERS = {
    "static": ("static", {"rule": "uniform"}),
    "random": ("random", {}),
    "odm": ("odm", {}),
    "ado": ("ado", {"start_step": 0, "refit_step": 2}),
    "doremi": ("doremi", {"reference_model": "reference"}),
    "custom": ("custom", {"power": 3.0}),
}


@pytest.fixture(autouse=True)
def reference_model(tmp_path):
    """Another model, as DoReMi's first step leaves one, in the working folder."""
    tiny_model(seed=3, attention_dropout=0.1).save_pretrained("reference")


def mixtures(out):
    lines = (out / "dataflex" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "mixture"]


class Rows(TrainerCallback):
    """The rows of every optimizer step."""

    def __init__(self, trainer):
        self.steps = {}
        original = trainer.training_step

        def recording(model, inputs, *args, **kwargs):
            self.steps.setdefault(trainer.state.global_step, []).extend(trainer.sample_ids.tolist())
            return original(model, inputs, *args, **kwargs)

        trainer.training_step = recording


def rows_of(spec, out):
    trainer, _ = make_trainer({**SPEC, **spec}, str(out))
    rows = Rows(trainer)
    trainer.train()
    return rows.steps


# ------------------------------------------------------------------------------------------------ what is drawn


def test_quotas_follow_the_proportions_exactly(tmp_path):
    dataflex = {"init_mixture_proportions": [0.5, 0.25, 0.25], "update_step": 4, "update_times": 2}
    steps = rows_of({"component": "static", "dataflex": dataflex}, tmp_path)
    counts = np.bincount([row % 3 for rows in steps.values() for row in rows], minlength=3)
    assert counts.tolist() == [16, 8, 8]
    assert all(np.bincount([row % 3 for row in rows], minlength=3).tolist() == [2, 1, 1] for rows in steps.values())  # in every step, too


def test_a_stratified_pass_holds_every_row_once(tmp_path):
    dataflex = {"static_mix": True, "mixture_sample_rule": "stratified"}
    steps = rows_of(
        {"component": None, "rows": 22, "epochs": 1, "dataflex": {**dataflex, "component_name": None}} | {"component": "static"}, tmp_path
    )
    drawn = [row for rows in steps.values() for row in rows]
    assert sorted(drawn[:22]) == list(range(22))
    assert len(drawn) == 24  # six full steps


def test_static_mix_needs_no_component_and_takes_the_hosts_number_of_steps(tmp_path):
    data = datasets.Dataset.from_list(tiny_rows(24)).add_column("domain_id", [k % 3 for k in range(24)])
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, report_to="none", disable_tqdm=True)
    dataflex = {"static_mix": True, "init_mixture_proportions": "0.5, 0.5, 0"}
    trainer = MixTrainer.over(Trainer)(model=tiny_model(), args=args, train_dataset=data, data_collator=pad_collator, dataflex=dataflex)
    trainer.train()
    assert trainer.state.global_step == 12
    assert [list(event["proportions"].values()) for event in mixtures(tmp_path)] == [[0.5, 0.5, 0.0]] * 2
    assert mixtures(tmp_path)[0]["domains"] == {"0": 12, "1": 12, "2": 0}


def test_proportions_may_count_tokens(tmp_path):
    rows = tiny_rows(8, lengths=(4, 4)) + tiny_rows(8, seed=1, lengths=(16, 16))
    data = datasets.Dataset.from_list(rows).add_column("domain_id", [0] * 8 + [1] * 8)
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=10, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    dataflex = {"static_mix": True, "mixture_unit": "token"}
    trainer = MixTrainer.over(Trainer)(model=tiny_model(), args=args, train_dataset=data, data_collator=pad_collator, dataflex=dataflex)
    trainer.train()
    assert mixtures(tmp_path)[0]["domains"] == {"0": 16, "1": 4}  # 64 tokens of each
    assert trainer.token_proportions.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("host", HOSTS)
def test_the_loss_is_the_hosts_own(tmp_path, host):
    """Bit for bit: the host on the very rows, in their order."""
    spec = {**SPEC, "host": host, "component": "static", "optim": "sgd", "dataflex": {"update_step": 3, "project_targets_only": False}}
    trainer, recorder = make_trainer(spec, str(tmp_path / "mix"))
    rows = Rows(trainer)
    trainer.train()
    order = [row for step in rows.steps.values() for row in step]
    plain, plain_recorder = make_trainer({**spec, "component": None, "max_steps": 3}, str(tmp_path / "plain"))
    plain.train_dataset = plain.train_dataset.select(order)
    plain._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(plain.train_dataset)
    plain.train()
    for ours, theirs in zip(recorder.gradients, plain_recorder.gradients, strict=True):
        assert ours.equal(theirs)


# ------------------------------------------------------------------------------------------------ what mixers are told


class Listening(Mixer):
    """Keeps what it is told, and decides as the test says."""

    answer = None
    told: ClassVar[list] = []

    def mix(self, model, step_id, **kwargs):
        Listening.told.append((step_id, kwargs["losses"], kwargs["current_update_times"]))
        return self.answer if self.answer is not None else self.mixture_manager.proportions


def with_mixer(cls, out, **spec):
    register_mixer(cls.__name__.lower())(cls)
    (out / "own.yaml").write_text(f"mixers: {{{cls.__name__.lower()}: {{params: {{}}}}}}")
    dataflex = {**SPEC["dataflex"], **spec.pop("dataflex", {}), "components_cfg_file": str(out / "own.yaml")}
    return run({**SPEC, "component": cls.__name__.lower(), "dataflex": dataflex, **spec}, out)


def test_losses_are_those_of_the_training_forward_by_domain_and_step(tmp_path):
    Listening.told, Listening.answer = [], None
    register_mixer("listening")(Listening)
    (tmp_path / "own.yaml").write_text("mixers: {listening: {params: {}}}")
    dataflex = {**SPEC["dataflex"], "components_cfg_file": str(tmp_path / "own.yaml")}
    trainer, _ = make_trainer({**SPEC, "component": "listening", "dataflex": dataflex}, str(tmp_path))
    expected = []
    original = trainer.training_step

    def recording(model, inputs, *args, **kwargs):
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            labels = inputs["labels"][:, 1:]
            tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view_as(labels)
        for row, (losses, targets) in enumerate(zip(tokens, labels, strict=True)):
            number = int((targets != -100).sum())
            domain = trainer.sample_ids[row] % 3
            expected.append((trainer.state.global_step, int(domain), float(losses.sum()), number, float(losses.sum()) / number, 1))
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = recording
    trainer.train()
    assert [(step, update) for step, _, update in Listening.told] == [(1, 1), (3, 2), (5, 3)]
    for (_, losses, _), (first, last) in zip(Listening.told, [(0, 1), (1, 3), (3, 5)], strict=True):
        brute = np.zeros((4, last - first, 3))
        for step, domain, *values in expected:
            if first <= step < last:
                brute[:, step - first, domain] += values
        for got, want in zip(losses, brute, strict=True):
            assert got == pytest.approx(want, rel=1e-5)


def test_per_domain_losses_and_proportions_are_logged(tmp_path):
    result = train({**SPEC, "component": "custom", "args": {"logging_steps": 2}}, tmp_path)
    logged = [entry for entry in result.log if "loss" in entry]
    assert all(f"dataflex/loss/{k}" in entry for entry in logged for k in range(3))
    assert sum(logged[0][f"dataflex/proportion/{k}"] for k in range(3)) == pytest.approx(1)
    first = [entry for entry in train({**SPEC, "component": "custom", "args": {"logging_steps": 1}}, tmp_path / "each").log if "loss" in entry]
    tokens = [entry["dataflex/loss/0"] for entry in first[:2]]
    assert min(tokens) <= logged[0]["dataflex/loss/0"] <= max(tokens)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"a": 1}, "mix must return 3 numbers, not dict"),
        ([0.5, 0.5], "cannot be changed"),
        ([1, -1, 1], "cannot be changed"),
        ([math.nan, 1, 1], "cannot be changed"),
        ([0, 0, 0], "cannot be changed"),
    ],
)
def test_wrong_proportions_stop_the_run(tmp_path, answer, message):
    Listening.answer, Listening.told = answer, []
    with pytest.raises(ComponentError, match=message):
        with_mixer(Listening, tmp_path)


def test_a_mixer_written_for_the_peer_runs_unmodified(tmp_path):
    class Peer(Mixer):
        def __init__(self, mixture_manager, power: float = 1.0):
            super().__init__(mixture_manager)
            self.power, self.seen = power, []

        def update_batch_info(self, loss, domain_id):
            self.seen.append((loss, domain_id))

        def mix(self, model, step_id: int, **kwargs):
            assert self.mixture_manager.k == len(self.mixture_manager.names) == len(self.mixture_manager.sizes) == 3
            assert [len(source) for source in self.mixture_manager.sources.values()] == [8, 8, 8]
            assert {"batch", "domain_ids", "data_collator", "dataset"} <= kwargs.keys()
            assert len(self.seen) == 2 * step_id
            return np.array([loss for loss, _ in self.seen[-2:]] + [1.0])

        def save_average_weights(self, output_dir):
            open(f"{output_dir}/saved", "w").close()

    with_mixer(Peer, tmp_path)
    assert (tmp_path / "saved").is_file()
    assert len({tuple(event["proportions"].values()) for event in mixtures(tmp_path)}) == 4


def test_domains_must_be_known(tmp_path):
    with pytest.raises(ConfigError, match="mixing needs domains"):
        make_trainer({**SPEC, "domains": 0}, str(tmp_path))


def test_proportions_must_fit_the_domains(tmp_path):
    with pytest.raises(ConfigError, match="init_mixture_proportions"):
        make_trainer({**SPEC, "dataflex": {**SPEC["dataflex"], "init_mixture_proportions": [0.5, 0.5]}}, str(tmp_path))


# ------------------------------------------------------------------------------------------------ the mixers


def test_odm_follows_the_losses(tmp_path):
    train({**SPEC, "dataflex": {**SPEC["dataflex"], "update_times": 6}}, tmp_path)
    trainer, _ = make_trainer({**SPEC, "dataflex": {**SPEC["dataflex"], "update_times": 6}}, str(tmp_path / "again"))
    told = []
    original = trainer.component.mix

    def recording(model, step_id, **kwargs):
        told.append((kwargs["losses"], trainer.mixture_manager.sample_proportions))
        return original(model, step_id, **kwargs)

    trainer.component.mix = recording
    trainer.train()
    rewards = np.zeros(3)
    for t, (losses, policy) in enumerate(told, start=1):
        counts = losses.samples.sum(0)
        assert (counts > 0).all()
        rewards = 0.9 * rewards + 0.1 * losses.sample_loss_sums.sum(0) / counts / policy
        expected = odm_policy(rewards, t)
    assert list(mixtures(tmp_path)[-1]["proportions"].values()) == pytest.approx(expected.tolist())


def brute_doremi(trainer, batches, domains, alpha, sampling):
    """One step: gradient of the weighted loss, and the next alpha, token by token."""
    model, reference = trainer.model, tiny_model(seed=3).eval()
    losses, excesses, owners = [], [], []
    for batch, owner in zip(batches, domains, strict=True):
        for row, domain in enumerate(owner):
            inputs = {k: v[row : row + 1, : int(batch["attention_mask"][row].sum())] for k, v in batch.items()}
            targets = inputs["labels"][0, 1:]
            kept = targets != -100
            proxy = F.cross_entropy(model(inputs["input_ids"]).logits[0, :-1][kept], targets[kept], reduction="none")
            with torch.no_grad():
                fixed = F.cross_entropy(reference(inputs["input_ids"]).logits[0, :-1][kept], targets[kept], reduction="none")
            losses.append(proxy)
            excesses.append((proxy.detach() - fixed).clamp(min=0))
            owners += [domain] * len(proxy)
    losses, excesses, owners = torch.cat(losses), torch.cat(excesses).double(), torch.tensor(owners)
    omega = (alpha / sampling)[owners]
    gradient = torch.autograd.grad((omega.float() * losses).sum() / omega.sum().float(), list(model.parameters()))
    excess = torch.stack([excesses[owners == k].mean() for k in range(3)])
    return torch.cat([g.flatten() for g in gradient]), doremi_update(alpha.log(), excess).exp()


def test_doremi_weights_tokens_and_updates_after_every_step(tmp_path):
    spec = {**SPEC, "component": "doremi", "params": {"reference_model": "reference"}, "optim": "sgd"}
    spec["dataflex"] = {"update_step": 4, "init_mixture_proportions": [0.5, 0.25, 0.25]}
    trainer, recorder = make_trainer(spec, str(tmp_path))
    alpha, found = torch.full((3,), 1 / 3, dtype=torch.float64), []
    inner = trainer.get_batch_samples

    def first(*args, **kwargs):
        nonlocal alpha
        batches, number = inner(*args, **kwargs)
        metas = trainer.step.metas
        sampling = torch.tensor(trainer.token_proportions)
        gradient, alpha = brute_doremi(trainer, batches, [m.domain_ids.tolist() for m in metas], alpha, sampling)
        found.append((gradient, alpha))
        return batches, number

    trainer.get_batch_samples = first
    trainer.train()
    assert len(found) == 4
    for ours, (gradient, _) in zip(recorder.gradients, found, strict=True):
        assert relative(ours, gradient) < 1e-5
    assert trainer.component.log_alpha.exp() == pytest.approx(found[-1][1], rel=1e-6)
    logged = [[entry[f"dataflex/weight/{k}"] for k in range(3)] for entry in trainer.state.log_history if "dataflex/weight/0" in entry]
    assert logged == [pytest.approx([1 / 3] * 3)]  # at the only decision, before the first step
    weights = json.loads((tmp_path / "dataflex" / "doremi_weights.json").read_text())
    mean = torch.stack([alpha for _, alpha in found]).mean(0)
    assert weights["average_weights"] == pytest.approx(mean.tolist(), rel=1e-6) and weights["steps"] == 4
    line = (tmp_path / "dataflex" / "doremi_proportions.yaml").read_text().splitlines()[-1]
    assert line.startswith("init_mixture_proportions: [0.")


def test_doremi_clips_token_by_token(tmp_path):
    trainer, _ = make_trainer({**SPEC, "component": "doremi", "params": {"reference_model": "reference"}}, str(tmp_path))
    component = trainer.component
    component._reference_losses = lambda ctx, inputs: torch.tensor([1.0, 1.0, 1.0])
    component.observe(torch.tensor([2.0, 0.0, math.nan]), torch.tensor([0, 0, 1]), ctx=trainer, inputs={})
    component.end_step(trainer)
    assert component.excess.tolist() == [0.5, 0.0, 0.0]  # excess +1 and -1 is half, not nothing; a loss that is no number decides nothing


def test_doremi_needs_a_reference_with_the_same_vocabulary(tmp_path):
    tiny_model(vocab_size=270).save_pretrained("other")
    with pytest.raises(ComponentError, match="has a vocabulary of 270, the model one of 261: not the same tokenizer"):
        run({**SPEC, "component": "doremi", "params": {"reference_model": "other"}}, tmp_path)


def test_static_rules_set_in_after_the_warm_up(tmp_path, caplog):
    dataflex = {**SPEC["dataflex"], "init_mixture_proportions": [0.5, 0.25, 0.25]}
    for rule, expected in {"initial": [0.5, 0.25, 0.25], "uniform": [1 / 3] * 3, "size": [8 / 24] * 3}.items():
        run({**SPEC, "component": "static", "params": {"rule": rule}, "dataflex": dataflex}, tmp_path / rule)
        first, *later = [list(event["proportions"].values()) for event in mixtures(tmp_path / rule)]
        assert first == [0.5, 0.25, 0.25] and later == [pytest.approx(expected)] * 3
    with caplog.at_level("WARNING", "dataflex"):
        run({**SPEC, "component": "static", "params": {"rule": "unimax", "max_epochs": 0.5}}, tmp_path / "unimax")
    assert "the run takes 28 samples, and max_epochs: 0.5 allows 12" in caplog.text


def test_a_mixture_that_stays_takes_no_mixer(tmp_path):
    with pytest.raises(ConfigError, match="static_mix: keeps the mixture, so AdoMixer would decide nothing"):
        ready_made(AdoMixer(), tmp_path, static_mix=True)


def test_doremi_needs_its_reference(tmp_path):
    with pytest.raises(ComponentError, match="reference_model: is required by DoremiMixer"):
        make_trainer({**SPEC, "component": "doremi"}, str(tmp_path))
    with pytest.raises(ComponentError, match=r"reference_model: .* is not valid"):
        make_trainer({**SPEC, "component": "doremi", "params": {"reference_model": "nowhere"}}, str(tmp_path))


def test_ado_prefers_the_domain_that_is_being_learned_fastest(tmp_path):
    trainer, _ = make_trainer({**SPEC, "component": "ado", "params": {"start_step": 10, "refit_step": 50}}, str(tmp_path))
    component, manager = trainer.component, trainer.mixture_manager
    steps = np.arange(1, 201)
    samples = np.tile([4.0, 4.0, 4.0], (200, 1))
    n = steps * 12.0
    curves = np.stack([1 + 40 * n**-0.7, 2 + 3 * n**-0.5, np.full(200, 3.0)], 1)  # the third has nothing left to learn
    from dataflex.train.mixer.base_mixer import DomainLosses

    losses = DomainLosses(curves * 10, np.full((200, 3), 10.0), curves * samples, samples)
    for step in range(10, 200, 10):
        part = DomainLosses(*(x[step - 10 : step] for x in losses))
        manager.set_proportions(component.mix(None, step, losses=part))
        assert manager.proportions.sum() == pytest.approx(1) and (manager.proportions > 0).all()
    laws = component.laws
    speeds = [law.speed(component.samples) for law in laws]
    assert np.argmax(manager.proportions) == np.argmax(speeds) and manager.proportions[2] < 1 / 3


# ------------------------------------------------------------------------------------------------ ready-made mixers, several runs


def parameters(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def ready_made(component, out, rows=None, **dataflex):
    data = datasets.Dataset.from_list(rows or tiny_rows(24)).add_column("domain_id", [k % 3 for k in range(24)])
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    settings |= {"max_grad_norm": 0.0, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    dataflex = {"update_step": 1, "update_times": 6, **dataflex}
    common = {"model": tiny_model(), "args": TrainingArguments(str(out), **settings), "train_dataset": data, "data_collator": pad_collator}
    return MixTrainer.over(Trainer)(**common, component=component, dataflex=dataflex)


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_mixers_made_beforehand_get_their_manager_from_the_trainer(tmp_path, unit):
    made = {"static": (StaticMixer, {"rule": "size"}), "ado": (AdoMixer, MIXERS["ado"][1]), "doremi": (DoremiMixer, MIXERS["doremi"][1])}
    for name, (cls, params) in made.items():
        trainer = ready_made(cls(**params), tmp_path / name, mixture_unit=unit)
        assert trainer.component.mixture_manager is trainer.mixture_manager
        trainer.train()
        dataflex = {"warmup_step": 0, "update_step": 1, "update_times": 6, "mixture_unit": unit}
        named = {**SPEC, "component": name, "params": params, "batch": 4, "accumulation": 1, "optim": "sgd", "dataflex": dataflex}
        assert parameters(trainer).equal(run(named, tmp_path / "named").parameters), name


@pytest.mark.parametrize("name", ["random", "odm", "ado", "doremi"])
def test_a_second_training_starts_like_the_first(tmp_path, name):
    component, params = MIXERS[name]
    trainer, _ = make_trainer({**SPEC, "component": component, "params": params, "optim": "sgd"}, str(tmp_path))
    start = copy.deepcopy(trainer.model.state_dict())
    outcomes = []
    for _ in range(2):
        trainer.model.load_state_dict(start)
        trainer.train()
        outcomes.append(([event["proportions"] for event in mixtures(tmp_path)], copy.deepcopy(trainer.model.state_dict())))
    (shares, first), (again, second) = outcomes
    assert shares == again
    assert all(first[key].equal(second[key]) for key in first)


class Interrupted(Exception):
    """Whatever ends a training early."""


@pytest.mark.parametrize("name", ["custom", "doremi"])
def test_a_training_interrupted_within_a_step_resumes_in_the_same_process(tmp_path, name):
    component, params = MIXERS[name]
    spec = {**SPEC, "component": component, "params": params, "optim": "sgd", "args": {"save_strategy": "steps", "save_steps": 1}}
    whole = run(spec, tmp_path / "whole")
    trainer, _ = make_trainer(spec, str(tmp_path / "stopped"))
    original, passes = trainer.training_step, []

    def interrupted(*args, **kwargs):
        passes.append(None)
        if len(passes) == 8:  # the second of two micro-batches of the fourth step
            raise Interrupted
        return original(*args, **kwargs)

    trainer.training_step = interrupted
    with pytest.raises(Interrupted):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert parameters(trainer).equal(whole.parameters)
    assert [event["proportions"] for event in mixtures(tmp_path / "stopped")] == [event["proportions"] for event in mixtures(tmp_path / "whole")]


def test_a_changed_batch_size_cuts_the_plan_to_whole_steps(tmp_path):
    spec = {**SPEC, "component": "random", "args": {"save_strategy": "steps", "save_steps": 1}}
    run(spec, tmp_path)
    changed = {**spec, "batch": 3, "dataflex": {**SPEC["dataflex"], "allow_changed_resume": True}, "resume": str(tmp_path / "checkpoint-2")}
    trainer, _ = make_trainer(changed, str(tmp_path))
    rows = Rows(trainer)
    trainer.train(resume_from_checkpoint=changed["resume"])
    assert trainer.state.global_step == 7
    assert {len(drawn) for step, drawn in rows.steps.items() if step >= 2} == {6}


def test_a_plan_for_other_data_cannot_be_resumed(tmp_path):
    spec = {**SPEC, "component": "random", "args": {"save_strategy": "steps", "save_steps": 1}}
    run(spec, tmp_path)
    changed = {**spec, "rows": 21, "dataflex": {**SPEC["dataflex"], "allow_changed_resume": True}}
    with pytest.raises(ResumeError, match=r"a plan of rows of another data set \(dataset rows, dataset content changed\)"):
        train({**changed, "resume": str(tmp_path / "checkpoint-2")}, tmp_path)


def rows_of_unequal_length():
    """Domain 0 has rows of 4 tokens, the others of 16."""
    domains = [tiny_rows(8, seed=k, lengths=(length, length), masked=0) for k, length in enumerate((4, 16, 16))]
    return [row for several in zip(*domains, strict=True) for row in several]


def test_by_size_means_rows_in_either_unit(tmp_path):
    for unit in ("sample", "token"):
        ready_made(StaticMixer(rule="size"), tmp_path / unit, rows_of_unequal_length(), mixture_unit=unit).train()
        drawn = [list(event["domains"].values()) for event in mixtures(tmp_path / unit)]
        assert np.sum(drawn, 0).tolist() == [8, 8, 8]  # all have eight rows


def test_ado_sees_shares_in_the_unit_of_the_mixture(tmp_path):
    trainer = ready_made(AdoMixer(start_step=0, refit_step=2), tmp_path, rows_of_unequal_length(), mixture_unit="token", warmup_step=0)
    assert trainer.component.prior == pytest.approx(np.array([3, 15, 15]) / 33)
    trainer.train()
    drawn = np.array([[event["domains"][str(k)] for k in range(3)] for event in mixtures(tmp_path)[:-1]]) * [3, 15, 15]
    recent = trainer.component.prior
    for tokens in drawn:
        recent = 0.9 * recent + 0.1 * tokens / tokens.sum()
    assert trainer.component.state.recent == pytest.approx(recent)


# ------------------------------------------------------------------------------------------------ resume and ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_resume_at_every_step(tmp_path, name):
    component, params = MIXERS[name]
    spec = {**SPEC, "component": component, "params": params, "dropout": 0.1}
    spec["args"] = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3, "lr_scheduler_type": "cosine"}
    whole = run(spec, tmp_path / "whole")
    for step in range(1, 7):
        resumed = run({**spec, "resume": str(tmp_path / "whole" / f"checkpoint-{step}")}, tmp_path / f"resumed-{step}")
        assert resumed.parameters.equal(whole.parameters)
        assert resumed.logged() == whole.logged()
    before = [{**event, "seconds": 0} for event in mixtures(tmp_path / "whole")]
    assert [{**event, "seconds": 0} for event in mixtures(tmp_path / "resumed-2")] == [event for event in before if event["step"] >= 2]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_draw_and_train_as_one_and_resume(tmp_path):
    reference = {"reference_model": str(Path("reference").resolve())}
    params = {name: reference if name == "doremi" else params for name, (_, params) in MIXERS.items()}
    specs = {name: {**SPEC, "component": component, "params": params[name], "double": True} for name, (component, _) in MIXERS.items()}
    one = {name: run({**spec, "batch": 4}, tmp_path / "one" / name) for name, spec in specs.items()}
    two = run_in_turn({name: {**spec, "batch": 2} for name, spec in specs.items()}, tmp_path / "two", world=2)
    for name in specs:
        first, second = ([list(event["proportions"].values()) for event in mixtures(tmp_path / ranks / name)] for ranks in ("one", "two"))
        assert np.allclose(first, second, rtol=1e-6), name
        assert torch.allclose(one[name].parameters, two[name].parameters, rtol=1e-6, atol=1e-9), name


@pytest.mark.slow
@pytest.mark.distributed
def test_resume_of_two_processes(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 4}
    spec = {**SPEC, "component": "custom", "params": {"power": 3.0}, "args": args}
    specs = {"whole": spec, "resumed": {**spec, "resume": str(tmp_path / "two" / "whole" / "checkpoint-2")}}
    results = run_in_turn(specs, tmp_path / "two", world=2)
    assert results["resumed"].parameters.equal(results["whole"].parameters)
    assert results["resumed"].logged() == results["whole"].logged()
