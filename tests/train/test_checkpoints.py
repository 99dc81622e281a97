"""Checkpoints are whole or passed over by name, a finished run is left alone, and what is changed on purpose takes effect."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from harness import DEFAULTS, Result, make_trainer, run, train
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from dataflex.core.manifest import ALL, NAME, Share, files_of
from dataflex.core.state import checkpoint_flaws, load_state, newest_complete_checkpoint, save_state
from dataflex.errors import ResumeError, TrainingError
from dataflex.train.trainer.checkpointing import CheckpointedTrainer

SAVED = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "lr_scheduler_type": "cosine"}
SPEC = {"rows": 8, "batch": 2, "max_steps": 4, "dropout": 0.1, "optim": "adamw_torch", "component": "loss", "args": SAVED}
KINDS = {
    "weight": {"component": "loss", "params": {"scope": "ema"}},
    "select": {"train_type": "dynamic_select", "component": "loss", "dataflex": {"warmup_step": 1, "update_step": 2, "update_times": -1}},
    "mix": {"train_type": "dynamic_mix", "component": "odm", "domains": 2, "dataflex": {"warmup_step": 1, "update_step": 2, "update_times": -1}},
    "static": {"component": None},
}


def trainer_of(spec, out):
    """As `make_trainer`; a static one keeps its checkpoints as the backends' does."""
    trainer, recorder = make_trainer(spec, str(out))
    if {**DEFAULTS, **spec}["component"] is None:
        trainer = CheckpointedTrainer.over(type(trainer))(
            model=trainer.model,
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
            data_collator=trainer.data_collator,
            callbacks=[recorder],
        )
    return trainer, recorder


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "out"
    run(SPEC, folder)
    return folder


@pytest.fixture
def copied(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    return tmp_path / "copy"


# ------------------------------------------------------------------------------------------------ damage

DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(_flipped(path.read_bytes(), path.stat().st_size // 2)),
    "gone": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"\xff\x00" * (path.stat().st_size // 2) + b"\xff" * (path.stat().st_size % 2)),
}


def _flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_every_damage_of_every_file_is_named_and_the_older_checkpoint_taken(two_checkpoints, tmp_path):
    names = [*files_of(two_checkpoints / "checkpoint-4"), NAME]
    assert len(names) >= 11 and {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "dataflex/state.json"} <= set(names)
    for name in names:
        for damage, harm in DAMAGES.items():
            copy = tmp_path / "copy"
            shutil.copytree(two_checkpoints, copy)
            harm(copy / "checkpoint-4" / name)
            found, skipped = newest_complete_checkpoint(copy, share=ALL)
            assert found == copy / "checkpoint-2", (name, damage)
            assert len(skipped) == 1 and Path(name).name in skipped[0], (name, damage, skipped)
            if (name, damage) != (NAME, "gone"):  # one that was uploaded may lack it
                assert checkpoint_flaws(copy / "checkpoint-4", share=ALL, named=True)
            shutil.rmtree(copy)


def test_a_damaged_checkpoint_is_passed_over_in_training_with_a_line(copied, caplog):
    DAMAGES["flipped"](copied / "checkpoint-4" / "optimizer.pt")
    with caplog.at_level(logging.WARNING, "dataflex"):
        result = train({**SPEC, "resume": True}, copied)
    assert "optimizer.pt is damaged: its digest differs" in caplog.text
    assert result.parameters.equal(Result(copied).parameters)


def test_a_damaged_checkpoint_that_is_named_is_refused(copied):
    DAMAGES["flipped"](copied / "checkpoint-4" / "model.safetensors")
    with pytest.raises(ResumeError, match=r"model\.safetensors is damaged"):
        train({**SPEC, "resume": str(copied / "checkpoint-4")}, copied)


def test_when_no_checkpoint_is_whole_each_is_named(copied):
    (copied / "checkpoint-4" / "scheduler.pt").unlink()
    DAMAGES["cut"](copied / "checkpoint-2" / "rng_state.pth")
    with pytest.raises(ResumeError) as error:
        train({**SPEC, "resume": True}, copied)
    assert "checkpoint-4 is incomplete (no scheduler.pt)" in str(error.value)
    assert "checkpoint-2/rng_state.pth is damaged: it is cut off" in str(error.value)


def test_every_byte_of_the_state_is_guarded(copied):
    path = copied / "checkpoint-4" / "dataflex" / "state.json"
    whole = path.read_bytes()
    assert load_state(copied / "checkpoint-4")[0]["global_step"] == 4
    for place in range(len(whole)):
        path.write_bytes(_flipped(whole, place))
        with pytest.raises(ResumeError, match=r"damaged"):
            load_state(copied / "checkpoint-4")


@pytest.mark.parametrize("name", ["dataflex/state.json", "trainer_state.json"])
@pytest.mark.parametrize("content", [b"[]", b"null", b"", b"\xff\xfe{}", b"3", b"[" * 100_000])
def test_json_that_is_no_state(copied, name, content):
    (copied / "checkpoint-4" / NAME).unlink()  # so that the file itself is looked at
    (copied / "checkpoint-4" / name).write_bytes(content)
    flaws = checkpoint_flaws(copied / "checkpoint-4", named=True)
    assert len(flaws) == 1 and f"{name} is damaged" in flaws[0] and "another run" not in flaws[0]


def test_a_folder_in_the_place_of_a_file_is_no_traceback(copied):
    path = copied / "checkpoint-4" / "dataflex" / "state.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(ResumeError, match=r"state\.json cannot be read"):
        load_state(copied / "checkpoint-4")


@pytest.mark.parametrize(("key", "value"), [("stream", {"epoch": 0, "row": 0}), ("pending", {"loss": [0.5]})])
def test_an_altered_position_or_loss_is_damage_and_not_another_run(copied, key, value):
    path = copied / "checkpoint-4" / "dataflex" / "state.json"
    state = json.loads(path.read_text())
    state[key].update(value)
    path.write_text(json.dumps(state, indent=1, sort_keys=True))
    with pytest.raises(ResumeError, match="damaged"):
        train({**SPEC, "resume": str(copied / "checkpoint-4")}, copied)


def test_states_of_the_version_before_can_be_read(tmp_path):
    save_state(tmp_path / "checkpoint-1", {"global_step": 1, "pending": {"loss": [0.0]}}, {"component/x": torch.ones(2)})
    path = tmp_path / "checkpoint-1" / "dataflex" / "state.json"
    state = json.loads(path.read_text())
    del state["seal"]
    path.write_text(json.dumps({**state, "version": 2}))
    assert load_state(tmp_path / "checkpoint-1")[0]["global_step"] == 1
    path.write_text(json.dumps(state))  # of this version, a seal is expected
    with pytest.raises(ResumeError, match="no seal"):
        load_state(tmp_path / "checkpoint-1")


def test_ranks_share_the_files():
    files = {"model.safetensors": 400, "optimizer.pt": 800, "rng_state_0.pth": 14, "rng_state_1.pth": 14, "config.json": 1}
    shares = [Share(rank, 2).of(files) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(files)
    assert "rng_state_0.pth" in shares[0] and "rng_state_1.pth" in shares[1]
    assert ("model.safetensors" in shares[0]) != ("optimizer.pt" in shares[0])


# ------------------------------------------------------------------------------------------------ checkpoints without a manifest


@pytest.fixture
def of_the_host(tmp_path):
    run({**SPEC, "component": None}, tmp_path / "host")
    return tmp_path / "host"


def test_a_checkpoint_of_the_host_alone_is_resumed_with_a_line(of_the_host, caplog):
    trainer, recorder = trainer_of({**SPEC, **KINDS["static"], "max_steps": 5}, of_the_host)
    with caplog.at_level(logging.WARNING, "dataflex"):
        trainer.train(resume_from_checkpoint=True)
    assert len(recorder.gradients) == 1
    assert "checkpoint-4 has no list of its files" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
def test_a_checkpoint_of_the_host_alone_that_lacks_something_is_passed_over(of_the_host, name, damage):
    DAMAGES[damage](of_the_host / "checkpoint-4" / name)
    found, skipped = newest_complete_checkpoint(of_the_host, with_state=False)
    assert found == of_the_host / "checkpoint-2" and name in skipped[0]


def test_weights_in_several_files_are_all_there(of_the_host):
    checkpoint = of_the_host / "checkpoint-4"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_flaws(checkpoint, with_state=False) == [f"{checkpoint} is incomplete (no model-00002-of-00002.safetensors)"]


# ------------------------------------------------------------------------------------------------ saving


def test_the_older_checkpoint_is_deleted_only_when_the_newer_one_is_whole(tmp_path, monkeypatch):
    limited = {**SPEC, "args": {**SAVED, "save_total_limit": 1}}
    from dataflex.train.trainer import checkpointing

    describe = checkpointing.describe

    def failing(folder, names):
        if folder.name == "checkpoint-4":
            assert newest_complete_checkpoint(folder.parent, share=ALL)[0] == folder.parent / "checkpoint-2"
            raise KeyboardInterrupt
        return describe(folder, names)

    monkeypatch.setattr(checkpointing, "describe", failing)
    with pytest.raises(KeyboardInterrupt):
        train(limited, tmp_path / "out")
    assert newest_complete_checkpoint(tmp_path / "out", share=ALL)[0] == tmp_path / "out" / "checkpoint-2"
    monkeypatch.undo()
    train({**limited, "resume": True}, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]
    assert torch.load(tmp_path / "out/checkpoint-4/training_args.bin", weights_only=False).save_total_limit == 1


def test_files_of_an_earlier_checkpoint_of_that_number_are_gone(tmp_path):
    stray = tmp_path / "out" / "checkpoint-2" / "rng_state_1.pth"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"of two ranks")
    train(SPEC, tmp_path / "out")
    assert not stray.exists()


def test_a_folder_that_was_removed_ends_the_run(tmp_path):
    class Removing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                shutil.rmtree(args.output_dir)

    for kind in ("weight", "static"):
        trainer, _ = trainer_of({**SPEC, **KINDS[kind]}, tmp_path / kind)
        trainer.add_callback(Removing())
        with pytest.raises(TrainingError, match="was removed or replaced while the run was going on"):
            trainer.train()


# ------------------------------------------------------------------------------------------------ nothing left to do


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_at_its_end_trains_no_step_more(tmp_path, caplog, kind, steps):
    spec = {**SPEC, **KINDS[kind], "rows": 10, "max_steps": steps, "epochs": 2}
    whole, _ = trainer_of(spec, tmp_path / "out")
    made = whole.train()
    again, recorder = trainer_of(spec, tmp_path / "out")
    with caplog.at_level(logging.WARNING, "dataflex"):
        finished = again.train(resume_from_checkpoint=True)
    assert recorder.gradients == []
    assert parameters(again).equal(parameters(whole))
    assert (finished.global_step, finished.training_loss) == (steps, made.training_loss)
    assert finished.metrics["train_loss"] == made.metrics["train_loss"]
    assert f"is the end of training (step {steps} of {steps}): no step is left to do" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_an_epoch_is_not_lost_between_its_last_step_and_its_evaluation(tmp_path, kind):
    # Rows 8 in batches of 2: an epoch ends with step 4, where the checkpoint is written before the evaluation and the log line of the epoch.
    args = {**SAVED, "eval_strategy": "epoch", "logging_strategy": "epoch"}
    spec = {**SPEC, **KINDS[kind], "max_steps": 8, "epochs": 2, "args": args}
    if kind in ("select", "mix"):
        spec["dataflex"] = {**spec["dataflex"], "update_times": 1, "warmup_step": 2}  # stages of 4 steps
    whole, _ = trainer_of(spec, tmp_path / "whole")
    whole.train()
    for step in (2, 4, 8):
        resumed, _ = trainer_of(spec, tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert _timeless(resumed.state.log_history) == _timeless(whole.state.log_history), step
        assert parameters(resumed).equal(parameters(whole))


def _timeless(log):
    times = ("runtime", "per_second", "flos", "seconds", "share_of_time")
    return [{key: value for key, value in entry.items() if not any(word in key for word in times)} for entry in log]


# ------------------------------------------------------------------------------------------------ callbacks with a state


class Counting(TrainerCallback, ExportableState):
    """Counts steps, in what it says it was made with, too."""

    def __init__(self, limit=10, count=0):
        self.limit, self.count, self.seen = limit, count, []

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1
        self.seen.append(state.global_step)

    def state(self):
        return {"args": {"limit": self.limit, "count": self.count}, "attributes": {"seen": self.seen}}


class Plain(TrainerCallback):
    pass


PATIENT = {**SPEC, "max_steps": 20, "args": {**SAVED, "save_steps": 1, "learning_rate": 1e-30, "eval_strategy": "steps", "eval_steps": 1}}
PATIENT["args"] |= {"metric_for_best_model": "loss"}


@pytest.mark.parametrize("kind", KINDS)
def test_early_stopping_keeps_its_patience(tmp_path, kind):
    def trained(resume):
        trainer, recorder = trainer_of({**PATIENT, **KINDS[kind]}, tmp_path / "out")
        trainer.add_callback(EarlyStoppingCallback(3))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step, len(recorder.gradients)

    assert trained(None) == (4, 4)
    assert trained(True) == (4, 0)  # stopped is finished
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert trained(True) == (4, 1)


def test_callbacks_stay_where_and_what_they_are(tmp_path):
    def trainer(*callbacks, steps):
        made, _ = trainer_of({**SPEC, "max_steps": steps}, tmp_path / "out")
        for callback in callbacks:
            made.add_callback(callback)
        return made

    trainer(Counting(), Plain(), Counting(), steps=2).train()
    first, plain, second = Counting(), Plain(), Counting()
    resumed = trainer(first, plain, second, steps=4)
    resumed.dataflex.allow_changed_resume = True
    before = list(resumed.callback_handler.callbacks)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.callback_handler.callbacks == before
    assert [first.count, second.count] == [4, 4] and first.seen == [1, 2, 3, 4]


def test_what_a_callback_is_made_with_now_counts(tmp_path):
    trainer, _ = trainer_of({**PATIENT, "max_steps": 3}, tmp_path / "out")
    trainer.add_callback(EarlyStoppingCallback(3))
    trainer.train()
    again, _ = trainer_of({**PATIENT, "dataflex": {"allow_changed_resume": True}}, tmp_path / "out")
    callback = EarlyStoppingCallback(5)
    again.add_callback(callback)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6  # 2 of 5 were counted before
    assert callback.early_stopping_patience == 5


def test_a_callback_that_is_new_does_not_stop_the_save(tmp_path):
    train(SPEC, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    trainer, _ = trainer_of(SPEC, tmp_path / "out")
    trainer.add_callback(Counting())
    trainer.train(resume_from_checkpoint=True)
    saved = TrainerState.load_from_json(str(tmp_path / "out" / "checkpoint-4" / "trainer_state.json"))
    assert saved.stateful_callbacks["Counting"]["args"]["count"] == 2


# ------------------------------------------------------------------------------------------------ changed on purpose


class Rates(TrainerCallback):
    """The learning rate of every step that is trained."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen += [(state.global_step + 1, group["lr"]) for group in optimizer.param_groups[:1]]


def changed(out, **args):
    spec = {**SPEC, "dataflex": {"allow_changed_resume": True}, "args": {**SAVED, **args}}
    return trainer_of(spec, out)[0]


def rates_of(trainer, resume=None):
    rates = Rates()
    trainer.add_callback(rates)
    trainer.train(resume_from_checkpoint=resume)
    return rates.seen


@pytest.mark.parametrize("new", [{"learning_rate": 0.5}, {"learning_rate": 0.5, "lr_scheduler_type": "linear"}, {"warmup_steps": 3}])
def test_a_new_learning_rate_is_the_one_that_trains(copied, new):
    resumed = rates_of(changed(copied / "again", **new), str(copied / "checkpoint-2"))
    assert resumed == rates_of(changed(copied / "fresh", **new))[2:]
    assert resumed != rates_of(changed(copied / "old"))[2:]


def test_the_optimizer_takes_its_new_settings(copied):
    trainer = changed(copied / "again", weight_decay=0.3, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3)
    trainer.train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    groups = trainer.optimizer.param_groups
    assert [(group["betas"], group["eps"]) for group in groups] == [((0.5, 0.6), 1e-3)] * 2
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


@pytest.mark.parametrize(
    ("args", "named"), [({"optim": "sgd"}, "optim"), ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "lr_scheduler_type")]
)
def test_what_cannot_be_changed_is_refused_with_the_way_to_do_it(copied, args, named):
    args = {**args, "metric_for_best_model": "loss"} if "eval_strategy" in args else args
    with pytest.raises(ResumeError, match=f"In a resumed run {named} would stay as it was") as error:
        changed(copied / "again", **args).train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    assert f"model_name_or_path: {copied / 'checkpoint-2'}" in str(error.value)


def test_a_mixture_cannot_begin_again(tmp_path):
    spec = {**SPEC, **KINDS["mix"]}
    run(spec, tmp_path / "out")
    wish = {**spec["dataflex"], "allow_changed_resume": True, "init_mixture_proportions": [0.9, 0.1]}
    with pytest.raises(ResumeError, match="In a resumed run init_mixture_proportions would stay as it was"):
        train({**spec, "dataflex": wish, "resume": True}, tmp_path / "out")


def test_a_static_run_applies_what_was_changed_and_says_so(tmp_path, caplog):
    spec = {**SPEC, **KINDS["static"]}
    trainer_of(spec, tmp_path / "out")[0].train()
    again, _ = trainer_of({**spec, "args": {**SAVED, "learning_rate": 0.5}}, tmp_path / "again")
    with caplog.at_level(logging.WARNING, "dataflex"):
        assert rates_of(again, str(tmp_path / "out" / "checkpoint-2"))[0] == (3, 0.25)
    assert "learning_rate was '0.01', now '0.5'; going on with the new values" in caplog.text


def test_a_checkpoint_of_a_static_run_is_none_of_an_algorithm(tmp_path):
    trainer_of({**SPEC, **KINDS["static"]}, tmp_path / "out")[0].train()
    with pytest.raises(ResumeError, match="is of a run without an algorithm"):
        train({**SPEC, "dataflex": {"allow_changed_resume": True}, "resume": str(tmp_path / "out" / "checkpoint-2")}, tmp_path / "out")


def test_an_evaluation_that_was_still_to_come_may_stop_the_run(tmp_path):
    args = {**SAVED, "learning_rate": 1e-30, "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    spec = {**SPEC, "max_steps": 16, "epochs": 4, "args": args}

    def trained(resume=None):
        trainer, recorder = trainer_of(spec, tmp_path / "out")
        trainer.add_callback(EarlyStoppingCallback(1))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step, len(recorder.gradients)

    assert trained() == (8, 8)  # the second evaluation is no better than the first, and comes after checkpoint-8
    assert trained(True) == (8, 0)


def test_a_checkpoint_of_the_host_alone_at_its_end(of_the_host, caplog):
    trainer, recorder = trainer_of({**SPEC, **KINDS["static"]}, of_the_host)
    with caplog.at_level(logging.WARNING, "dataflex"):
        trainer.train(resume_from_checkpoint=True)
    assert recorder.gradients == [] and "no step is left to do" in caplog.text
