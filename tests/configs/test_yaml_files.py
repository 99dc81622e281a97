"""Reading YAML: values, references, overrides, and where each key stands."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.configs.components import component_entry, component_params, components_path
from dataflex.configs.loading import load_run
from dataflex.configs.schema import PACKAGED_COMPONENTS, DataflexConfig
from dataflex.configs.values import wording
from dataflex.configs.yaml_files import key_lines, load_yaml, read_yaml
from dataflex.errors import ConfigError

TEXT = "a: 1\nb:\n  c: ${a}\n  d:\n    - e: 1\n? f\n: 2\n"


def written(folder, text, name="x.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_of_nested_keys(tmp_path):
    assert key_lines(TEXT) == {"a": 1, "b": 2, "b.c": 3, "b.d": 4, "f": 6}
    assert key_lines("") == key_lines("- a\n") == {}
    content = load_yaml(written(tmp_path, TEXT))
    assert [content.where("x", key) for key in ("b.c", "b.c.z", "b.z", "z")] == ["x:3", "x:3", "x:2", "x"]


def test_references_and_substitutes(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "/data")
    path = written(tmp_path, "a: 1\nb: {c: '${a}', d: ['${out}/x']}\ne: ${oc.env:SOME_FOLDER}\nf: ${b}\n")
    assert read_yaml(path, {"out": "o"}) == {"a": 1, "b": {"c": 1, "d": ["o/x"]}, "e": "/data", "f": {"c": 1, "d": ["o/x"]}}


def test_every_reference_to_nothing_is_reported_and_the_other_keys_are_read(tmp_path):
    content = load_yaml(written(tmp_path, "learning_rate: 1\na: ${learning_rat}\nb:\n  c: ${oc.env:NO_SUCH_VARIABLE_HERE}\n"))
    assert content.values == {"learning_rate": 1}
    assert [str(problem).replace(f"{tmp_path}/", "") for problem in content.unresolved] == [
        "x.yaml:2: a: refers to ${learning_rat}, but there is no key 'learning_rat'. Did you mean 'learning_rate'? "
        "Environment variables are written ${oc.env:NAME}",
        "x.yaml:4: b.c: cannot be resolved: KeyError raised while resolving interpolation: "
        "\"Environment variable 'NO_SUCH_VARIABLE_HERE' not found\"",
    ]


def test_overrides_replace_add_and_reach_into_mappings(tmp_path):
    path = written(tmp_path, "a: 1\nb: {c: 2, d: 3}\ng: ${a}\n")
    content = load_yaml(path, overrides=["a=1e-3", "b.c=[x, y]", "n=true", "s=", "b.e.f=null"])
    assert content.values == {"a": 0.001, "b": {"c": ["x", "y"], "d": 3, "e": {"f": None}}, "g": 0.001, "n": True, "s": None}


def test_an_override_of_a_list_by_a_mapping(tmp_path):
    with pytest.raises(ConfigError, match=r"^command line: "):
        load_yaml(written(tmp_path, "a: [1]\n"), overrides=["a.b=2"])


keys = st.text("abcxyz_", min_size=1, max_size=5)
leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab ${}:#-", max_size=6)
values = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner), max_leaves=8)


@settings(deadline=None)  # other tests run beside this one
@given(st.dictionaries(keys, values))
def test_whatever_is_written_is_read_back_or_refused_in_words(tmp_path_factory, content):
    path = written(tmp_path_factory.mktemp("yaml"), yaml.safe_dump(content))
    try:
        assert read_yaml(path) == content or "${" in str(content)
    except ConfigError as error:
        assert "$" in str(content) and "${" in path.read_text() and error.problems


def test_a_run_file_keeps_its_lines_and_marks_overrides(tmp_path):
    run = load_run(written(tmp_path, "train_type: static\nlearning_rate: 1\ndataflex_run: {seed: 1}\n"), ["learning_rate=2", "x.y=3"])
    assert run.dataflex == DataflexConfig() and run.backend == {"learning_rate": 2, "x": {"y": 3}}
    assert [run.where(key) for key in ("train_type", "learning_rate", "x.y", "other")] == [
        f"{run.path}:1",
        "command line",
        "command line",
        str(run.path),
    ]


def test_problems_leave_the_other_settings_in_force(tmp_path):
    run = load_run(written(tmp_path, "train_type: dynamic_weight\ncomponent_name: loss\nwarmup_step: x\nplugins: 3\n"))
    assert (run.dataflex.train_type, run.dataflex.component_name, run.dataflex.warmup_step) == ("dynamic_weight", "loss", 0)
    assert [problem.key for problem in run.problems] == ["warmup_step", "plugins"]


class TestComponents:
    def test_the_packaged_file_stands_in_for_its_name(self, tmp_path):
        assert components_path(PACKAGED_COMPONENTS).is_file()
        assert component_params("weighter", "loss", PACKAGED_COMPONENTS) == {"strategy": "linupper", "delta": 1.0, "r": 1.0, "scope": "micro"}

    def test_a_file_of_that_name_wins(self, tmp_path):
        path = tmp_path / PACKAGED_COMPONENTS
        path.parent.mkdir(parents=True)
        path.write_text("weighters:\n  loss:\n    params: {r: 0.5}\n")
        assert component_params("weighter", "loss", PACKAGED_COMPONENTS) == {"r": 0.5}

    def test_entries(self, tmp_path):
        text = "weighters:\n  bare:\n  named: {name: named}\n  full:\n    params:\n      cache: ${output_dir}/c\nreorderers:\n  r: {params: {a: 1}}\n"
        path = str(written(tmp_path, text))
        entry = component_entry("weighter", "full", path, substitute={"output_dir": "out"})
        assert entry.params == {"cache": "out/c"}
        assert str(entry.problem("cache", "is bad")) == f"{path}:6: weighters.full.params.cache: is bad"
        for name in ("bare", "named"):
            assert component_params("weighter", name, path, substitute={"output_dir": "out"}) == {}
        assert component_params("reorder", "r", path, substitute={"output_dir": "out"}) == {"a": 1}

    def test_all_problems_at_once(self, tmp_path):
        path = written(tmp_path, "weighter: {}\nweighters:\n  loss:\n    name: los\n    r: 1\n    params: 3\nmixer: {}\n")
        with pytest.raises(ConfigError) as caught:
            component_params("weighter", "loss", str(path))
        assert [(problem.where, problem.key) for problem in caught.value.problems] == [
            (f"{path}:1", "weighter"),
            (f"{path}:7", "mixer"),
            (f"{path}:5", "weighters.loss.r"),
            (f"{path}:4", "weighters.loss.name"),
            (f"{path}:6", "weighters.loss.params"),
        ]


def test_wording():
    detail = {"type": "literal_error", "msg": "Input should be 'a' or 'bcd'", "input": "bce", "loc": (), "ctx": {"expected": "'a' or 'bcd'"}}
    assert wording(detail) == "'bce' is not valid: must be 'a' or 'bcd'. Did you mean 'bcd'?"
