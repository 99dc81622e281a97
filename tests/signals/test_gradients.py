"""The gradient engine against plain autograd, one row at a time, in fp64 (ALGORITHMS 0.4, B1)."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama import modeling_llama

from dataflex.errors import ComponentError, TrainingError
from dataflex.signals import gradients
from dataflex.signals.gradients import (
    Moments,
    Preconditioner,
    gradient_sum,
    mean_gradient,
    per_sample_products,
    scored_parameters,
    sketch,
)
from dataflex.testing.tiny import tiny_model, tiny_rows
from dataflex.train.data.sample_meta import build_meta
from dataflex.train.trainer.token_losses import losses_from_logits, per_sample_loss_from_logits

VOCABULARY = 67
BETAS, EPS = (0.9, 0.99), 1e-6
SGD = Preconditioner()


@pytest.fixture(autouse=True)
def _norms_in_the_models_own_precision(monkeypatch):
    """The Llama norm computes in fp32 whatever the weights are; its rounding would hide all further digits."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def llama(**config):
    model = tiny_model(vocab_size=VOCABULARY, pad_token_id=0, **config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # away from the near-linear start
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def gpt2(**config):
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2, **config))


def opt():
    """Folds rows and positions into one dimension."""
    sizes = {"hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, init_std=0.3, **sizes))


def lora(model, **config):
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM", **config))
    for name, p in model.named_parameters():
        if "lora_B" in name:  # it starts at 0, and so do the gradients of A
            nn.init.normal_(p, std=0.1)
    return model


MODELS = {
    "untied": lambda: llama(tie_word_embeddings=False),
    "tied": lambda: llama(),
    "biases": lambda: llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "lora": lambda: lora(llama()),
    "gpt2": lambda: gpt2(),
    "gpt2 lora": lambda: lora(gpt2(), fan_in_fan_out=True),
    "opt": lambda: opt(),
}
CASES = [(name, flag) for name in MODELS for flag in (False, True) if not (flag and "lora" in name)]


def model_of(name):
    torch.manual_seed(1)
    return MODELS[name]().double()


def batch_of(rows, side="right"):
    """Rows padded to the longest, with positions that count from the first token where the padding is on the left."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values, filler):
        padding = [filler] * (width - len(values))
        return values + padding if side == "right" else padding + values

    fillers = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {name: torch.tensor([padded(row[name], filler) for row in rows]) for name, filler in fillers.items()}
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch, build_meta(list(range(len(rows))), rows, batch)


def rows_of(number=4, seed=0, lengths=(6, 24)):
    rows = tiny_rows(number, seed=seed, vocab_size=VOCABULARY, lengths=lengths)
    rows[0]["input_ids"][2] = 0  # the padding token as content: its embedding gets no gradient
    return rows


def row_losses(model, inputs, meta, head=None):
    """Each row's mean token loss; 0 for a row without targets."""
    tokens = losses_from_logits(model, inputs, meta, head=head).of_targets()
    n = inputs["input_ids"].shape[0]
    total = torch.zeros(n, dtype=tokens.dtype).index_add(0, meta.rows, tokens)
    return total / torch.bincount(meta.rows, minlength=n).clamp(min=1)


def row_losses_of_targets(model, inputs, meta):
    return row_losses(model, inputs, meta, head=model.get_output_embeddings())


def single_gradients(model, parameters, rows):
    """Gradient of each row's own loss, by autograd and without padding: a list of dictionaries."""
    training = model.training
    model.eval()
    found = []
    for row in rows:
        inputs = {name: torch.tensor([values]) for name, values in row.items()}
        loss = per_sample_loss_from_logits(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])[0]
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found.append({name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), gradients, strict=True)})
    model.train(training)
    return found


def moments_of(parameters):
    generator = torch.Generator().manual_seed(5)

    def draw(p):
        m, v = torch.randn(p.shape, generator=generator), torch.rand(p.shape, generator=generator)
        return Moments((m * 1e-2).to(p), ((0.1 + v) * 1e-3).to(p), *BETAS, EPS)

    return {name: draw(p) for name, p in parameters.items()}


def updates(kind, gradients, moments):
    """The definitions, spelled out."""
    if kind == "sgd":
        return gradients
    if kind == "sign":
        return {name: g.sign() for name, g in gradients.items()}
    result = {}
    for name, g in gradients.items():
        m = BETAS[0] * moments[name].exp_avg + (1 - BETAS[0]) * g
        v = BETAS[1] * moments[name].exp_avg_sq + (1 - BETAS[1]) * g**2
        result[name] = torch.where(v == 0, 0.0, m / (v.sqrt() + EPS))
    return result


def dot(a, b):
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


def norm(a):
    return math.sqrt(dot(a, a))


def directions(parameters, number=2):
    generator = torch.Generator().manual_seed(9)
    return [{name: torch.randn(p.shape, generator=generator).to(p) for name, p in parameters.items()} for _ in range(number)]


def check(model, parameters, rows, batches, loss_fn, kind, number=2, tolerance=1e-10):
    moments, targets = moments_of(parameters), directions(parameters, number)
    results = list(per_sample_products(model, parameters, batches, loss_fn, targets, Preconditioner(kind, moments if kind == "adam" else {})))
    dots, norms = torch.cat([d for d, _ in results]), torch.cat([x for _, x in results])
    assert dots.dtype == norms.dtype == torch.float64 and dots.shape == (len(rows), number)
    for i, gradient in enumerate(single_gradients(model, parameters, rows)):
        expected = updates(kind, gradient, moments)
        assert float(norms[i]) == pytest.approx(norm(expected), rel=tolerance)
        for k, target in enumerate(targets):
            assert float(dots[i, k]) == pytest.approx(dot(expected, target), abs=tolerance * norm(expected) * norm(target))


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("kind", ["sgd", "sign", "adam"])
@pytest.mark.parametrize(("name", "embeddings"), CASES)
def test_products_and_norms_are_those_of_autograd_row_by_row(name, embeddings, kind):
    model, rows = model_of(name), rows_of()
    parameters = scored_parameters(model, embeddings)
    if kind == "sign":  # the gradient of the keys' bias is 0, so its sign is that of a rounding error
        parameters = {key: p for key, p in parameters.items() if not key.endswith(("c_attn.bias", "k_proj.bias")) or name == "biases"}
    loss_fn = row_losses if embeddings else row_losses_of_targets
    model.train()
    check(model, parameters, rows, [batch_of(rows[:3]), batch_of(rows[3:])], loss_fn, kind)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["tied", "lora", "gpt2"])
def test_padding_on_the_left(name, kind):
    model, rows = model_of(name), rows_of()
    check(model, scored_parameters(model, True), rows, [batch_of(rows, "left")], row_losses, kind)


@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize("length", [5, 60])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_any_number_of_targets_and_positions(name, length, number):
    """Short rows take the way without gradients, long ones with many targets the way through them."""
    model, rows = model_of(name), rows_of(3, lengths=(length, length))
    check(model, scored_parameters(model, True), rows, [batch_of(rows)], row_losses, "sgd", number)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_few_rows_at_a_time(kind, monkeypatch):
    monkeypatch.setattr("dataflex.signals.gradients._CHUNK_BYTES", {"cpu": 32 * 64 * 8 * 2})
    monkeypatch.setattr("dataflex.signals.gradients._PASS", 0)
    model, rows = model_of("tied"), rows_of(5)
    check(model, scored_parameters(model, True), rows, [batch_of(rows)], row_losses, kind)


@pytest.mark.parametrize("kind", ["sgd", "sign", "adam"])
def test_a_module_that_runs_twice(kind):
    model, rows = model_of("biases"), rows_of()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    check(model, scored_parameters(model), rows, [batch_of(rows)], row_losses, kind)


class WithExtras(nn.Module):
    """A language model behind modules of every awkward kind."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.shared, self.unused = lm, nn.Linear(24, 24), nn.Linear(3, 2)
        self.own, self.aside, self.scale = Doubling(), nn.Linear(24, 5), Scale()
        self.config = lm.config

    def forward(self, input_ids, **kwargs):
        hidden = self.lm.transformer(input_ids, **kwargs).last_hidden_state
        self.aside(hidden)  # does not reach the loss
        hidden = self.scale(self.own(self.shared(torch.tanh(self.shared(hidden)))), factor=2.0)
        return CausalLMOutput(logits=self.lm.lm_head(hidden))


class _Double(torch.autograd.Function):
    """As Liger's kernels: has no rule for vmap, and writes to the gradient it gets."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g.mul_(2) * weight, (g * x).flatten(0, -2).sum(0)


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 24))

    def forward(self, x):
        return _Double.apply(x, self.weight)


class Scale(nn.Module):
    """A parameter without dimensions, in front of a module that has one of its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.tensor(0.7)), nn.LayerNorm(24)

    def forward(self, x, factor):
        return self.inner(x * self.weight + x.square()) * factor


@pytest.mark.parametrize("kind", ["sgd", "sign", "adam"])
def test_unusual_modules(kind):
    torch.manual_seed(0)
    model, rows = WithExtras(gpt2()).double(), rows_of()
    parameters = {name: p for name, p in sorted(model.named_parameters()) if not name.startswith("lm.")}
    assert len(parameters) == 3 * 2 + 1 + 3
    check(model, parameters, rows, [batch_of(rows)], row_losses, kind)


def test_the_looked_up_rows_of_an_embedding_are_the_only_ones_touched(monkeypatch):
    """With Adam as well: no gradient of the embedding's whole shape is ever made."""
    model, rows = model_of("untied"), rows_of()
    name = "model.embed_tokens.weight"
    parameters = {name: model.get_parameter(name)}
    monkeypatch.setattr("dataflex.signals.gradients._materialised", None)
    for kind in ("sgd", "sign", "adam"):
        check(model, parameters, rows, [batch_of(rows)], row_losses, kind)


def test_an_embedding_that_scales_its_gradient_by_the_row_is_no_plain_one():
    model, rows = model_of("untied"), rows_of()
    model.get_input_embeddings().scale_grad_by_freq = True
    check(model, scored_parameters(model, True), rows, [batch_of([row]) for row in rows], row_losses, "sgd")


SHARED = llama().double()


@given(st.lists(st.integers(2, 12), min_size=1, max_size=5), st.sampled_from(["sgd", "adam"]), st.sampled_from(["left", "right"]), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_row_gets_the_same_values_in_any_company(lengths, kind, side, seed):
    rows = [row for number, n in enumerate(lengths) for row in tiny_rows(1, seed=seed + number, vocab_size=VOCABULARY, lengths=(n, n), masked=0.5)]
    parameters = scored_parameters(SHARED, True)
    arguments = (row_losses, directions(parameters, 1), Preconditioner(kind, moments_of(parameters) if kind == "adam" else {}))
    ((dots, norms),) = per_sample_products(SHARED, parameters, [batch_of(rows, side)], *arguments)
    alone = list(per_sample_products(SHARED, parameters, [batch_of([row]) for row in rows], *arguments))
    assert torch.allclose(dots, torch.cat([d for d, _ in alone]), rtol=1e-9, atol=1e-9)
    assert torch.allclose(norms, torch.cat([x for _, x in alone]), rtol=1e-9)


# ---------------------------------------------------------------- preconditioners


def test_adam_oracle():
    moments = Moments(torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.01, 0.04, 0.0]), 0.9, 0.999, 1e-8)
    update = Preconditioner("adam", {"w": moments}).update("w", torch.float64)
    assert update(torch.tensor([[1.0, 2.0, 0.0]]).double())[0].tolist() == pytest.approx([1.812403, 0.095390, 0.0], abs=1e-6)
    assert update(torch.tensor([[0.0, 0.0, 2.0]]).double())[0, 2] == pytest.approx((0.27 + 0.2) / math.sqrt(0.001 * 4), rel=1e-6)


def test_moments_of_the_optimizer_and_of_accelerates_wrapper():
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    parameters = scored_parameters(model)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "betas": (0.8, 0.95)},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.7, 0.9), eps=1e-5)
    before = Preconditioner.from_optimizer("adam", optimizer, parameters)
    assert before.update("model.norm.weight", torch.float32)(torch.ones(1, 32))[0, 0] == pytest.approx(0.3 / (math.sqrt(0.1) + 1e-5))
    inputs, meta = batch_of(rows_of())
    row_losses(model, inputs, meta).sum().backward()
    optimizer.step()
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    for source in (optimizer, wrapped):
        found = Preconditioner.from_optimizer("adam", source, parameters).moments
        assert list(found) == list(parameters)
        for name, p in parameters.items():
            betas = (0.8, 0.95) if p.dim() > 1 else (0.7, 0.9)
            assert (found[name].beta1, found[name].beta2, found[name].eps) == (*betas, 1e-5)
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(getattr(found[name], key), optimizer.state[p][key])


def test_a_digest_tells_moments_apart():
    parameters = {"w": nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.AdamW(parameters.values())

    def digest(kind="adam"):
        return Preconditioner.from_optimizer(kind, optimizer, parameters).digest(lambda tensors: str({k: x.tolist() for k, x in tensors.items()}))

    start = digest()
    assert start == digest() != digest("sgd")
    parameters["w"].sum().backward()
    optimizer.step()
    assert digest() != start
    stepped = digest()
    optimizer.param_groups[0]["eps"] = 1e-3
    assert digest() != stepped


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adamax])
def test_optimizers_without_adam_moments_are_refused(optimizer):
    parameter = nn.Parameter(torch.ones(3))
    opt = optimizer([parameter], lr=0.1)
    parameter.sum().backward()
    opt.step()
    assert Preconditioner.from_optimizer("sign", opt, {"w": parameter}).kind == "sign"
    with pytest.raises(ComponentError, match=r"keeps no Adam moments .* of 'w'.*adamw_torch.*sgd or sign"):
        Preconditioner.from_optimizer("adam", opt, {"w": parameter})


def test_an_optimizer_of_other_parameters_is_refused():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(ComponentError, match="AdamW does not train 'w'"):
        Preconditioner.from_optimizer("adam", optimizer, {"w": nn.Parameter(torch.ones(3))})


# ---------------------------------------------------------------- which parameters


def test_scored_parameters_leave_out_embedding_and_output_layer_but_no_adapter():
    for name, tied in (("tied", True), ("untied", False)):
        model = model_of(name)
        ends = ["model.embed_tokens.weight"] if tied else ["lm_head.weight", "model.embed_tokens.weight"]
        names, everything = list(scored_parameters(model)), list(scored_parameters(model, include_embeddings=True))
        assert names == sorted(names) and sorted(names + ends) == everything == sorted(name for name, _ in model.named_parameters())
    model = get_peft_model(llama(tie_word_embeddings=False), LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"]))
    names = list(scored_parameters(model))
    assert len(names) == 2 * 3 and all("lora_" in name for name in names)
    (trained,) = set(scored_parameters(model, True)) - set(names)
    assert "embed_tokens.modules_to_save" in trained


def test_nothing_to_score_is_an_error():
    model = llama()
    model.requires_grad_(False)
    with pytest.raises(ComponentError, match="no trainable parameters besides"):
        model.get_input_embeddings().requires_grad_(True)
        scored_parameters(model)


# ---------------------------------------------------------------- the model is left as it was


def state_of(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], hooks, model.config.use_cache


def run_products(model, loss_fn=row_losses):
    parameters = scored_parameters(model)
    return list(per_sample_products(model, parameters, [batch_of(rows_of())], loss_fn, directions(parameters, 1), SGD))


@pytest.mark.parametrize("call", ["products", "mean"])
@pytest.mark.parametrize("failure", [None, "in the forward pass", "in the backward pass"])
def test_the_model_is_as_it_was(call, failure, monkeypatch):
    model = model_of("lora")
    model.train()
    model.base_model.model.model.layers[0].eval()
    row_losses(model, *batch_of(rows_of())).sum().backward()
    before, gradients = state_of(model), [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    seen = {}

    def loss_fn(model, inputs, meta):
        seen["training"], seen["cache"] = any(m.training for m in model.modules()), model.config.use_cache
        if failure == "in the forward pass":
            raise KeyError("forward")
        losses = row_losses(model, inputs, meta)
        if failure:
            losses.register_hook(lambda g: {}["backward"])
        return losses

    with pytest.raises(KeyError) if failure else nullcontext():
        if call == "products":
            run_products(model, loss_fn)
        else:
            mean_gradient(model, scored_parameters(model), [batch_of(rows_of())], loss_fn, unit=False)
    assert seen == {"training": False, "cache": False}
    assert state_of(model) == before and before[-1]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) if gradient is None else torch.equal(p.grad, gradient)


def test_between_batches_the_model_is_as_it_was():
    model = model_of("untied").train()
    parameters, before = scored_parameters(model), state_of(model)
    iterator = per_sample_products(model, parameters, [batch_of(rows_of())] * 2, row_losses, [], SGD)
    next(iterator)
    assert state_of(model) == before and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["untied", "lora", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name):
    model = model_of(name).train()
    ((dots, norms),) = run_products(model)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ((again, norms_again),) = run_products(model)
    assert torch.equal(dots, again) and torch.equal(norms, norms_again)


# ---------------------------------------------------------------- what cannot be known is an error


class Outside(nn.Module):
    """A model that reads a parameter of a module it never runs."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.holder, self.config = lm, nn.ParameterDict({"scale": nn.Parameter(torch.ones(()))}), lm.config

    def forward(self, **kwargs):
        return CausalLMOutput(logits=self.lm(**kwargs).logits * self.holder["scale"])


def test_a_parameter_used_outside_its_module_is_an_error():
    model = Outside(llama())
    parameters = dict(sorted(model.named_parameters()))
    with pytest.raises(ComponentError, match=r"outside the forward pass.*holder\.scale; freeze"):
        list(per_sample_products(model, parameters, [batch_of(rows_of())], row_losses, [], SGD))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.forward = lambda **kwargs: CausalLMOutput(logits=model.lm(**kwargs).logits * model.lm.model.norm.weight.mean())
    with pytest.raises(ComponentError, match=r"outside the forward pass.*: lm\.model\.norm\.weight; freeze"):  # beside its ordinary use
        list(per_sample_products(model, parameters, [batch_of(rows_of())], row_losses, [], SGD))
    model = lora(llama(), use_dora=True)
    with pytest.raises(ComponentError, match=r"gradients of .*lora_.* are not known"):
        run_products(model)


@pytest.mark.parametrize("tokens", [3, 4, 83])
def test_a_module_that_mixes_rows_is_an_error(tokens):
    """An expert gets some tokens of all rows, perhaps as many as there are rows."""
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[:tokens],))
    mlp.register_forward_hook(lambda _, args, output: torch.cat([output, output.new_zeros(4 * 21 - tokens, 32)]).view(4, -1, 32))
    with pytest.raises(ComponentError, match=r"layers\.0\.mlp\.gate_proj\.weight.*mixes them"):
        run_products(model)


def test_checkpoints_that_stay_on_outside_training():
    model = llama()
    ((dots, norms),) = run_products(model)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = partial(checkpoint, forward, use_reentrant=False)
    ((again, norms_again),) = run_products(model)
    assert torch.equal(dots, again) and torch.equal(norms, norms_again)
    mlp.forward = partial(checkpoint, forward, use_reentrant=True)
    with pytest.raises(ComponentError, match=r"'model\.layers\.0\.mlp\..*' ran without a graph; .* use_reentrant: false"):
        run_products(model)


def test_a_scored_output_layer_must_see_all_positions():
    model = llama(tie_word_embeddings=False)
    parameters = scored_parameters(model, True)
    with pytest.raises(ComponentError, match=r"'lm_head\.weight'.*output layer run on the targets only"):
        list(per_sample_products(model, parameters, [batch_of(rows_of())], row_losses_of_targets, [], SGD))


@pytest.mark.parametrize("wrong", [lambda x: x.sum(), lambda x: x[:2], lambda x: x.detach()])
def test_losses_of_another_kind_are_an_error(wrong):
    with pytest.raises(ComponentError, match="the loss of each of the batch's 4 rows"):
        run_products(llama(), lambda *args: wrong(row_losses(*args)))


def test_a_target_must_cover_all_parameters():
    model = llama()
    parameters = scored_parameters(model)
    rest = dict(list(directions(parameters, 1)[0].items())[1:])
    with pytest.raises(ComponentError, match=f"no direction for {next(iter(parameters))}"):
        list(per_sample_products(model, parameters, [batch_of(rows_of())], row_losses, [rest], SGD))


# ---------------------------------------------------------------- rows without targets, precision


@pytest.mark.parametrize("loss_fn", [row_losses, lambda *args: row_losses(*args) / torch.tensor([1.0, 0.0, 1.0, 1.0])[: len(args[1]["input_ids"])]])
def test_rows_without_targets_have_no_values_and_disturb_no_other(loss_fn):
    """Also when their loss is 0 / 0."""
    model, rows = model_of("untied"), rows_of()
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    parameters = scored_parameters(model)
    targets = directions(parameters, 1)
    ((dots, norms),) = per_sample_products(model, parameters, [batch_of(rows)], loss_fn, targets, SGD)
    assert norms.isnan().tolist() == dots[:, 0].isnan().tolist() == [False, True, False, False]
    others = [row for i, row in enumerate(rows) if i != 1]
    ((kept, _),) = per_sample_products(model, parameters, [batch_of(others)], row_losses, targets, SGD)
    assert torch.allclose(dots[[0, 2, 3]], kept, rtol=1e-10)
    features = sketch(model, parameters, [batch_of(rows), batch_of([rows[1]])], loss_fn, SGD, 16, 0)
    assert features.isnan().all(1).tolist() == [False, True, False, False, True]
    for unit in (False, True):
        mean = mean_gradient(model, parameters, [batch_of(rows), batch_of([rows[1]])], loss_fn, unit=unit)
        expected = mean_gradient(model, parameters, [batch_of(others)], row_losses, unit=unit)
        assert norm({name: mean[name] - expected[name] for name in mean}) < 1e-10 * norm(mean)
    with pytest.raises(TrainingError, match="no row has a target token"):
        mean_gradient(model, parameters, [batch_of([rows[1]])], row_losses, unit=True)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_bf16_weights(kind):
    """The gradients are those of a bf16 model, but nothing is added up in bf16."""
    model, rows = llama(tie_word_embeddings=False).bfloat16(), rows_of()
    parameters = scored_parameters(model)
    exact = llama(tie_word_embeddings=False)
    exact.load_state_dict(model.state_dict())
    exact_parameters = scored_parameters(exact)
    targets, moments = directions(exact_parameters, 1), moments_of(exact_parameters)
    preconditioner = Preconditioner(kind, moments if kind == "adam" else {})
    ((dots, norms),) = per_sample_products(model, parameters, [batch_of(rows)], row_losses, targets, preconditioner)
    ((expected, expected_norms),) = per_sample_products(exact, exact_parameters, [batch_of(rows)], row_losses, targets, preconditioner)
    assert torch.allclose(norms, expected_norms, rtol=0.02)
    assert float((dots - expected).abs().max()) < 0.02 * float(expected_norms.max()) * norm(targets[0])
    mean = mean_gradient(model, parameters, [batch_of(rows)], row_losses, unit=True)
    assert all(x.dtype == torch.float32 for x in mean.values())


def test_under_autocast_the_products_stay_in_fp32():
    model, rows = llama(mlp_bias=True), rows_of()
    weight, bias = (f"model.layers.0.mlp.up_proj.{key}" for key in ("weight", "bias"))
    one = {weight: model.get_parameter(weight)}
    caught = {}

    def loss_fn(model, inputs, meta):
        module = model.model.layers[0].mlp.up_proj

        def hook(_, args, output):
            output.register_hook(lambda g: caught.update(x=args[0].detach(), g=g))

        handle = module.register_forward_hook(hook)
        losses = row_losses(model, inputs, meta)
        handle.remove()
        return losses

    with torch.autocast("cpu", torch.bfloat16):
        ((_, norms),) = per_sample_products(model, one, [batch_of(rows)], loss_fn, [], Preconditioner("sign"))
        mean = mean_gradient(model, one, [batch_of(rows)], loss_fn, unit=False)
        ((_, plain),) = per_sample_products(model, one, [batch_of(rows)], loss_fn, [], SGD)
    assert caught["g"].dtype == torch.bfloat16 and mean[weight].dtype == torch.float32
    exact = torch.einsum("bto,bti->boi", caught["g"].double(), caught["x"].double())
    assert torch.allclose(plain, exact.flatten(1).norm(dim=1), rtol=1e-6)
    assert torch.allclose(norms, exact.sign().flatten(1).norm(dim=1), rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        ((_, norms),) = per_sample_products(model, {bias: model.get_parameter(bias)}, [batch_of(rows)], loss_fn, [], SGD)
    assert torch.allclose(norms, caught["g"].double().sum(1).norm(dim=1), rtol=1e-6)


# ---------------------------------------------------------------- mean gradients


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(("name", "embeddings"), [("tied", True), ("lora", False), ("gpt2", False)])
def test_the_mean_gradient_is_the_mean_of_autograds(name, embeddings, unit):
    model, rows = model_of(name), rows_of(5)
    parameters = scored_parameters(model, embeddings)
    batches = [batch_of(rows[:2]), batch_of(rows[2:])]
    singles = single_gradients(model, parameters, rows)
    found = mean_gradient(model, parameters, batches, row_losses, unit=unit)
    assert list(found) == list(parameters)
    for key in parameters:
        expected = sum(g[key] / (norm(g) if unit else 1) for g in singles) / len(rows)
        assert torch.allclose(found[key], expected, rtol=1e-9, atol=1e-12)
    total, count = gradient_sum(model, parameters, batches, row_losses, unit=unit)
    assert count == 5 and torch.allclose(total[key] / 5, found[key])


def test_a_row_without_a_gradient_has_no_direction():
    model, rows = model_of("untied"), rows_of()
    parameters = scored_parameters(model)

    def loss_fn(*args):
        return row_losses(*args) * torch.tensor([1.0, 0.0, 1.0, 1.0])

    total, count = gradient_sum(model, parameters, [batch_of(rows)], loss_fn, unit=True)
    expected, others = gradient_sum(model, parameters, [batch_of([rows[0], *rows[2:]])], row_losses, unit=True)
    assert count == others == 3 and norm({name: total[name] - expected[name] for name in total}) < 1e-10 * norm(total)
    assert gradient_sum(model, parameters, [batch_of(rows)], loss_fn, unit=False)[1] == 4


# ---------------------------------------------------------------- sketches


def test_a_sketch_keeps_products_on_average_over_seeds():
    model, rows = model_of("gpt2"), rows_of(2)
    parameters = scored_parameters(model, True)
    moments = moments_of(parameters)
    for kind in ("sgd", "adam"):
        g, h = (updates(kind, gradient, moments) for gradient in single_gradients(model, parameters, rows))
        preconditioner = Preconditioner(kind, moments if kind == "adam" else {})
        products = []
        for seed in range(30):
            a, b = sketch(model, parameters, [batch_of(rows)], row_losses, preconditioner, 128, seed)
            products.append(torch.stack([a @ b, a @ a]))
        products = torch.stack(products)
        error = (products.mean(0) - torch.tensor([dot(g, h), dot(g, g)])).abs()
        assert bool((error < 4 * products.std(0) / math.sqrt(30)).all())
        assert bool((products.std(0) < 2 * norm(g) * max(norm(g), norm(h)) / math.sqrt(128)).all())


@pytest.mark.parametrize("kind", ["sgd", "sign", "adam"])
@pytest.mark.parametrize("dim", [1, 2, 100, 5000])
def test_sketches_of_shards_add_up_and_batches_do_not_matter(kind, dim):
    model, rows = model_of("untied"), rows_of()
    parameters = scored_parameters(model, True)
    preconditioner = Preconditioner(kind, moments_of(parameters) if kind == "adam" else {})

    def features(part, batches, seed=3):
        return sketch(model, part, batches, row_losses, preconditioner, dim, seed)

    whole = features(parameters, [batch_of(rows)])
    assert whole.shape == (4, dim) and whole.dtype == torch.float64
    scale = 1e-10 * float(whole.abs().max())
    shards = [features(dict(list(parameters.items())[start::3]), [batch_of(rows)]) for start in range(3)]
    assert torch.allclose(sum(shards), whole, atol=scale)
    assert torch.allclose(features(parameters, [batch_of(rows[:1]), batch_of(rows[1:], "left")]), whole, atol=scale)
    assert not torch.allclose(features(parameters, [batch_of(rows)], seed=4).abs(), whole.abs(), atol=scale)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_looked_up_rows_sketch_as_the_whole_matrix_does(kind):
    model, rows = model_of("untied"), rows_of()
    name = "model.embed_tokens.weight"
    parameters = {name: model.get_parameter(name)}
    moments = moments_of(parameters)
    found = sketch(model, parameters, [batch_of(rows)], row_losses, Preconditioner(kind, moments if kind == "adam" else {}), 64, 0)
    matrix = gradients._Sketch(64, 0).of(name, parameters[name])
    for i, gradient in enumerate(single_gradients(model, parameters, rows)):
        assert torch.allclose(found[i], matrix.whole(updates(kind, gradient, moments)[name][None])[0], rtol=1e-9, atol=1e-12)


def test_a_column_that_holds_all_the_energy_spreads_over_the_buckets():
    """Massive activations make such columns; with 64 buckets all entries of this one would meet in a single one."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    column = torch.zeros(1, 64, 64, dtype=torch.float64).index_fill_(2, torch.tensor([5]), 1.0)
    lengths = [float(gradients._Sketch(64, seed).of("w", parameter).whole(column.clone()).square().sum()) / 64 for seed in range(50)]
    assert sum(lengths) / 50 == pytest.approx(1, abs=0.1) and torch.tensor(lengths).std() < 0.4
