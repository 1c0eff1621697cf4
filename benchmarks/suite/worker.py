"""One work in a process of its own: build its engines, measure them interleaved, write the rows as JSON.

    python -m benchmarks.suite.worker '{"work": "S-decode", ...}'      # started by benchmarks.suite

Every event is a line of JSON in the file `events`, so that a crash is charged to the engine that was being used.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Engine, Row, measure
from benchmarks.suite.maker import Task, plan
from benchmarks.suite.works import Work, find


@dataclass(frozen=True)
class Order:
    """What the parent process asks for; `skip` holds [engine, precision] that ended the process before."""

    work: str
    engines: tuple[str, ...]
    precisions: tuple[str, ...]
    models: str
    threads: int
    runs: int
    events: str
    lock: str = ""
    skip: tuple[tuple[str, str], ...] = ()


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    skip = {tuple(pair) for pair in order.skip}
    with open(order.events, "a", buffering=1) as events:
        work = find(order.work)

        def tell(**event: Any) -> None:
            events.write(json.dumps(event) + "\n")

        set_threads(order.threads)
        engines = []
        for maker, precision in plan(work, tuple(order.engines)):
            if maker.missing() or (maker.name, precision) in skip or not wanted(precision, order.precisions):
                continue
            tell(using=[maker.name, precision])
            task = Task(work, precision, Path(order.models), order.threads)
            built = attempt(lambda maker=maker, task=task: tried(maker(task)), work, maker.name, precision)
            if isinstance(built, Row):
                tell(row=asdict(built))
            else:
                engines.append(built)
        tell(using=["measuring", ""])
        with locked(order.lock):
            for row in measure(work.name, engines, exact_output(work, Path(order.models)), order.runs):
                tell(row=asdict(row))


def wanted(precision: str, precisions: tuple[str, ...]) -> bool:
    return not precisions or precision in precisions


def tried(engine: Engine) -> Engine:
    """Runs it once, so that an engine which cannot run is reported here."""
    engine.output()
    return engine


def attempt(build: Any, work: Work, name: str, precision: str) -> Engine | Row:
    try:
        return build()
    except Exception as problem:
        traceback.print_exc()
        text = f"{type(problem).__name__}: {problem}".strip().splitlines()
        return Row(work.name, name, precision, failure=" ".join(text)[:300])


def exact_output(work: Work, models: Path) -> Any:
    if work.kind != "zoo":
        from benchmarks.suite.references import exact

        return exact(work, models)
    import copy

    import torch

    from benchmarks.suite.vision import case as case_of
    from tests import zoo

    case = case_of(work.shape)
    with torch.inference_mode():
        return zoo.tensors(copy.deepcopy(case.model).double()(**zoo.to_double(case.inputs)))[0].numpy()


def set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold an exclusive lock on a file while timing, where several jobs share the machine."""
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
