"""A program as a Hugging Face folder: config.json with the skip schema, and the weights that are left, each once.

The architecture is captured again from the folder the program was made from and walked beside the program, so that
every stored tensor gets the name it has there, and whatever does not fit is found and named.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sylvester.compiler.artefact import check_destination
from sylvester.compiler.check import evaluate, relative_error
from sylvester.compiler.driver import trace
from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface import WEIGHTS, load_folder
from sylvester.compiler.huggingface_names import Naming
from sylvester.compiler.huggingface_parts import DEPTH, SKIPPED, drop
from sylvester.compiler.huggingface_skips import ALL, DECODE, KINDS, Skips, ordered, write_skips
from sylvester.compiler.program import Program
from sylvester.compiler.weights import ALIAS_PREFIX

KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
"""Files of the source folder that stay as they are."""
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SAME = 1e-4


def export(program: Program, folder: str | Path, *, stock: bool = False) -> Path:
    """Write the folder; returns its path.

    Skipped parts are left out of model.safetensors and listed in `per_layer_config`; shared tensors are stored once,
    with aliases in the metadata of the file. transformers itself builds every layer and knows no aliases: with `stock`
    the file has copies of shared tensors, and zeros where a skipped part writes, so that it computes the same.
    Raises `CompileError` for a program that is not from a Hugging Face folder or no longer fits its architecture.
    """
    target, source = Path(folder), Path(_known(program, "source"))
    _require_empty(target)
    skips = _skips(program)
    _require_stock(stock, skips)
    model, _, info = load_folder(source, whole=True)
    if info["config"] != _known(program, "config"):
        raise CompileError(f"the config in {str(source)!r} is not that of the program", hint="trace the folder again")
    naming = _naming(program, model, skips)
    tensors, aliases = naming.stored()
    if stock:
        tensors |= naming.copies(tensors, aliases) | naming.zeros(skips.get(ALL, {}))
        aliases = {name: to for name, to in aliases.items() if name not in tensors}
    config = write_skips(_known(program, "config"), skips, program.info.get(DEPTH, 0))
    tensors, config = _as_stored(tensors, config)
    metadata = {"format": "pt"} | {ALIAS_PREFIX + name: to for name, to in sorted(aliases.items())}
    target.mkdir(parents=True, exist_ok=True)
    try:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, target / WEIGHTS, metadata=metadata)
        _copy(program, source, target, model)
        if stock:
            _require_same(program, target)
    except BaseException:
        shutil.rmtree(target)
        raise
    return target


def _known(program: Program, key: str) -> Any:
    if key not in program.info:
        hint = "sv.trace(folder) keeps what an export needs"
        raise CompileError("the program was not made from a Hugging Face folder", hint=hint)
    return program.info[key]


def _require_empty(folder: Path) -> None:
    check_destination(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise CompileError(f"{str(folder)!r} is not empty", hint="choose an empty folder")


def _require_stock(stock: bool, skips: Skips) -> None:
    if stock and skips.get(DECODE):
        raise CompileError(
            f"transformers cannot skip {skips[DECODE]} in decoding only",
            hint="leave out `stock`, or skip with phase='all'",
        )


def _skips(program: Program) -> Skips:
    """What the program lacks; a part that is gone for good is not listed for decoding too."""
    skipped: Skips = program.info.get(SKIPPED, {})
    for kind, numbers in ((kind, n) for kinds in skipped.values() for kind, n in kinds.items()):
        if kind not in KINDS.values():
            raise CompileError(f"the schema cannot say that {kind} of layers {numbers} is skipped")
    gone = skipped.get(ALL, {})
    later = {kind: set(n) - set(gone.get(kind, ())) for kind, n in skipped.get(DECODE, {}).items()}
    return ordered({ALL: gone, DECODE: later})


def _naming(program: Program, model: nn.Module, skips: Skips) -> Naming:
    """The architecture captured as the program was, before and after the same parts are dropped."""
    whole = trace(model, dict(program.main.examples))
    whole.info[DEPTH] = program.info.get(DEPTH, 0)
    left = whole.clone()
    for phase, wanted in skips.items():
        drop(left, phase, wanted)
    return Naming(model.state_dict(), whole, left, program)


def _as_stored(tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """In the half precision of the source, when that holds every value; else in float32."""
    wanted = config.get("dtype") or config.get("torch_dtype")
    plain = {key: item for key, item in config.items() if key != "torch_dtype"}
    half = HALVES.get(str(wanted))
    if half is None or not all(torch.equal(t.to(half).to(t.dtype), t) for t in tensors.values()):
        return tensors, plain | {"dtype": "float32"}
    return {name: t.to(half) if t.is_floating_point() else t for name, t in tensors.items()}, plain | {"dtype": wanted}


def _copy(program: Program, source: Path, target: Path, model: nn.Module) -> None:
    """Tokenizer and defaults of generation."""
    found = {name: source / name for name in KEPT if (source / name).is_file()}
    if program.info.get("tokenizer"):
        found.setdefault("tokenizer.json", Path(program.info["tokenizer"]))
    for name, path in found.items():
        shutil.copyfile(path, target / name)
    defaults: Any = getattr(model, "generation_config", None)
    if defaults is not None and "generation_config.json" not in found:
        defaults.save_pretrained(target)


def _require_same(program: Program, folder: Path) -> None:
    """What transformers makes of the folder computes what the program computes, on its examples."""
    model, _, _ = load_folder(folder, whole=True)
    with torch.no_grad():
        expected = model(**program.main.examples)
    found = next(iter(evaluate(program).values()))
    for name in (o.name for o in program.main.outputs if o.kind == "output"):
        error = relative_error(found[name], expected[name])
        if not error < SAME:
            raise CompileError(
                f"{name!r} of transformers differs by {error:.1e} from the program, expected at most {SAME:.0e}",
                hint="a skipped part writes more than its last linear layer does: leave out `stock`",
            )
