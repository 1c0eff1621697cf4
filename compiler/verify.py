"""The invariants that every pass may assume and must keep."""

from __future__ import annotations

from torch import Tensor, fx

from sylvester.compiler.cache_ops import UPDATES
from sylvester.compiler.errors import InvalidProgram
from sylvester.compiler.program import Binding, Entry, Program, binding, value
from sylvester.compiler.skip_ops import update_unless
from sylvester.compiler.stages import DRAFT, stages_of


def verify(program: Program) -> None:
    """Raise `InvalidProgram` at the first broken invariant."""
    for name, entry in program.entries.items():
        try:
            _verify_graph(entry)
            _verify_bindings(program, entry)
        except InvalidProgram as error:
            error.add_note(f"in entry {name!r}")
            raise
    _verify_slots(program)


def _verify_graph(entry: Entry) -> None:
    try:
        entry.graph.lint()
    except RuntimeError as error:
        raise InvalidProgram(f"malformed graph: {error}") from error
    if len(entry.outputs) != len(entry.results()):
        raise InvalidProgram(f"{len(entry.results())} results but {len(entry.outputs)} output names")
    for node in entry.graph.nodes:
        if node.op in ("call_method", "call_module", "get_attr"):
            raise InvalidProgram(f"found a {node.op} node, expected calls of ops only", at=node)
        if node.op != "output" and "val" not in node.meta:
            raise InvalidProgram("node has no tensor fact", at=node, hint="create nodes with Entry.emit")
        _verify_mutation(node)


def _verify_mutation(node: fx.Node) -> None:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise InvalidProgram("op mutates its input, expected value semantics", at=node)


def _verify_bindings(program: Program, entry: Entry) -> None:
    seen: set[Binding] = set()
    for node in entry.placeholders():
        bound = node.meta.get("bind")
        if not isinstance(bound, Binding):
            raise InvalidProgram("placeholder is bound to nothing", at=node, hint="create placeholders with Entry.bind")
        if bound in seen:
            raise InvalidProgram(f"{bound.kind} {bound.key!r} is bound twice", at=node)
        seen.add(bound)
        if bound.kind == "weight":
            _verify_weight(program.weights[bound.key], node)
        if bound.kind == "state" and bound.key not in program.state:
            raise InvalidProgram(f"no state slot {bound.key!r}", at=node, hint=f"slots are {list(program.state)}")


def _verify_weight(weight: Tensor, node: fx.Node) -> None:
    fact: Tensor = value(node)
    if tuple(weight.shape) != tuple(fact.shape) or weight.dtype != fact.dtype:
        found, expected = f"{weight.dtype}{list(weight.shape)}", f"{fact.dtype}{list(fact.shape)}"
        raise InvalidProgram(f"weight {binding(node).key!r} is {found}, the graph expects {expected}", at=node)


def _verify_slots(program: Program) -> None:
    """Slots are 0..k-1; an entry that touches state writes each slot once and reads a slot only after writing it.

    A later stage of decoding may leave slots alone, for good: what a step reads, every step before it wrote. What
    drafts may leave any alone: others write what it reads.
    """
    indices = sorted(slot.index for slot in program.state.values())
    if indices != list(range(len(indices))):
        raise InvalidProgram(f"state slots are numbered {indices}, expected 0..{len(indices) - 1}")
    expected = _expected_slots(program)
    for name, entry in program.entries.items():
        written = sorted(o.name for o in entry.outputs if o.kind == "state")
        allowed = expected.get(name, set(program.state))
        if written and (len(set(written)) < len(written) or set(written) != allowed):
            raise InvalidProgram(f"entry {name!r} writes state {written}, expected each of {sorted(allowed)} once")
        for node in entry.placeholders("state"):
            _verify_read_after_write(node)


def _expected_slots(program: Program) -> dict[str, set[str]]:
    """The slots of what drafts, and of the stages of decoding after the first, which the one before touches too."""
    found: dict[str, set[str]] = {}
    drafts = program.entries.get(program.info.get(DRAFT, {}).get("entry", ""))
    if drafts is not None:
        found[program.info[DRAFT]["entry"]] = {o.name for o in drafts.outputs if o.kind == "state"}
    before = set(program.state)
    for stage in stages_of(program.info):
        entry = program.entries.get(stage.entry)
        if entry is None:
            continue
        own = {o.name for o in entry.outputs if o.kind == "state"}
        if stage.position and not own <= before:
            missing = sorted(own - before)
            raise InvalidProgram(
                f"stage {stage.entry!r} reads state {missing} from position {stage.position} on, "
                "which the stage before it does not write",
                hint="depth must not grow with the position",
            )
        before = found[stage.entry] = own if stage.position else set(program.state)
    return found


def _verify_read_after_write(node: fx.Node) -> None:
    updates = [u for u in node.users if u.target in UPDATES and u.args[0] is node]
    kept = [u for u in node.users if u.target is update_unless.target and u.args[:2] == (node, *updates)]
    if len(updates) != 1 or len(node.users) != len(updates) + len(kept):
        raise InvalidProgram(
            f"state {binding(node).key!r} must be read by exactly one update, found {list(node.users)}", at=node
        )
