"""`dataflex-cli offline`: its files against brute force, the runs that read them, and what it leaves behind."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from workspace import listing, make_workspace, run_cli, write_config, write_rows

from dataflex.backends import load_backend
from dataflex.cli.plan import check_run
from dataflex.functional.transport import task_probabilities
from dataflex.signals import store
from dataflex.signals.signals import Signals
from dataflex.testing.tiny import tiny_model
from dataflex.train.data.fingerprint import dataset_fingerprint

WORDS = ["red", "green", "blue", "one", "three", "four", "five", "seven", "eight", "ten", "up", "down", "right", "north", "south", "east", "west"]
SIZE, HELD_OUT = 14, 3


def texts(number, seed):
    rng = np.random.default_rng(seed)
    return [
        {"instruction": " ".join(rng.choice(WORDS, 3)), "input": "", "output": " ".join(rng.choice(WORDS, length))}
        for length in rng.integers(1, 6, number)
    ]


@pytest.fixture
def folder(tmp_path):
    """A workspace whose model has weights far from its start, so that embeddings and losses of rows differ."""
    make_workspace(tmp_path)
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    model.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "data/rows.jsonl", texts(SIZE, 0))
    write_rows(tmp_path / "data/held_out.jsonl", texts(HELD_OUT, 1))
    config(tmp_path)
    return tmp_path


def config(folder, **changes):
    settings = {"eval_dataset": "held_out", "scoring_tokens": 200, "disable_tqdm": True, "update_step": 1, "warmup_step": 0, "train_step": 1}
    write_config(folder, **{**settings, "train_type": "dynamic_select", "component_name": "random", **changes})


def offline(method, *arguments):
    """Run it; the array and the metadata of the file."""
    result = run_cli("offline", method, "config.yaml", *arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return read(arguments[arguments.index("-o") + 1] if "-o" in arguments else f"{method}.safetensors")


def read(path):
    with safe_open(path, "numpy") as file:
        (name,) = file.keys()
        return name, file.get_tensor(name), file.metadata()


def problem_of(*arguments):
    result = run_cli("offline", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    return result.stderr


def trained_on(out, step=0):
    return np.load(f"{out}/dataflex/selections/step_{step}.npy")


# ------------------------------------------------------------------------------------------------ brute force


def trainer_of(*overrides):
    """The trainer whose rows and model are asked."""
    run, checked = check_run("config.yaml", ["overwrite_output_dir=true", *overrides], scoring=True)
    return load_backend("trl").scoring_trainer(run, checked, "elsewhere")


def embeddings(trainer, dataset, pooling="weighted_mean"):
    """Of each row alone."""
    found = []
    for row in dataset:
        with torch.no_grad():
            hidden = trainer.model.eval().model(torch.tensor([row["input_ids"]])).last_hidden_state[0].double()
        weights = torch.arange(1.0, len(hidden) + 1) if pooling == "weighted_mean" else torch.ones(len(hidden))
        pooled = (weights[:, None] * hidden).sum(0)
        found.append((pooled / pooled.norm()).numpy())
    return np.array(found)


def in_turns(rankings):
    """Everyone's first, everyone's second, and so on, each row once."""
    order = []
    for rank in zip(*rankings, strict=True):
        order += [row for row in dict.fromkeys(rank) if row not in order]
    return order


def nearest_first(queries, features):
    return np.argsort(-(queries @ features.T), axis=1, kind="stable").tolist()


class TestNear:
    @pytest.mark.parametrize("pooling", ["weighted_mean", "mean"])
    def test_rows_in_the_order_in_which_the_evaluation_data_asks_for_them(self, folder, pooling):
        name, order, _ = offline("near", "--pooling", pooling)
        trainer = trainer_of()
        features, queries = (embeddings(trainer, data, pooling) for data in (trainer.train_dataset, trainer.eval_dataset))
        assert name == "order" and order.tolist() == in_turns(nearest_first(queries, features))

    def test_as_many_rows_as_wanted(self, folder):
        _, whole, _ = offline("near")
        _, part, _ = offline("near", "--number", "5", "-o", "deep/er/part.safetensors")
        assert sorted(whole.tolist()) == list(range(SIZE)) and part.tolist() == whole[:5].tolist()

    def test_a_run_takes_them_in_that_order(self, folder):
        _, order, _ = offline("near")
        config(folder, component_name="near", component_params={"file": "near.safetensors"}, update_times=2, train_step=2, eval_dataset=...)
        assert run_cli("train", "config.yaml").exit_code == 0
        for step in (0, 1):
            assert sorted(trained_on("out", step).tolist()) == sorted(order[4 * step : 4 * step + 4].tolist())

    def test_rows_held_out_for_evaluation_are_the_queries(self, folder):
        config(folder, eval_dataset=..., val_size=4)
        _, order, metadata = offline("near")
        trainer = trainer_of()
        features, queries = (embeddings(trainer, data) for data in (trainer.train_dataset, trainer.eval_dataset))
        assert (len(features), len(queries), metadata["rows"]) == (SIZE - 4, 4, str(SIZE - 4))
        assert order.tolist() == trainer.row_numbers.of(np.array(in_turns(nearest_first(queries, features)))).tolist()


class TestRds:
    def test_highest_similarity_counts(self, folder):
        name, order, _ = offline("rds", "--aggregation", "max")
        trainer = trainer_of()
        similarity = embeddings(trainer, trainer.eval_dataset) @ embeddings(trainer, trainer.train_dataset).T
        assert name == "order" and order.tolist() == np.argsort(-similarity.max(0), kind="stable").tolist()

    def test_one_data_set_takes_turns_like_near(self, folder):
        assert offline("rds")[1].tolist() == offline("near")[1].tolist()

    def test_several_data_sets_take_turns(self, folder):
        write_rows(folder / "data/more.jsonl", texts(2, 2))
        config(folder, eval_dataset="held_out,more.jsonl", eval_on_each_dataset=True)
        _, order, _ = offline("rds")
        trainer = trainer_of()
        features = embeddings(trainer, trainer.train_dataset)
        similarity = [(embeddings(trainer, data) @ features.T).max(0) for data in trainer.eval_dataset.values()]
        assert len(similarity) == 2 and order.tolist() == in_turns([np.argsort(-values, kind="stable").tolist() for values in similarity])

    def test_a_run_takes_the_first_rows(self, folder):
        _, order, _ = offline("rds", "--aggregation", "max")
        config(folder, component_name="rds", component_params={"file": "rds.safetensors"})
        assert run_cli("train", "config.yaml").exit_code == 0
        assert sorted(trained_on("out").tolist()) == sorted(order[:4].tolist())


class TestTsds:
    def test_probabilities_are_those_of_the_function(self, folder):
        name, probabilities, metadata = offline("tsds", "--alpha", "0.7", "--C", "2", "--sigma", "0.3")
        trainer = trainer_of()
        features, queries = (embeddings(trainer, data) for data in (trainer.train_dataset, trainer.eval_dataset))
        expected = task_probabilities(features, queries, alpha=0.7, C=2.0, sigma=0.3).probabilities
        assert name == "probabilities" and probabilities.sum() == pytest.approx(1)
        assert probabilities == pytest.approx(expected, abs=1e-5) and 0 < (expected > 0).sum() < SIZE
        told = json.loads(metadata["parameters"])
        assert {key: told[key] for key in ("alpha", "C", "sigma", "max_neighbours")} == {
            "alpha": "0.7",
            "C": "2.0",
            "sigma": "0.3",
            "max_neighbours": "5000",
        }

    def test_a_run_draws_from_them(self, folder):
        _, probabilities, _ = offline("tsds")
        config(folder, component_name="tsds", component_params={"file": "tsds.safetensors"}, update_step=5, train_step=5)
        assert run_cli("train", "config.yaml").exit_code == 0
        drawn = np.bincount(trained_on("out"), minlength=SIZE)
        assert drawn.sum() == 20 and (drawn[probabilities == 0] == 0).all()


class TestIfd:
    def losses(self, trainer, row):
        """Mean loss of the answer given the instruction, and behind the start token alone."""
        tokens, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        answer = tokens[1:][labels[1:] != -100]
        with torch.no_grad():
            given = trainer.model.eval()(tokens[None]).logits[0, :-1][labels[1:] != -100]
            alone = trainer.model(torch.cat([torch.tensor([trainer.processing_class.bos_token_id]), answer])[None]).logits[0, :-1]
        cross_entropy = torch.nn.functional.cross_entropy
        return float(cross_entropy(given.double(), answer)), float(cross_entropy(alone.double(), answer)), len(answer)

    def test_ratios_of_losses(self, folder):
        name, scores, _ = offline("ifd", "--min-tokens", "8")
        trainer = trainer_of()
        found = [self.losses(trainer, row) for row in trainer.train_dataset]
        ratio, length = np.array([given / alone for given, alone, _ in found]), np.array([length for *_, length in found])
        usable = (ratio < 1) & (length >= 8)
        assert {bool(v) for v in ratio < 1} == {bool(v) for v in length >= 8} == {False, True} and usable.any()
        assert name == "scores" and scores == pytest.approx(np.where(usable, ratio, np.nan), rel=1e-5, nan_ok=True)

    def test_it_needs_no_evaluation_data_and_a_run_takes_the_highest(self, folder):
        config(folder, eval_dataset=...)
        _, scores, _ = offline("ifd", "--min-tokens", "2")
        config(folder, eval_dataset=..., component_name="ifd", component_params={"file": "ifd.safetensors"})
        assert run_cli("train", "config.yaml").exit_code == 0
        best = np.argsort(np.where(np.isfinite(scores), -scores, np.inf), kind="stable")[: min(4, np.isfinite(scores).sum())]
        assert set(trained_on("out").tolist()) == set(best.tolist())


# ------------------------------------------------------------------------------------------------ what the file says


@pytest.mark.parametrize(("method", "content"), [("near", "order"), ("rds", "order"), ("tsds", "probabilities"), ("ifd", "scores")])
def test_metadata(folder, method, content):
    name, values, metadata = offline(method, "component_params.candidate_pool=nowhere.npy")  # the component is not looked at
    assert name == content and values.shape == (SIZE,)
    assert {key: metadata[key] for key in ("format", "method", "rows")} == {"format": "dataflex-offline-2", "method": method, "rows": str(SIZE)}
    assert metadata["fingerprint"] == dataset_fingerprint(trainer_of().train_dataset)
    told = json.loads(metadata["parameters"])
    assert told["model"] == "model" and ("min_tokens" in told if method == "ifd" else told["pooling"] == "weighted_mean")


@pytest.mark.parametrize(
    ("prepare", "overrides", "words"),
    [
        (lambda folder: write_rows(folder / "data/rows.jsonl", texts(SIZE, 7)), (), "was made for another data set of 14 rows, or another "),
        (lambda folder: write_rows(folder / "data/rows.jsonl", texts(9, 0)), (), "was made for a data set of 14 rows; this one has 9. Make it again"),
        (None, ("cutoff_len=50",), "was made for another data set of 14 rows, or another tokenizer, template or cutoff_len. Make it again"),
        (None, ("train_on_prompt=true",), "was made for another data set of 14 rows, or another "),
        (None, ("component_name=rds",), "was made by `offline near`, and rds is wanted"),
        (None, ("component_name=ifd",), "was made by `offline near`, and ifd is wanted"),
    ],
)
def test_a_result_is_refused_for_anything_else(folder, prepare, overrides, words):
    offline("near")
    if prepare:
        prepare(folder)
    config(folder, component_name="near", component_params={"file": "near.safetensors"})
    result = run_cli("train", "config.yaml", *overrides)
    assert result.exit_code == 2 and f"dataflex-cli: file near.safetensors {words}" in result.stderr
    assert not (folder / "out/dataflex").exists()


# ------------------------------------------------------------------------------------------------ other embeddings


def test_embeddings_from_files(folder):
    rng = np.random.default_rng(0)
    features, queries = rng.normal(size=(SIZE, 5)), rng.normal(size=(2, 5))
    np.save("features.npy", features), np.save("queries.npy", queries)
    config(folder, eval_dataset=...)
    _, order, metadata = offline("near", "--embeddings-file", "features.npy", "--query-embeddings-file", "queries.npy")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert order.tolist() == in_turns(nearest_first(queries, unit))
    told = json.loads(metadata["parameters"])
    assert (told["embeddings_file"], told["query_embeddings_file"]) == ("features.npy", "queries.npy")


class FakeEncoder:
    """Embeds a text as the numbers of its vowels, and keeps what it was given."""

    made: list["FakeEncoder"]

    def __init__(self, name):
        self.name, self.seen = name, []
        self.made.append(self)

    def encode(self, texts, show_progress_bar):
        self.seen.append(texts)
        return np.array([[text.count(letter) for letter in "aeiou"] for text in texts], dtype=np.float32)


def test_embeddings_of_a_sentence_transformer(folder, monkeypatch):
    FakeEncoder.made = []
    monkeypatch.setitem(sys.modules, "sentence_transformers", ModuleType("sentence_transformers"))
    sys.modules["sentence_transformers"].SentenceTransformer = FakeEncoder
    _, order, metadata = offline("near", "--embedder", "some/encoder")
    (encoder,) = FakeEncoder.made
    assert encoder.name == "some/encoder" and json.loads(metadata["parameters"])["embedder"] == "some/encoder"
    expected = [[f"{row['instruction']} {row['output']}" for row in rows] for rows in (texts(SIZE, 0), texts(HELD_OUT, 1))]
    for seen, rows in zip(encoder.seen, expected, strict=True):  # the whole rows, without special tokens
        assert len(seen) == len(rows)
        for text, row in zip(seen, rows, strict=True):
            assert all(word in text for word in row.split()) and "<|im_start|>" not in text
    features, queries = (FakeEncoder("again").encode(seen, False) for seen in encoder.seen)
    features, queries = (found / np.linalg.norm(found, axis=1, keepdims=True) for found in (features, queries))
    assert order.tolist() == in_turns(nearest_first(queries, features))


def test_without_sentence_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    message = "dataflex-cli: command line: --embedder: needs sentence-transformers: pip install 'dataflex[embed]'\n"
    assert problem_of("near", "config.yaml", "--embedder", "some/encoder").endswith(message)


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        *(
            ([method], {"eval_dataset": ...}, f"config.yaml: eval_dataset: is required: {method} compares rows with evaluation data. Or set val_size")
            for method in ("near", "rds", "tsds")
        ),
        (
            ["near", "--embeddings-file", "some.npy"],
            {},
            "command line: --embeddings-file: goes with --query-embeddings-file: both must come from one model",
        ),
        (
            ["tsds", "--query-embeddings-file", "some.npy"],
            {},
            "command line: --embeddings-file: goes with --query-embeddings-file: both must come from one model",
        ),
        (["near", "--poling=mean"], {}, "command line: --poling=mean: is not an override; write key=value (no spaces, no leading dashes)"),
        (["ifd"], {"model_name_or_path": "modl"}, None),
    ],
)
def test_mistakes_are_told_and_leave_nothing(folder, arguments, changes, message):
    np.save("some.npy", np.ones((SIZE, 2)))
    config(folder, **changes)
    before = listing(folder)
    told = problem_of(arguments[0], "config.yaml", *arguments[1:])
    assert told == f"dataflex-cli: {message}\n" if message else "Did you mean 'model'?" in told
    assert listing(folder) == before


@pytest.mark.parametrize(
    "arguments", [["near", "--pooling", "men"], ["tsds", "--alpha", "1.5"], ["rds", "--number", "0"], ["near", "--embeddings-file", "no.npy"]]
)
def test_values_that_an_option_does_not_take(folder, arguments):
    assert f"Invalid value for '{arguments[1]}'" in problem_of(arguments[0], "config.yaml", *arguments[1:])


# ------------------------------------------------------------------------------------------------ what is left behind


@pytest.mark.parametrize("method", ["near", "ifd"])
def test_nothing_is_written_but_the_file(folder, method):
    assert run_cli("train", "config.yaml").exit_code == 0  # a run is there
    before = listing(folder)
    offline(method, "resume_from_checkpoint=true")
    assert {name: what for name, what in listing(folder).items() if name != f"{method}.safetensors"} == before
    offline(method, "output_dir=nowhere", "-o", "again.safetensors")
    assert listing(folder).keys() - before.keys() == {f"{method}.safetensors", "again.safetensors"}


@pytest.mark.parametrize(("method", "scored"), [("near", SIZE + HELD_OUT), ("ifd", 2 * SIZE)])
def test_a_pass_that_was_interrupted_is_taken_up(folder, monkeypatch, method, scored):
    _, expected, _ = offline(method, "-o", "expected.safetensors")
    monkeypatch.setattr(store, "_FLUSH_SECONDS", 0.0)  # every batch reaches the disk
    add, batch, rows = store.PartStore.add, Signals._batch, []

    def failing(self, positions, values):
        add(self, positions, values)
        if len(rows) == 3:
            raise RuntimeError("power cut")

    def counting(self, dataset, chosen):
        rows.append(len(chosen))
        return batch(self, dataset, chosen)

    monkeypatch.setattr(Signals, "_batch", counting)
    monkeypatch.setattr(store.PartStore, "add", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        offline(method)
    assert list((folder / f"{method}.safetensors.partial").glob("*/part-*.npy")) and not (folder / f"{method}.safetensors").exists()
    done = sum(rows)
    rows.clear()
    monkeypatch.setattr(store.PartStore, "add", add)
    _, found, _ = offline(method)
    assert 0 < done < scored and sum(rows) == scored - done
    np.testing.assert_array_equal(found, expected)
    assert not (folder / f"{method}.safetensors.partial").exists()
