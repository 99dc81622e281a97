"""Which Trainers DataFlex may stand in front of: those whose methods are known, and others as far as they leave rows and loss alone."""

import functools
import importlib
import inspect
import pkgutil

import datasets
import pytest
import torch
from harness import HOSTS, make_trainer
from transformers import LlamaForSequenceClassification, Seq2SeqTrainer, Trainer, TrainingArguments

from dataflex import MixTrainer, SampleWeighter, SelectTrainer, WeightTrainer
from dataflex.errors import ConfigError
from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows, tiny_tokenizer
from dataflex.train.trainer import hosts

MIXINS = {"weight": WeightTrainer, "select": SelectTrainer, "mix": MixTrainer}
ALGORITHM = {"weight": "loss", "select": "random", "mix": "odm"}
WITH_TRL = "sft" in HOSTS


def trainers_of(package: str) -> list[type[Trainer]]:
    """Every Trainer class that a package defines, as far as its modules can be imported here."""
    found: dict[str, type[Trainer]] = {}
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda name: None):
        if not module.name.rsplit(".", 1)[-1].startswith(("trainer", "dpo_trainer")) and not module.name.endswith("_trainer"):
            continue
        try:
            members = vars(importlib.import_module(module.name)).values()
        except Exception:  # vLLM, DeepSpeed and the like are not here
            continue
        for cls in [member for member in members if inspect.isclass(member) and issubclass(member, Trainer)]:
            found[f"{cls.__module__}.{cls.__name__}"] = cls
    return list(found.values())


def every_trainer() -> list[type[Trainer]]:
    packages = ["trl.trainer", "trl.experimental"] if WITH_TRL else ["llamafactory.train"]
    return [Trainer, Seq2SeqTrainer, *(cls for package in packages for cls in trainers_of(package))]


def refused(kind: str, host: type[Trainer]) -> list[str]:
    """What `kind` says against the methods of a class."""
    mixin = MIXINS[kind]
    return hosts.unsupported_methods(mixin.over(host), sampler=mixin._orders_rows, loss=mixin._builds_loss)


def build(kind: str, host: type[Trainer], out, *, algorithm: str | None = None, component=None, **changes):
    data = datasets.Dataset.from_list([{**row, "domain_id": number % 2} for number, row in enumerate(tiny_rows(8))])
    common = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(str(out), use_cpu=True, **common)
    dataflex = {} if kind == "weight" else {"update_step": 1, "update_times": -1}
    dataflex |= {} if component else {"component_name": algorithm or ALGORITHM[kind]}
    common = {"model": tiny_model(), "args": args, "train_dataset": data, "data_collator": pad_collator}
    return MIXINS[kind].over(host)(**{**common, **changes}, dataflex=dataflex, component=component)


# ------------------------------------------------------------------------------------------------ every host there is


@pytest.fixture(scope="module")
def installed_hosts():
    found = every_trainer()
    assert len(found) > (20 if WITH_TRL else 5)
    return found


@pytest.mark.parametrize("kind", MIXINS)
def test_no_host_uses_a_name_of_dataflexs(installed_hosts, kind):
    assert {cls.__name__: names for cls in installed_hosts if (names := hosts.collisions(MIXINS[kind], cls))} == {}


def test_what_each_host_may_be_combined_with(installed_hosts):
    selectable = {cls.__name__ for cls in installed_hosts if not refused("select", cls)}
    weightable = {cls.__name__ for cls in installed_hosts if not refused("weight", cls)}
    mixable = {cls.__name__ for cls in installed_hosts if not refused("mix", cls)}
    plain = {"Trainer", "Seq2SeqTrainer"}
    if WITH_TRL:
        assert weightable == mixable == plain | {"SFTTrainer", "_BaseTrainer"}
        assert {"SFTTrainer", "DPOTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer"} <= selectable
        own_rows = {"GRPOTrainer", "RLOOTrainer", "GMPOTrainer", "OnlineDPOTrainer", "KTOTrainer", "GOLDTrainer", "A2POTrainer", "AsyncGRPOTrainer"}
        there = {cls.__name__ for cls in installed_hosts}
        assert there & own_rows >= {"GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer", "KTOTrainer"} and not selectable & own_rows
    else:
        assert weightable == mixable == plain | {"CustomTrainer", "CustomSeq2SeqTrainer"}
        assert not selectable & {"CustomPPOTrainer", "PairwiseTrainer", "CustomKTOTrainer"}


@pytest.mark.skipif(not WITH_TRL, reason="TRL's trainers")
@pytest.mark.parametrize("kind", MIXINS)
def test_online_trainers_are_refused_before_they_are_made(tmp_path, kind):
    from trl import GRPOTrainer

    with pytest.raises(ConfigError, match=r"_get_train_sampler|get_train_dataloader.*_prepare_inputs of GRPOTrainer \(trl.trainer.grpo_trainer\)"):
        build(kind, GRPOTrainer, tmp_path)


# ------------------------------------------------------------------------------------------------ preference and reward trainers


def preference(host: str, out, algorithm: str):
    import trl

    rows = [{"prompt": "Say ", "chosen": "ab" * (number + 1), "rejected": "cd"} for number in range(8)]
    common = {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = getattr(trl, f"{host}Config")(str(out), bf16=False, gradient_checkpointing=False, logging_steps=1, **common)
    model, extra = tiny_model(), {"ref_model": tiny_model()} if host == "DPO" else {}
    if host == "Reward":
        model.config.num_labels = 1
        model = LlamaForSequenceClassification(model.config)
    return SelectTrainer.over(getattr(trl, f"{host}Trainer"))(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        dataflex={"component_name": algorithm, "update_step": 1, "update_times": -1},
        **extra,
    )


@pytest.mark.skipif(not WITH_TRL, reason="TRL's trainers")
@pytest.mark.parametrize("host", ["DPO", "Reward"])
def test_random_selection_in_front_of_preference_trainers(tmp_path, host):
    trainer = preference(host, tmp_path, "random")
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    assert len(list((tmp_path / "dataflex/selections").glob("step_*.npy"))) == 3


@pytest.mark.skipif(not WITH_TRL, reason="TRL's trainers")
@pytest.mark.parametrize("host", ["DPO", "Reward"])
def test_scoring_in_front_of_preference_trainers_is_refused(tmp_path, host):
    trainer = preference(host, tmp_path, "loss")
    with pytest.raises(ConfigError, match=rf"dynamic_select: cannot be combined with the batches of {host}Trainer: .*such as random"):
        trainer.train()


# ------------------------------------------------------------------------------------------------ classes of a user's own


PLAN = ["get_train_dataloader", "_get_dataloader", "get_batch_samples", "_prepare_inputs", "_prepare_input"]


def overriding(*names: str, base: type[Trainer] = Trainer) -> type[Trainer]:
    """A class that overrides methods and hands on to those of `base`."""

    def forwarding(name):
        def method(self, *args, **kwargs):
            return getattr(super(own, self), name)(*args, **kwargs)

        return method

    own = type("Mine", (base,), {name: forwarding(name) for name in names})
    return own


@pytest.mark.parametrize("kind", MIXINS)
@pytest.mark.parametrize("method", PLAN)
def test_rows_of_a_hosts_own_are_refused(tmp_path, kind, method):
    with pytest.raises(ConfigError, match=rf"dynamic_{kind}: cannot be combined with the {method} of Mine \(test_hosts\): .*leave it to Trainer"):
        build(kind, overriding(method), tmp_path)


def test_a_sampler_of_a_hosts_own_is_kept_by_weighting_alone(tmp_path):
    host = overriding("_get_train_sampler")
    for kind in ("select", "mix"):
        with pytest.raises(ConfigError, match="the _get_train_sampler of Mine"):
            build(kind, host, tmp_path)
    build("weight", host, tmp_path)


@pytest.mark.parametrize("method", ["compute_loss", "training_step"])
def test_a_loss_of_a_hosts_own_is_refused_where_dataflex_builds_it(tmp_path, method):
    host = overriding(method)
    for kind in ("weight", "mix"):
        with pytest.raises(ConfigError, match=rf"the {method} of Mine \(test_hosts\): the weighted loss would take its place"):
            build(kind, host, tmp_path)
    build("select", host, tmp_path).train()


@pytest.mark.parametrize("kind", MIXINS)
def test_other_methods_of_a_hosts_own_are_kept(tmp_path, kind):
    assert refused(kind, overriding("log", "create_optimizer", "create_scheduler", "evaluate", "_save_checkpoint", "prediction_step")) == []

    class Mine(Trainer):
        stepped = 0

        def train(self, *args, **kwargs):
            return super().train(*args, **kwargs)

        def log(self, *args, **kwargs):
            Mine.stepped += 1
            return super().log(*args, **kwargs)

        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs)

    trainer = build(kind, Mine, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 2 and Mine.stepped


@pytest.mark.parametrize("kind", MIXINS)
def test_a_training_loop_of_ones_own_is_refused(tmp_path, kind):
    class Mine(Trainer):
        def train(self, *args, **kwargs):
            self.model.train()
            for _ in self.get_train_dataloader():
                pass

    with pytest.raises(ConfigError, match="the train of Mine"):
        build(kind, Mine, tmp_path)


def test_classes_are_known_by_themselves_and_not_by_their_package(tmp_path):
    stranger = type("SFTTrainer", (Trainer,), {"compute_loss": Trainer.compute_loss, "__module__": "trl.trainer.other"})
    with pytest.raises(ConfigError, match=r"the compute_loss of SFTTrainer \(trl.trainer.other\)"):
        build("weight", stranger, tmp_path)


def test_an_override_behind_a_known_class_is_found(tmp_path):
    class Mine(Seq2SeqTrainer, overriding("get_batch_samples")):
        pass

    with pytest.raises(ConfigError, match="the get_batch_samples of Mine"):
        build("select", Mine, tmp_path)


def test_a_partial_in_a_class_is_an_override(tmp_path):
    def loss(trainer, *args, **kwargs):
        raise AssertionError

    with pytest.raises(ConfigError, match="the compute_loss of Mine"):
        build("weight", type("Mine", (Trainer,), {"compute_loss": functools.partial(loss, None)}), tmp_path)


def test_a_method_exchanged_in_a_known_class_is_an_override(tmp_path, monkeypatch):
    original = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    build("weight", Trainer, tmp_path)  # a wrapper
    monkeypatch.setattr(Trainer, "training_step", lambda self, model, inputs, num_items_in_batch=None: model(**inputs).loss)
    with pytest.raises(ConfigError, match="the training_step of Trainer, put there by test_hosts"):
        build("weight", Trainer, tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("weight", "compute_loss"),
        ("mix", "training_step"),
        ("select", "get_train_dataloader"),
        ("weight", "get_batch_samples"),
        ("weight", "compute_loss_func"),
    ],
)
def test_what_is_assigned_to_the_trainer_is_noticed_before_training(tmp_path, kind, name):
    trainer = build(kind, Trainer, tmp_path)
    setattr(trainer, name, functools.partial(lambda *args, **kwargs: None))
    with pytest.raises(ConfigError, match=rf"{name}.*"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_class_in_front_of_dataflex_may_add_to_it(tmp_path):
    class Timed(WeightTrainer.over(Trainer)):
        steps = 0

        def training_step(self, *args, **kwargs):
            Timed.steps += 1
            return super().training_step(*args, **kwargs)

    class Instead(WeightTrainer.over(Trainer)):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return model(**inputs).loss

    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no")
    common = {
        "model": tiny_model(),
        "args": args,
        "train_dataset": tiny_rows(4),
        "data_collator": pad_collator,
        "dataflex": {"component_name": "loss"},
    }
    Timed(**common).train()
    assert Timed.steps == 2
    with pytest.raises(ConfigError, match="the training_step of Instead"):
        Instead(**common)


def test_a_wrapper_around_the_trainers_own_method_is_kept(tmp_path):
    trainer = build("weight", Trainer, tmp_path)
    original, seen = trainer.training_step, []

    def counting(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    trainer.training_step = counting
    trainer.train()
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["step", "metrics", "gather_samples"])
def test_a_host_with_attributes_that_dataflex_needs_is_refused(name):
    with pytest.raises(ConfigError, match=rf"WeightTrainer: cannot be put in front of .*Mine, which has attributes .*: {name}; rename"):
        WeightTrainer.over(type("Mine", (Trainer,), {name: 1}))

    with pytest.raises(ConfigError, match=f"attributes of its own that DataFlex needs: {name}"):
        type("Direct", (WeightTrainer, type("Mine", (Trainer,), {name: 1})), {})(dataflex={"component_name": "loss"})

    code = f"class Mine(Trainer):\n def __init__(self, *args):\n  super().__init__(*args)\n  self.{name} = 0"
    scope = {"Trainer": Trainer}
    exec(code, scope)
    with pytest.raises(ConfigError, match=name):
        WeightTrainer.over(scope["Mine"])


# ------------------------------------------------------------------------------------------------ batches


def test_batches_without_tokens_are_refused_before_training(tmp_path):
    def vision(rows):
        return {"pixel_values": torch.zeros(len(rows), 3), "labels": torch.zeros(len(rows), dtype=torch.int64)}

    seen = []

    class Own(SampleWeighter):
        def sample_weights(self, losses, *, ctx, model, inputs):
            seen.append(1)
            return torch.ones_like(losses)

    for kind, component in (("weight", Own()), ("mix", None)):
        trainer = build(kind, Trainer, tmp_path, component=component, data_collator=vision)
        with pytest.raises(ConfigError, match=r"the batches of Trainer: the collator's batch has no input_ids, only pixel_values, labels"):
            trainer.train()
    with pytest.raises(ConfigError, match="has no input_ids"):
        build("select", Trainer, tmp_path, algorithm="loss", data_collator=vision).train()
    assert not seen


@pytest.mark.parametrize("host", HOSTS)
def test_trying_a_batch_draws_no_random_number(tmp_path, host):
    trainer, _ = make_trainer({"host": host, "component": "loss", "batch": 2, "max_steps": 1}, str(tmp_path))
    loader, before = Trainer.get_train_dataloader(trainer), torch.get_rng_state()
    trainer._try_batch(loader)
    assert torch.get_rng_state().equal(before)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    trainers = [build(kind, Trainer, tmp_path / kind) for kind in MIXINS]
    monkeypatch.setenv("WORLD_SIZE", "2")  # now, since accelerate would try to reach the other process
    for trainer in trainers:
        with pytest.raises(ConfigError, match=r"WORLD_SIZE=2, while this Trainer runs in one process.* set use_cpu to true"):
            trainer.train()
