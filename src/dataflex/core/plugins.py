"""Loading components from outside the package: files and modules named in YAML, and installed entry points."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from dataflex.errors import ConfigError, DataflexError, Problem
from dataflex.utils.seeding import derive_seed

ENTRY_POINT_GROUP = "dataflex.components"


def load_builtin_components() -> None:
    """Register the components that ship with DataFlex."""
    for package in ("weighter", "selector", "mixer"):
        importlib.import_module(f"dataflex.train.{package}")


def load_plugins(plugins: Sequence[str] = (), *, base: Path | None = None, where: str = "plugins") -> None:
    """Register built-in components, installed entry points and every file or module named in `plugins`.

    Args:
        plugins: paths of Python files (relative ones are looked up from `base`, then from the working directory) or module names.
        base: folder of the YAML file.
        where: what to call the place that names them, in error messages.

    Raises:
        ConfigError: one cannot be found or fails on import.
    """
    load_builtin_components()
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        _guarded(where, entry_point.value, entry_point.load)
    for plugin in plugins:
        _guarded(where, plugin, lambda plugin=plugin: _import(plugin, base or Path.cwd(), where))


def _guarded(where: str, plugin: str, load: object) -> None:
    try:
        load()  # type: ignore[operator]
    except ConfigError:
        raise
    except DataflexError as error:
        raise ConfigError(Problem(where, "plugins", f"'{plugin}' cannot be used: {error}")) from error
    except (Exception, SystemExit) as error:
        place = "" if isinstance(error, SyntaxError) else _place(error, plugin)
        raise ConfigError(Problem(where, "plugins", f"'{plugin}' failed on import: {type(error).__name__}: {error}{place}")) from error


def _place(error: BaseException, plugin: str) -> str:
    """Line of the plugin's own file where it failed, or nothing when the failure is elsewhere."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == Path(plugin).name]
    return f" (line {frames[-1].lineno})" if frames else ""


def _import(plugin: str, base: Path, where: str) -> None:
    if not (plugin.endswith(".py") or "/" in plugin):
        importlib.import_module(plugin)
        return
    candidates = [base / plugin, Path.cwd() / plugin]
    path = next((path.resolve() for path in candidates if path.is_file()), None)
    if path is None:
        folders = dict.fromkeys(str(candidate.parent) for candidate in candidates)
        raise ConfigError(Problem(where, "plugins", f"no file '{plugin}' in {' or '.join(folders)}"))
    name = f"dataflex_plugin_{path.stem}_{derive_seed(str(path)):x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints in the plugin look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
