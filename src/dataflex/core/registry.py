"""Names for components: `@register_weighter("loss")` makes a class available to YAML as `component_name: loss`.

Constructor arguments are matched by name: YAML `params` and the run's live objects (dataset, tokenizer, ...) go to the parameters that
carry their names. Names are read along the class hierarchy, so a subclass that takes `**kwargs` accepts what its bases accept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from dataflex.configs.values import wording
from dataflex.errors import ComponentError, Problem, listing, nearest

KINDS = ("weighter", "selector", "mixer", "reorder")

# Live objects a constructor may ask for by name. A component is given the ones it names and nothing else.
RUNTIME_NAMES = (
    "dataset",
    "eval_dataset",
    "row_numbers",
    "accelerator",
    "data_collator",
    "tokenizer",
    "mixture_manager",
    "output_dir",
    "cache_dir",
    "seed",
)

# Those of them that a YAML file may set nevertheless.
SETTABLE_NAMES = ("output_dir", "cache_dir", "seed")

T = TypeVar("T", bound=type)


class Registry:
    """Component classes by kind and name."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}

    def register(self, kind: str, name: str) -> Callable[[T], T]:
        """Class decorator that files a class under `name`.

        Raises:
            ComponentError: another class already has that name.
        """
        bucket = self._bucket(kind)

        def decorate(cls: T) -> T:
            known = bucket.get(name)
            # A plugin file may be read twice (validate, then train): the same definition may replace itself.
            if known is not None and _origin(known) != _origin(cls):
                raise ComponentError(f"{kind}.{name} already registered by {_origin(known)}; {_origin(cls)} needs another name")
            bucket[name] = cls
            return cls

        return decorate

    def get(self, kind: str, name: str) -> type:
        """The class registered as `name`; an unknown name lists what exists."""
        bucket = self._bucket(kind)
        if name not in bucket:
            raise ComponentError(f"unknown {kind} '{name}'.{nearest(name, bucket)} Registered: {listing(bucket)} (add one with @register_{kind})")
        return bucket[name]

    def names(self, kind: str) -> list[str]:
        return sorted(self._bucket(kind))

    def build(self, kind: str, name: str, *, runtime: Mapping[str, Any], cfg: Mapping[str, Any] | None = None) -> Any:
        """Make a component from YAML parameters and live objects.

        Raises:
            ComponentError: a parameter has no taker, or a wrong value; the message names what is accepted.
        """
        cls = self.get(kind, name)
        problems = check_parameters(cls, cfg or {})
        if problems:
            raise ComponentError("; ".join(f"{kind} '{name}', parameter {problem.key}: {problem.message}" for problem in problems))
        accepted = parameters_of(cls)
        live = {key: value for key, value in runtime.items() if key in accepted}
        return cls(**{**live, **convert_parameters(cls, cfg or {})})

    def _bucket(self, kind: str) -> dict[str, type]:
        if kind not in self._classes:
            raise ComponentError(f"unknown kind of component '{kind}'.{nearest(kind, KINDS)} Kinds: {listing(KINDS)}")
        return self._classes[kind]


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """Constructor parameters by name, following `**kwargs` up the class hierarchy; annotations are resolved."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None or base is object:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        hints = _hints(init)
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, parameter.replace(annotation=hints.get(parameter.name, Any)))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def settings_of(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters that a YAML file may set: those that are not live objects."""
    return {name: parameter for name, parameter in parameters_of(cls).items() if name not in RUNTIME_NAMES}


def uses_eval_dataset(cls: Any, params: Mapping[str, Any]) -> bool:
    """Whether a component needs evaluation data with these parameters."""
    asked = getattr(cls, "uses_eval_dataset", None)
    return bool(asked(params)) if asked is not None else bool(getattr(cls, "needs_eval_dataset", False))


def check_parameters(cls: type, params: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with YAML `params` for `cls`: unknown names, wrong types or values, missing ones."""
    settings = settings_of(cls)
    accepted = parameters_of(cls)
    problems = []
    for name, value in params.items():
        if name in RUNTIME_NAMES and name not in SETTABLE_NAMES:
            problems.append(Problem("", name, "is provided by the run and cannot be set here"))
        elif name not in accepted:
            problems.append(Problem("", name, f"is not a parameter of {cls.__name__}.{nearest(name, settings)} It accepts: {listing(settings)}"))
        elif name in settings:
            problems += _check_value(name, settings[name], value)
    missing = [name for name, parameter in settings.items() if parameter.default is parameter.empty and name not in params]
    problems += [Problem("", name, f"is required by {cls.__name__} and has no default") for name in missing]
    return problems


def convert_parameters(cls: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` as the annotated types (YAML's `1` for a float parameter becomes `1.0`); call `check_parameters` first."""
    accepted = parameters_of(cls)
    return {name: _adapter(accepted[name]).validate_python(value) for name, value in params.items()}


def _check_value(name: str, parameter: inspect.Parameter, value: Any) -> list[Problem]:
    try:
        _adapter(parameter).validate_python(value)
    except ValidationError as error:
        return [Problem("", name, wording(detail)) for detail in error.errors(include_url=False)]
    except (OSError, ArithmeticError, RecursionError) as error:  # such as a name that is too long for a file
        return [Problem("", name, f"is not valid: {error}")]
    return []


def _adapter(parameter: inspect.Parameter) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(parameter.annotation)
    except (PydanticUserError, PydanticSchemaGenerationError):  # an annotation pydantic has no check for
        return TypeAdapter(Any)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except NameError:  # an annotation that exists for type checkers only: then the value is not checked
        return {}


def _origin(cls: type) -> str:
    return f"{inspect.getsourcefile(cls) or cls.__module__}:{cls.__qualname__}"


REGISTRY = Registry()


def register_weighter(name: str) -> Callable[[T], T]:
    """Class decorator: make a `Weighter` available as `component_name: <name>`."""
    return REGISTRY.register("weighter", name)


def register_selector(name: str) -> Callable[[T], T]:
    """Class decorator: make a selector available as `component_name: <name>`."""
    return REGISTRY.register("selector", name)


def register_mixer(name: str) -> Callable[[T], T]:
    """Class decorator: make a mixer available as `component_name: <name>`."""
    return REGISTRY.register("mixer", name)


def register_reorder(name: str) -> Callable[[T], T]:
    """Class decorator: make a reorder component available as `component_name: <name>`."""
    return REGISTRY.register("reorder", name)
