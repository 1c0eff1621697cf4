"""Turn a failure inside torch.export into one short error: what failed, at which line of the model, what to do."""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from sylvester.compiler.errors import TraceError
from sylvester.compiler.inputs import Inputs

TORCH = Path(torch.__file__).parent
OURS = Path(__file__).parent
LOGGERS = ("torch._export", "torch.export", "torch.fx", "torch._dynamo", "torch._functorch", "torch._subclasses")
LONGEST = 200


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back torch's warnings, log lines and graph dumps: what matters comes back as an error or a note."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def explain(error: Exception, model: nn.Module, inputs: Inputs) -> TraceError:
    """The error to raise from `error`; the model is run once to tell wrong inputs from untraceable code."""
    failure = _eager_failure(model, inputs)
    if failure is not None:
        return _located(TraceError(f"the model fails on its example inputs: {first_line(failure)}"), failure)
    if isinstance(error, GuardOnDataDependentSymNode):
        hint = "compute both sides and choose with torch.where, or move the decision out of the model"
        return _located(TraceError("control flow or a size depends on the values of a tensor", hint=hint), error)
    if isinstance(error, ConstraintViolationError) or "dynamic_shapes" in str(error):
        hint = "leave `dynamic` out to let every batch and sequence dimension that can be symbolic be so"
        return TraceError(f"the dynamic shapes do not fit the model: {first_line(error)}", hint=hint)
    hint = "the full report of torch.export is the cause of this error"
    return _located(TraceError(f"torch.export cannot trace the model: {first_line(error)}", hint=hint), error)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LONGEST] if lines else type(error).__name__


def _eager_failure(model: nn.Module, inputs: Inputs) -> Exception | None:
    args, kwargs = inputs.call()
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        return error
    return None


def _located(error: TraceError, cause: BaseException) -> TraceError:
    """`error` with a note that names the innermost line outside torch."""
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if _is_users(f.filename)]
    if frames:
        at = frames[-1]
        line = linecache.getline(at.filename, at.lineno or 0).strip()
        error.add_note(f"from {at.filename}:{at.lineno} in {at.name}: {line}")
    return error


def _is_users(filename: str) -> bool:
    path = Path(filename)
    return path.is_absolute() and TORCH not in path.parents and path.parent != OURS
