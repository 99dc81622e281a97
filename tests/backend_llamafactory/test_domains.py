"""Several data sets under `dataset` are the domains of LLaMA-Factory's training. Every text is the first letter of its data set's name."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import transformers
import yaml

from dataflex.backends import load_backend
from dataflex.cli.plan import check_run
from dataflex.errors import ConfigError
from dataflex.testing.tiny import tiny_tokenizer

ROWS = {"vole": 12, "zebra": 30, "quail": 5}  # neither in the order of the names nor of the sizes; of each, LLaMA-Factory drops one row
NAMES = list(ROWS)
BASE = {
    "stage": "sft",
    "finetuning_type": "lora",
    "dataset": ",".join(NAMES),
    "template": "empty",
    "cutoff_len": 24,
    "per_device_train_batch_size": 5,
    "learning_rate": 1.0e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
STATIC = {"train_type": "dynamic_mix", "static_mix": True, "train_step": 4}
ODM = {"train_type": "dynamic_mix", "component_name": "odm", "warmup_step": 1, "update_step": 1, "update_times": -1, "train_step": 7}
SELECT = {"train_type": "dynamic_select", "component_name": "random", "warmup_step": 1, "update_step": 2, "update_times": -1, "train_step": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, info = tmp_path_factory.mktemp("data"), {}
    for name, number in ROWS.items():
        answers = [{"instruction": name[0] * (1 + k % 4), "input": "", "output": name[0] * 4} for k in range(number)]
        answers[1]["output"] = None
        texts = [{"text": name[0] * (4 + k % 5)} for k in range(number)]
        for kind, rows, columns in (("", answers, {}), ("_text", texts, {"columns": {"prompt": "text"}})):
            (folder / f"{name}{kind}.json").write_text(json.dumps(rows))
            info[name + kind] = {"file_name": f"{name}{kind}.json", **columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(folder)


@pytest.fixture
def write(tmp_path, data, model):
    def write(**keys):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**BASE, "dataset_dir": data, "model_name_or_path": model, "output_dir": str(tmp_path / "out"), **keys}))
        return path

    return write


class Run:
    """A finished run: its trainer, what it trained on as (domain, letters) pairs, one for each sample, and the files it left."""

    def __init__(self, path):
        run, prepared = check_run(path)
        self.trained, step = [], transformers.Trainer.training_step

        def recording(trainer, model, inputs, *args, **kwargs):
            self.trainer = trainer
            if run.dataflex.train_type == "dynamic_mix":
                self.trained += zip(*domains_and_letters(trainer, inputs), strict=True)
            return step(trainer, model, inputs, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.Trainer, "training_step", recording)
            load_backend("auto").train(run, prepared)
        out = Path(run.backend["output_dir"])
        self.events = [json.loads(line) for line in (out / "dataflex" / "events.jsonl").read_text().splitlines()]
        self.log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        self.results = json.loads((out / "all_results.json").read_text())
        self.selections = {int(file.stem.split("_")[1]): np.load(file) for file in (out / "dataflex" / "selections").glob("step_*.npy")}


def letters(tokens):
    """The different letters of a text; one, if no other data set's text got into it."""
    return "".join(sorted(set(tiny_tokenizer().decode(tokens, skip_special_tokens=True))))


def letters_of(rows):
    return [letters(row["input_ids"]) for row in rows]


def domains_and_letters(trainer, inputs):
    meta = trainer.step.meta
    texts = [inputs["input_ids"][meta.token_samples == sample] for sample in range(meta.num_samples)]
    return [trainer.domain_names[domain] for domain in meta.domain_ids], [letters(text) for text in texts]


@pytest.mark.parametrize(
    ("keys", "shares", "quotas"),
    [
        ({"mixture_sample_rule": "uniform"}, [1 / 3, 1 / 3, 1 / 3], [7, 7, 6]),
        ({"mixture_sample_rule": "stratified"}, [11 / 44, 29 / 44, 4 / 44], [5, 13, 2]),
        ({"init_mixture_proportions": [0.5, 0.3, 0.2]}, [0.5, 0.3, 0.2], [10, 6, 4]),
    ],
)
def test_quotas_are_exact_and_in_the_order_of_the_data_sets(write, keys, shares, quotas):
    run = Run(write(**STATIC, **keys))
    (event,) = run.events
    assert event["event"] == "mixture" and event["samples"] == 20
    assert list(event["domains"].items()) == list(zip(NAMES, quotas, strict=True))
    assert list(event["proportions"]) == NAMES and np.allclose(list(event["proportions"].values()), shares)
    assert Counter(found for _, found in run.trained) == {name[0]: quota for name, quota in zip(NAMES, quotas, strict=True)}
    assert {f"dataflex/proportion/{name}": share for name, share in event["proportions"].items()}.items() <= run.log[0].items()


def test_losses_of_domains_are_those_of_their_data_sets(write):
    """A pass without learning: what training logs for a domain is what evaluation finds on its data set."""
    keys = {"per_device_train_batch_size": 11, "logging_steps": 4, "learning_rate": 0.0, "mixture_sample_rule": "stratified"}
    run = Run(write(**STATIC, **keys, eval_dataset="quail,zebra", eval_on_each_dataset=True, do_eval=True))
    logged = {name: run.log[0][f"dataflex/loss/{name}"] for name in NAMES}
    evaluated = {name: run.results[f"eval_{name}_loss"] for name in ("zebra", "quail")}
    assert min(abs(logged["vole"] - logged["zebra"]), abs(logged["zebra"] - logged["quail"])) > 1e-3
    assert logged == pytest.approx({"vole": logged["vole"], **evaluated}, rel=1e-5)
    assert not {"eval_loss", "eval_vole_loss"} & run.results.keys()


def test_odm_changes_the_mixture_that_rows_are_drawn_by_and_repeats_itself(write, tmp_path):
    keys = {**ODM, "finetuning_type": "full", "init_mixture_proportions": [0.6, 0.3, 0.1]}
    runs = [Run(write(**keys, output_dir=str(tmp_path / name))) for name in ("once", "again")]
    once, again = [[(event["step"], event["proportions"], event["domains"]) for event in run.events] for run in runs]
    assert [step for step, _, _ in once] == list(range(7))
    shares = np.array([list(mixture.values()) for _, mixture, _ in once])
    assert np.allclose(shares[0], [0.6, 0.3, 0.1]) and np.ptp(shares[-1]) > 0.01 and not np.allclose(shares[-1], shares[0])
    drawn = np.array([list(counts.values()) for _, _, counts in once])
    assert (drawn.sum(1) == 5).all() and np.abs(drawn.cumsum(0) - 5 * shares.cumsum(0)).max() < 1
    assert Counter(domain for domain, _ in runs[0].trained) == dict(zip(NAMES, drawn.sum(0).tolist(), strict=True))
    assert once == again and [entry.get("loss") for entry in runs[0].log] == [entry.get("loss") for entry in runs[1].log]


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({"max_samples": 7}, [6, 6, 4]),
        ({"packing": True}, None),
        ({"neat_packing": True}, None),
        ({"stage": "pt", "cutoff_len": 16}, [5, 13, 2]),  # 83, 210 and 35 tokens
        ({"stage": "pt", "cutoff_len": 16, "packing": False}, [12, 30, 5]),
    ],
)
def test_rows_keep_their_domain_when_some_are_dropped_or_packed(write, keys, rows):
    kind = "_text" if keys.get("stage") == "pt" else ""
    names = [name + kind for name in NAMES]
    run = Run(write(**STATIC, **{"mixture_sample_rule": "stratified", "dataset": ",".join(names)}, **keys))
    trainer = run.trainer
    assert trainer.domain_names == names
    assert letters_of(trainer.train_dataset) == [names[domain][0] for domain in trainer.domains]
    assert len(run.trained) >= 20 and all(found == domain[0] for domain, found in run.trained)
    counts = np.bincount(trainer.domains).tolist()
    assert counts == rows if rows else all(0 < count < before - 1 for count, before in zip(counts, ROWS.values(), strict=True))


def test_val_size_holds_back_rows_of_every_data_set(write):
    trainer = Run(write(**STATIC, val_size=0.25)).trainer
    train, held_back = letters_of(trainer.train_dataset), Counter(letters_of(trainer.eval_dataset))
    assert train == [NAMES[domain][0] for domain in trainer.domains]
    assert Counter(train) + held_back == {name[0]: rows - 1 for name, rows in ROWS.items()}
    assert all(0 <= expected - held_back[name[0]] <= 1 for name, expected in zip(NAMES, (3, 8, 2), strict=True))  # 1: the one dropped


def test_selection_records_how_many_rows_each_data_set_gives(write):
    run = Run(write(**SELECT))
    assert [event["step"] for event in run.events] == sorted(run.selections) == [0, 1, 3]
    for event in run.events:
        positions = run.trainer.row_numbers.first_positions(run.selections[event["step"]])  # the files tell rows of the user's data
        found = Counter(letters_of(run.trainer.train_dataset.select(positions)))
        assert list(event["domains"].items()) == [(name, found[name[0]]) for name in NAMES]
    last = run.events[-1]["domains"]
    assert {f"dataflex/selection_share/{name}": count / 10 for name, count in last.items()}.items() <= run.log[3].items()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_mixture_proportions": [0.5, 0.5]}, "init_mixture_proportions: has 2 numbers and there are 3 domains: vole, zebra, quail"),
        ({"dataset": "vole"}, "dataset: is one data set, so there is nothing to mix: name several\n"),
        ({"streaming": True, "max_steps": 7}, "streaming: cannot be combined with train_type: dynamic_mix: DataFlex needs to know the rows"),
        ({"mix_strategy": "interleave_under"}, "mix_strategy: cannot be combined with train_type: dynamic_mix, which mixes the data sets itself"),
        ({"tokenized_path": "tokens"}, "tokenized_path: cannot be combined with train_type: dynamic_mix"),
        ({"val_size": 4}, "val_size: is a number of rows, and with train_type: dynamic_mix each data set is split alone; give a share below 1"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_before_training(write, tmp_path, keys, message):
    with pytest.raises(ConfigError) as error:
        check_run(write(**{**ODM, **keys}))
    assert message in f"{error.value}\n"
    assert not (tmp_path / "out").exists()
