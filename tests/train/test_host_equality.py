"""With equal weights DataFlex gives what the host gives; before `warmup_step` the loss has the scale it has after it."""

import pytest
from harness import HOSTS, relative, run

EQUAL = {"rows": 16, "lengths": [12, 12], "batch": 4, "accumulation": 2, "epochs": 2, "optim": "adamw_torch"}
UNEQUAL = {**EQUAL, "lengths": [6, 24], "rows": 19}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("component", "params"), [("loss", {"strategy": "uniform"}), ("dft", {"power": 0}), ("focal", {"gamma": 0})])
def test_equal_weights_on_equally_long_samples_give_the_hosts_bits(tmp_path, host, component, params):
    spec = {**EQUAL, "host": host}
    plain = run(spec, tmp_path / "plain")
    weighted = run({**spec, "component": component, "params": params, "dataflex": {"project_targets_only": False}}, tmp_path / "weighted")
    assert plain.parameters.equal(weighted.parameters)
    assert all(a.equal(b) for a, b in zip(plain.gradients, weighted.gradients, strict=True))
    assert plain.logged("loss", "grad_norm") == weighted.logged("loss", "grad_norm")


@pytest.mark.parametrize("host", HOSTS)
def test_token_normalization_gives_the_hosts_bits_on_unequal_lengths_and_a_ragged_epoch_end(tmp_path, host):
    spec = {**UNEQUAL, "host": host}
    plain = run(spec, tmp_path / "plain")
    settings = {"loss_normalization": "token", "project_targets_only": False}
    weighted = run({**spec, "component": "loss", "params": {"strategy": "uniform"}, "dataflex": settings}, tmp_path / "weighted")
    assert plain.parameters.equal(weighted.parameters)
    assert plain.logged("loss") == weighted.logged("loss")


def test_projecting_targets_only_changes_nothing_but_rounding(tmp_path):
    full = run({**UNEQUAL, "component": "loss", "dataflex": {"project_targets_only": False}}, tmp_path / "full")
    targets = run({**UNEQUAL, "component": "loss"}, tmp_path / "targets")
    assert relative(targets.gradients[0], full.gradients[0]) < 1e-6


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("component", ["loss", "custom", "dft"])
def test_warmup_has_the_scale_of_equal_weights(tmp_path, host, component):
    warmup = run({**UNEQUAL, "host": host, "component": component, "dataflex": {"warmup_step": 100}}, tmp_path / "warmup")
    equal = {"loss": {"strategy": "uniform"}, "custom": {}, "dft": {"power": 0}}[component]
    after = run({**UNEQUAL, "host": host, "component": component, "params": equal}, tmp_path / "after")
    assert relative(warmup.gradients[0], after.gradients[0]) < 1e-6
    assert relative(warmup.gradients[-1], after.gradients[-1]) < 1e-4  # AdamW has amplified the rounding of the first steps


def test_weights_change_the_gradient_after_warmup(tmp_path):
    spec = {**EQUAL, "component": "loss", "params": {"r": 0.4}}
    plain = run({**spec, "dataflex": {"warmup_step": 100}}, tmp_path / "plain")
    switched = run({**spec, "dataflex": {"warmup_step": 1}}, tmp_path / "switched")
    assert plain.gradients[0].equal(switched.gradients[0])
    assert relative(switched.gradients[1], plain.gradients[1]) > 1e-2


@pytest.mark.parametrize("host", HOSTS)
def test_label_smoothing_stays(tmp_path, host):
    # Without accumulation: transformers before 5.15 scales the smoothed loss wrongly with it.
    spec = {**EQUAL, "accumulation": 1, "host": host, "args": {"label_smoothing_factor": 0.1}}
    plain = run(spec, tmp_path / "plain")
    for full in (False, True):
        settings = {"project_targets_only": not full}
        weighted = run({**spec, "component": "loss", "params": {"strategy": "uniform"}, "dataflex": settings}, tmp_path / f"weighted{full}")
        assert relative(weighted.gradients[0], plain.gradients[0]) < 1e-5
