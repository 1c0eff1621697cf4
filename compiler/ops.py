"""The dialect: one declaration per op gives its meaning, shapes, gradient, cost and test examples.

An op is registered as a composite torch operator, so a Program runs in plain PyTorch at every stage and differentiates.
One with a gradient of its own stays a single node in graphs of gradients.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler import hadamard as matrices
from sylvester.compiler.attention_operands import require_alone, with_blocks, with_shared
from sylvester.compiler.token_tree import tree_positions, tree_visible

NAMESPACE = "sylvester"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations, and bytes read plus written if every operand is touched once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Ints:
    """A tensor of integers in [0, high) in an example."""

    shape: tuple[int, ...]
    high: int


@dataclass(frozen=True)
class Stored:
    """A stored weight in an example: normal floats that bfloat16 holds, or integers over the range of the dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Records:
    """Rows of a quantised cache in an example: records of normal values of this shape, in numbers of `bits`."""

    shape: tuple[int, ...]
    bits: int


Example = tuple[Any, ...]
"""One argument list: a tuple of ints is a float tensor of that shape, `Ints`, `Stored`, `Records` say which other."""


@dataclass(frozen=True)
class Op:
    """An op is its reference: the same function gives meaning, shapes and the test oracle."""

    name: str
    reference: Callable[..., Tensor]
    cost: Callable[..., Cost]
    examples: tuple[Example, ...]

    @property
    def target(self) -> Callable[..., Tensor]:
        return cast(Callable[..., Tensor], getattr(getattr(torch.ops, NAMESPACE), self.name).default)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.target(*args, **kwargs)


OPS: dict[str, Op] = {}
FACTS: dict[Callable[..., Any], Callable[..., Tensor]] = {}
"""Op -> an empty tensor like its result, for ops whose reference takes many steps: fake tensors make each slow."""


def op(
    *,
    cost: Callable[..., Cost],
    examples: tuple[Example, ...],
    fact: Callable[..., Tensor] | None = None,
    linear: Callable[..., Tensor] | None = None,
) -> Callable[[Callable[..., Tensor]], Op]:
    """Declare an op from its reference implementation. Annotations become the schema.

    `linear`: of an op that is linear in its first argument and has a fact, the gradient of that argument from the
    gradient of the result and the other arguments.
    """

    def declare(reference: Callable[..., Tensor]) -> Op:
        name = reference.__name__
        if name in OPS:
            raise ValueError(f"op {name!r} is declared twice")
        signature = inspect.signature(reference, eval_str=True)
        reference.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()} | {"return": Tensor}
        LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=()))
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd" if linear else "CompositeImplicitAutograd")
        OPS[name] = Op(name, reference, cost, examples)
        if fact is not None:
            FACTS[OPS[name].target] = fact
        if linear is not None:
            torch.library.register_fake(f"{NAMESPACE}::{name}", fact, lib=LIBRARY)
            differentiate(name, linear)
        return OPS[name]

    return declare


def differentiate(name: str, linear: Callable[..., Tensor]) -> None:
    """Give an op that is linear in its first argument its gradient; the other arguments have none."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.others = inputs[1:]

    def gradient(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        return (linear(given, *ctx.others), *(None for _ in ctx.others))

    torch.library.register_autograd(f"{NAMESPACE}::{name}", gradient, setup_context=keep, lib=LIBRARY)


def sample(example: Example, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, ...]:
    """Concrete arguments for an example, the same ones every time."""
    random = torch.Generator().manual_seed(seed)

    def concrete(x: Any) -> Any:
        if isinstance(x, Ints):
            return torch.randint(x.high, x.shape, generator=random)
        if isinstance(x, Stored) and not x.dtype.is_floating_point:
            limits = torch.iinfo(x.dtype)
            return torch.randint(limits.min, limits.max + 1, x.shape, generator=random, dtype=x.dtype)
        if isinstance(x, Stored):
            return torch.randn(x.shape, generator=random).bfloat16().to(x.dtype)
        if isinstance(x, Records):
            return cache_ops.quantize_records(torch.randn(x.shape, generator=random), x.bits)
        if isinstance(x, tuple) and all(isinstance(n, int) for n in x):
            return torch.randn(x, generator=random, dtype=dtype)
        return x

    return tuple(concrete(x) for x in example)


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def elementwise_cost(x: Tensor, *others: Any, **_: Any) -> Cost:
    return Cost(x.numel(), _nbytes(x, x, *(o for o in others if isinstance(o, Tensor))))


@op(cost=elementwise_cost, examples=(((2, 3, 8), (8,), 1e-6), ((5, 7), None, 1e-5)))
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2, last axis) + eps) * weight, the mean in float32 or wider (Zhang and Sennrich, 2019)."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else y * weight


@op(
    cost=elementwise_cost,
    examples=(((2, 3, 5, 8), (1, 5, 8), (1, 5, 8), False), ((2, 3, 5, 12), (5, 8), (5, 8), True)),
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary positions on the first `cos.shape[-1]` features of x [batch, heads, tokens, features] (Su et al., 2021).

    cos and sin are [tokens, rotary] or [batch, tokens, rotary]. Pairs are (i, i + rotary / 2), or (2i, 2i + 1) when
    interleaved; features past the rotary part pass through.
    """
    rotary = cos.shape[-1]
    cos, sin = (t.unsqueeze(-3) for t in (cos, sin))
    head, tail = x[..., :rotary], x[..., rotary:]
    if interleaved:
        turned = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-head[..., rotary // 2 :], head[..., : rotary // 2]), -1)
    y = head * cos + turned * sin
    return y if tail.shape[-1] == 0 else torch.cat((y, tail), -1)


def visible(queries: int, keys: int, offset: Tensor | int, causal: bool, window: int, device: torch.device) -> Tensor:
    """Boolean [queries, keys]: query i sees key j when j <= i + offset and, with a window, j > i + offset - window."""
    i = torch.arange(queries, device=device)[:, None] + offset
    j = torch.arange(keys, device=device)[None, :]
    seen = j <= i if causal else torch.ones_like(i >= j)
    return seen & (j > i - window) if window else seen


def repeated_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [batch, kv heads, keys, d] for every head of q."""
    groups = q.shape[1] // x.shape[1]
    return x.repeat_interleave(groups, 1) if groups > 1 else x


def attention_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    past: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float = 0.0,
    depths: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale + mask) [batch, heads, queries, keys] with as many heads in k; as in `attention`."""
    scores = q @ k.transpose(-2, -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    start = 0 if past is None else past
    if depths is not None:
        scores = scores.masked_fill(~tree_visible(k.shape[2], start, depths, window), -math.inf)
    elif causal or window:
        seen = visible(q.shape[2], k.shape[2], start, causal, window, q.device)
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        mask = mask if past is None else mask[..., : k.shape[2]]
        mask = mask if depths is None else mask.index_select(-1, tree_positions(k.shape[2], start, depths))
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1).nan_to_num(0.0)


def attention_cost(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Cost:
    return Cost(2 * q.numel() * k.shape[-2] * 2, _nbytes(q, k, v, q))


@op(
    cost=attention_cost,
    examples=(
        ((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), None, None, 0.35, True, 0),
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), (2, 1, 5, 7), None, 0.5, False, 0),
        ((1, 3, 9, 16), (1, 1, 9, 16), (1, 1, 9, 16), None, None, 0.25, True, 4),
        ((2, 4, 3, 8), (2, 2, 16, 8), (2, 2, 16, 8), None, Ints((), 13), 0.35, True, 0),
        ((1, 4, 9, 16), (1, 2, 9, 16), (1, 2, 9, 16), None, None, 2.0, True, 4, 3.0),
        ((2, 4, 3, 8), (2, 2, 32, 8), (2, 2, 32, 8), (1, 4, 1, 32), Ints((), 9), 0.35, True, 0, 1.5),
    ),
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float = 0.0,
    *,
    depths: Tensor | None = None,
    shared: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale + mask) v over q [batch, heads, queries, d], k and v [batch, kv heads, keys, d].

    Query heads share key heads in consecutive groups. `mask` is bool (True = visible) or added to the scores.
    `window` > 0 keeps the last `window` keys up to the query. With `past` (0-d integer), k and v are caches: query i
    stands at position past + i, and keys after it are not read; the mask may be of more keys. A row that sees no key
    is 0. k and v may be bfloat16. `softcap` c > 0 makes scores s, before the mask, c tanh(s / c) (Gemma 2, 2024).
    `depths` (int64 [queries], with `past`) makes the queries a tree of tokens in preorder, of which each sees the keys
    before `past`, its ancestors and itself; it stands at past + its depth.
    `shared` (0-d int64, with `past`): keys at positions below it are those of row 0 for the whole batch (Hydragen,
    2024). `blocks` (without `past`): int64 [(batch,) (heads,) blocks of queries, most], ascending numbers of the blocks
    of 64 keys that 64 queries may see, then -1.
    """
    require_alone(past, shared, blocks)
    mask = with_blocks(mask, blocks, q.shape[2], k.shape[2])
    k, v = (repeated_heads(with_shared(t, shared).to(q.dtype), q) for t in (k, v))
    return attention_weights(q, k, mask, past, scale, causal, window, softcap, depths) @ v


@op(cost=elementwise_cost, examples=(((2, 3, 8), (2, 3, 8)),))
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020)."""
    return F.silu(gate) * up


@op(cost=elementwise_cost, examples=(((2, 3, 8), (2, 3, 8), "none"), ((2, 3, 8), (2, 3, 8), "tanh")))
def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """gelu(gate) * up (Shazeer, 2020)."""
    return F.gelu(gate, approximate=approximate) * up


def _hadamard_cost(x: Tensor, block: int, transposed: bool = False) -> Cost:
    return Cost(x.numel() * (matrices.scheme_of(block).additions + 1), _nbytes(x, x))


def _hadamard_fact(x: Tensor, block: int, transposed: bool = False) -> Tensor:
    _require_block(x, block)
    return torch.empty_like(x)


def _require_block(x: Tensor, block: int) -> None:
    if block < 1 or x.shape[-1] % block or matrices.find(block) is None:
        raise ValueError(
            f"hadamard needs a block of a known order that divides {x.shape[-1]}, got {block}; "
            f"the largest is {matrices.largest_block(int(x.shape[-1]))}"
        )


def _hadamard_gradient(given: Tensor, block: int, transposed: bool = False) -> Tensor:
    return hadamard(given, block, not transposed)


@op(
    cost=_hadamard_cost,
    fact=_hadamard_fact,
    linear=_hadamard_gradient,
    examples=(
        *(((2, 3, 8), 8), ((5, 96), 32), ((3, 2, 256), 64), ((4, 6), 1), ((3, 40), 20), ((2, 5, 96), 96)),
        *(((7, 72), 36, True), ((2, 240), 240, True), ((1, 3, 192), 192)),
    ),
)
def hadamard(x: Tensor, block: int, transposed: bool = False) -> Tensor:
    """y = x H^T / sqrt(block), or x H, in blocks of the last axis, where H has order `block` (compiler/hadamard.py)."""
    _require_block(x, block)
    return matrices.transform(x, block, transposed)


def _update_cost(cache: Tensor, new: Tensor, past: Tensor) -> Cost:
    return Cost(0, 2 * _nbytes(new))


@op(cost=_update_cost, examples=(((2, 2, 16, 8), (2, 2, 3, 8), Ints((), 13)),))
def kv_update(cache: Tensor, new: Tensor, past: Tensor) -> Tensor:
    """The cache [batch, heads, capacity, d] with `new` [batch, heads, tokens, d] at positions past, past + 1, ...

    The rows are rounded to the dtype of the cache.
    """
    return cache.index_copy(2, past + torch.arange(new.shape[2], device=new.device), new.to(cache.dtype))


# These declare their ops with `op` above.
from sylvester.compiler import cache_ops, parallel_ops, quantized_ops, shared_ops, skip_ops, sparse_ops  # noqa: E402, F401
