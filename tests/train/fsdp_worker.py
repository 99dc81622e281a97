"""Losses and gradients of a model that `fully_shard` has sharded over two processes, against the same model whole. Run under torchrun."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dataflex.testing.tiny import pad_collator, tiny_model, tiny_rows
from dataflex.train.data.sample_meta import build_meta
from dataflex.train.trainer.token_losses import MicroStep, losses_from_logits
from dataflex.utils.distributed import leave


def gradients(model, batch, meta, targets_only):
    tokens = losses_from_logits(model, batch, meta, head=model.get_output_embeddings() if targets_only else None)
    micro = MicroStep(tokens, meta, torch.tensor(meta.num_targets), torch.tensor(meta.num_samples), 1.0, 1, 1, per_token=True)
    loss = micro.weight_samples(torch.tensor([0.2, 0.8, 1.0, 2.0]))
    loss.backward()
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return loss.detach(), torch.cat([grad.flatten() for grad in grads])


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = tiny_rows(4, vocab_size=67)
    batch = pad_collator(rows)
    meta = build_meta(list(range(4)), rows, batch)
    for tied in (True, False):
        for targets_only in (True, False):
            whole, sharded = (tiny_model(vocab_size=67, tie_word_embeddings=tied) for _ in range(2))
            for layer in sharded.model.layers:
                fully_shard(layer)
            fully_shard(sharded)
            want_loss, want = gradients(whole, batch, meta, targets_only)
            loss, got = gradients(sharded, batch, meta, targets_only)
            assert abs(float(loss - want_loss)) < 1e-5, (tied, targets_only)
            assert float((got - want).norm() / want.norm()) < 1e-5, (tied, targets_only)
    print("equal")
    leave()


if __name__ == "__main__":
    main()
