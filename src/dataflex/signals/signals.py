"""What selectors learn from the model about rows: losses, embeddings, gradient features. Computed once for all who ask.

Every pass runs in evaluation mode over batches of rows of like length, under a budget of tokens. The batches are fixed by the data alone
and dealt out to the ranks, so the values are the same for any number of ranks. Results are kept on disk by content (see `store.py`).

Legend: n rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from dataflex.errors import TrainingError
from dataflex.signals.answers import AnswersAlone
from dataflex.signals.batches import length_buckets, row_lengths
from dataflex.signals.gradients import Preconditioner, mean_gradient, per_sample_products, scored_parameters, sketch
from dataflex.signals.store import PartStore, array_digest, content_key, model_digest, tensors_digest
from dataflex.train.data.fingerprint import dataset_fingerprint, has_content
from dataflex.train.data.sample_meta import ROW_FIELDS, BatchMeta, build_meta, without_own
from dataflex.train.trainer import hosts
from dataflex.train.trainer.features import captured_hidden_states, pooled_features
from dataflex.train.trainer.token_losses import losses_from_logits
from dataflex.utils.distributed import gather_ragged, gather_rows
from dataflex.utils.seeding import isolated_rng

Compute = Callable[[dict[str, Any], BatchMeta], torch.Tensor]


class Signals:
    """The trainer's view of rows under its current model. All ranks must call every method, with the same arguments."""

    def __init__(self, trainer: Any, cache_dir: str | None = None):
        """
        Args:
            cache_dir: where results are kept; None: nowhere.
        """
        self.trainer, self.cache_dir = trainer, cache_dir
        self.token_budget = int(trainer.dataflex.scoring_tokens)
        self._known: dict[tuple[str, int], tuple[Any, Any]] = {}  # the data set too, or another one could get its id
        self._model_digest: tuple[int, str] | None = None

    @property
    def model(self) -> Any:
        """The model without DDP's wrapper: scoring needs no communication."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    # ---------------------------------------------------------------- the signals

    def losses(self, dataset: Any, rows: np.ndarray) -> np.ndarray:
        """Mean loss of each row's target tokens (n,), fp64; NaN for a row without a target."""

        def compute(inputs: dict[str, Any], meta: BatchMeta) -> torch.Tensor:
            return self._row_losses(self.model, inputs, meta, self._head())[:, None]

        return self._rows("losses", dataset, rows, 1, compute)[:, 0]

    def embeddings(self, dataset: Any, rows: np.ndarray, pooling: str = "weighted_mean") -> np.ndarray:
        """Unit embedding of each row (n, D), fp32: pooled last hidden states. NaN for a row without a target.

        Args:
            pooling: `weighted_mean` weights tokens by their position, `mean` equally, `last` takes the last one.
        """
        base = hosts.causal_lm(self.trainer)

        def compute(inputs: dict[str, Any], meta: BatchMeta) -> torch.Tensor:
            hidden: list[torch.Tensor] = []
            body = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}
            with captured_hidden_states(base, hidden):
                base.base_model(**body)  # the output layer is not run
            features = _per_row(pooled_features(hidden[0], meta, pooling), torch.ones(meta.num_samples), meta, meta.num_rows)
            return torch.nn.functional.normalize(features, dim=1, eps=1e-12)

        width = int(base.config.get_text_config().hidden_size)
        return self._rows("embeddings", dataset, rows, width, compute, dtype=np.float32, pooling=pooling)

    def gradient_products(
        self, dataset: Any, rows: np.ndarray, targets: list[dict[str, torch.Tensor]], preconditioner: Preconditioner, include_embeddings: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Products (n, K) of each row's preconditioned gradient with K targets, and its norm (n,).

        Args:
            targets: K directions, as `mean_gradient` returns them.
        """
        parameters = scored_parameters(self.model, include_embeddings)

        def compute(inputs: dict[str, Any], meta: BatchMeta) -> torch.Tensor:
            batches = [(inputs, meta)]
            loss = self._gradient_loss(include_embeddings)
            ((dots, norms),) = per_sample_products(self.model, parameters, batches, loss, targets, preconditioner)
            return torch.cat([dots, norms[:, None]], 1)

        key = {
            "targets": [tensors_digest(target) for target in targets],
            "preconditioner": preconditioner.kind,
            "moments": preconditioner.digest(tensors_digest),
            "embeddings": include_embeddings,
        }
        values = self._rows("gradients", dataset, rows, len(targets) + 1, compute, no_grad=False, **key)
        return values[:, :-1], values[:, -1]

    def gradient_sketches(self, dataset: Any, rows: np.ndarray, preconditioner: Preconditioner, dim: int, include_embeddings: bool) -> np.ndarray:
        """A sketch (n, dim), fp32, of each row's preconditioned gradient: products of sketches estimate products of gradients."""
        parameters = scored_parameters(self.model, include_embeddings)

        def compute(inputs: dict[str, Any], meta: BatchMeta) -> torch.Tensor:
            return sketch(self.model, parameters, [(inputs, meta)], self._gradient_loss(include_embeddings), preconditioner, dim, 0)

        key = {
            "preconditioner": preconditioner.kind,
            "moments": preconditioner.digest(tensors_digest),
            "dim": dim,
            "embeddings": include_embeddings,
        }
        return self._rows("sketches", dataset, rows, dim, compute, no_grad=False, dtype=np.float32, **key)

    def mean_gradient(self, dataset: Any, rows: np.ndarray, *, unit: bool, include_embeddings: bool) -> dict[str, torch.Tensor]:
        """Mean over the rows of their gradient, each divided by its norm with `unit`; by parameter name, fp32.

        The rows of a target are few, so every rank goes through all of them: the result is the same bits everywhere.
        """
        parameters = scored_parameters(self.model, include_embeddings)
        batches = length_buckets(self.lengths(dataset)[rows], self.token_budget)
        with self._scoring(no_grad=False):
            described = [self._batch(dataset, rows[batch]) for batch in batches]
            return mean_gradient(self.model, parameters, described, self._gradient_loss(include_embeddings), unit=unit)

    # ---------------------------------------------------------------- how they are computed

    def lengths(self, dataset: Any) -> np.ndarray:
        """Tokens of every row of a data set."""
        return self._of("lengths", dataset, row_lengths)

    def fingerprint(self, dataset: Any) -> str:
        """What tells a data set from others."""
        own = getattr(dataset, "fingerprint", None)
        return own if isinstance(own, str) else self._of("fingerprint", dataset, dataset_fingerprint)

    def answers_alone(self, dataset: Any) -> AnswersAlone:
        """The rows of a data set without what precedes their answers."""
        tokenizer = self.trainer.processing_class
        start = next((token for name in ("bos_token_id", "eos_token_id") if (token := getattr(tokenizer, name, None)) is not None), 0)
        return self._of("answers alone", dataset, lambda rows: AnswersAlone(rows, start, self.fingerprint(rows)))

    def _of(self, what: str, dataset: Any, compute: Callable[[Any], Any]) -> Any:
        """Something about a data set, computed once."""
        if (what, id(dataset)) not in self._known:
            self._known[what, id(dataset)] = (dataset, compute(dataset))
        return self._known[what, id(dataset)][1]

    def model_digest(self) -> str:
        """What tells the model's weights from others, taken once per optimizer step."""
        step = self.trainer.state.global_step
        if self._model_digest is None or self._model_digest[0] != step:
            self._model_digest = (step, model_digest(self.model))
        return self._model_digest[1]

    def _rows(
        self,
        signal: str,
        dataset: Any,
        rows: np.ndarray,
        width: int,
        compute: Compute,
        *,
        no_grad: bool = True,
        dtype: Any = np.float64,
        **parameters: Any,
    ) -> np.ndarray:
        """`compute` of every row, (n, width): from the cache, or batch by batch on all ranks."""
        rank, world = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        # Rows that are not read for the fingerprint could be other ones in the next run.
        cache_dir = self.cache_dir if isinstance(dataset, AnswersAlone) or has_content(dataset) else None
        key = "" if cache_dir is None else self._key(signal, dataset, rows, parameters)
        store = PartStore(cache_dir, signal, key, rank, world, (len(rows), width), dtype)
        whole = store.whole()
        if int(gather_rows(torch.tensor([whole is not None])).sum()) == world and whole is not None:
            return whole
        values = np.full((len(rows), width), np.nan, dtype=dtype)
        here = np.zeros(len(rows), dtype=bool)
        for positions, part in store.parts():
            values[positions], here[positions] = part, True
        known = gather_rows(torch.from_numpy(here.astype(np.uint8))).amax(0).numpy().astype(bool)
        batches = [batch for batch in length_buckets(self.lengths(dataset)[rows], self.token_budget) if not known[batch].all()]
        own = batches[rank::world]
        progress = tqdm(
            total=sum(map(len, own)), desc=f"Scoring: {signal}", unit="row", leave=False, disable=self.trainer.args.disable_tqdm or rank > 0
        )
        with progress, self._scoring(no_grad):
            for batch in own:
                result = compute(*self._batch(dataset, rows[batch]))
                part = result.detach().cpu().double().numpy().astype(dtype)
                values[batch], here[batch] = part, True
                store.add(batch, part)
                progress.update(len(batch))
        store.flush()
        values = _merged(values, np.flatnonzero(here))
        if rank == 0:
            store.finish(values)
        return values

    def _key(self, signal: str, dataset: Any, rows: np.ndarray, parameters: dict[str, Any]) -> str:
        return content_key(
            signal=signal,
            version=1,
            model=self.model_digest(),
            dataset=self.fingerprint(dataset),
            rows=array_digest(rows),
            precision=str(self.trainer.accelerator.mixed_precision),
            budget=self.token_budget,
            **parameters,
        )

    @contextmanager
    def _scoring(self, no_grad: bool) -> Iterator[None]:
        """Evaluation mode, module by module restored; `no_grad`, since inference tensors cannot enter a later backward pass."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad() if no_grad else nullcontext(), self.trainer.compute_loss_context_manager(), self.trainer.accelerator.autocast():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def _batch(self, dataset: Any, rows: np.ndarray) -> tuple[dict[str, Any], BatchMeta]:
        """Rows as the model's inputs, and which tokens are whose."""
        fetch = getattr(dataset, "__getitems__", None)
        indices = [int(row) for row in rows]
        items = fetch(indices) if fetch is not None else [dataset[index] for index in indices]
        described = [{field: item[field] for field in ROW_FIELDS if field in item} for item in items]  # collators may empty the rows
        with isolated_rng(self.trainer.args.seed, "signals"):
            batch = self.trainer.data_collator(_accepted(items, self.trainer))
        meta = build_meta(list(range(len(items))), described, batch)
        return {**self.trainer._prepare_inputs(dict(batch)), "use_cache": False}, meta

    def _head(self) -> nn.Module | None:
        return hosts.causal_lm(self.trainer).get_output_embeddings() if self.trainer.dataflex.project_targets_only else None

    def _row_losses(self, model: Any, inputs: dict[str, Any], meta: BatchMeta, head: nn.Module | None) -> torch.Tensor:
        """Mean loss of the target tokens of each row (n,), with graph; NaN without targets."""
        tokens = losses_from_logits(model, inputs, meta, head=head).of_targets()
        counts = meta.counts.to(tokens.device)
        owner = torch.repeat_interleave(meta.sample_ids.to(tokens.device), counts, output_size=meta.num_targets)
        size = meta.num_rows
        total = torch.zeros(size, dtype=tokens.dtype, device=tokens.device).index_add(0, owner, tokens)
        return total / torch.zeros_like(total).index_add(0, owner, torch.ones_like(tokens))  # 0 / 0 is NaN

    def _gradient_loss(self, include_embeddings: bool) -> Callable[[Any, dict[str, Any], BatchMeta], torch.Tensor]:
        head = None if include_embeddings else self._head()  # a scored output layer must see every position

        def loss(model: Any, inputs: dict[str, Any], meta: BatchMeta) -> torch.Tensor:
            if inputs["input_ids"].shape[0] != meta.num_rows:
                raise TrainingError("gradients of single rows need a collator that keeps them apart: switch padding_free off")
            return self._row_losses(model, inputs, meta, head)

        return loss


def _per_row(values: torch.Tensor, weights: torch.Tensor, meta: BatchMeta, size: int) -> torch.Tensor:
    """Weighted mean of the samples' values (samples, ...) for each row (size, ...); NaN for a row without samples."""
    owner, weights = meta.sample_ids.to(values.device), weights.to(values)
    total = values.new_zeros((size, *values.shape[1:])).index_add(0, owner, values * weights[:, None])
    return total / values.new_zeros(size).index_add(0, owner, weights)[:, None]


def _merged(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """All ranks' rows of `values`; this rank has those at `positions`."""
    counts = gather_rows(torch.tensor([len(positions)]))[:, 0].tolist()
    if len(counts) == 1:
        return values
    where = gather_ragged(torch.from_numpy(positions), counts).numpy()
    values[where] = gather_ragged(torch.from_numpy(values[positions]), counts).numpy()
    return values


def _accepted(rows: list[Any], trainer: Any) -> list[Any]:
    """Rows without the columns that the host's loaders would drop (names, domains, texts)."""
    if not trainer.args.remove_unused_columns:
        return [without_own(row) for row in rows]
    trainer._set_signature_columns_if_needed()
    names = [*(trainer._signature_columns or []), *trainer.label_names, "seq_lengths"]
    return [{name: row[name] for name in row if name in names} for row in rows]
