"""Local rewriting: rules whose two sides are torch functions, applied to a fixpoint with refusals and fuel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.errors import CompileError, InvalidProgram
from sylvester.compiler.forms import target_of
from sylvester.compiler.match import Match, Matcher
from sylvester.compiler.ops import Example
from sylvester.compiler.pattern import either, optional, pattern_of
from sylvester.compiler.printing import fact as fact_text
from sylvester.compiler.program import ORIGIN, Entry, Program, value

__all__ = ["Match", "Refusal", "Rule", "either", "optional", "rewrite"]


class Rule:
    """`before(...)` becomes `after(...)`, both ordinary torch functions with the same parameters.

    `example` gives one argument per parameter, as in compiler.ops: a tuple is a tensor shape and binds a node; a float,
    int or string binds a literal and must be a value that occurs nowhere else in `before`.
    `transparent` lists ops to look through, such as casts; dtype arguments are then ignored as well.
    `free` says that inner values cost nothing: they may be used outside, and then stay.
    """

    before: ClassVar[Callable[..., Tensor]]
    after: ClassVar[Callable[..., Tensor]]
    example: ClassVar[Example]
    transparent: ClassVar[tuple[Any, ...]] = ()
    free: ClassVar[bool] = False

    def allow(self, match: Match) -> Refusal | None:
        """A refusal when the pattern fits but the rewrite would be wrong or slow."""
        return None

    @property
    def name(self) -> str:
        return type(self).__name__


def rewrite(over: Program | Entry, rules: Iterable[Rule], *, fuel: int | None = None) -> Changes:
    """Apply rules until nothing changes, users before producers. `fuel` bounds the number of rewrites.

    Raises `CompileError` naming the rule and node when the rules feed each other for ever.
    """
    rules, changes = list(rules), Changes()
    for entry in over.entries.values() if isinstance(over, Program) else [over]:
        left = None if fuel is None else fuel - len(changes.applied)
        changes.extend(Engine(entry, rules, left).run())
    return changes


class Engine:
    """Rewrites one graph: a worklist of nodes, the rules by root op, and the replacement graphs by facts."""

    def __init__(self, entry: Entry, rules: list[Rule], fuel: int | None) -> None:
        self.entry = entry
        self.fuel = fuel
        self.limit = 100 + 4 * len(entry.graph.nodes)
        self.templates: dict[object, fx.Graph] = {}
        self.work: list[fx.Node] = [n for n in entry.graph.nodes if n.op == "call_function"]
        self.queued = set(self.work)
        self.gone: set[fx.Node] = set()
        self.refused: dict[tuple[fx.Node, str], Refusal] = {}
        self.changes = Changes()
        self.by_root: dict[Any, list[tuple[Rule, Matcher]]] = defaultdict(list)
        for rule in rules:
            matcher = Matcher(pattern_of(type(rule)), rule.transparent, rule.free)
            for target in matcher.pattern.targets():
                self.by_root[target].append((rule, matcher))
        self.depth = max((matcher.pattern.depth for uses in self.by_root.values() for _, matcher in uses), default=0)

    def run(self) -> Changes:
        while self.work and len(self.changes.applied) != self.fuel:
            node = self.work.pop()
            self.queued.discard(node)
            if node not in self.gone:
                self._visit(node)
        for (node, name), refusal in self.refused.items():
            if node not in self.gone:
                self.changes.refuse(name, refusal, node)
        return self.changes

    def _visit(self, node: fx.Node) -> None:
        for rule, matcher in self.by_root.get(target_of(node), ()):
            self.refused.pop((node, rule.name), None)
            verdict = self._decide(rule, matcher.match(node))
            if isinstance(verdict, Refusal):
                self.refused[node, rule.name] = verdict
            elif verdict is not None:
                self._apply(rule, verdict)
                return

    def _decide(self, rule: Rule, found: Match | Refusal | None) -> Match | Refusal | None:
        if not isinstance(found, Match):
            return found
        refusal = rule.allow(found)
        if refusal is None and rule.transparent:
            refusal = _widened(found.root, self._template(rule, found).output_node().all_input_nodes[0])
        return refusal or found

    def _apply(self, rule: Rule, match: Match) -> None:
        if len(self.changes.applied) == self.limit:
            raise CompileError(f"{rule.name} does not converge", at=match.root, hint="does its result match itself?")
        template = self._template(rule, match)
        _require_same_fact(rule, match.root, template.output_node().all_input_nodes[0])
        new, inserted = self._insert(rule, match, template)
        self.changes.apply(rule.name, match.root)
        concerned = [*inserted, *match.root.users, *self._blocked(match)]
        self.entry.replace(match.root, new)
        self._erase(match.root)
        self._revisit([n for n in concerned if n.op == "call_function"])

    def _template(self, rule: Rule, match: Match) -> fx.Graph:
        """`after` traced on the facts of the bound nodes; equal facts share one trace."""
        key = (rule, *((name, _fact_key(x)) for name, x in match.bound.items()))
        if key not in self.templates:
            self.templates[key] = self._trace(rule, match)
        return self.templates[key]

    def _trace(self, rule: Rule, match: Match) -> fx.Graph:
        nodes = _bound_nodes(match)

        def closed(*given: Tensor) -> Tensor:
            return type(rule).after(**{**match.bound, **dict(zip(nodes, given, strict=True))})

        with self.entry.fake_mode, torch.no_grad():
            graph = make_fx(closed, pre_dispatch=True)(*(value(n) for n in nodes.values())).graph
        for node in graph.nodes:
            if node.op == "get_attr":
                raise InvalidProgram(f"{rule.name}: `after` makes a tensor constant", hint="use factory ops")
        return graph

    def _insert(self, rule: Rule, match: Match, template: fx.Graph) -> tuple[fx.Node, list[fx.Node]]:
        """Copy the replacement in front of the root: its result and all new nodes.

        An input that is returned as it is keeps its own facts.
        """
        copies = dict(zip(template.find_nodes(op="placeholder"), _bound_nodes(match).values(), strict=True))
        result = template.output_node().all_input_nodes[0]
        inserted = []
        with self.entry.graph.inserting_before(match.root):
            for node in template.nodes:
                if node.op == "call_function" and (node.users or node is result):
                    copies[node] = self.entry.graph.node_copy(node, copies.__getitem__)
                    copies[node].meta = inherited(match.root, rule.name) | {"val": value(node)}
                    inserted.append(copies[node])
        return copies[result], inserted

    def _blocked(self, match: Match) -> list[fx.Node]:
        """Roots refused because of an operand of this match: what uses it has changed."""
        operands = {n for inner in match.body for n in inner.all_input_nodes}
        return [node for (node, _), refusal in self.refused.items() if refusal.at in operands]

    def _erase(self, root: fx.Node) -> None:
        """Remove a replaced node and what only it used."""
        stack = [root]
        while stack:
            node = stack.pop()
            if node.op == "call_function" and not node.users and node not in self.gone:
                stack += node.all_input_nodes
                self.entry.graph.erase_node(node)
                self.gone.add(node)

    def _revisit(self, nodes: list[fx.Node]) -> None:
        """Put nodes and the users that can see them from a pattern's root back on the worklist, users on top."""
        seen = dict.fromkeys(nodes)
        frontier = list(seen)
        for _ in range(self.depth - 1):
            frontier = list(dict.fromkeys(u for n in frontier for u in n.users if u not in seen and u.op != "output"))
            seen |= dict.fromkeys(frontier)
        again = [n for n in seen if n.op == "call_function" and n not in self.queued and n not in self.gone]
        self.work += again
        self.queued.update(again)


def _bound_nodes(match: Match) -> dict[str, fx.Node]:
    return {name: x for name, x in match.bound.items() if isinstance(x, fx.Node)}


def _fact_key(x: Any) -> object:
    if not isinstance(x, fx.Node):
        return x
    return str([str(n) for n in value(x).shape]), value(x).dtype


def inherited(old: fx.Node, made_by: str) -> dict[str, Any]:
    """The origin of a node that takes the place of `old`."""
    origin = {key: old.meta[key] for key in ORIGIN if key in old.meta}
    return origin | {"made_by": (*origin.get("made_by", ()), made_by)}


def _require_same_fact(rule: Rule, old: fx.Node, new: fx.Node) -> None:
    found, expected = value(new), value(old)
    same_rank = found.dim() == expected.dim() and found.dtype == expected.dtype
    pairs = zip(found.shape, expected.shape, strict=False)
    if not same_rank or not all(a is b or statically_known_true(a == b) for a, b in pairs):
        raise InvalidProgram(f"{rule.name} gives {fact_text(new)}, expected {fact_text(old)}", at=old)


def _widened(old: fx.Node, new: fx.Node) -> Refusal | None:
    """The graph goes on in another type than the rule gives, because the match looked through a cast."""
    if value(old).dtype == value(new).dtype:
        return None
    return Refusal(f"the result is used as {value(old).dtype}, the rewrite gives {value(new).dtype}", old)
