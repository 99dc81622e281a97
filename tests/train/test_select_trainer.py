"""What `SelectTrainer` trains on, when it asks, and what it does with the answers."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from harness import HOSTS, make_trainer, train
from transformers import Trainer, TrainerCallback, TrainingArguments

from dataflex import ScoringSelector, Selector, SelectTrainer
from dataflex.core.registry import register_selector
from dataflex.errors import ComponentError, ConfigError, TrainingError
from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows

# 24 rows, 4 to a step: a stage of 1 + 2 * 2 steps draws 4 + 8 + 8 samples.
SPEC = {
    "train_type": "dynamic_select",
    "component": "random",
    "rows": 24,
    "batch": 2,
    "accumulation": 2,
    "dataflex": {"warmup_step": 1, "update_step": 2, "update_times": 2},
}


def selections(out):
    """Rows of every interval by its first step."""
    found = {int(path.stem.split("_")[1]): np.load(path) for path in (out / "dataflex" / "selections").glob("step_*.npy")}
    return dict(sorted(found.items()))


def events(out):
    lines = (out / "dataflex" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "selection"]


class Seen(TrainerCallback):
    """The batches that reached the model, by optimizer step."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, {}
        original = trainer.training_step

        def recording(model, inputs, *args, **kwargs):
            self.steps.setdefault(trainer.state.global_step, []).append(inputs["input_ids"].clone())
            return original(model, inputs, *args, **kwargs)

        trainer.training_step = recording

    def rows(self, number):
        """The data set rows of each step, told by their tokens."""
        by_tokens = {tuple(row["input_ids"]): index for index, row in enumerate(tiny_rows(number))}
        return {
            step: [by_tokens[tuple(tokens.tolist()[: _length(tokens)])] for batch in batches for tokens in batch]
            for step, batches in self.steps.items()
        }


def _length(tokens):
    return int((tokens != 0).sum())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_model_sees_the_rows_that_were_chosen_and_no_others(tmp_path, host, workers):
    spec = {**SPEC, "host": host, "args": {"dataloader_num_workers": workers}}
    trainer, _ = make_trainer(spec, str(tmp_path))
    seen = Seen(trainer)
    trainer.train()
    rows = seen.rows(24)
    assert sorted(rows) == [0, 1, 2, 3, 4]
    chosen = selections(tmp_path)
    assert {step: len(rows) for step, rows in chosen.items()} == {0: 4, 1: 8, 3: 8}
    for start, plan in chosen.items():
        trained = [row for step in range(start, start + len(plan) // 4) for row in rows[step]]
        assert trained == plan.tolist()


def test_every_candidate_comes_up_once_before_any_comes_up_again(tmp_path):
    train({**SPEC, "dataflex": {"update_step": 2, "update_times": 3}}, tmp_path)
    chosen = np.concatenate(list(selections(tmp_path).values()))
    assert sorted(chosen.tolist()) == list(range(24))


def test_warm_ups_draw_without_repetition_and_differ_between_stages(tmp_path):
    train({**SPEC, "epochs": 2, "dataflex": {"warmup_step": 3, "update_step": 1}}, tmp_path)
    warm_ups = [rows for step, rows in selections(tmp_path).items() if step in (0, 4)]
    assert [len(set(rows.tolist())) for rows in warm_ups] == [12, 12]
    assert warm_ups[0].tolist() != warm_ups[1].tolist()
    assert [(e["step"], e["kind"], e["stage"], e["update"]) for e in events(tmp_path)] == [
        (0, "warm-up", 0, 0),
        (3, "selection", 0, 1),
        (4, "warm-up", 1, 0),
        (7, "selection", 1, 1),
    ]


@pytest.mark.parametrize(
    ("epochs", "dataflex", "steps"),
    [
        (1, {"warmup_step": 1, "update_step": 2, "update_times": 2}, 5),
        (3, {"warmup_step": 1, "update_step": 2, "update_times": 1}, 9),
        (3, {"warmup_step": 1, "update_step": 2, "update_times": 2, "train_step": 7}, 7),
        (2, {"warmup_step": 1, "update_step": 2, "update_times": -1}, 12),  # 6 steps are a pass over 24 rows
        (1.5, {"update_step": 2, "update_times": 2}, 6),
    ],
)
def test_number_of_steps(tmp_path, epochs, dataflex, steps):
    result = train({**SPEC, "epochs": epochs, "dataflex": dataflex}, tmp_path)
    assert len(result.gradients) == steps
    assert sum(map(len, selections(tmp_path).values())) == steps * 4


def test_nothing_but_the_rows_differs_from_the_hosts_own_training(tmp_path):
    """Bit for bit: the host on the very rows, in their order."""
    selected = train(SPEC, tmp_path / "select")
    rows = np.concatenate(list(selections(tmp_path / "select").values()))
    args = TrainingArguments(
        output_dir=str(tmp_path / "plain"), per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1, optim="sgd",
        learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    data = datasets.Dataset.from_list(tiny_rows(24)).select(rows)
    plain = Trainer(model=tiny_model(attention_dropout=0.0), args=args, train_dataset=data, data_collator=pad_collator)
    plain.train()
    assert torch.cat([p.detach().flatten() for p in plain.model.parameters()]).equal(selected.parameters)


def test_saving_and_evaluating_by_epoch_happens_at_the_end_of_stages(tmp_path):
    train({**SPEC, "epochs": 2, "args": {"save_strategy": "epoch"}}, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]


def test_metrics_and_events(tmp_path):
    result = train({**SPEC, "domains": 2, "component": "custom", "params": {}}, tmp_path)
    logged = [entry for entry in result.log if "dataflex/decision_seconds" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 4]
    assert "dataflex/selection_overlap" not in logged[0]
    assert logged[2]["dataflex/selection_overlap"] == 1.0  # the longest rows stay the longest
    assert logged[1]["dataflex/selection_share/0"] + logged[1]["dataflex/selection_share/1"] == 1.0
    last = events(tmp_path)[-1]
    assert {key: last[key] for key in ("samples", "distinct", "pool", "overlap")} == {"samples": 8, "distinct": 8, "pool": 24, "overlap": 1.0}
    assert sum(last["domains"].values()) == 8
    assert last["scores"]["min"] <= last["scores"]["p50"] <= last["scores"]["max"]


def test_the_summary_names_the_rows_chosen_most_and_least(tmp_path):
    spec = {**SPEC, "host": "sft"} if "sft" in HOSTS else SPEC
    train({**spec, "component": "custom", "domains": 2}, tmp_path)
    summary = json.loads((tmp_path / "dataflex" / "selections" / "summary.json").read_text())
    times = np.bincount(np.concatenate(list(selections(tmp_path).values())), minlength=24)
    assert summary["rows"] == 24
    assert [row["times"] for row in summary["most"]] == sorted(times.tolist(), reverse=True)[:20]
    assert summary["least"][0]["times"] == 0
    assert all(row["times"] == times[row["row"]] for row in summary["most"] + summary["least"])
    assert {row["domain"] for row in summary["most"]} == {"0", "1"}
    assert all(row["text"] for row in summary["most"]) or "sft" not in HOSTS


# ------------------------------------------------------------------------------------------------ selectors of one's own


def with_selector(cls, tmp_path, *, rows=24, dataflex=None, params=None, **spec):
    name = cls.__name__.lower()
    register_selector(name)(cls)
    Path("own.yaml").write_text(f"selectors: {{{name}: {{params: {{}}}}}}")
    dataflex = {**(dataflex or SPEC["dataflex"]), "components_cfg_file": "own.yaml"}
    return train({**SPEC, "rows": rows, "component": name, "params": params or {}, "dataflex": dataflex, **spec}, tmp_path)


class Fixed(ScoringSelector):
    """Scores that the test sets."""

    values = np.zeros(24)

    def scores(self, rows, *, ctx, **kwargs):
        return self.values[rows]


def test_rows_without_a_finite_score_are_never_chosen_and_ties_go_by_row(tmp_path):
    Fixed.values = np.array([np.nan, 1, 1, 1, np.inf, -np.inf] + [1.0] * 10 + [0.0] * 8)
    with_selector(Fixed, tmp_path)
    assert sorted(selections(tmp_path)[1].tolist()) == [1, 2, 3, 6, 7, 8, 9, 10]


def test_a_pool_restricts_every_draw(tmp_path):
    np.save("pool.npy", np.array([3, 5, 7, 8, 9, 11, 13, 15, 17, 20]))
    train({**SPEC, "component": "custom", "params": {"candidate_pool": "pool.npy"}}, tmp_path)
    for rows in selections(tmp_path).values():
        assert set(rows.tolist()) <= {3, 5, 7, 8, 9, 11, 13, 15, 17, 20}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "pool is empty"),
        ([0, 24], "rows from 0 to 24, and there are 24"),
        ([-1, 3], "rows from -1 to 3"),
        ([0.5], "must be a list of row numbers .*, not a list that holds float"),
        ("nonsense", "cannot be read|must be a list"),
    ],
)
def test_a_wrong_pool_is_refused(tmp_path, content, message):
    (tmp_path / "pool.json").write_text(json.dumps(content))
    with pytest.raises((ComponentError, ConfigError), match=message):
        make_trainer({**SPEC, "params": {"candidate_pool": str(tmp_path / "pool.json")}}, str(tmp_path))


@pytest.mark.parametrize(("length", "refused"), [(24, False), (23, True), (25, True)])
def test_a_pool_of_true_and_false_has_an_entry_for_every_row(tmp_path, length, refused):
    np.save("pool.npy", np.arange(length) % 2 == 1)
    spec = {**SPEC, "component": "custom", "params": {"candidate_pool": "pool.npy"}}
    if refused:
        with pytest.raises(ConfigError, match=f"says yes or no to {length} rows, and there are 24"):
            make_trainer(spec, str(tmp_path))
    else:
        train(spec, tmp_path)
        assert all((rows % 2 == 1).all() for rows in selections(tmp_path).values())


def test_too_few_rows_are_repeated_and_said_so(tmp_path, caplog):
    train({**SPEC, "rows": 5}, tmp_path)
    for rows in list(selections(tmp_path).values())[1:]:
        assert set(np.bincount(rows, minlength=5).tolist()) <= {1, 2}
    Fixed.values = np.array([1.0, 2, np.nan, np.nan, np.nan] * 5)
    with caplog.at_level("WARNING", "dataflex"):
        with_selector(Fixed, tmp_path / "fixed", rows=5)
    assert "8 samples are wanted and 2 rows chosen, so rows come up 4.0 times" in caplog.text
    assert np.bincount(selections(tmp_path / "fixed")[1]).tolist() == [4, 4]


def test_no_finite_score_at_all_stops_the_run(tmp_path):
    Fixed.values = np.full(24, np.nan)
    with pytest.raises(TrainingError, match="chose no row at step 1: none has a finite score"):
        with_selector(Fixed, tmp_path)


class Returning(Selector):
    """Returns what the test sets."""

    answer: object = None

    def select(self, model, step_id, num_samples, **kwargs):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0, 24], "chose 1 rows that are not in the pool of 24 candidates, such as 24"),
        ([0.5, 1.5], "must return a list of row numbers"),
        ([[0, 1]], "must return a list of row numbers"),
        (None, "must return a list of row numbers"),
    ],
)
def test_wrong_answers_are_refused(tmp_path, answer, message):
    Returning.answer = answer
    with pytest.raises(ComponentError, match=message):
        with_selector(Returning, tmp_path)


def test_more_rows_than_asked_are_cut_off(tmp_path):
    Returning.answer = list(range(24))
    with_selector(Returning, tmp_path)
    assert sorted(selections(tmp_path)[1].tolist()) == list(range(8))


class InOrder(Returning):
    keeps_order = True


def test_a_selector_may_decide_the_order_too(tmp_path):
    InOrder.answer = [9, 3, 7, 1, 0, 23, 11, 5]
    with_selector(InOrder, tmp_path)
    assert selections(tmp_path)[1].tolist() == InOrder.answer
    Returning.answer = InOrder.answer
    with_selector(Returning, tmp_path / "shuffled")
    shuffled = selections(tmp_path / "shuffled")[1].tolist()
    assert shuffled != InOrder.answer and sorted(shuffled) == sorted(InOrder.answer)


class Untidy(Selector):
    """Leaves the model as no selector should, and draws from every global generator."""

    def select(self, model, step_id, num_samples, **kwargs):
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = torch.ones_like(parameter)
        torch.rand(3), np.random.rand(3)
        return list(range(num_samples))


class Tidy(Selector):
    def select(self, model, step_id, num_samples, **kwargs):
        return list(range(num_samples))


def test_what_a_selector_does_to_model_and_generators_does_not_reach_training(tmp_path):
    results = [with_selector(cls, tmp_path / cls.__name__, dropout=0.2) for cls in (Tidy, Untidy)]
    assert results[0].parameters.equal(results[1].parameters)


def test_a_selector_written_for_the_peer_runs_unmodified(tmp_path):
    class Peer(Selector):
        def __init__(self, dataset, accelerator, data_collator, cache_dir, top: int = 3):
            super().__init__(dataset, accelerator, data_collator, cache_dir)
            self.top = top

        def select(self, model, step_id: int, num_samples: int, **kwargs):
            assert kwargs["current_update_times"] in (1, 2) and kwargs["update_times"] == 2
            assert "optimizer_state" in kwargs and "scheduler_state" in kwargs and "tokenizer" in kwargs
            assert self.seed == 42 and self.data_collator is not None
            batch = self.data_collator(
                [{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in map(self.dataset.__getitem__, [0, 1])]
            )
            with torch.no_grad():
                assert torch.isfinite(model(**batch).loss)
            return list(range(self.top)) * (num_samples // self.top + 1)

    with_selector(Peer, tmp_path, params={"top": 4})
    assert np.bincount(selections(tmp_path)[1]).tolist() == [2, 2, 2, 2]


def test_a_duck_typed_selector_runs(tmp_path):
    class Duck:
        def __init__(self, dataset):
            self.dataset = dataset

        def select(self, model, step_id, num_samples):
            return range(len(self.dataset))[-num_samples:]

    with_selector(Duck, tmp_path)
    assert sorted(selections(tmp_path)[1].tolist()) == list(range(16, 24))


def test_as_a_library_with_a_ready_made_selector(tmp_path):
    Fixed.values = np.arange(24.0)
    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True)
    data = datasets.Dataset.from_list(tiny_rows(24))
    trainer = SelectTrainer.over(Trainer)(
        model=tiny_model(), args=args, train_dataset=data, data_collator=pad_collator, dataflex={"update_step": 2}, component=Fixed()
    )
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert sorted(selections(tmp_path)[0].tolist()) == list(range(16, 24))
    again = selections(tmp_path)[0].tolist()
    trainer.train()
    assert selections(tmp_path)[0].tolist() == again


def test_something_without_select_is_no_selector(tmp_path):
    class Nothing:
        pass

    with pytest.raises(ComponentError, match="Nothing is no selector"):
        with_selector(Nothing, tmp_path)
