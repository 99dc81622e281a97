"""The mixin that goes in front of any `transformers.Trainer` subclass: it decides which rows come next and keeps its state in checkpoints.

Every override calls `super()`; no training loop is copied and nothing is patched. The key hook is `Trainer.get_batch_samples`, called once
per optimizer step before any of its batches is drawn: there the mixin hands out batches from its own loader. The host's loader supplies
data set, collator, column rules and the order of each epoch, and is never iterated itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.data_loader import get_sampler
from torch.utils.data import DataLoader

from dataflex.configs.components import component_params
from dataflex.configs.schema import COMPONENT_KIND, DataflexConfig, TrainType
from dataflex.core import row_table as row_tables
from dataflex.core.events import EventLog
from dataflex.core.plugins import load_plugins
from dataflex.core.registry import REGISTRY
from dataflex.core.row_numbers import RowNumbers
from dataflex.core.row_table import RowTable
from dataflex.core.state import load_state
from dataflex.errors import ComponentError, ConfigError, Problem, TrainingError
from dataflex.train.data.fingerprint import dataset_fingerprint
from dataflex.train.data.index_stream import IndexedRows, IndexStream, Place, PlanStream, RankBatches
from dataflex.train.data.sample_meta import DOMAIN_COLUMN, KeyedCollator, MetaCollator, column_values
from dataflex.train.trainer import hosts
from dataflex.train.trainer.checkpointing import CheckpointedTrainer
from dataflex.train.trainer.metrics import BoundaryMetrics, WeightMetrics
from dataflex.train.trainer.row_source import number_rows, read_row_numbers
from dataflex.train.trainer.run_state import RunState
from dataflex.utils.seeding import derive_seed, isolated_rng


class DynamicTrainer(CheckpointedTrainer):
    """Base of `WeightTrainer` and its siblings. Use them: `WeightTrainer.over(SFTTrainer)(..., dataflex=DataflexConfig(...))`."""

    train_type: ClassVar[TrainType]
    needs_state = True
    own_settings: ClassVar[tuple[str, ...]] = ()
    """Further keys of `DataflexConfig` that decide the course of training."""

    _orders_rows: ClassVar[bool] = False
    """Whether rows come in an order of its own instead of the host's."""

    _builds_loss: ClassVar[bool] = False
    """Whether the loss is its own instead of the host's."""

    def __init__(
        self,
        *args: Any,
        dataflex: DataflexConfig | dict[str, Any],
        component: Any = None,
        domain_names: Sequence[str] | None = None,
        row_table: RowTable | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            dataflex: the algorithm and its schedule; `train_type` may be left out.
            component: a ready-made component, instead of `dataflex.component_name`.
            domain_names: names of the domains that the training data's `domain_id` column numbers.
            row_table: the user's rows that the training data was made of, whose column `dataflex_row` numbers them.
            *args, **kwargs: the host Trainer's own.

        Raises:
            ConfigError: a setting of the host under which the results would be wrong, or of `dataflex`.
        """
        hosts.refuse_collisions(type(self), hosts.host_of(type(self)))
        settings = dataflex if isinstance(dataflex, dict) else dataflex.model_dump(exclude_unset=True)
        name = settings.get("component_name") or (type(component).__name__ if component is not None else None)
        self._dataflex = RunState()
        self._dataflex.config = DataflexConfig(**{**settings, "train_type": self.train_type, "component_name": name})
        self._refuse(self._unsupported_methods())  # before the host loads models of its own
        given = number_rows(hosts.host_of(type(self)), args, kwargs)
        super().__init__(*given.args, **given.kwargs)
        self._refuse_unsupported()
        self._apply_train_step()
        self._dataflex.row_numbers = read_row_numbers(self, given.dataset, row_table)
        self._dataflex.row_table = row_table
        self._dataflex.domains = self._read_domains(domain_names)
        self._dataflex.domain_names = list(domain_names or self._domain_numbers())
        self._dataflex.metrics = self._make_metrics()
        self._dataflex.events = EventLog(str(self.args.output_dir), active=self.accelerator.is_main_process)
        made = self._adopt(component) if component is not None else self._build_component()
        self._dataflex.component, self._dataflex.component_settings = made
        values, tensors = self._component_state()
        self._dataflex.first_state = copy.deepcopy({**values, **tensors})

    # ---------------------------------------------------------------- what components and users may read

    @property
    def dataflex(self) -> DataflexConfig:
        """The settings."""
        config: DataflexConfig = self._dataflex.config
        return config

    @property
    def component(self) -> Any:
        """The algorithm."""
        return self._dataflex.component

    @property
    def domains(self) -> np.ndarray | None:
        """Domain of every row of the training data (N,), or None."""
        return self._dataflex.domains

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains."""
        return self._dataflex.domain_names

    @property
    def row_numbers(self) -> RowNumbers:
        """Positions in the training data to the rows of the user's data."""
        numbers: RowNumbers = self._dataflex.row_numbers
        return numbers

    @property
    def metrics(self) -> Any:
        """What is added to the next log line."""
        return self._dataflex.metrics

    @property
    def events(self) -> EventLog:
        """`output_dir/dataflex/events.jsonl`."""
        events: EventLog = self._dataflex.events
        return events

    # ---------------------------------------------------------------- set-up

    def _refuse_unsupported(self) -> None:
        reasons = self._unsupported()
        if self.train_dataset is not None and not hasattr(self.train_dataset, "__len__"):
            reasons.append("a streaming data set: DataFlex needs to know its rows; load it without streaming")
        self._refuse(reasons)

    def _refuse(self, reasons: list[str]) -> None:
        if reasons:
            raise ConfigError([Problem("", self.train_type, f"cannot be combined with {reason}") for reason in reasons])

    def _unsupported(self) -> list[str]:
        """What of the host and its settings this trainer cannot work with."""
        return [*self._unsupported_methods(), *hosts.unsupported_order(self)]

    def _unsupported_methods(self) -> list[str]:
        """Methods of the host's, or assigned to this object, that would undo what is decided."""
        return hosts.unsupported_methods(type(self), self, sampler=self._orders_rows, loss=self._builds_loss)

    def _make_metrics(self) -> WeightMetrics | BoundaryMetrics:
        raise NotImplementedError

    def _apply_train_step(self) -> None:
        steps = self.dataflex.train_step
        if steps and self.args.max_steps > 0 and self.args.max_steps != steps:
            raise ConfigError(
                Problem("", "train_step", f"is {steps} but max_steps is {self.args.max_steps}; both set the total number of optimizer steps")
            )
        if steps:
            self.args.max_steps = steps

    def _build_component(self) -> tuple[Any, dict[str, Any]]:
        config, kind = self.dataflex, COMPONENT_KIND[self.train_type]
        load_plugins(config.plugins)
        assert config.algorithm is not None
        in_file = component_params(kind, config.algorithm, config.components_cfg_file, substitute={"output_dir": str(self.args.output_dir)})
        params = {**in_file, **({} if config.keeps_mixture else config.component_params)}
        component = REGISTRY.build(kind, config.algorithm, runtime=self._runtime(), cfg=params)
        if getattr(component, "row_numbers", self) is None:  # of a class whose constructor does not hand it on
            component.row_numbers = self.row_numbers
            component.set_candidate_pool(component.get_candidate_pool())
        return component, params

    def _runtime(self) -> dict[str, Any]:
        """Live objects that a component may ask for."""
        return {
            "dataset": self.train_dataset,
            "row_numbers": self.row_numbers,
            "eval_dataset": self.eval_dataset,
            "accelerator": self.accelerator,
            "data_collator": self.data_collator,
            "tokenizer": self.processing_class,
            "output_dir": str(self.args.output_dir),
            "cache_dir": str(Path(str(self.args.output_dir)) / "dataflex" / "cache"),
            "seed": self.args.seed,
        }

    def _adopt(self, component: Any) -> tuple[Any, dict[str, Any]]:
        """A ready-made component, given the run's evaluation data, and its public settings."""
        if isinstance(component, type):
            raise ComponentError(f"component must be an object, not the class {component.__name__}: write {component.__name__}(...)")
        if getattr(component, "needs_eval_dataset", False) and getattr(component, "eval_dataset", None) is None:
            component.eval_dataset = self.eval_dataset
            if not self.eval_dataset:
                raise ComponentError(f"{type(component).__name__} compares samples with evaluation data, and there is none")
        return component, {
            k: v for k, v in getattr(component, "__dict__", {}).items() if not k.startswith("_") and isinstance(v, str | int | float | bool | None)
        }

    def _read_domains(self, names: Sequence[str] | None) -> np.ndarray | None:
        dataset: Any = self.train_dataset
        columns = getattr(dataset, "column_names", None) or []
        if DOMAIN_COLUMN not in columns:
            return None
        domains = column_values(dataset, DOMAIN_COLUMN)
        limit = len(names) if names else np.inf
        if len(domains) and (not np.issubdtype(domains.dtype, np.integer) or domains.min() < 0 or domains.max() >= limit):
            upper = f" to {limit - 1}, one for each of domain_names" if names else ""
            raise ConfigError(Problem("", DOMAIN_COLUMN, f"must hold whole numbers from 0{upper}"))
        return domains.astype(np.int64)

    def _domain_numbers(self) -> list[str]:
        return [] if self.domains is None or not len(self.domains) else [str(k) for k in range(int(self.domains.max()) + 1)]

    # ---------------------------------------------------------------- data

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self._sees_samples:
            self._try_batch(loader)
        self._dataflex.stream = self._make_stream(loader)
        workers = self.args.dataloader_num_workers
        self._dataflex.loader = DataLoader(
            IndexedRows(loader.dataset, self.args.seed),
            batch_sampler=RankBatches(self._dataflex.stream, self.accelerator.process_index, self.accelerator.num_processes),
            collate_fn=self._make_collator(loader),
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(self.args.seed),  # otherwise iterating draws from the global one
        )
        self._dataflex.batches = None
        self._component_state()  # a state that cannot be saved is better known before the first step
        if self._dataflex.resume is not None:
            self._restore(self._dataflex.resume)
        else:
            self._rewind(0)
            self._start_over()
        return self._pacing_loader(loader)

    @property
    def _sees_samples(self) -> bool:
        """Whether the tokens of a batch are traced back to their samples."""
        return self._builds_loss

    def _try_batch(self, loader: DataLoader[Any]) -> None:
        """Collate the first row, so that batches which cannot be traced back to samples are refused before training."""
        try:
            if len(loader.dataset):  # type: ignore[arg-type]
                rows = IndexedRows(loader.dataset, self.args.seed)
                MetaCollator(loader.collate_fn, self.domains, self.args.seed)([rows[Place(0, 0)]])
        except TrainingError as error:
            host = hosts.host_of(type(self)).__name__
            self._refuse([f"the batches of {host}: {error}. Only algorithms that look at no tokens can be used, such as random"])

    @property
    def micro_batch_size(self) -> int:
        """Rows of a micro-batch over all ranks."""
        return int(self._train_batch_size) * self.accelerator.num_processes

    def _make_stream(self, loader: DataLoader[Any]) -> IndexStream | PlanStream:
        """The order in which rows come: here the host's own, epoch after epoch."""
        sampler = get_sampler(loader)

        def epoch_order(epoch: int) -> np.ndarray:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            elif isinstance(getattr(sampler, "generator", None), torch.Generator):
                sampler.generator.manual_seed(derive_seed(self.args.seed, "epoch order", epoch))
            with isolated_rng(self.args.seed, "epoch order", epoch):
                return np.fromiter(iter(sampler), dtype=np.int64)

        stream = IndexStream(epoch_order, self.micro_batch_size, drop_last=self.args.dataloader_drop_last)
        if not stream.micro_batches_per_epoch():
            raise TrainingError(f"there are fewer rows than a micro-batch of {stream.micro_batch_size} takes, and dataloader_drop_last is set")
        if len(loader) != stream.micro_batches_per_epoch():
            raise TrainingError(
                f"the host's loader has {len(loader)} batches in an epoch where {stream.micro_batches_per_epoch()} are expected; "
                "its batch sampler is not supported"
            )
        return stream

    def _make_collator(self, loader: DataLoader[Any]) -> KeyedCollator:
        return MetaCollator(loader.collate_fn, self.domains, self.args.seed)

    def _pacing_loader(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """What the host counts its epochs with; it is never iterated."""
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        if not self._dataflex.rows_written:  # not before the backend has cleared what an earlier run left
            self._write_rows()
        batches, num_items = super().get_batch_samples(self._next_batches(num_batches), num_batches, device)
        self._describe(batches, device)
        return batches, num_items

    def _write_rows(self) -> None:
        """Leave `dataflex/rows.parquet`."""
        self._dataflex.rows_written = True
        if self.accelerator.is_main_process:
            table = self._dataflex.row_table or row_tables.of_dataset(self.train_dataset, self.row_numbers)
            table.write(str(self.args.output_dir), self.row_numbers)

    def _next_batches(self, number: int) -> Iterator[Any]:
        if self._dataflex.batches is None:
            self._dataflex.batches = iter(self._dataflex.loader)
        for _ in range(number):
            batch = next(self._dataflex.batches)
            self._dataflex.stream.advance()
            yield batch

    def _describe(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        """Look at the optimizer step's micro-batches before the first forward pass."""

    # ---------------------------------------------------------------- logging and state

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.metrics.drain())
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._refuse_unsupported()  # what was assigned to the trainer since it was made
        if resume_from_checkpoint:
            self.args.ignore_data_skip = False  # skipping is free here, and without it the host counts epochs anew
        elif hasattr(self.component, "load_state_dict"):
            self.component.load_state_dict(copy.deepcopy(self._dataflex.first_state))  # a second call starts like the first
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _settings_for_resume(self, dataset: Any) -> dict[str, Any]:
        own = self.dataflex.model_dump(include={"train_type", "component_name", "warmup_step", "train_step", *self.own_settings})
        return {
            **super()._settings_for_resume(dataset),
            **own,
            "component": f"{type(self.component).__module__}.{type(self.component).__qualname__}",
            "component_params": self._dataflex.component_settings,
            "dataset rows": len(dataset),
            "dataset content": dataset_fingerprint(dataset),
            "evaluation data": self._evaluation_fingerprint(),
            "rows per micro-batch over all ranks": self.micro_batch_size,
        }

    def _may_change(self, changed: dict[str, Any]) -> bool:
        return self.dataflex.allow_changed_resume

    def _evaluation_fingerprint(self) -> list[str] | None:
        if not getattr(self.component, "needs_eval_dataset", False):
            return None
        data = self.component.eval_dataset
        return [dataset_fingerprint(part) for part in (data.values() if isinstance(data, dict) else [data])]

    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        state, _ = super()._state()
        values, tensors = self._component_state()
        position, plan = _split(self._dataflex.stream.state_dict())
        own, own_tensors = _split(self._own_state())
        state["pending"]["metrics"] = self.metrics.merged()
        state |= {
            "stream": position,
            "trainer": own,
            "component": values,
            "on device": [name for name, tensor in tensors.items() if tensor.device.type != "cpu"],
        }
        named = [(owner, part) for owner, part in (("component", tensors), ("stream", plan), ("trainer", own_tensors))]
        return state, {f"{owner}/{name}": tensor for owner, part in named for name, tensor in part.items()}

    def _own_state(self) -> dict[str, Any]:
        """What else a subclass keeps: tensors and JSON values. All ranks call."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `_own_state` returned."""

    def _component_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The component's state as JSON values and tensors.

        Raises:
            ComponentError: it holds something else.
        """
        saved = self.component.state_dict() if hasattr(self.component, "state_dict") else {}
        values, tensors = _split(saved)
        for name, value in values.items():
            try:
                same = repr(json.loads(json.dumps(value))) == repr(value)
                reason = "" if same else "JSON would give it back changed"
            except TypeError as error:
                reason = str(error)
            if reason:
                what = f"{type(self.component).__name__}.state_dict()['{name}'] cannot be saved ({reason})"
                raise ComponentError(f"{what}: return tensors and JSON values, side by side")
        return values, tensors

    def _restore(self, checkpoint: Path) -> None:
        state, tensors = load_state(checkpoint)
        of = {
            owner: {name.removeprefix(f"{owner}/"): t for name, t in tensors.items() if name.startswith(f"{owner}/")}
            for owner in ("component", "stream", "trainer")
        }
        self._dataflex.stream.load_state_dict({**state["stream"], **of["stream"]})
        self._load_own_state({**state["trainer"], **of["trainer"]})
        self.metrics.restore(state["pending"]["metrics"], self.args.device, keep=self.accelerator.is_main_process)
        self._rewind(state["global_step"])
        if hasattr(self.component, "load_state_dict"):
            moved = {name: value.to(self.args.device) if name in state["on device"] else value for name, value in of["component"].items()}
            self.component.load_state_dict({**state["component"], **moved})

    def _rewind(self, step: int) -> None:
        """Drop what an earlier run left of `step` and later steps."""
        self.events.rewind(step)

    def _start_over(self) -> None:
        """Forget what an earlier `train` left in memory."""
        self._dataflex.metrics = self._make_metrics()


def _split(saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The values and the tensors (copied) of a state."""
    tensors = {str(name): value.clone() for name, value in saved.items() if torch.is_tensor(value)}
    return {name: value for name, value in saved.items() if name not in tensors}, tensors
