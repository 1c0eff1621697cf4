"""Runs the graphs of an artefact in onnxruntime: caches stay where they are, outputs are bound to them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.onnx.names import past_name, present_name
from sylvester.backends.onnx.properties import read_properties
from sylvester.compiler import binding, knobs
from sylvester.compiler.errors import ArtefactError, CompileError
from sylvester.compiler.manifest import EntrySpec, Manifest
from sylvester.compiler.runner import State, entry_of

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[np.generic]
BFLOAT16 = 16
"""The number of the type in ONNX, which numpy has no name for."""
LEVEL = "session.qdq_matmulnbits_accuracy_level"


class Graphs:
    """A session per entry, opened when it is first run."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        self.folder, self.manifest = folder, manifest
        self.threads = threads or manifest.threads or knobs.threads()
        self.properties = read_properties(folder)
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()

    def new_state(self, entry: str, inputs: Mapping[str, Array]) -> State:
        """Zeroed slots for the batch of `inputs`."""
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        arrays = binding.complete(spec, inputs, State({}))
        values = binding.bind(spec, arrays, None, self.manifest.state)
        shapes = binding.state_shapes(spec, self.manifest.state, values)
        return State({name: np.zeros(shape, _dtype(self.manifest.state[name].dtype)) for name, shape in shapes.items()})

    def run(self, entry: str, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        state = state if spec.states else None
        arrays = [np.asarray(a, order="C") for a in binding.complete(spec, inputs, state)]
        binding.bind(spec, arrays, state, self.manifest.state)
        session = self.session(entry)
        caches = {name: state.arrays[name] for name in spec.states} if state else {}
        named = {s.name: a for s, a in zip(spec.inputs, arrays, strict=True)}
        if not self._row_by_row(entry, state, named):
            return _call(session, spec, named, caches, self.manifest)
        rows = [
            _call(session, spec, _row(named, n), _row(caches, n), self.manifest)
            for n in range(len(next(iter(caches.values()))))
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _row_by_row(self, entry: str, state: State | None, inputs: Mapping[str, Array]) -> bool:
        """Whether the call has more tokens and rows than its graph takes at once."""
        if state is None or not self.properties[entry].rows_alone:
            return False
        shapes = [array.shape for array in inputs.values() if array.ndim > 1]
        return any(shape[0] > 1 and shape[1] > 1 for shape in shapes)

    def session(self, entry: str) -> onnxruntime.InferenceSession:
        with self._lock:
            if entry not in self._sessions:
                level = self.properties[entry].accuracy_level
                self._sessions[entry] = open_session(self.folder / f"{entry}.onnx", self.threads, level)
            return self._sessions[entry]

    def close(self) -> None:
        self._sessions.clear()


def open_session(path: Path, threads: int, level: int | None = None) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU that says nothing but errors."""
    try:
        import onnxruntime
    except ImportError as error:
        raise CompileError(
            "running an ONNX artefact needs onnxruntime", hint="pip install 'sylvester[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    if level is not None:
        options.add_session_config_entry(LEVEL, str(level))
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtefactError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path.name}: {error}",
            hint="update onnxruntime, or compile for an older opset",
        ) from error


def _call(
    session: Any, spec: EntrySpec, inputs: Mapping[str, Array], caches: Mapping[str, Array], manifest: Manifest
) -> dict[str, Array]:
    """One run with every buffer bound: caches are inputs and outputs at once."""
    bound = session.io_binding()
    known = {i.name for i in session.get_inputs()}
    for s in spec.inputs:
        if s.name in known:
            array = inputs[s.name]
            bound.bind_input(s.name, "cpu", 0, _element(s.dtype), array.shape, array.ctypes.data)
    for name, array in caches.items():
        element = _element(manifest.state[name].dtype)
        bound.bind_input(past_name(name), "cpu", 0, element, array.shape, array.ctypes.data)
        bound.bind_output(present_name(name), "cpu", 0, element, array.shape, array.ctypes.data)
    for s in spec.outputs:
        bound.bind_output(s.name, "cpu")
    session.run_with_iobinding(bound)
    found = bound.get_outputs()[len(caches) :]
    return {s.name: np.array(value.numpy()) for s, value in zip(spec.outputs, found, strict=True)}


def _row(arrays: Mapping[str, Array], number: int) -> dict[str, Array]:
    return {name: array[number : number + 1] if array.ndim else array for name, array in arrays.items()}


def _dtype(name: str) -> str:
    return binding.DTYPES.get(name, name)


def _element(name: str) -> Any:
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def load(folder: Path, manifest: Manifest, threads: int | None = None) -> Graphs:
    return Graphs(folder, manifest, threads)
