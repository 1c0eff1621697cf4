"""Grows graphs from a seed, checks each, bundles them for the backends, shrinks what fails, and counts."""

from __future__ import annotations

import re
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from sylvester.compiler.program import Program
from tests.fuzz.graphs import Case, Graph, build
from tests.fuzz.grow import grow
from tests.fuzz.known import known
from tests.fuzz.native import Bundle, Failures, check_bundle, refusal
from tests.fuzz.onnx import KINDS, check_onnx
from tests.fuzz.oracles import EXACT, ORACLES, check_pass, passes, rewritten
from tests.fuzz.records import lowered, records
from tests.fuzz.shrink import shrink
from tests.fuzz.values import Mismatch
from tests.kernel_harness import supported

LOSSY = ("w8a8", "w4a8", "w4a16", "bf16", "quantize(weights=3, group=32)", "quantize-attention(products='bf16')")
"""What graphs become, in turn, before their native code is built, besides themselves and their exact form."""
BACKENDS = ("native", *(f"onnx-{kind}" for kind in KINDS))
SHRINKING = 60.0


@dataclass(frozen=True)
class Failure:
    """One kind of failure: what it says, and a smallest graph as a test."""

    number: int
    oracle: str
    message: str
    reason: str
    test: str


@dataclass(frozen=True)
class Options:
    """How much each graph goes through: every `trace_every`th is captured, `passes` passes in turn; 0 means all."""

    seed: int = 0
    bundle: int = 20
    trace_every: int = 1
    passes: int = 0
    wasm: bool = True
    shrinking: float = SHRINKING


@dataclass
class Campaign:
    """Counts and failures so far; `done` is the number of the next graph."""

    options: Options
    say: Callable[[str], None] = lambda _: None
    done: int = 0
    graphs: int = 0
    steps: int = 0
    ops: set[str] = field(default_factory=set)
    turns: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Failure] = field(default_factory=dict)

    def run(self, seconds: float = float("inf"), graphs: float = float("inf")) -> None:
        """Go on until the time or the number of graphs is reached; a bundle that was begun is finished."""
        end, first = time.monotonic() + seconds, self.done
        while time.monotonic() < end and self.done < first + graphs:
            self.bundle(min(self.options.bundle, int(min(first + graphs - self.done, self.options.bundle))))
            self.say(
                f"{self.graphs} graphs, {self.steps} calls, {len(self.ops)} of {len(lowered())} ops, "
                f"{len(self.failures)} kinds of failure"
            )

    def bundle(self, size: int) -> None:
        """The next graphs one by one, then their native code together."""
        bundle, owners = Bundle(), {}
        for number in range(self.done, self.done + size):
            self.done = number + 1
            graph = grow(Random(f"{self.options.seed}:{number}"))
            if graph.outputs and (case := self.alone(number, graph)):
                self.graphs += 1
                for name, text in self._forms(number).items():
                    if self.attempt(number, graph, f"lowering {text}", self._adding(bundle, name, text), case):
                        owners[name] = number, graph, text
        self._check_native(bundle, owners)

    def alone(self, number: int, graph: Graph) -> Case | None:
        """The checks of one graph by itself; None when it makes no sound program."""
        self.steps += len(graph.steps)
        self.ops |= {str(step.target) for step in graph.steps if step.target in lowered()}
        made: list[Case] = []
        self.attempt(number, graph, "build", lambda case: made.append(case))
        if not made or not self.attempt(number, graph, "meaning", self._counting(ORACLES["meaning"]), made[0]):
            return None
        self.turns[len(made[0].turns)] += 1
        for name in self._chosen(number):
            check = ORACLES[name] if name in ORACLES else check_pass(name)
            self.attempt(number, graph, name if name in ORACLES else f"pass {name}", self._counting(check), made[0])
        return made[0]

    def _chosen(self, number: int) -> list[str]:
        found = [name for name in ORACLES if name not in ("meaning", "trace")]
        found += ["trace"] if number % self.options.trace_every == 0 else []
        every = passes()
        count = self.options.passes or len(every)
        return found + [every[(number * count + k) % len(every)] for k in range(count)]

    def _forms(self, number: int) -> dict[str, str]:
        lossy = f"{EXACT}, {LOSSY[number % len(LOSSY)]}"
        return {f"g{number}": "", f"g{number}_exact": EXACT, f"g{number}_lossy": lossy}

    def _counting(self, check: Callable[[Case, Counter[str]], None]) -> Callable[[Case], None]:
        return lambda case: check(case, self.counts)

    def _adding(self, bundle: Bundle, name: str, text: str) -> Callable[[Case], None]:
        def add(case: Case) -> None:
            program: Program | None = rewritten(case, text, Counter()) if text else case.program
            if program is None or (text and str(program) == str(case.program)):
                return
            if (why := refusal(program)) is not None:
                self.counts[f"not lowered: {re.sub('%[a-z0-9_]+', '%', str(why))[:120]}"] += 1
                return
            bundle.add(name, case, program)

        return add

    def attempt(
        self, number: int, graph: Graph, oracle: str, check: Callable[[Case], None], case: Case | None = None
    ) -> bool:
        """Whether the check holds; a new kind of failure is shrunk and kept."""
        self.counts[f"checks: {oracle}"] += 1
        try:
            checked(check, case or build(graph))
        except Exception as error:
            self._keep(number, graph, oracle, error, lambda g: _kind(oracle, _error(lambda: checked(check, build(g)))))
            return False
        return True

    def _check_native(self, bundle: Bundle, owners: dict[str, tuple[int, Graph, str]]) -> None:
        if not bundle.cases:
            return
        self.counts["checks: native"] += len(bundle.cases)
        for kind in BACKENDS:
            for name, error in self.failures_of(kind, bundle).items():
                number, graph, text = owners[name]
                oracle = f"{kind} {text}".strip()
                again = lambda g, k=kind, t=text, o=oracle: _kind(o, self.backend_error(k, g, t))  # noqa: E731
                self._keep(number, graph, oracle, error, again)

    def failures_of(self, kind: str, bundle: Bundle) -> Failures:
        """What a kind of backend gets wrong, by entry."""
        if kind == "native":
            return check_bundle(bundle, best_isas(), wasm=self.options.wasm)
        return check_onnx(bundle, kind.partition("-")[2], self.counts)

    def backend_error(self, kind: str, graph: Graph, text: str) -> Exception | None:
        """What the backends get wrong of a graph after passes."""
        bundle = Bundle()
        self._adding(bundle, "g", text)(build(graph))
        return next(iter(self.failures_of(kind, bundle).values()), None) if bundle.cases else None

    def _keep(self, number: int, graph: Graph, oracle: str, error: Exception, again: Callable[[Graph], str]) -> None:
        kind, message = _kind(oracle, error), _message(error)
        self.counts[f"failures: {kind}"] += 1
        if kind in self.failures:
            return
        found = known(oracle, message)
        small = graph if found else shrink(graph, lambda g: _quietly(again, g) == kind, self.options.shrinking)
        self.failures[kind] = Failure(number, oracle, message, found.reason if found else "", _test(oracle, small))
        self.say(f"graph {number}: {oracle}: {message}\n{self.failures[kind].test}")

    def report(self) -> dict[str, Any]:
        """Everything counted, as plain JSON."""
        every = {str(target) for target in lowered()}
        return {
            "seed": self.options.seed, "next": self.done, "graphs": self.graphs, "calls": self.steps,
            "ops": len(self.ops), "lowered": len(every), "missing": sorted(every - self.ops),
            "records": len(records()), "turns": dict(self.turns), "counts": dict(sorted(self.counts.items())),
            "failures": [asdict(f) for f in self.failures.values()],
        }  # fmt: skip


def checked(check: Callable[[Case], None], case: Case) -> None:
    """The check holds, and fixes no size that may change from call to call."""
    before = case.settled
    check(case)
    if new := {symbol: size for symbol, size in case.settled.items() if before.get(symbol) != size}:
        raise Mismatch(f"sizes were fixed: {new}")


def best_isas() -> tuple[str, ...]:
    """The instruction set that every machine has, and the best of this one."""
    return tuple(dict.fromkeys((supported()[0].name, supported("bf16", "q8", "q4")[-1].name)))


def _error(check: Callable[[], None]) -> Exception | None:
    try:
        check()
    except Exception as error:
        return error
    return None


def _quietly(again: Callable[[Graph], str], graph: Graph) -> str:
    try:
        return again(graph)
    except Exception:
        return ""


def _kind(oracle: str, error: Exception | None) -> str:
    """What failures that are alike share: the check, the place in the code, and the message without its numbers."""
    if error is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].name}" if frames else ""
    text = re.sub(r"%\w+|[-+]?\d[\d.e+-]*|\[.*?\]|nan|inf|'[^']*'", "#", str(error).partition("\n")[0])
    return f"{oracle.partition(' ')[0]}: {type(error).__name__} at {place}: {text[:80]}"


def _message(error: Exception) -> str:
    notes = "; ".join(getattr(error, "__notes__", []))
    return f"{type(error).__name__}: {str(error)[:400]}{f' ({notes})' if notes else ''}"


def _test(oracle: str, graph: Graph) -> str:
    body = graph.text().replace("\n", "\n    ")
    return f"def test_found() -> None:\n    graph = {body}\n    replay({oracle!r}, graph)\n"


def replay(oracle: str, graph: Graph) -> None:
    """The check that failed, again; raises what it finds."""
    kind, _, text = oracle.partition(" ")
    campaign, case = Campaign(Options()), build(graph)
    if kind in ORACLES:
        checked(lambda given: ORACLES[kind](given, campaign.counts), case)
    elif kind == "pass":
        checked(lambda given: check_pass(text)(given, campaign.counts), case)
    elif (error := campaign.backend_error(kind if kind in BACKENDS else "native", graph, text)) is not None:
        raise error
