"""`dataflex-cli`. Heavy modules are imported inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dataflex import __version__
from dataflex.cli.offline import app as offline_app
from dataflex.configs.secrets import forget, redacted
from dataflex.errors import ConfigError, DataflexError
from dataflex.utils.printable import one_line, printable, shortened

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Optimise the data while the model trains. Start with: dataflex-cli train config.yaml",
)

app.add_typer(offline_app, name="offline")

Config = Annotated[str, typer.Argument(help="YAML file with the settings.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings that replace those of the file.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]


_MOST_PROBLEMS = 100  # that are printed one by one

# An option that does not exist is an override written wrongly, and is reported as one.
_LENIENT = {"ignore_unknown_options": True}


@app.command(context_settings=_LENIENT)
def train(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Train as a YAML file says."""
    guarded(lambda: _train(config, overrides or []), debug)


@app.command(context_settings=_LENIENT)
def validate(
    config: Config,
    overrides: Overrides = None,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Do not run the code under `plugins`, nor that of installed plugins.")] = False,
    debug: Debug = False,
) -> None:
    """Check a YAML file and print what it would do, without loading the model or writing anything but tokenised rows.

    Plugins are run, to know their components.
    """
    guarded(lambda: _validate(config, overrides or [], plugins=not no_plugins), debug)


@app.command()
def components(
    components_cfg_file: Annotated[str | None, typer.Option(help="Components file to read parameters from.")] = None,
    plugins: Annotated[list[str] | None, typer.Option("--plugin", help="Python file or module with components of your own.")] = None,
    debug: Debug = False,
) -> None:
    """List the algorithms with their parameters, defaults and needs."""
    from dataflex.cli.tables import print_components

    guarded(lambda: print_components(components_cfg_file, plugins or []), debug)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"dataflex {__version__}")


@app.command()
def env() -> None:
    """Print what a bug report should contain."""
    from dataflex.cli.tables import print_environment

    print_environment()


@app.command()
def reference() -> None:
    """Print every key of a training file, in Markdown."""
    from dataflex.cli.tables import reference_page

    typer.echo(reference_page(), nl=False)


@app.command(context_settings=_LENIENT)
def doremi(config: Config, overrides: Overrides = None, debug: Debug = False) -> None:
    """Run DoReMi's three steps (reference, proxy, final) from one YAML file; finished steps are not repeated."""
    from dataflex.cli.doremi import doremi as run_all

    guarded(lambda: run_all(config, overrides or []), debug)


@app.command()
def inspect(
    output_dir: Annotated[str, typer.Argument(help="Folder of a run with dynamic_select or dynamic_mix.")],
    rows: Annotated[int, typer.Option(help="Rows to show of those chosen most and least often.", min=0)] = 5,
    html: Annotated[str | None, typer.Option(help="Report to write instead of output_dir/dataflex/selections/report.html.")] = None,
    png: Annotated[str | None, typer.Option(help="Picture to write instead of output_dir/dataflex/selections/report.png.")] = None,
    debug: Debug = False,
) -> None:
    """Show what a run was trained on: what was chosen when, from which data set, and which rows most and least."""
    from dataflex.cli.inspect import inspect as show

    guarded(lambda: show(output_dir, rows, html, png), debug)


def _train(config: str, overrides: list[str]) -> None:
    from dataflex.cli.launch import launch, name_rank_in_tracebacks, should_launch
    from dataflex.cli.plan import check_run
    from dataflex.core.lock import refuse_if_locked

    if should_launch():
        run, _ = check_run(config, overrides)  # a mistake is reported once, by this process
        refuse_if_locked(run.backend["output_dir"])
        raise typer.Exit(launch(["train", config, *overrides]))
    from dataflex.backends import load_backend
    from dataflex.utils.distributed import leave
    from dataflex.utils.logging import logger, show_logs

    show_logs()
    name_rank_in_tracebacks()
    run, checked = check_run(config, overrides)
    for note in checked.notes:
        logger.warning(note)
    load_backend(run.dataflex.backend).train(run, checked)
    leave()


def _validate(config: str, overrides: list[str], plugins: bool) -> None:
    from dataflex.cli.plan import check_run, plan
    from dataflex.cli.tables import print_plan

    print_plan(plan(*check_run(config, overrides, plugins=plugins)))


def guarded(action: Callable[[], Any], debug: bool) -> None:
    """Run a command; errors that DataFlex raises on purpose are printed without a traceback, and the exit code is 2."""
    forget()
    try:
        action()
    except DataflexError as error:
        if debug:
            typer.echo(printable(redacted(traceback.format_exc())), err=True, nl=False)
        _print_error(error)
        sys.exit(2)


def _print_error(error: DataflexError) -> None:
    from dataflex.cli.launch import rank_prefix

    rank, problems = rank_prefix(), error.problems if isinstance(error, ConfigError) else [error]
    if len(problems) > 1:
        typer.echo(f"dataflex-cli: {rank}{len(problems)} problems", err=True)
    for problem in problems[:_MOST_PROBLEMS]:
        typer.echo(f"{'  ' if len(problems) > 1 else f'dataflex-cli: {rank}'}{shortened(one_line(redacted(str(problem))), 2000)}", err=True)
    if len(problems) > _MOST_PROBLEMS:
        typer.echo(f"  and {len(problems) - _MOST_PROBLEMS:,} more", err=True)


def main() -> None:
    """Entry point of `dataflex-cli`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to stop
    app()
