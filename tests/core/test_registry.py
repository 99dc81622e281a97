"""Names and parameters of components."""

from typing import Annotated, Literal

import pytest
from annotated_types import Gt

from dataflex.core.registry import Registry, check_parameters, parameters_of, settings_of
from dataflex.errors import ComponentError


class Base:
    def __init__(self, *, dataset=None, accelerator=None):
        self.dataset = dataset


class Middle(Base):
    def __init__(self, depth: Annotated[float, Gt(0)] = 1.0, mode: Literal["a", "bee"] = "a", **kwargs):
        super().__init__(**kwargs)
        self.depth, self.mode = depth, mode


class Leaf(Middle):
    def __init__(self, width: int, **kwargs):
        super().__init__(**kwargs)
        self.width = width


class Closed(Middle):
    def __init__(self, width: int = 3):
        super().__init__()
        self.width = width


@pytest.fixture
def registry():
    registry = Registry()
    registry.register("weighter", "leaf")(Leaf)
    return registry


def test_parameters_follow_kwargs_up_the_hierarchy():
    assert list(parameters_of(Leaf)) == ["width", "depth", "mode", "dataset", "accelerator"]
    assert list(settings_of(Leaf)) == ["width", "depth", "mode"]
    assert list(parameters_of(Closed)) == ["width"]


def test_build_matches_by_name_and_converts(registry):
    leaf = registry.build("weighter", "leaf", runtime={"dataset": [1], "tokenizer": object()}, cfg={"width": 2, "depth": 3})
    assert (leaf.width, leaf.depth, leaf.dataset) == (2, 3.0, [1]) and isinstance(leaf.depth, float)


def test_live_objects_cannot_be_set_in_yaml(registry):
    with pytest.raises(ComponentError, match="dataset: is provided by the run and cannot be set here"):
        registry.build("weighter", "leaf", runtime={"dataset": "live"}, cfg={"width": 1, "dataset": "yaml"})


def test_the_seed_may_be_set_in_yaml(registry):
    class Seeded:
        def __init__(self, seed: int = 0):
            self.seed = seed

    registry.register("weighter", "seeded")(Seeded)
    assert registry.build("weighter", "seeded", runtime={"seed": 42}, cfg={}).seed == 42
    assert registry.build("weighter", "seeded", runtime={"seed": 42}, cfg={"seed": 7}).seed == 7


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"width": 1, "dept": 2}, "dept: is not a parameter of Leaf. Did you mean 'depth'? It accepts: depth, mode, width"),
        ({"width": "wide"}, "width: 'wide' is not valid: must be a valid integer, unable to parse string as an integer"),
        ({"width": 1, "depth": 0}, "depth: 0 is not valid: must be greater than 0"),
        ({"width": 1, "mode": "be"}, "mode: 'be' is not valid: must be 'a' or 'bee'. Did you mean 'bee'?"),
        ({}, "width: is required by Leaf and has no default"),
    ],
)
def test_wrong_parameters(registry, params, message):
    assert [str(problem) for problem in check_parameters(Leaf, params)] == [message]
    with pytest.raises(ComponentError, match="weighter 'leaf', parameter"):
        registry.build("weighter", "leaf", runtime={}, cfg=params)


def test_unknown_names(registry):
    with pytest.raises(ComponentError, match=r"unknown weighter 'leef'. Did you mean 'leaf'\? Registered: leaf \(add one with @register_weighter\)"):
        registry.get("weighter", "leef")
    with pytest.raises(ComponentError, match=r"unknown kind of component 'wheighter'. Did you mean 'weighter'\?"):
        registry.get("wheighter", "leaf")


def test_a_name_is_registered_once(registry):
    with pytest.raises(ComponentError, match=r"weighter\.leaf already registered by"):
        registry.register("weighter", "leaf")(Middle)
    registry.register("weighter", "leaf")(Leaf)  # the same definition, read again


def test_an_annotation_that_cannot_be_checked_is_let_through(registry):
    class Odd:
        def __init__(self, thing: "Unknown" = None):  # noqa: F821
            self.thing = thing

    assert check_parameters(Odd, {"thing": 3}) == []
