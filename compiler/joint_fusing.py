"""Steps of a rewritten joint graph that kernels do at once: rotations with rounding, products with what is undone."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from sylvester.compiler.hadamard import largest_block
from sylvester.compiler.halo_ops import Turns, product, rounded
from sylvester.compiler.halo_quantise import Rounded
from sylvester.compiler.halo_rotate import padded
from sylvester.compiler.joint_graph import emit, fact
from sylvester.compiler.joint_products import drop_double_transposes
from sylvester.compiler.joint_rotations import HADAMARD

aten, dialect = torch.ops.aten, torch.ops.sylvester
TAG = "partitioner_tag"


def multiplied(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, features: bool, tokens: int
) -> Tensor:
    """`halo_ops.product` of rounded operands: `features` and so many `tokens`, if any, are turned back."""
    turns = Turns(left=tokens > 0, right=features)
    return product(Rounded(a, scale_a), Rounded(b, scale_b), dtype, turns, tokens)


def fuse(graph: fx.Graph) -> None:
    """Only what nothing else reads goes into a kernel."""
    for node in [n for n in graph.nodes if n.target is dialect.halo_quantise.default]:
        _round(graph, node)
    for node in [n for n in graph.nodes if n.target is dialect.halo_mm.default]:
        _multiply(graph, node)
    drop_double_transposes(graph)


def _round(graph: fx.Graph, node: fx.Node) -> None:
    """Q(x R), Q(H x) and Q(H x R) from x."""
    x, _, format, what = node.args
    found = _over_tokens(x)
    tokens, source = found is not None, x if found is None else found
    assert isinstance(source, fx.Node)
    features = _turns_features(source, False) and (source is x or len(source.users) == 1)
    if fact(source).dim() != 2 or not (tokens or features) or (not tokens and len(source.users) != 1):
        return
    read = source.args[0] if features else source
    new = emit(graph, rounded, read, format, features, tokens, None, what, before=node)
    new.meta[TAG] = node.meta.get(TAG, "")
    for part in list(node.users):
        assert part.target is operator.getitem
        taken = emit(graph, operator.getitem, new, part.args[1], before=part)
        made = emit(graph, aten.t.default, taken, before=part) if tokens and part.args[1] == 0 else taken
        taken.meta[TAG] = made.meta[TAG] = node.meta.get(TAG, "")
        part.replace_all_uses_with(made)
    graph.eliminate_dead_code()


def _over_tokens(x: object) -> fx.Node | None:
    """y of (H y)^T, where nothing else reads what is in between."""
    if not isinstance(x, fx.Node) or x.target is not HADAMARD or x.args[2] or len(x.users) != 1:
        return None
    columns = x.args[0]
    if isinstance(columns, fx.Node) and columns.target is aten.constant_pad_nd.default:
        columns = columns.args[0]
    if not isinstance(columns, fx.Node) or columns.target is not aten.t.default:
        return None
    y = columns.args[0]
    assert isinstance(y, fx.Node)
    order = padded(int(fact(y).shape[0]))
    return y if order == x.args[1] == fact(x).shape[-1] else None


def _turns_features(x: fx.Node, undo: bool) -> bool:
    return x.target is HADAMARD and x.args[1:] == (largest_block(int(fact(x).shape[-1])), undo)


def _multiply(graph: fx.Graph, node: fx.Node) -> None:
    """The product with the casts and rotations that only its result goes through."""
    a, b, scale = node.args
    assert isinstance(scale, fx.Node)
    last, dtype = node, fact(node).dtype
    if (user := _only_user(last)) is not None and user.target is aten.to.dtype:
        last, dtype = user, fact(user).dtype
    back = _rows_back(last)
    tokens, last = (0, last) if back is None else (int(fact(back).shape[0]), back)
    features = (user := _only_user(last)) is not None and _turns_features(user, True)
    if not tokens and not features:
        return
    last = user if features and user is not None else last
    new = emit(graph, multiplied, a, b, *scale.args, dtype, features, tokens, before=last)
    last.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _rows_back(x: fx.Node) -> fx.Node | None:
    """The end of x -> H^T x, cut to its first rows."""
    steps: list[fx.Node] = [x]
    for target in (aten.t.default, HADAMARD, aten.slice.Tensor, aten.t.default):
        user = _only_user(steps[-1])
        if user is None or user.target is not target:
            return None
        steps.append(user)
    turn = steps[2]
    return steps[-1] if turn.args[2] and turn.args[1] == fact(x).shape[0] else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
