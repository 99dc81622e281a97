"""Train every method the way `dataflex-cli train` does, and measure what came out."""

from __future__ import annotations

import json
import logging
import os
import shlex
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.demo.data import ROW_SHARES, Row

METHODS: dict[str, list[str]] = {
    "static": ["warmup_step=null"],
    "loss linupper": ["train_type=dynamic_weight", "component_name=loss", "component_params.strategy=linupper"],
    "loss quadratic": ["train_type=dynamic_weight", "component_name=loss", "component_params.strategy=quadratic"],
    "dft": ["train_type=dynamic_weight", "component_name=dft"],
}


@dataclass(frozen=True)
class Outcome:
    """What one run gave.

    Attributes:
        eval_loss, accuracy: on held-out rows with right answers.
        history: the Trainer's log lines.
    """

    method: str
    seed: int
    eval_loss: float
    accuracy: float
    seconds: float
    history: list[dict[str, float]]

    def curve(self, key: str) -> dict[int, float]:
        """A logged value by optimizer step."""
        return {int(entry["step"]): entry[key] for entry in self.history if key in entry}

    def sample_loss(self) -> dict[int, float]:
        """Training loss without weights: the plain `loss` as long as the weights are 1."""
        return self.curve("loss") | self.curve("dataflex/sample_loss")

    def weight_range(self) -> tuple[float, float]:
        lowest, highest = self.curve("dataflex/weight_min").values(), self.curve("dataflex/weight_max").values()
        return min(lowest, default=1.0), max(highest, default=1.0)


def overrides(config: Path, method: str, seed: int) -> list[str]:
    folder = config.parent / "runs" / f"{method.replace(' ', '-')}-seed{seed}"
    return [*METHODS[method], f"seed={seed}", f"output_dir={folder}", "overwrite_output_dir=true"]


def command(config: Path, method: str, seed: int) -> str:
    """The command line that repeats a run."""
    return shlex.join(["dataflex-cli", "train", str(config), *overrides(config, method, seed)])


def run_method(config: Path, method: str, seed: int) -> Outcome:
    """Train with one method; what the libraries print goes to demo.log."""
    from dataflex.backends import trl
    from dataflex.cli.plan import check_run

    settings = overrides(config, method, seed)
    start = time.monotonic()
    with quiet(config.parent / "demo.log"):
        run, checked = check_run(config, settings)
        trl.train(run, checked)
        seconds = time.monotonic() - start
        folder = Path(str(run.backend["output_dir"]))
        accuracy = answer_accuracy(folder, _read_rows(config.parent / "data" / "held_out.jsonl"))
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return Outcome(method, seed, results["eval_loss"], accuracy, seconds, history)


def _read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_accuracy(folder: Path, rows: list[Row]) -> float:
    """Share of rows that the model in `folder` answers exactly right when decoding greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": row["instruction"]}], tokenize=False) for row in rows]
    answers = torch.tensor(tokenizer([row["output"] for row in rows])["input_ids"])
    # Greedy decoding is right just when every token is the likeliest after the right ones before it: one forward pass tells.
    tokens = torch.cat([torch.tensor(tokenizer(prompts)["input_ids"]), answers], 1)
    with torch.no_grad():
        likeliest = model(tokens).logits.argmax(-1)[:, -answers.shape[1] - 1 : -1]
    return float((likeliest == answers).all(1).float().mean())


@contextmanager
def quiet(log: Path | None = None) -> Iterator[None]:
    """What the libraries print goes to a file, and their warnings nowhere."""
    with open(log or os.devnull, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


# ---- Over the seeds ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One method over its seeds."""

    method: str
    runs: list[Outcome]

    @property
    def eval_loss(self) -> float:
        return statistics.fmean(run.eval_loss for run in self.runs)

    @property
    def spread(self) -> float:
        """Largest difference of eval_loss between two seeds."""
        losses = [run.eval_loss for run in self.runs]
        return max(losses) - min(losses)

    @property
    def accuracy(self) -> float:
        return statistics.fmean(run.accuracy for run in self.runs)

    @property
    def seconds(self) -> float:
        return statistics.fmean(run.seconds for run in self.runs)

    @property
    def weight_range(self) -> tuple[float, float]:
        ranges = [run.weight_range() for run in self.runs]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def curve(self, read: Callable[[Outcome], dict[int, float]]) -> dict[int, float]:
        """The mean over the seeds of what `read` takes from a run."""
        curves = [read(run) for run in self.runs]
        return {step: statistics.fmean(curve[step] for curve in curves) for step in curves[0]}

    def relative_weight(self, domain: str) -> dict[int, float]:
        """By step, the mean weight of a data set's rows where the mean of all rows is 1; empty without weights."""
        shares = self.curve(lambda run: run.curve(f"dataflex/weight_share/{domain}"))
        return {step: share / ROW_SHARES[domain] for step, share in shares.items()}


def summaries(outcomes: list[Outcome]) -> list[Summary]:
    """One per method, in the order of `METHODS`."""
    return [Summary(method, runs) for method in METHODS if (runs := [run for run in outcomes if run.method == method])]
