"""Per-token losses: one forward pass, one cross-entropy, right for every kind of output layer and every layout of a batch."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from dataflex.errors import TrainingError
from dataflex.testing.distributed import run_distributed
from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows
from dataflex.train.data.sample_meta import build_meta
from dataflex.train.trainer.token_losses import MicroStep, TokenLosses, losses_from_logits, per_sample_loss_from_logits

SMALL = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
MODELS = {
    "llama, tied": lambda: tiny_model(vocab_size=67),
    "llama, untied": lambda: tiny_model(vocab_size=67, tie_word_embeddings=False),
    "gemma2, soft-capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    ),
    "granite, scaled": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=3.0)),
    "cohere, scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.3)),
    "phi, bias": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4)),
}


def batch_of(number=4, vocab_size=67, **kwargs):
    rows = tiny_rows(number, vocab_size=vocab_size, **kwargs)
    batch = pad_collator(rows)
    return batch, build_meta(list(range(number)), rows, batch)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def weighted(tokens, meta, weights):
    return MicroStep(tokens, meta, torch.tensor(meta.num_targets), torch.tensor(meta.num_samples), 1.0, 1, 1, per_token=True).weight_samples(weights)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets_only", [False, True])
def test_losses_and_gradients_of_every_output_layer(name, targets_only):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch, meta = batch_of()
    tokens = losses_from_logits(model, batch, meta, head=model.get_output_embeddings() if targets_only else None)
    weights = torch.tensor([0.0, 0.5, 1.0, 2.5])
    got = gradient(model, weighted(tokens, meta, weights))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none").view(4, -1)
    targets = batch["labels"][:, 1:] != -100
    assert torch.allclose(tokens.of_targets(), expected[targets], atol=1e-5)
    want = gradient(model, (expected * weights[:, None]).sum() / targets.sum())
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("targets_only", [False, True])
def test_one_forward_and_one_cross_entropy(targets_only, monkeypatch):
    model = tiny_model(vocab_size=67)
    batch, meta = batch_of()
    heads, forwards, entropies = [], [], []
    model.lm_head.register_forward_hook(lambda m, args, output: heads.append(tuple(output.shape)))
    model.register_forward_hook(lambda *_: forwards.append(1))
    for name in ("cross_entropy", "nll_loss", "log_softmax"):
        original = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *a, _original=original, _name=name, **k: entropies.append(_name) or _original(*a, **k))
    losses_from_logits(model, batch, meta, head=model.lm_head if targets_only else None)
    width = batch["input_ids"].shape[1]
    assert forwards == [1]
    assert heads == [(1, meta.num_targets, 67)] if targets_only else heads == [(4, width, 67)]
    assert entropies == ([] if targets_only else ["cross_entropy"])  # targets only: a cross-entropy of our own


def test_half_precision_losses_are_fp32():
    model = tiny_model(vocab_size=67).bfloat16()
    batch, meta = batch_of()
    for head in (None, model.lm_head):
        tokens = losses_from_logits(model, batch, meta, head=head)
        assert tokens.values.dtype == torch.float32
        loss = weighted(tokens, meta, torch.ones(4))
        assert bool(torch.isfinite(gradient(model, loss)).all())


def test_a_weight_of_zero_silences_a_loss_that_is_not_finite():
    logits = torch.randn(1, 6, 67, requires_grad=True)
    values = logits.clone()
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    meta = build_meta([0, 1], rows, batch)
    poisoned = values.view(2, 3, 67).clone()
    poisoned[0, :, 2] = -math.inf

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Identity()

        def forward(self, input_ids):
            return {"logits": self.head(poisoned)}

    broken = Broken()
    tokens = losses_from_logits(broken, batch, meta, head=broken.head)
    assert torch.isinf(tokens.of_targets()).any()
    loss = weighted(tokens, meta, torch.tensor([0.0, 1.0]))
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(logits.grad).all())


def test_a_model_without_logits_is_an_error():
    class Fused(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return {"loss": input_ids.sum() * 1.0, "logits": None}

    batch, meta = batch_of()
    with pytest.raises(TrainingError, match="returned no logits"):
        losses_from_logits(Fused(), batch, meta, head=None)


def test_mixture_of_experts_keeps_its_router_loss(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5
    )
    model = MixtralForCausalLM(config)
    batch, meta = batch_of()
    plain = model(**batch).loss
    for head in (None, model.lm_head):
        tokens = losses_from_logits(model, batch, meta, head=head, router_coefficient=0.5)
        assert float(weighted(tokens, meta, torch.ones(4))) == pytest.approx(float(plain), rel=1e-5)


def test_prompt_tuning():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(vocab_size=67), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch, meta = batch_of()
    plain = model(**batch).loss
    for head in (None, model.get_base_model().lm_head):
        tokens = losses_from_logits(model, batch, meta, head=head)
        assert float(weighted(tokens, meta, torch.ones(4))) == pytest.approx(float(plain), rel=1e-5)


def test_the_tutorials_helper():
    logits, labels = torch.randn(3, 5, 7), torch.tensor([[1, 2, 3, 4, 5], [-100, -100, 2, 3, -100], [-100] * 5])
    want = [F.cross_entropy(logits[k, :-1], labels[k, 1:]) for k in range(2)]
    assert torch.allclose(per_sample_loss_from_logits(logits, labels), torch.stack([*want, torch.tensor(0.0)]), atol=1e-6)


def test_sample_losses_are_means_over_a_samples_targets():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7]}]
    batch = pad_collator([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])
    meta = build_meta([0, 1], rows, batch)
    micro = MicroStep(TokenLosses(values, torch.arange(5)), meta, torch.tensor(5), torch.tensor(2), 2.5, 1, 1, per_token=False)
    assert micro.sample_losses.tolist() == [1.5, 4.0]
    assert float(micro.weight_samples(torch.tensor([1.0, 3.0]))) == pytest.approx((1.5 + 3 * 4.0) / 2)
    micro.per_token = True
    assert float(micro.weight_samples(torch.tensor([1.0, 3.0]))) == pytest.approx((1.5 * 2 + 3 * 4.0 * 3) / 5)


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_parameters():
    assert "equal" in run_distributed(Path(__file__).parent / "fsdp_worker.py").stdout
