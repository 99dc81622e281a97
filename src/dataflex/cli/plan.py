"""Checking a training file as a whole, and saying what it will do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex.backends import Sizes, backend_name, load_backend
from dataflex.configs.components import component_entry
from dataflex.configs.loading import RunFile, load_run
from dataflex.configs.paths import PATHS, path_problems
from dataflex.configs.schema import COMPONENT_KIND
from dataflex.core.plugins import load_builtin_components, load_plugins
from dataflex.core.registry import REGISTRY, check_parameters, uses_eval_dataset
from dataflex.core.schedule import WITHOUT_END, Schedule, stage_length, total_steps
from dataflex.errors import ComponentError, ConfigError, Problem
from dataflex.train.trainer.by_type import AVAILABLE


def check_run(path: str | Path, overrides: Sequence[str] = (), *, scoring: bool = False, plugins: bool = True) -> tuple[RunFile, Any]:
    """A training file, checked as a whole, and what its backend needs to run it.

    Args:
        scoring: rows are only to be scored, so that the file's `train_type` and component do not matter.
        plugins: whether to run the code under `plugins` and that of installed plugins; a component that they define is not looked at otherwise.

    Raises:
        ConfigError: with every problem that was found.
    """
    run = load_run(path, overrides, scoring=scoring)
    run.add_all(path_problems({**run.dataflex.model_dump(exclude_unset=True), **run.backend}, run.folder))
    if any(problem.key.split(".")[0] in PATHS for problem in run.problems):
        run.raise_problems()  # whatever looks for these files would stumble
    try:
        _check_component(run, plugins)
        checked = load_backend(run.dataflex.backend).check(run)
    except ConfigError as error:
        run.add_all(error.problems)
    except _UNFORESEEN as error:
        run.add("", f"cannot be checked: {type(error).__name__}: {error}")
    run.raise_problems()
    assert checked is not None
    checked.notes += [f"{key}: {getattr(run.dataflex, key)} is not used: static_mix keeps the mixture" for key in run.dataflex.unused]
    return run, checked


# What strange values make libraries raise. A file that does is refused in words; `--debug` shows where.
_UNFORESEEN = (OSError, ValueError, ArithmeticError, RecursionError, TypeError, AttributeError, LookupError)


def _check_component(run: RunFile, plugins: bool = True) -> None:
    config = run.dataflex
    if config.train_type != "static":
        _check_domains(run)
    if config.train_type == "static" or config.component_name is None or config.keeps_mixture:
        return
    if config.train_type not in AVAILABLE:
        run.add("train_type", f"{config.train_type} is not available in this version; allowed: {', '.join(AVAILABLE)}")
        return
    kind = COMPONENT_KIND[config.train_type]
    try:
        if plugins:
            load_plugins(config.plugins, base=run.folder, where=run.where("plugins"))
        else:
            load_builtin_components()
            if config.component_name not in REGISTRY.names(kind):
                return None
        entry = component_entry(kind, config.component_name, config.components_cfg_file, run.folder, _references(run))
        cls: Any = REGISTRY.get(kind, config.component_name)
    except ConfigError as error:
        return run.add_all(error.problems)
    except ComponentError as error:
        return run.add("component_name", str(error))
    problems = check_parameters(cls, {**entry.params, **config.component_params})
    for problem in problems:
        if problem.key in entry.params and problem.key not in config.component_params:
            run.problems.append(entry.problem(problem.key, problem.message))
        else:
            run.add(f"component_params.{problem.key}", problem.message)
    params = {**entry.params, **config.component_params}
    if not problems and uses_eval_dataset(cls, params) and not (run.backend.get("eval_dataset") or run.backend.get("val_size")):
        run.add("component_name", f"{config.component_name} compares samples with evaluation data: set eval_dataset or val_size")
    # The trainer finds the same files from wherever it is started.
    if config.plugins:
        config.plugins = [str(p.resolve()) if (p := run.folder / name).is_file() else name for name in config.plugins]
    local = run.folder / config.components_cfg_file
    if local.is_file() and not Path(config.components_cfg_file).is_file():
        config.components_cfg_file = str(local)
    return None


def _check_domains(run: RunFile) -> None:
    names = [] if run.backend.get("domain_column") else _dataset_names(run)  # a column's values are known once the rows are read
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        run.add("dataset", f"names '{name}' more than once")
    if run.dataflex.train_type != "dynamic_mix":
        return
    if problem := _misfit(run, names):
        run.add("init_mixture_proportions", problem)
    if len(names) == 1:
        column = ", or the column that tells domains apart with domain_column" if backend_name(run.dataflex.backend) == "trl" else ""
        run.add("dataset", f"is one data set, so there is nothing to mix: name several{column}")


def _misfit(run: RunFile, domains: Sequence[str]) -> str:
    """What is wrong with the number of proportions."""
    given = run.dataflex.init_mixture_proportions
    if given is None or not domains or len(given) == len(domains):
        return ""
    return f"has {len(given)} numbers and there are {len(domains)} domains: {', '.join(domains)}"


def _references(run: RunFile) -> dict[str, str]:
    return {"output_dir": str(run.backend.get("output_dir", ""))}


def plan(run: RunFile, prepared: Any) -> list[tuple[str, str]]:
    """What the run will do, as (name, value) lines."""
    config = run.dataflex
    try:
        lines, sizes = load_backend(config.backend).summary(run, prepared)
        lines += (_unknown_lines if _unknown(run) else _LINES[config.train_type])(run, sizes)
    except ConfigError:
        raise
    except _UNFORESEEN as error:
        raise ConfigError(Problem(str(run.path), "", f"cannot be planned: {type(error).__name__}: {error}")) from error
    return [*lines, *(("note", note) for note in prepared.notes)]


def _static_lines(run: RunFile, sizes: Sizes) -> list[tuple[str, str]]:
    return [_steps_line(sizes.fixed or sizes.steps, sizes), ("train type", "static: the backend's own training")]


def _weight_lines(run: RunFile, sizes: Sizes) -> list[tuple[str, str]]:
    config, (cls, params) = run.dataflex, _component(run)
    steps = sizes.fixed or (None if sizes.packed else sizes.steps)
    lines = [
        _steps_line(sizes.fixed or sizes.steps, sizes),
        _component_line(run),
        ("warmup_step", f"weights are 1 for the first {config.warmup_step}{f' of {steps}' if steps else ''} optimizer steps"),
        ("extra cost", "; ".join(cls.costs(params)) or "none: weights come from the training forward"),
    ]
    if steps and config.warmup_step >= steps:
        lines.append(("warning", f"warmup_step {config.warmup_step} leaves no step to weight"))
    return lines


def _select_lines(run: RunFile, sizes: Sizes) -> list[tuple[str, str]]:
    if sizes.packed:  # packing makes rows of its own, which are counted only then
        sizes = sizes._replace(rows=None, packed=False)
    (cls, params), schedule = _component(run), _schedule(run, sizes)
    if schedule is None:
        return [_component_line(run), ("boundaries", "until training ends; counted once the rows are tokenised")]
    lines = [
        _steps_line(schedule.total_steps, sizes),
        _component_line(run),
        ("boundaries", _boundaries(schedule, "selection")),
        ("samples drawn", _drawn(schedule, sizes)),
        (
            "extra cost",
            _passes(cls.passes(params), schedule.decisions, sizes, bool(params.get("diversity"))) if hasattr(cls, "passes") else "not known",
        ),
    ]
    if not schedule.decisions:
        lines.append(("warning", f"the {schedule.total_steps} steps are over before the first selection at step {schedule.warmup_step}"))
    largest = schedule.longest * sizes.batch
    if sizes.rows and largest > sizes.rows:
        lines.append(("warning", f"an interval takes {largest} samples and there are {sizes.rows} rows: rows are repeated"))
    return lines


def _mix_lines(run: RunFile, sizes: Sizes) -> list[tuple[str, str]]:
    config = run.dataflex
    (cls, params), schedule = _component(run), _schedule(run, sizes)
    names = sizes.domains or _dataset_names(run)
    if problem := _misfit(run, names):
        raise ConfigError(Problem(run.where("init_mixture_proportions"), "init_mixture_proportions", problem))
    lines = [_steps_line(schedule.total_steps if schedule else None, sizes), _component_line(run)]
    if config.mixture_sample_rule == "mixture":
        given = config.init_mixture_proportions or [1.0] * len(names)
        shares = [f"{name} {share / sum(given):.3g}" for name, share in zip(names, given, strict=False)]
        lines.append(("first mixture", ", ".join(shares) or "equal"))
        if config.init_mixture_proportions and abs(sum(given) - 1) > 1e-6:
            lines.append(("note", f"init_mixture_proportions sum to {sum(given):g}; they are scaled to sum to 1"))
    else:
        lines.append(("mixture", {"stratified": "by size of the domains", "uniform": "equal"}[config.mixture_sample_rule]))
    if config.static_mix:
        return [*lines, ("boundaries", "none: the mixture stays")]
    if schedule is None:
        lines.append(("boundaries", "until training ends; counted once the rows are tokenised"))
    else:
        lines.append(("boundaries", _boundaries(schedule, "decision")))
        if not schedule.decisions:
            lines.append(("warning", f"the {schedule.total_steps} steps are over before the first decision at step {schedule.warmup_step}"))
    if config.mixture_sample_rule != "mixture":
        lines.append(("warning", f"mixture_sample_rule: {config.mixture_sample_rule} fixes the mixture, so what the mixer decides is not used"))
    return [*lines, ("extra cost", "; ".join(cls.costs(params)) or "none: losses come from the training forward")]


def _dataset_names(run: RunFile) -> list[str]:
    names = run.backend.get("dataset") or []
    return [str(name) for name in names] if isinstance(names, list | tuple) else [name.strip() for name in str(names).split(",")]


def _schedule(run: RunFile, sizes: Sizes) -> Schedule | None:
    """When there are decisions; None if the rows must be known for that and are not."""
    config = run.dataflex
    if config.keeps_mixture:
        steps = sizes.fixed or sizes.steps
        return Schedule(0, steps, WITHOUT_END, steps) if steps else None
    if config.update_times == WITHOUT_END and not (sizes.fixed or sizes.rows):
        return None
    stage = stage_length(config.warmup_step, config.update_step, config.update_times, -(-(sizes.rows or 0) // sizes.batch))
    return Schedule(config.warmup_step, config.update_step, config.update_times, total_steps(sizes.epochs, stage, sizes.fixed))


def _boundaries(schedule: Schedule, what: str) -> str:
    number = schedule.decisions
    listed = range(number) if number <= 8 else [*range(4), number - 2, number - 1]
    shown = [str(schedule.decision_step(k)) for k in listed]
    if number > 8:
        shown.insert(4, "...")
    plural = "s" if number != 1 else ""
    text = f"{number} {what}{plural}, at step{plural} {', '.join(shown)}" if number else "none"
    return f"{text}; {schedule.stages} stages" if schedule.stages > 1 else text


def _drawn(schedule: Schedule, sizes: Sizes) -> str:
    warm = schedule.warmup_total * sizes.batch
    total = schedule.total_steps * sizes.batch
    text = f"{total}: {warm} at random in warm-up, {total - warm} selected"
    return f"{text}; at most {min(1.0, total / sizes.rows):.0%} of the rows are seen" if sizes.rows else text


def _passes(passes: Any, decisions: int, sizes: Sizes, diversity: bool) -> str:
    """What `decisions` of these passes cost; how many of the best rows are embedded for `diversity` is not known beforehand."""
    if sizes.rows is None or sizes.eval_rows is None:
        numbers = ((passes.forward, "forward"), (passes.backward, "forward and backward"))
        parts = [f"for each row {number:g} {what} passes at each selection" for number, what in numbers if number]
        if passes.once:
            parts.append(f"{passes.once.forward:g} forward at the first")
    else:
        forward = backward = 0.0
        for part, times in ((passes, decisions), (passes.once, min(decisions, 1))):
            if part is not None:
                forward += times * (part.forward * sizes.rows + part.eval_forward * sizes.eval_rows)
                backward += times * (part.backward * sizes.rows + part.eval_backward * sizes.eval_rows)
        parts = [f"{number:,.0f} rows {what}" for number, what in ((forward, "forward"), (backward, "forward and backward")) if number]
    if diversity and decisions:
        parts.append("the best rows forward (diversity)")
    return " and ".join(parts) or "none: the model is not run for a selection"


def _steps_line(steps: int | None, sizes: Sizes) -> tuple[str, str]:
    if steps is None:
        return "optimizer steps", f"{sizes.epochs} epochs"
    about = "at most " if sizes.packed and not sizes.fixed else ""
    passes = f", {steps * sizes.batch / max(sizes.rows, 1):.1f} passes over the data" if sizes.rows is not None else ""
    return "optimizer steps", f"{about}{steps}{passes}"


def _component(run: RunFile) -> tuple[Any, dict[str, Any]]:
    """The component's class and parameters."""
    load_builtin_components()  # a mixture that stays has no component_name, so nothing has asked for them yet
    config = run.dataflex
    kind, name = COMPONENT_KIND[config.train_type], config.algorithm
    assert name is not None
    entry = component_entry(kind, name, config.components_cfg_file, run.folder, _references(run))
    return REGISTRY.get(kind, name), {**entry.params, **({} if config.keeps_mixture else config.component_params)}


def _unknown(run: RunFile) -> bool:
    """Whether the component's code was left alone."""
    config = run.dataflex
    return (
        config.train_type != "static" and not config.keeps_mixture and config.component_name not in REGISTRY.names(COMPONENT_KIND[config.train_type])
    )


def _unknown_lines(run: RunFile, sizes: Sizes) -> list[tuple[str, str]]:
    config = run.dataflex
    return [("train type", f"{config.train_type}, {config.component_name}: not looked at, since plugins were not run")]


def _component_line(run: RunFile) -> tuple[str, str]:
    _, params = _component(run)
    settings = ", ".join(f"{key}={value}" for key, value in params.items())
    return "train type", f"{run.dataflex.train_type}, {run.dataflex.algorithm}{f' ({settings})' if settings else ''}"


_LINES = {"static": _static_lines, "dynamic_weight": _weight_lines, "dynamic_select": _select_lines, "dynamic_mix": _mix_lines}
