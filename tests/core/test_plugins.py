"""Components from files, modules and entry points."""

import sys
from importlib.metadata import EntryPoint

import pytest

import dataflex.core.plugins as plugins
from dataflex.core.registry import REGISTRY
from dataflex.errors import ConfigError

SOURCE = """
from dataflex import SampleWeighter, register_weighter

@register_weighter("NAME")
class Equal(SampleWeighter):
    def sample_weights(self, losses, *, ctx, model, inputs):
        return losses * 0 + 1
"""


def test_a_file_relative_to_the_yaml_file(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE.replace("NAME", "plugin_file"))
    plugins.load_plugins(["mine.py"], base=tmp_path)
    plugins.load_plugins(["mine.py"], base=tmp_path)
    assert "plugin_file" in REGISTRY.names("weighter")


def test_a_module(tmp_path, monkeypatch):
    (tmp_path / "plugin_module_for_tests.py").write_text(SOURCE.replace("NAME", "plugin_module"))
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_plugins(["plugin_module_for_tests"])
    assert "plugin_module" in REGISTRY.names("weighter")


def test_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "plugin_entry_for_tests.py").write_text(SOURCE.replace("NAME", "plugin_entry"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("mine", "plugin_entry_for_tests", group)])
    plugins.load_plugins()
    assert "plugin_entry" in REGISTRY.names("weighter")


def test_a_missing_file_and_a_broken_one(tmp_path):
    with pytest.raises(ConfigError, match=r"no file 'gone\.py' in"):
        plugins.load_plugins(["gone.py"], base=tmp_path)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(ConfigError, match=r"'broken.py' failed on import: ModuleNotFoundError"):
        plugins.load_plugins(["broken.py"], base=tmp_path)
    assert not [name for name in sys.modules if "dataflex_plugin_broken" in name]
