"""Every selector: its scores against brute force, exact resume, and the same choice on any number of ranks."""

import json

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import HOSTS, make_trainer, run, run_in_turn, train
from transformers import Trainer, TrainingArguments

from dataflex import SelectTrainer
from dataflex.core.row_numbers import RowNumbers
from dataflex.errors import ComponentError, ConfigError
from dataflex.offline.results import save_result
from dataflex.signals.answers import ifd_scores
from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows
from dataflex.train.data.fingerprint import dataset_fingerprint
from dataflex.train.selector.less_selector import LessSelector

SPEC = {
    "train_type": "dynamic_select",
    "component": "random",
    "rows": 24,
    "batch": 2,
    "accumulation": 2,
    "optim": "adamw_torch",
    "dataflex": {"warmup_step": 1, "update_step": 2, "update_times": 2, "scoring_tokens": 64},
}
SELECTORS = {
    "random": ("random", {}),
    "loss": ("loss", {"focus": "high"}),
    "delta_loss": ("delta_loss", {}),
    "less": ("less", {}),
    "less over refreshes": ("less", {"gradient_type": "sgd", "refreshes": 2}),
    "cluster_less": ("cluster_less", {"cluster_size": 4, "representatives": 2}),
    "near": ("near", {}),
    "rds": ("rds", {"diversity": 0.95}),
    "tsds": ("tsds", {}),
    "ifd": ("ifd", {"min_tokens": 2}),
    "custom": ("custom", {}),
}


def selections(out):
    return {int(path.stem.split("_")[1]): np.load(path).tolist() for path in (out / "dataflex" / "selections").glob("step_*.npy")}


def at_step(spec, out, step):
    """A trainer that has done `step` optimizer steps."""
    trainer, _ = make_trainer({**SPEC, **spec, "stop_at": step}, str(out))
    trainer.train()
    return trainer


# ------------------------------------------------------------------------------------------------ resume and ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTORS)
def test_resume_at_every_step(tmp_path, name):
    component, params = SELECTORS[name]
    dataflex = {"warmup_step": 1, "update_step": 2, "update_times": 3}
    spec = {**SPEC, "component": component, "params": params, "dropout": 0.1, "dataflex": dataflex}
    spec["args"] = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3, "lr_scheduler_type": "cosine"}
    whole = run(spec, tmp_path / "whole")
    for step in range(1, 7):
        resumed = run({**spec, "resume": str(tmp_path / "whole" / f"checkpoint-{step}")}, tmp_path / f"resumed-{step}")
        assert resumed.parameters.equal(whole.parameters)
        assert resumed.logged() == whole.logged()
        later = selections(tmp_path / f"resumed-{step}")
        assert later.items() <= selections(tmp_path / "whole").items()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["less", "near"])
def test_a_run_killed_while_scoring_takes_up_where_it_stopped(tmp_path, name):
    component, params = SELECTORS[name]
    spec = {**SPEC, "component": component, "params": params, "args": {"save_strategy": "steps", "save_steps": 1}}
    whole = run(spec, tmp_path / "whole")
    run({**spec, "kill_in": 3}, tmp_path / "killed")
    parts = list((tmp_path / "killed" / "dataflex" / "cache").glob("*/part-*.npy"))
    assert parts  # of the pass it was in the middle of
    resumed = run({**spec, "resume": True}, tmp_path / "killed")
    assert resumed.parameters.equal(whole.parameters)
    assert selections(tmp_path / "killed") == selections(tmp_path / "whole")


def test_parts_on_disk_are_not_computed_again(tmp_path):
    trainer = at_step({"component": "loss"}, tmp_path, 1)
    signals, rows = trainer.signals, np.arange(24)
    computed = []
    original = signals._batch
    signals._batch = lambda dataset, batch: computed.append(batch) or original(dataset, batch)
    first = signals.losses(trainer.train_dataset, rows)
    assert sum(map(len, computed)) == 24
    assert signals.losses(trainer.train_dataset, rows).tolist() == first.tolist()
    assert sum(map(len, computed)) == 24
    with torch.no_grad():
        next(trainer.model.parameters()).add_(0.1)
    trainer.state.global_step += 1
    assert signals.losses(trainer.train_dataset, rows).tolist() != first.tolist()  # another model, another result


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_choose_as_one(tmp_path):
    specs = {name: {**SPEC, "component": component, "params": params, "double": True} for name, (component, params) in SELECTORS.items()}
    one = {name: run({**spec, "batch": 4}, tmp_path / "one" / name) for name, spec in specs.items()}
    two = run_in_turn({name: {**spec, "batch": 2} for name, spec in specs.items()}, tmp_path / "two", world=2)
    for name in specs:
        assert selections(tmp_path / "two" / name) == selections(tmp_path / "one" / name), name
        assert torch.allclose(one[name].parameters, two[name].parameters, rtol=1e-9, atol=1e-12), name


# ------------------------------------------------------------------------------------------------ signals


def brute_losses(trainer, dataset):
    """Each row alone through the model's own loss."""
    model = trainer.model.eval()
    with torch.no_grad():
        return np.array([float(model(**_inputs(row)).loss) for row in dataset])


def _inputs(row):
    return {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_losses_do_not_depend_on_the_batches(tmp_path, host, budget):
    trainer = at_step({"host": host, "dataflex": {**SPEC["dataflex"], "scoring_tokens": budget}, "dropout": 0.3}, tmp_path, 1)
    rows = np.array([5, 3, 17, 0])
    losses = trainer.signals.losses(trainer.train_dataset, rows)
    expected = brute_losses(trainer, trainer.train_dataset.select(rows))
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pooling", ["weighted_mean", "mean", "last"])
def test_embeddings_are_pooled_hidden_states(tmp_path, pooling):
    trainer = at_step({}, tmp_path, 1)
    found = trainer.signals.embeddings(trainer.train_dataset, np.arange(6), pooling)
    for row, embedding in zip(trainer.train_dataset.select(range(6)), found, strict=True):
        with torch.no_grad():
            hidden = trainer.model.eval().model(torch.tensor([row["input_ids"]])).last_hidden_state[0].double()
        length = len(hidden)
        weights = {"weighted_mean": torch.arange(1.0, length + 1), "mean": torch.ones(length), "last": torch.eye(length)[-1]}[pooling]
        expected = (weights[:, None].double() * hidden).sum(0)
        assert embedding == pytest.approx((expected / expected.norm()).numpy(), abs=1e-5)


def test_embeddings_of_a_run_in_bf16_are_pooled_in_fp32(tmp_path):
    """The mean of many hidden states rounds away what tells rows apart if it is taken in bf16."""
    trainer = at_step({"args": {"bf16": True}, "lengths": [40, 48]}, tmp_path, 1)
    found = trainer.signals.embeddings(trainer.train_dataset, np.arange(4), "mean")
    assert found.dtype == np.float32
    for row, embedding in zip(trainer.train_dataset.select(range(4)), found, strict=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = trainer.model.eval().model(torch.tensor([row["input_ids"]])).last_hidden_state[0]
        expected = hidden.double().mean(0)
        assert embedding == pytest.approx((expected / expected.norm()).numpy(), abs=2e-5)


def test_scoring_leaves_modes_and_gradients_alone(tmp_path):
    trainer = at_step({"component": "less", "lora": True}, tmp_path, 3)
    trainer.model.train()
    dropout = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))
    dropout.eval()
    before = [(m, m.training) for m in trainer.model.modules()]
    needed = [p.requires_grad for p in trainer.model.parameters()]
    trainer.signals.losses(trainer.train_dataset, np.arange(4))
    trainer.signals.mean_gradient(trainer.train_dataset, np.arange(4), unit=True, include_embeddings=False)
    assert all(module.training == training for module, training in before)
    assert [p.requires_grad for p in trainer.model.parameters()] == needed
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_row_without_a_target_has_no_score(tmp_path):
    rows = tiny_rows(8)
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    trainer = at_step({"component": "less"}, tmp_path, 3)
    data = datasets.Dataset.from_list(rows)
    everything = np.arange(8)
    assert np.flatnonzero(np.isnan(trainer.signals.losses(data, everything))).tolist() == [3]
    assert np.flatnonzero(np.isnan(trainer.signals.embeddings(data, everything)).any(1)).tolist() == [3]
    trainer.train_dataset = data
    scores = trainer.component.influence(everything, trainer)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [3]


# ------------------------------------------------------------------------------------------------ less


def gradient(model, parameters, row, dtype=torch.float64):
    model.zero_grad()
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()  # the model's own loss is fp32, whatever the model is
    F.cross_entropy(logits, torch.tensor(row["labels"][1:])).backward()
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel(), dtype=dtype) for p in parameters])
    model.zero_grad()
    return flat.double()


def brute_less(trainer, kind, tasks, target, embeddings):
    """Cosines of whole gradients, one row at a time, by autograd."""
    model = trainer.model.eval()
    ends = [] if embeddings else [model.get_input_embeddings().weight]
    parameters = [p for p in model.parameters() if p.requires_grad and not any(p is end for end in ends)]
    state = trainer.optimizer.optimizer.state
    group = trainer.optimizer.param_groups[0]
    b1, b2 = group["betas"]
    m, v = (torch.cat([state[p][name].flatten() for p in parameters]).double() for name in ("exp_avg", "exp_avg_sq"))

    def gamma(g):
        if kind == "sgd":
            return g
        if kind == "sign":
            return g.sign()
        new_m, new_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return torch.where(new_v > 0, new_m / (new_v.sqrt() + group["eps"]), 0.0)

    updates = [gamma(gradient(model, parameters, row)) for row in trainer.train_dataset]
    scores = []
    for task in tasks:
        queries = [gradient(model, parameters, row) for row in task]
        if target == "mean_of_cosines":
            direction = sum(q / q.norm() for q in queries) / len(queries)
        else:
            direction = sum(queries) / sum(queries).norm()
        scores.append([float(u @ direction / u.norm()) for u in updates])
    return np.array(scores)


@pytest.mark.parametrize("kind", ["adam", "sgd", "sign"])
@pytest.mark.parametrize("lora", [False, True])
def test_less_ranks_as_cosines_of_whole_gradients_do(tmp_path, kind, lora):
    trainer = at_step({"component": "less", "params": {"gradient_type": kind}, "lora": lora, "double": not lora}, tmp_path, 3)
    scores = trainer.component.influence(np.arange(24), trainer)
    expected = brute_less(trainer, kind, [trainer.eval_dataset], "mean_of_cosines", embeddings=lora)[0]
    assert scores == pytest.approx(expected, rel=1e-3 if lora else 1e-5, abs=1e-5 if lora else 1e-7)  # Llama takes norms in fp32
    assert np.argsort(scores).tolist() == np.argsort(expected).tolist()


@pytest.mark.parametrize("target", ["mean_of_cosines", "cosine_of_mean"])
@pytest.mark.parametrize(("aggregation", "reduce"), [("max", np.max), ("mean", np.mean)])
def test_less_over_tasks(tmp_path, target, aggregation, reduce):
    params = {"target": target, "task_aggregation": aggregation, "include_embeddings": True}
    trainer = at_step({"component": "less", "params": params, "double": True}, tmp_path, 3)
    tasks = {"a": trainer.eval_dataset.select([0, 1]), "b": trainer.eval_dataset.select([2, 3, 4, 5])}
    trainer.component.eval_dataset = tasks
    scores = trainer.component.influence(np.arange(24), trainer)
    each = brute_less(trainer, "adam", tasks.values(), target, embeddings=True)
    assert scores == pytest.approx(reduce(each, axis=0), rel=1e-4, abs=1e-7)
    if aggregation == "max" and target == "mean_of_cosines":  # the mean over all queries would rank differently
        assert np.argsort(scores).tolist() != np.argsort(each[0] * 2 + each[1] * 4).tolist()


def test_tasks_may_be_told_by_a_domain_column(tmp_path):
    trainer = at_step({"component": "less", "params": {"gradient_type": "sgd"}}, tmp_path, 1)
    parts = {"a": trainer.eval_dataset.select([0, 2, 4]), "b": trainer.eval_dataset.select([1, 3, 5])}
    trainer.component.eval_dataset = parts
    by_name = trainer.component.influence(np.arange(24), trainer)
    trainer.component.eval_dataset = datasets.Dataset.from_dict({**tiny_columns(6), "domain_id": [0, 1] * 3})
    assert trainer.component.influence(np.arange(24), trainer) == pytest.approx(by_name, rel=1e-5)


def tiny_columns(number):
    rows = tiny_rows(number, seed=1)
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_refreshes_are_averaged_by_learning_rate(tmp_path):
    trainer = at_step({"component": "less", "params": {"refreshes": 2}}, tmp_path, 1)
    answers = iter([np.array([1.0, 0.0]), np.array([0.0, 3.0]), np.array([2.0, 2.0])])
    trainer.component.influence = lambda rows, ctx: next(answers)
    trainer.lr_scheduler.get_last_lr = lambda: [rates.pop(0)]
    rates = [0.3, 0.1, 0.1]
    rows = np.arange(2)
    trainer.component.history = []
    assert trainer.component.scores(rows, ctx=trainer).tolist() == [1.0, 0.0]
    assert trainer.component.scores(rows, ctx=trainer) == pytest.approx([0.75, 0.75])
    assert trainer.component.scores(rows, ctx=trainer) == pytest.approx([1.0, 2.5])  # the first is forgotten


def test_less_needs_an_optimizer_with_moments(tmp_path):
    with pytest.raises(ComponentError, match=r"SGD keeps no Adam moments.*sgd"):
        train({**SPEC, "component": "less", "optim": "sgd"}, tmp_path)


def test_clusters_of_one_row_give_what_less_gives(tmp_path):
    plain = at_step({"component": "less", "double": True}, tmp_path / "less", 3)
    clustered = at_step({"component": "cluster_less", "params": {"cluster_size": 1}, "double": True}, tmp_path / "cluster", 1)
    rows = np.arange(24)
    expected = plain.component.influence(rows, plain)
    found = clustered.component.influence(rows, plain)
    assert np.argsort(-found).tolist() == np.argsort(-expected).tolist()


def test_clusters_are_taken_whole_in_the_order_of_their_scores(tmp_path):
    trainer = at_step({"component": "cluster_less", "params": {"cluster_size": 8, "representatives": 8}}, tmp_path, 3)
    component, rows = trainer.component, np.arange(24)
    component.labels, component.similarity = rows % 3, rows / 24
    scores = component.influence(rows, trainer)
    single = LessSelector.influence(component, rows, trainer)
    best = np.argsort([-single[rows % 3 == k].mean() for k in range(3)])
    order = np.argsort(-scores)
    assert (order[:8] % 3 == best[0]).all() and (order[8:16] % 3 == best[1]).all()
    assert (np.diff(order[:8]) < 0).all()  # by similarity, highest first


# ------------------------------------------------------------------------------------------------ the others


def test_delta_loss_compares_with_the_first_decision(tmp_path):
    dataflex = {"update_step": 1, "update_times": 4}
    trainer = at_step({"component": "delta_loss", "params": {"window": 0.25}, "dataflex": dataflex}, tmp_path, 1)
    component, rows = trainer.component, np.arange(24)
    assert component.decisions == 1
    component.baseline = np.linspace(2, 1, 24)  # row 0 falls most, the last one not at all
    trainer.__dict__["signals"] = type("Fake", (), {"losses": staticmethod(lambda data, rows: np.ones(24))})
    means = []
    for decision in (2, 3, 4):  # of 4: the window goes from the rows that fell most to those that fell least
        first = []
        for component.step_id in range(200):
            component.decisions = decision - 1
            first.append(np.argsort(-component.scores(rows, ctx=trainer))[:3])
        means.append(np.mean(first))
    assert means[0] < 6 and 8 < means[1] < 15 and means[2] > 17


def test_loss_prefers_its_band(tmp_path):
    trainer = at_step({"component": "loss", "params": {"focus": "low", "focus_weight": 1000.0}}, tmp_path, 1)
    losses = trainer.signals.losses(trainer.train_dataset, np.arange(24))
    chosen = np.argsort(-trainer.component.scores(np.arange(24), ctx=trainer))[:6]
    assert set(chosen.tolist()) <= set(np.argsort(losses)[:8].tolist())


def test_near_goes_on_where_it_stopped_and_starts_anew_when_all_are_taken(tmp_path):
    features = np.eye(24, 24, dtype=np.float32) + 0.01
    queries = np.arange(24, 0, -1, dtype=np.float32)[None]  # row 0 is nearest, then 1, ...
    np.save(tmp_path / "rows.npy", features)
    np.save(tmp_path / "queries.npy", queries)
    params = {"embeddings_file": str(tmp_path / "rows.npy"), "query_embeddings_file": str(tmp_path / "queries.npy")}
    train({**SPEC, "component": "near", "params": params, "dataflex": {"update_step": 5, "update_times": 3}}, tmp_path)
    chosen = selections(tmp_path)
    assert sorted(chosen[0]) == list(range(20))
    assert sorted(chosen[5]) == [*range(16), *range(20, 24)]
    assert sorted(chosen[10]) == [*range(16, 24), *range(12)] or len(set(chosen[10])) == 20


def test_ifd_is_the_ratio_of_the_losses_of_the_very_answers(tmp_path):
    trainer = at_step({"component": "ifd", "host": HOSTS[-1]}, tmp_path, 1)
    data, model = trainer.train_dataset, trainer.model.eval()
    scores = ifd_scores(trainer.signals, data, np.arange(24), min_tokens=5)
    start = 1  # the tokenizer's bos
    for index, row in enumerate(data):
        answer = [label for label in row["labels"] if label != -100]
        with torch.no_grad():
            given = model(**_inputs(row)).loss
            alone = model(input_ids=torch.tensor([[start, *answer]]), labels=torch.tensor([[-100, *answer]])).loss
        ratio = float(given / alone)
        expected = ratio if ratio < 1 and len(answer) >= 5 else np.nan
        assert scores[index] == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert 0 < np.isnan(scores).sum() < 24


def test_diversity_leaves_out_rows_like_better_ones(tmp_path):
    trainer = at_step({"component": "custom", "params": {"diversity": 0.5}}, tmp_path, 1)
    features = np.zeros((24, 3))
    features[np.arange(24), np.arange(24) % 3] = 1.0
    trainer.__dict__["signals"] = type("Fake", (), {"embeddings": staticmethod(lambda data, rows: features[rows])})
    chosen = trainer.component.best(np.arange(24.0), np.arange(24), 3, ctx=trainer)
    assert chosen.tolist() == [23, 22, 21]
    assert trainer.component.best(np.arange(24.0), np.arange(24), 5, ctx=trainer).tolist() == [23, 22, 21]


def test_diversity_looks_further_when_the_best_rows_are_alike(tmp_path):
    trainer = at_step({"component": "custom", "params": {"diversity": 0.5}}, tmp_path, 1)
    features = np.tile([1.0, 0.0], (24, 1))
    features[:2] = [0.0, 1.0]
    trainer.__dict__["signals"] = type("Fake", (), {"embeddings": staticmethod(lambda data, rows: features[rows])})
    assert trainer.component.best(np.arange(24.0), np.arange(24), 2, ctx=trainer).tolist() == [23, 1]


@pytest.mark.parametrize("name", SELECTORS)
def test_a_pool_is_honoured_by_all(tmp_path, name):
    component, params = SELECTORS[name]
    np.save("pool.npy", np.arange(24) % 2 == 1)
    train({**SPEC, "component": component, "params": {**params, "candidate_pool": "pool.npy"}}, tmp_path)
    for rows in selections(tmp_path).values():
        assert all(row % 2 for row in rows)


# ------------------------------------------------------------------------------------------------ offline results


@pytest.fixture
def data():
    return datasets.Dataset.from_list(tiny_rows(24))


def result(path, method, values, data):
    save_result(path, method, values, fingerprint=dataset_fingerprint(data), numbers=RowNumbers(None, len(data)), parameters={})
    return {"file": str(path)}


def test_selectors_read_offline_results(tmp_path, data):
    order = np.random.default_rng(0).permutation(24)
    train({**SPEC, "component": "near", "params": result(tmp_path / "near.st", "near", order, data), "eval_rows": 0}, tmp_path / "near")
    assert sorted(selections(tmp_path / "near")[1]) == sorted(order[:8].tolist())
    assert sorted(selections(tmp_path / "near")[3]) == sorted(order[8:16].tolist())
    train({**SPEC, "component": "rds", "params": result(tmp_path / "rds.st", "rds", order, data), "eval_rows": 0}, tmp_path / "rds")
    assert sorted(selections(tmp_path / "rds")[3]) == sorted(order[:8].tolist())
    probabilities = np.zeros(24)
    probabilities[[4, 9]] = 0.5
    train({**SPEC, "component": "tsds", "params": result(tmp_path / "tsds.st", "tsds", probabilities, data), "eval_rows": 0}, tmp_path / "tsds")
    assert set(selections(tmp_path / "tsds")[1]) == {4, 9}
    scores = np.full(24, np.nan)
    scores[[1, 2, 3]] = [0.5, 0.9, 0.7]
    train({**SPEC, "component": "ifd", "params": result(tmp_path / "ifd.st", "ifd", scores, data)}, tmp_path / "ifd")
    assert set(selections(tmp_path / "ifd")[1]) == {1, 2, 3}


@pytest.mark.parametrize(
    ("method", "rows", "message"),
    [
        ("rds", 24, "was made by `offline rds`, and near is wanted"),
        ("near", 23, "was made for a data set of 23 rows; this one has 24"),
        ("near", -24, "was made for another data set of 24 rows"),
    ],
)
def test_a_result_for_something_else_is_refused(tmp_path, method, rows, message):
    other = datasets.Dataset.from_list(tiny_rows(abs(rows), seed=0 if rows > 0 else 5))
    params = result(tmp_path / "file.st", method, np.arange(abs(rows)), other)
    with pytest.raises(ComponentError, match=message):
        make_trainer({**SPEC, "component": "near", "params": params}, str(tmp_path))


def test_another_file_is_no_result(tmp_path):
    (tmp_path / "file.st").write_text(json.dumps({}))
    with pytest.raises(ComponentError, match="cannot be read"):
        make_trainer({**SPEC, "component": "near", "params": {"file": str(tmp_path / "file.st")}}, str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "queries", "message"),
    [
        (np.zeros((23, 4)), np.zeros((2, 4)), "has 23 rows; the data set has 24"),
        (np.zeros(24), np.zeros((2, 4)), "must hold floats of shape"),
        (np.zeros((24, 4)), None, "query_embeddings_file is missing"),
    ],
)
def test_wrong_embeddings_are_refused(tmp_path, rows, queries, message):
    np.save(tmp_path / "rows.npy", rows)
    params = {"embeddings_file": str(tmp_path / "rows.npy")}
    if queries is not None:
        np.save(tmp_path / "queries.npy", queries)
        params["query_embeddings_file"] = str(tmp_path / "queries.npy")
    with pytest.raises(ComponentError, match=message):
        make_trainer({**SPEC, "component": "near", "params": params}, str(tmp_path))


@pytest.mark.parametrize("name", ["less", "near", "rds", "tsds"])
def test_evaluation_data_must_be_there(tmp_path, name):
    with pytest.raises(ComponentError, match="evaluation data, and there is none"):
        make_trainer({**SPEC, "component": name, "eval_rows": 0}, str(tmp_path))


def test_a_sharded_model_is_refused(tmp_path, monkeypatch):
    def sharded(self, *args, **kwargs):
        Trainer.__init__(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    class Sharded(Trainer):
        __init__ = sharded

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    common = {"model": tiny_model(), "args": args, "data_collator": pad_collator, "train_dataset": datasets.Dataset.from_list(tiny_rows(8))}
    with pytest.raises(ConfigError, match="loss runs the model outside the training step, which FSDP and DeepSpeed shard"):
        SelectTrainer.over(Sharded)(**common, dataflex={"component_name": "loss", "update_step": 1})
    SelectTrainer.over(Sharded)(**common, dataflex={"component_name": "random", "update_step": 1})
