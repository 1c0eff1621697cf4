"""Target `dot`: every entry as a drawing for Graphviz; what runs is the reference, in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from sylvester.backends.reference import Reference
from sylvester.backends.reference import load as load
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.target import Target


class Dot(Reference):
    name: ClassVar[str] = "dot"

    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        graph = program.to_networkx()
        for entry in program.entries:
            ours = [key for key, data in graph.nodes(data=True) if data["entry"] == entry]
            lines = [f"{json.dumps(key)} [label={json.dumps(graph.nodes[key]['op'])}];" for key in ours]
            lines += [f"{json.dumps(a)} -> {json.dumps(b)};" for a, b, _ in graph.subgraph(ours).edges]
            (folder / f"{entry}.dot").write_text("digraph {\n" + "\n".join(lines) + "\n}\n", encoding="utf-8")
        return super().build(program, target, folder, progress)
