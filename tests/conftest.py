"""Settings shared by all tests: no network, one thread per worker, nothing printed by the libraries."""

import atexit
import os
import shutil
import sys
import tempfile

if "DATAFLEX_CACHE" not in os.environ:  # one for all tests of a process and its children, and nothing in the user's own
    os.environ["DATAFLEX_CACHE"] = tempfile.mkdtemp(prefix="dataflex-test-cache-")
    atexit.register(shutil.rmtree, os.environ["DATAFLEX_CACHE"], ignore_errors=True)
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Nothing a test writes without saying where may land in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _components_of_one_test_only():
    """What a test registers is gone after it."""
    from dataflex.core.registry import REGISTRY

    before = {kind: dict(classes) for kind, classes in REGISTRY._classes.items()}
    yield
    for kind, classes in REGISTRY._classes.items():
        for name in set(classes) - set(before[kind]):
            if not classes[name].__module__.startswith("dataflex."):
                del classes[name]
    for name in [name for name in sys.modules if name.startswith("dataflex_plugin_")]:
        del sys.modules[name]  # a file read again registers its components again
