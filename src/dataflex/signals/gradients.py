"""Exact products, norms and sketches of every row's own gradient, from one batched forward and backward pass.

Hooks take the input and the output gradient of each module that holds a scored parameter; what they say about single rows is read off
there and then, one parameter at a time. The weights are frozen meanwhile, so autograd does not compute their gradients: the products take
the place of that work. No gradient of a row is kept, and none is projected before Adam's non-linear update (LESS, arXiv 2402.04333).

Legend: n rows of a batch (row b of `input_ids` is sample b), T positions, P scored parameters, K targets, (O, I) shape of a matrix. A row's
gradient is that of its own loss; Gamma is what a preconditioner makes of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dataflex.errors import ComponentError, TrainingError
from dataflex.train.data.sample_meta import BatchMeta
from dataflex.utils.seeding import derive_seed

Kind = Literal["sgd", "sign", "adam"]
Batch = tuple[dict[str, Any], BatchMeta]
LossFn = Callable[[nn.Module, dict[str, Any], BatchMeta], torch.Tensor]
Update = Callable[[torch.Tensor], torch.Tensor]

_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}  # gradients of as many rows at a time: what a CPU's cache holds, what fills a GPU
_PASS = 15  # reading or writing a gradient once takes about as long as the products of so many positions (CPU)


@dataclass(frozen=True)
class Moments:
    """Adam's state of one parameter; the averages have its shape."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    beta1: float
    beta2: float
    eps: float

    @cached_property
    def may_divide_by_zero(self) -> bool:
        """Whether an entry with v' = 0 can have an update other than 0, so that it has to be looked for."""
        return self.eps == 0 or bool(((self.exp_avg_sq == 0) & (self.exp_avg != 0)).any())


@dataclass(frozen=True)
class Preconditioner:
    """Gamma: what an optimizer would make of a single row's gradient.

    `sgd` is the gradient itself, `sign` its sign, `adam` LESS' update m' / (sqrt(v') + eps) with m' = b1 m + (1 - b1) g and
    v' = b2 v + (1 - b2) g^2, which is 0 where v' is. Bias correction would only scale it.

    Attributes:
        moments: of each scored parameter, for `adam`. Not copies: they follow the optimizer's next step.
    """

    kind: Kind = "sgd"
    moments: dict[str, Moments] = field(default_factory=dict)

    @classmethod
    def from_optimizer(cls, kind: Kind, optimizer: Any, parameters: dict[str, nn.Parameter]) -> Preconditioner:
        """With the state of a torch optimizer or accelerate's wrapper of one; moments that do not exist yet are 0.

        Raises:
            ComponentError: `adam` with an optimizer that keeps no Adam moments, or does not train the parameters.
        """
        if kind != "adam":
            return cls(kind)
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        return cls(kind, {name: _moments(name, p, groups.get(p), optimizer) for name, p in parameters.items()})

    @property
    def moves_zero(self) -> bool:
        """Whether a gradient of 0 has an update other than 0."""
        return self.kind == "adam"

    def update(self, name: str, dtype: torch.dtype, index: torch.Tensor | None = None) -> Update:
        """Gamma, in place, of gradients (r, *shape) of a parameter, or (u, ...) of its rows `index` (u,)."""
        if self.kind == "sgd":
            return lambda gradients: gradients
        if self.kind == "sign":
            return lambda gradients: gradients.sign_()
        of = self.moments[name]
        m, v = ((x if index is None else x[index]).to(dtype) for x in (of.exp_avg, of.exp_avg_sq))
        # Both halves of the fraction are divided by 1 - b1, which saves a pass over the gradients.
        rest = 1 - of.beta1
        m, v = m * (of.beta1 / rest), v * (of.beta2 / rest**2)

        def adam(gradients: torch.Tensor) -> torch.Tensor:
            scale = torch.addcmul(v, gradients, gradients, value=(1 - of.beta2) / rest**2).sqrt_()
            zero = scale == 0 if of.may_divide_by_zero else None
            result = gradients.add_(m).div_(scale.add_(of.eps / rest))
            return result if zero is None else result.masked_fill_(zero, 0.0)

        return adam

    def digest(self, of: Callable[[dict[str, torch.Tensor]], str]) -> str:
        """What tells this preconditioner from others, given the digest `of` named tensors."""
        tensors = {f"{name} {key}": getattr(m, key) for name, m in self.moments.items() for key in ("exp_avg", "exp_avg_sq")}
        constants = sorted({(m.beta1, m.beta2, m.eps) for m in self.moments.values()})
        return f"{self.kind} {constants} {of(tensors)}"


def _moments(name: str, parameter: nn.Parameter, group: dict[str, Any] | None, optimizer: Any) -> Moments:
    if group is None:
        raise ComponentError(f"{type(optimizer).__name__} does not train '{name}' itself (a copy of it?): its moments are unknown; use sgd or sign")
    state = optimizer.state.get(parameter, {})
    averages = [state.get(key) for key in ("exp_avg", "exp_avg_sq")]
    if not {"betas", "eps"} <= group.keys() or (state and any(x is None or x.shape != parameter.shape for x in averages)):
        raise ComponentError(
            f"{type(optimizer).__name__} keeps no Adam moments (exp_avg, exp_avg_sq) of '{name}'; train with AdamW (optim: adamw_torch), "
            "or use the preconditioner sgd or sign"
        )
    zeros = parameter.detach().new_zeros(()).expand(parameter.shape)  # takes no memory
    mean, square = averages if state else (zeros, zeros)
    beta1, beta2 = group["betas"]
    return Moments(mean, square, beta1, beta2, group["eps"])


def scored_parameters(model: Any, include_embeddings: bool = False) -> dict[str, nn.Parameter]:
    """Trainable parameters by qualified name, in the canonical (sorted) order.

    Args:
        include_embeddings: also those of the input embedding and the output layer. LoRA matrices always are.

    Raises:
        ComponentError: there is none.
    """
    ends = [] if include_embeddings else [model.get_input_embeddings(), model.get_output_embeddings()]
    left_out = {id(p) for module in ends if module is not None for name, p in module.named_parameters() if not _is_adapter(name)}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in left_out}
    if not found:
        hint = "" if include_embeddings else " besides those of the embedding and the output layer (include_embeddings adds them)"
        raise ComponentError(f"the model has no trainable parameters{hint}, so rows have no gradients to compare")
    return dict(sorted(found.items()))


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


# ---------------------------------------------------------------- what is computed


def per_sample_products(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: Iterable[Batch],
    loss_fn: LossFn,
    targets: Sequence[dict[str, torch.Tensor]],
    preconditioner: Preconditioner,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each batch, products <Gamma(g_i), H_k> (n, K) and norms |Gamma(g_i)| (n,) of its rows, fp64 on the CPU; NaN without targets.

    One layer's products are taken in fp32 (fp64 for an fp64 model) and added up in fp64. Between two batches the model is as it was.

    Args:
        parameters: see `scored_parameters`; the others count as constants.
        batches: inputs on the model's device, with their meta object.
        loss_fn: each row's mean token loss (n,), with graph. Frozen output layers may be run on the targets only.
        targets: K directions, each with a tensor for every parameter. None at all: only the norms.

    Raises:
        ComponentError: a parameter is used in a way that hides which row its gradient comes from.
    """
    for target in targets:
        if missing := parameters.keys() - target.keys():
            raise ComponentError(f"a target has no direction for {', '.join(sorted(missing))}")
    yield from _readings(model, parameters, batches, loss_fn, _Products(targets), preconditioner)


def sketch(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: Iterable[Batch],
    loss_fn: LossFn,
    preconditioner: Preconditioner,
    dim: int,
    seed: int,
) -> torch.Tensor:
    """Sketches R Gamma(g_i) (n, dim) of all batches' rows, fp64 on the CPU: <R g, R h> is <g, h> on average over seeds. NaN without targets.

    A sign-fold count sketch, at the cost of one more pass over the gradients: each entry gets a random sign and is added to the bucket its
    position has modulo a prime. The error of a cosine is about 1 / sqrt(dim). What R does to a parameter depends on `seed` and its name
    alone, so sketches over disjoint sets of parameters add up to the whole one.
    """
    parts = [values for values, _ in _readings(model, parameters, batches, loss_fn, _Sketch(dim, seed), preconditioner)]
    return torch.cat(parts) if parts else torch.zeros(0, dim, dtype=torch.float64)


def mean_gradient(
    model: nn.Module, parameters: dict[str, nn.Parameter], batches: Iterable[Batch], loss_fn: LossFn, *, unit: bool
) -> dict[str, torch.Tensor]:
    """Mean of the rows' gradients, each divided by its norm with `unit`; at least fp32. See `gradient_sum`.

    Raises:
        TrainingError: no row has a gradient.
    """
    total, count = gradient_sum(model, parameters, batches, loss_fn, unit=unit)
    if not count:
        raise TrainingError("no row has a target token, so there is no gradient to compare with")
    return {name: x.div_(count) for name, x in total.items()}


def gradient_sum(
    model: nn.Module, parameters: dict[str, nn.Parameter], batches: Iterable[Batch], loss_fn: LossFn, *, unit: bool
) -> tuple[dict[str, torch.Tensor], int]:
    """Sum over the rows of g_i, or with `unit` of g_i / |g_i|, and the number of rows in it.

    Rows without targets are left out, with `unit` also those without a gradient. It takes a second forward and backward pass: one for the
    norms, one for the sum of l_i / |g_i|.
    """
    total = {name: torch.zeros_like(p, dtype=_accumulation(p)) for name, p in parameters.items()}
    count = 0
    for inputs, meta in batches:
        keep = meta.rows.unique()
        weights = torch.ones(len(keep), dtype=torch.float64)
        if unit:
            ((_, norms),) = per_sample_products(model, parameters, [(inputs, meta)], loss_fn, [], Preconditioner())
            keep = keep[torch.isfinite(norms[keep]) & (norms[keep] > 0)]
            weights = 1 / norms[keep]
        if not len(keep):
            continue
        with _scoring(model, parameters):
            losses = _row_losses(model, inputs, meta, loss_fn)
            loss = losses[keep.to(losses.device)] @ weights.to(losses)
            with torch.autocast(loss.device.type, enabled=False):
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
        count += len(keep)
    return total, count


# ---------------------------------------------------------------- one batch


def _readings(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: Iterable[Batch],
    loss_fn: LossFn,
    reading: _Reading,
    preconditioner: Preconditioner,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What `reading` says of the rows of each batch (n, width), and the norms (n,)."""
    constants: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for inputs, meta in batches:
        shape = inputs["input_ids"].shape
        rows = _Rows(parameters, shape[0], reading, preconditioner, constants)
        if len(meta.rows):
            with _scoring(model, parameters), _Hooks(model, parameters, shape, rows.add) as hooks:
                hooks.backward(_row_losses(model, inputs, meta, loss_fn))
        empty = torch.ones(shape[0], dtype=torch.bool).index_fill_(0, meta.rows, False)
        values, norms = rows.values.cpu(), rows.squares.cpu().clamp_(min=0).sqrt_()
        yield values.masked_fill_(empty[:, None], torch.nan), norms.masked_fill_(empty, torch.nan)


def _row_losses(model: nn.Module, inputs: dict[str, Any], meta: BatchMeta, loss_fn: LossFn) -> torch.Tensor:
    losses, n = loss_fn(model, inputs, meta), inputs["input_ids"].shape[0]
    if losses.shape != (n,) or not losses.requires_grad:
        kind = f"of shape {tuple(losses.shape)}, with{'' if losses.requires_grad else 'out'} a graph"
        raise ComponentError(f"gradients need the loss of each of the batch's {n} rows, with a graph from the scored parameters; got losses {kind}")
    return losses


@contextmanager
def _scoring(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, no cache, gradients for `parameters` only; afterwards all is as it was, `.grad` included."""
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    wanted = {id(p) for p in parameters.values()}
    weights = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        for p, _, _ in weights:
            p.requires_grad_(id(p) in wanted)
            p.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for config in caching:
            config.use_cache = True
        for p, trainable, grad in weights:
            p.requires_grad_(trainable)
            p.grad = grad


class _Hooks:
    """Hooks on the modules that hold scored parameters.

    `done(name, uses)` is called once for each parameter, with all that adds to its gradient: Gamma is not linear, so a parameter that is
    used twice has to wait for both.

    A scored parameter needs no gradient while its own module runs, and does at any other time. What reaches it then comes from a use the
    hooks cannot see, which is an error.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], shape: torch.Size, done: Callable[[str, list[_Use]], None]):
        """
        Args:
            shape: (n, T) of the batch.
        """
        self.model, self.parameters, self.shape, self.done = model, parameters, shape, done
        self.expected: dict[str, int] = defaultdict(int)
        self.uses: dict[str, list[_Use]] = {name: [] for name in parameters}
        self.recording = True
        self.handles: list[Any] = []

    def __enter__(self) -> _Hooks:
        names = {id(p): name for name, p in self.parameters.items()}
        for path, module in self.model.named_modules():
            own = {key: names[id(p)] for key, p in module._parameters.items() if id(p) in names}
            if own:
                self.handles.append(module.register_forward_pre_hook(partial(self._before, own)))
                self.handles.append(module.register_forward_hook(partial(self._after, path, own), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def backward(self, losses: torch.Tensor) -> None:
        self.recording = False  # modules that run from now on are run again, by a checkpoint or by `_any_module`
        with torch.autocast(losses.device.type, enabled=False):
            losses.sum().backward()
        if hidden := [name for name, p in self.parameters.items() if p.grad is not None]:
            raise ComponentError(
                f"parameters used outside the forward pass of the module that holds them, so that single rows' gradients are not known: "
                f"{', '.join(hidden)}; freeze them, or train LoRA matrices of linear layers only"
            )
        for name in list(self.uses):  # unused, or some of their uses do not reach the loss
            self.done(name, self.uses.pop(name))

    def _before(self, own: dict[str, str], module: nn.Module, args: Any) -> None:
        for name in own.values():
            self.parameters[name].requires_grad_(False)

    def _after(self, path: str, own: dict[str, str], module: nn.Module, args: Any, kwargs: Any, output: Any) -> torch.Tensor | None:
        for name in own.values():
            self.parameters[name].requires_grad_(True)
        if not self.recording:
            return None
        if not torch.is_tensor(output):
            raise ComponentError(f"single rows' gradients of {_listed(path, own)} are not known: it returns {type(output).__name__}; freeze them")
        if not torch.is_grad_enabled():
            raise ComponentError(f"'{path}' ran without a graph; switch gradient checkpointing off, or set use_reentrant: false")
        rule = _rule(module)
        if rule is _lookup and output.shape[0] == 1:  # positions, the same for all rows
            output = output.expand(self.shape[0], *output.shape[1:])
        is_folded = output.shape[:-1] == (self.shape.numel(),)
        if not is_folded and (output.shape[0] != self.shape[0] or output.dim() < 3):
            raise ComponentError(
                f"single rows' gradients of {_listed(path, own)} are not known: the module made {tuple(output.shape)} of a batch of "
                f"{self.shape[0]} rows, which mixes them (a mixture of experts, or an output layer run on the targets only); leave them out or "
                "freeze them"
            )
        if not output.requires_grad:  # nothing before it is trained
            output = output.detach().requires_grad_()
        for name in own.values():
            self.expected[name] += 1
        shape = self.shape if is_folded else None
        args, kwargs = _detached(args, shape), _detached(kwargs, shape)
        output.register_hook(lambda gradient: self._gradient(own, rule(module, list(own), args, kwargs, _detached(gradient, shape))))
        return output

    def _gradient(self, own: dict[str, str], uses: dict[str, _Use]) -> None:
        for key, use in uses.items():
            name = own[key]
            self.uses[name].append(use)
            if len(self.uses[name]) == self.expected[name]:
                self.done(name, self.uses.pop(name))


def _listed(path: str, own: dict[str, str]) -> str:
    return ", ".join(f"'{path}.{key}'" for key in own)


def _detached(tree: Any, shape: torch.Size | None) -> Any:
    """Tensors without their graph; where rows and positions are folded into one dimension (shared experts, OPT), unfolded to `shape`."""

    def detached(x: Any) -> Any:
        if not torch.is_tensor(x):
            return x
        return x.detach().unflatten(0, shape) if shape is not None and x.dim() == 2 and len(x) == shape.numel() else x.detach()

    return tree_map(detached, tree)


# ---------------------------------------------------------------- what a use of a parameter adds to its gradient


@dataclass
class _Given:
    """Gradients of the rows (n, *shape)."""

    gradient: torch.Tensor


@dataclass
class _Outer:
    """Gradients sum_t left_t (x) right_t of a matrix (O, I).

    Attributes:
        left: (n, T, O), or which of the O entries is 1 and the others 0 (n, T).
        right: (n, T, I).
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def is_lookup(self) -> bool:
        return self.left.dim() == 2

    def part(self, rows: slice, dtype: torch.dtype) -> _Outer:
        return _Outer(self.left[rows] if self.is_lookup else self.left[rows].to(dtype), self.right[rows].to(dtype))


_Use = _Given | _Outer
_Rule = Callable[[nn.Module, list[str], tuple[Any, ...], dict[str, Any], torch.Tensor], dict[str, _Use]]


def _rule(module: nn.Module) -> _Rule:
    """How the output gradient of a module becomes gradients of its own parameters. Subclasses that compute otherwise get the general one."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return _linear
    if forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        return _lookup
    return _any_module


def _linear(module: nn.Module, own: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], gradient: torch.Tensor) -> dict[str, _Use]:
    (x,) = [*args, *kwargs.values()]
    left, right = gradient.flatten(1, -2), x.flatten(1, -2)
    return {key: _Outer(left, right) if key == "weight" else _Given(left.sum(1, dtype=_accumulation(left))) for key in own}


def _lookup(module: nn.Module, own: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], gradient: torch.Tensor) -> dict[str, _Use]:
    (ids,) = [*args, *kwargs.values()]
    ids = ids.expand(gradient.shape[0], *ids.shape[1:])
    if module.padding_idx is not None:
        gradient = gradient.masked_fill((ids == module.padding_idx)[..., None], 0.0)
    return {"weight": _Outer(ids.flatten(1), gradient.flatten(1, -2))}


def _any_module(module: nn.Module, own: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], gradient: torch.Tensor) -> dict[str, _Use]:
    """Run the module again, row by row as far as autograd can tell: the vector-Jacobian product of its forward, mapped over the rows."""
    n = gradient.shape[0]
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [x.to(_accumulation(x)) if torch.is_tensor(x) and x.is_floating_point() else x for x in leaves]
    is_batched = [torch.is_tensor(x) and x.dim() >= 2 and x.shape[0] == n for x in leaves]
    weights = {name: p.detach().to(_accumulation(p)) for name, p in module.named_parameters()}

    def forward(row: Iterable[torch.Tensor], scored: dict[str, torch.Tensor]) -> torch.Tensor:
        row = iter(row)
        a, k = tree_unflatten([next(row)[None] if batched else x for x, batched in zip(leaves, is_batched, strict=True)], spec)
        return functional_call(module, {**weights, **scored}, a, k)

    def pulled_back(g: torch.Tensor, *row: torch.Tensor) -> dict[str, torch.Tensor]:
        output, pull, *_ = vjp(partial(forward, row), {key: weights[key] for key in own})
        return pull(g[None].to(output.dtype))[0]

    def backward(g: torch.Tensor, *row: torch.Tensor) -> list[torch.Tensor]:
        scored = {key: weights[key].clone().requires_grad_() for key in own}
        with torch.enable_grad():
            output = forward(row, scored)
        g = g[None].to(output.dtype, copy=True)  # such kernels may write to it, and it still has to reach the layers below
        return list(torch.autograd.grad(output, list(scored.values()), g))

    batched = [x for x, flag in zip(leaves, is_batched, strict=True) if flag]
    try:
        gradients = vmap(pulled_back)(gradient, *batched)
    except RuntimeError:  # kernels of its own (Liger), or decisions that depend on values
        each = [backward(*row) for row in zip(gradient, *batched, strict=True)]
        gradients = dict(zip(own, map(torch.stack, zip(*each, strict=True)), strict=True))
    return {key: _Given(gradients[key]) for key in own}


# ---------------------------------------------------------------- from uses to values


class _Rows:
    """Adds up, parameter by parameter, what a reading says of each row's Gamma.

    Attributes:
        values: (n, width), fp64.
        squares: |Gamma|^2 (n,), fp64.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        n: int,
        reading: _Reading,
        preconditioner: Preconditioner,
        constants: dict[str, tuple[torch.Tensor, torch.Tensor]],
    ):
        """
        Args:
            constants: what the reading says of Gamma(0), filled when needed.
        """
        self.parameters, self.n, self.reading, self.preconditioner, self.constants = parameters, n, reading, preconditioner, constants
        device = next(iter(parameters.values())).device
        self.values = torch.zeros(n, reading.width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(n, dtype=torch.float64, device=device)

    def add(self, name: str, uses: list[_Use]) -> None:
        parameter = self.parameters[name]
        outer = [use for use in uses if isinstance(use, _Outer)]
        if all(use.is_lookup for use in outer) and len(outer) == len(uses):
            self._add_sparse(name, parameter, outer)
        elif len(outer) == len(uses) and self._ghost_is_cheaper(parameter, outer):
            self._add_ghost(name, parameter, outer)
        else:
            self._add_dense(name, parameter, uses)

    def _add_dense(self, name: str, parameter: nn.Parameter, uses: list[_Use]) -> None:
        """From the gradients themselves, those of a few rows at a time."""
        dtype = _accumulation(parameter)
        update, read = self.preconditioner.update(name, dtype), self.reading.of(name, parameter)
        size = max(1, _CHUNK_BYTES.get(parameter.device.type, 2**28) // (parameter.numel() * dtype.itemsize))
        for start in range(0, self.n, size):
            rows = slice(start, min(start + size, self.n))
            change = update(_materialised(uses, rows, parameter))
            self.squares[rows] += _squared_norms(change)
            self.values[rows] += read.whole(change)

    def _add_sparse(self, name: str, parameter: nn.Parameter, uses: list[_Outer]) -> None:
        """From the looked-up rows of the matrix alone; on all others the gradient is 0 for every sample, and the update the same."""
        if self.preconditioner.moves_zero:
            values, square = self._constant(name, parameter)
            self.values += values
            self.squares += square
        if not uses:
            return
        dtype, height = _accumulation(parameter), parameter.shape[0]
        ids, right = torch.cat([use.left for use in uses], 1), torch.cat([use.right.to(dtype) for use in uses], 1)
        slots, place = (ids + height * torch.arange(self.n, device=ids.device)[:, None]).flatten().unique(return_inverse=True)
        touched = right.new_zeros(len(slots), parameter.shape[1]).index_add_(0, place, right.flatten(0, 1))
        owner, index = slots // height, slots % height
        update = self.preconditioner.update(name, dtype, index)
        untouched = update(torch.zeros_like(touched))
        change = update(touched)
        self.squares.index_add_(0, owner, _squared_norms(change) - _squared_norms(untouched))
        self.reading.of(name, parameter).add_rows(self.values, change - untouched, owner, index)

    def _constant(self, name: str, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in self.constants:
            dtype = _accumulation(parameter)
            change = self.preconditioner.update(name, dtype)(torch.zeros_like(parameter, dtype=dtype)[None])
            square = _squared_norms(change)
            self.constants[name] = self.reading.of(name, parameter).whole(change), square
        return self.constants[name]

    def _ghost_is_cheaper(self, parameter: nn.Parameter, uses: list[_Outer]) -> bool:
        if self.preconditioner.kind != "sgd" or not isinstance(self.reading, _Products):
            return False
        height, width = parameter.shape
        positions, k = sum(use.right.shape[1] for use in uses), self.reading.width
        ghost = k * positions + positions**2 * (height + width) / (height * width)
        return ghost < positions + _PASS * (k + 1)

    def _add_ghost(self, name: str, parameter: nn.Parameter, uses: list[_Outer]) -> None:
        """Without the gradients: <sum_t a_t (x) b_t, H> = sum_t a_t H b_t, and norms from the Gram matrices of both factors."""
        dtype = _accumulation(parameter)
        parts = [use.part(slice(None), dtype) for use in uses]
        assert isinstance(self.reading, _Products)
        directions = self.reading.of(name, parameter).directions.unflatten(1, parameter.shape)
        for number, use in enumerate(parts):
            self.values += torch.stack([_along(use, direction) for direction in directions], 1) if len(directions) else 0.0
            for other in parts[: number + 1]:
                inner = (_left_products(use, other) * (use.right @ other.right.mT)).sum((1, 2), dtype=torch.float64)
                self.squares += inner if other is use else 2 * inner


def _accumulation(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _materialised(uses: list[_Use], rows: slice, parameter: nn.Parameter) -> torch.Tensor:
    """Gradients (r, *shape) of some of the rows, to be written to."""
    dtype = _accumulation(parameter)
    total: torch.Tensor | None = None
    lookups = []
    for use in uses:
        if isinstance(use, _Given):
            term = use.gradient[rows].to(dtype)
            total = term.clone() if total is None else total.add_(term)
        elif use.is_lookup:
            lookups.append(use.part(rows, dtype))
        else:
            part = use.part(rows, dtype)
            left = part.left.mT
            # One row at a time as a plain product: a batch of one is slower.
            term = torch.bmm(left, part.right) if len(left) > 1 else (left[0] @ part.right[0])[None]
            total = term if total is None else total.add_(term)
    assert total is not None  # lookups alone are not materialised
    for part in lookups:
        slots = part.left + parameter.shape[0] * torch.arange(len(total), device=total.device)[:, None]
        total.flatten(0, 1).index_add_(0, slots.flatten(), part.right.flatten(0, 1))
    return total


def _left_products(a: _Outer, b: _Outer) -> torch.Tensor:
    """<left_t of a, left_s of b> (n, T, S)."""
    if a.is_lookup and b.is_lookup:
        return (a.left[:, :, None] == b.left[:, None, :]).to(a.right.dtype)
    if a.is_lookup:
        return _left_products(b, a).mT
    if b.is_lookup:
        return a.left.gather(2, b.left[:, None, :].expand(-1, a.left.shape[1], -1))
    return a.left @ b.left.mT


def _along(use: _Outer, direction: torch.Tensor) -> torch.Tensor:
    """<sum_t left_t (x) right_t, direction> (n,), fp64."""
    if use.is_lookup:
        terms = direction[use.left] * use.right
    elif direction.shape[0] <= direction.shape[1]:
        terms = (use.right @ direction.mT).mul_(use.left)
    else:
        terms = (use.left @ direction).mul_(use.right)
    return terms.sum(2).sum(1, dtype=torch.float64)


def _squared_norms(x: torch.Tensor) -> torch.Tensor:
    """|x_i|^2 (r,) of x (r, ...), fp64: in fp32 along the last dimension only, since such a sum over a million entries loses digits."""
    lines = x.reshape(len(x), -1, x.shape[-1] if x.dim() > 1 else 1)
    return torch.linalg.vector_norm(lines, dim=2).double().square().sum(1)


# ---------------------------------------------------------------- linear readings of Gamma


class _Reader(Protocol):
    """A linear map of one parameter's gradients."""

    def whole(self, change: torch.Tensor) -> torch.Tensor:
        """Of gradients (r, *shape), which may be overwritten: (r, width), fp64."""

    def add_rows(self, values: torch.Tensor, change: torch.Tensor, owner: torch.Tensor, index: torch.Tensor) -> None:
        """Of gradients that are 0 but for `change` (u, I) in their rows `index` (u,), added to `values[owner]` (n, width)."""


class _Reading(Protocol):
    """A linear map to (width,) of the whole gradient."""

    width: int

    def of(self, name: str, parameter: nn.Parameter) -> _Reader: ...


class _Products:
    """Products with K given directions."""

    def __init__(self, targets: Sequence[dict[str, torch.Tensor]]):
        self.targets, self.width = targets, len(targets)

    def of(self, name: str, parameter: nn.Parameter) -> _Dots:
        dtype, device = _accumulation(parameter), parameter.device
        lines = [target[name].detach().to(device, dtype).reshape(1, -1) for target in self.targets]
        return _Dots(lines[0] if len(lines) == 1 else torch.cat([torch.zeros(0, parameter.numel(), dtype=dtype, device=device), *lines]))


@dataclass
class _Dots:
    """Products with the rows of `directions` (K, numel)."""

    directions: torch.Tensor

    def whole(self, change: torch.Tensor) -> torch.Tensor:
        return (change.reshape(len(change), -1) @ self.directions.T).double()

    def add_rows(self, values: torch.Tensor, change: torch.Tensor, owner: torch.Tensor, index: torch.Tensor) -> None:
        for k, direction in enumerate(self.directions):
            values[:, k].index_add_(0, owner, (change * direction.view(-1, change.shape[1])[index]).sum(1).double())


class _Sketch:
    """The sign-fold count sketch of `sketch`.

    The number of buckets is the largest prime up to `dim`. A column of a matrix, in which all the energy may lie (massive activations),
    then spreads over all of them; with a power of two it would land in few, or in one.
    """

    def __init__(self, dim: int, seed: int):
        self.width, self.seed = dim, seed
        self.buckets = next(p for p in range(dim, 0, -1) if all(p % q for q in range(2, math.isqrt(p) + 1)))
        self.signs: dict[str, tuple[torch.Tensor, int]] = {}

    def of(self, name: str, parameter: nn.Parameter) -> _Fold:
        if name not in self.signs:
            generator = np.random.default_rng(derive_seed(self.seed, "sketch", name))
            shift = int(generator.integers(self.buckets))
            bits = np.unpackbits(np.frombuffer(generator.bytes(-(-parameter.numel() // 8)), dtype=np.uint8), count=parameter.numel())
            self.signs[name] = torch.from_numpy(bits.view(np.int8)).mul_(2).sub_(1).to(parameter.device), shift
        signs, shift = self.signs[name]
        return _Fold(signs.to(_accumulation(parameter)), shift, self.buckets, self.width)


@dataclass
class _Fold:
    """Entry p goes with sign `signs[p]` (numel,) to bucket (p + shift) mod `buckets`."""

    signs: torch.Tensor
    shift: int
    buckets: int
    width: int

    def whole(self, change: torch.Tensor) -> torch.Tensor:
        flat = change.reshape(len(change), -1).mul_(self.signs)
        size = flat.shape[1] // self.buckets * self.buckets
        folded = flat[:, :size].unflatten(1, (-1, self.buckets)).sum(1) if size else flat.new_zeros(len(flat), self.buckets)
        folded[:, : flat.shape[1] - size] += flat[:, size:]
        return F.pad(folded.roll(self.shift, 1), (0, self.width - self.buckets)).double()

    def add_rows(self, values: torch.Tensor, change: torch.Tensor, owner: torch.Tensor, index: torch.Tensor) -> None:
        place = index[:, None] * change.shape[1] + torch.arange(change.shape[1], device=index.device)
        slots = owner[:, None] * self.width + (place + self.shift) % self.buckets
        values.view(-1).index_add_(0, slots.flatten(), (change * self.signs[place]).double().flatten())
