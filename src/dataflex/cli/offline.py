"""`dataflex-cli offline near|tsds|rds|ifd`: a selection computed once, before training, from the training file itself."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dataflex.errors import ConfigError, Problem
from dataflex.utils.printable import one_line

app = typer.Typer(
    no_args_is_help=True, help="Compute a selection before training, for the data and model of a training file; selectors read it as `file`."
)

Config = Annotated[str, typer.Argument(help="The training file. Its train_type does not matter.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings that replace those of the file.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write.", dir_okay=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
Pooling = Annotated[Literal["weighted_mean", "mean", "last"], typer.Option(help="How hidden states of the training model become an embedding.")]
Embedder = Annotated[str | None, typer.Option(help="Embed with this sentence-transformers model instead (extra: dataflex[embed]).")]
Features = Annotated[Path | None, typer.Option(help=".npy with an embedding of every training row instead.", exists=True, dir_okay=False)]
Queries = Annotated[Path | None, typer.Option(help=".npy with embeddings of the queries, with --embeddings-file.", exists=True, dir_okay=False)]
Number = Annotated[int | None, typer.Option(help="Rows to put in order; all by default.", min=1)]

_LENIENT = {"ignore_unknown_options": True}


@app.command(context_settings=_LENIENT)
def near(
    config: Config,
    overrides: Overrides = None,
    output: Output = Path("near.safetensors"),
    number: Number = None,
    pooling: Pooling = "weighted_mean",
    embedder: Embedder = None,
    embeddings_file: Features = None,
    query_embeddings_file: Queries = None,
    debug: Debug = False,
) -> None:
    """Order rows as the evaluation data's nearest neighbours."""
    source = {"pooling": pooling, "embedder": embedder, "embeddings_file": embeddings_file, "query_embeddings_file": query_embeddings_file}
    _guarded("near", config, overrides, output, {**source, "number": number}, debug)


@app.command(context_settings=_LENIENT)
def rds(
    config: Config,
    overrides: Overrides = None,
    output: Output = Path("rds.safetensors"),
    number: Number = None,
    aggregation: Annotated[
        Literal["round_robin", "max"], typer.Option(help="Evaluation rows take turns, or the highest similarity counts.")
    ] = "round_robin",
    pooling: Pooling = "weighted_mean",
    embedder: Embedder = None,
    embeddings_file: Features = None,
    query_embeddings_file: Queries = None,
    debug: Debug = False,
) -> None:
    """Order rows by RDS+ (arXiv 2503.01807)."""
    source = {"pooling": pooling, "embedder": embedder, "embeddings_file": embeddings_file, "query_embeddings_file": query_embeddings_file}
    _guarded("rds", config, overrides, output, {**source, "number": number, "aggregation": aggregation}, debug)


@app.command(context_settings=_LENIENT)
def tsds(
    config: Config,
    overrides: Overrides = None,
    output: Output = Path("tsds.safetensors"),
    alpha: Annotated[float, typer.Option(help="Weight of closeness against diversity.", min=0, max=1)] = 0.5,
    c: Annotated[float, typer.Option("--C", help="Scale of distances.", min=1e-9)] = 5.0,
    sigma: Annotated[float, typer.Option(help="Rows closer than this count as near-duplicates; 0: none do.", min=0)] = 0.75,
    max_neighbours: Annotated[int, typer.Option(help="Candidates a query may give mass to, at most a tenth of all, or 100.", min=1)] = 5000,
    pooling: Pooling = "weighted_mean",
    embedder: Embedder = None,
    embeddings_file: Features = None,
    query_embeddings_file: Queries = None,
    debug: Debug = False,
) -> None:
    """Give rows probabilities by TSDS (arXiv 2410.11303)."""
    source = {"pooling": pooling, "embedder": embedder, "embeddings_file": embeddings_file, "query_embeddings_file": query_embeddings_file}
    settings = {**source, "alpha": alpha, "C": c, "sigma": sigma, "max_neighbours": max_neighbours}
    _guarded("tsds", config, overrides, output, settings, debug)


@app.command(context_settings=_LENIENT)
def ifd(
    config: Config,
    overrides: Overrides = None,
    output: Output = Path("ifd.safetensors"),
    min_tokens: Annotated[int, typer.Option(help="Answers with fewer tokens are never chosen.", min=1)] = 5,
    debug: Debug = False,
) -> None:
    """Score rows by how little their instruction helps with the answer (arXiv 2308.12032)."""
    _guarded("ifd", config, overrides, output, {"min_tokens": min_tokens}, debug)


@app.command()
def regmix(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of finished runs with dynamic_mix and different mixtures.")],
    metric: Annotated[str, typer.Option(help="What to make small: a key of all_results.json.")] = "eval_loss",
    output: Output = Path("regmix.json"),
    prior: Annotated[str | None, typer.Option(help="Mixtures are tried around this one, e.g. 0.2,0.8; equal shares by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the mixtures that are tried.")] = 42,
    debug: Debug = False,
) -> None:
    """Fit proportions to the results of small runs (arXiv 2407.01492)."""
    from dataflex.cli.app import guarded

    guarded(lambda: _regmix(runs, metric, output, prior, seed), debug)


def _regmix(folders: list[Path], metric: str, output: Path, prior: str | None, seed: int) -> None:
    from dataflex.offline.regmix import fit, read_runs
    from dataflex.utils.files import write_json_atomically

    try:
        numbers = None if prior is None else [float(part) for part in prior.split(",")]
    except ValueError:
        raise ConfigError(Problem("command line", "--prior", f"must be numbers with commas between them, not '{prior}'")) from None
    runs = read_runs(folders, metric)
    found = fit(runs, numbers, seed)
    shares = dict(zip(runs.names, (round(float(share), 6) for share in found.proportions), strict=True))
    told = {
        "mixture_unit": runs.unit,
        "metric": metric,
        "runs": found.num_runs,
        "predicted": found.predicted_loss,
        "spearman_held_out": found.spearman,
    }
    write_json_atomically(output, {"proportions": shares, **told})
    typer.echo(f"{found.num_runs} runs; rank correlation of predicted and measured {one_line(metric)} on held-out runs: {found.spearman:.2f}")
    typer.echo(f"mixture_unit: {runs.unit}")
    typer.echo(f"init_mixture_proportions: [{', '.join(f'{share:.6f}' for share in shares.values())}]  # {one_line(', '.join(shares))}")
    typer.echo(one_line(f"wrote {output}"))


def _guarded(method: str, config: str, overrides: list[str] | None, output: Path, settings: dict[str, Any], debug: bool) -> None:
    from dataflex.cli.app import guarded

    guarded(lambda: _compute(method, config, overrides or [], output, settings), debug)


def _compute(method: str, config: str, overrides: list[str], output: Path, settings: dict[str, Any]) -> None:
    from dataflex.cli.launch import launch, should_launch
    from dataflex.utils.distributed import leave
    from dataflex.utils.logging import logger, show_logs

    run, checked = _checked(method, config, overrides, settings)
    if should_launch():
        raise typer.Exit(launch(sys.argv[1:]))
    from dataflex.backends import load_backend
    from dataflex.offline.results import save_result
    from dataflex.train.data.fingerprint import dataset_fingerprint

    show_logs()
    partial = output.with_name(output.name + ".partial")  # where an interrupted pass over the rows is taken up again
    trainer = load_backend(run.dataflex.backend).scoring_trainer(run, checked, partial)
    values = _method(method, settings)(trainer)
    if trainer.is_world_process_zero():
        data = trainer.train_dataset
        told = {key: str(value) for key, value in settings.items() if value is not None} | {"model": str(run.backend.get("model_name_or_path"))}
        save_result(output, method, values, fingerprint=dataset_fingerprint(data), numbers=trainer.row_numbers, parameters=told)
        shutil.rmtree(partial, ignore_errors=True)
        logger.info("wrote %s. Use it: component_name: %s, component_params: {file: %s}", output, method, output)
    leave()


def _checked(method: str, config: str, overrides: list[str], settings: dict[str, Any]) -> tuple[Any, Any]:
    """The training file, checked but for its component, which may name the very file that is to be written."""
    from dataflex.cli.plan import check_run

    if (settings.get("embeddings_file") is None) != (settings.get("query_embeddings_file") is None):
        raise ConfigError(Problem("command line", "--embeddings-file", "goes with --query-embeddings-file: both must come from one model"))
    other = ["overwrite_output_dir=true", "resume_from_checkpoint=null"]  # a run in output_dir is neither touched nor asked for
    run, checked = check_run(config, [*overrides, *other], scoring=True)
    queries = method == "ifd" or settings.get("query_embeddings_file") or run.backend.get("eval_dataset") or run.backend.get("val_size")
    if not queries:
        raise ConfigError(Problem(config, "eval_dataset", f"is required: {method} compares rows with evaluation data. Or set val_size"))
    return run, checked


def _method(method: str, settings: dict[str, Any]) -> Callable[[Any], Any]:
    from dataflex.offline import methods

    source = {name: settings[name] for name in methods.Embeddings._fields if name in settings}
    other = {name: value for name, value in settings.items() if name not in source}
    arguments = ({"source": methods.Embeddings(**source)} if source else {}) | other
    return lambda trainer: getattr(methods, method)(trainer, **arguments)
