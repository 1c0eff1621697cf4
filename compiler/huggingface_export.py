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
from sylvester.compiler.check import ROUNDED, evaluate, relative_error
from sylvester.compiler.driver import trace
from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface import WEIGHTS, load_folder, run_stock
from sylvester.compiler.huggingface_absent import absent_modules, formats_of_absent
from sylvester.compiler.huggingface_names import Naming
from sylvester.compiler.huggingface_parts import DEPTH, SKIPPED, drop
from sylvester.compiler.huggingface_quantized import (
    GUARD,
    KEY,
    METHOD,
    MODULES,
    NOTHING,
    PASSED,
    REFUSED,
    SCALE,
    STEP,
    VERSION,
    WEIGHTS_KEY,
    with_all_parts,
)
from sylvester.compiler.huggingface_sites import untie
from sylvester.compiler.huggingface_skips import ALL, DECODE, KINDS, Skips, acts_on_skips, ordered, write_skips
from sylvester.compiler.program import Program
from sylvester.compiler.quantized_ops import QUANTISED
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
    with aliases in the metadata of the file; rounded weights are stored as the program has them. transformers reads
    such a folder after `import sylvester.transformers`. With `stock` it needs nothing: the file has copies of shared
    tensors, and zeros where a skipped part writes. What transformers makes of the folder is compared with the program.
    Raises `CompileError` for a program that is not from a Hugging Face folder or that a folder cannot say.
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
    plan = _plan(naming, model, skips, aliases)
    if stock:
        _require_float(plan)
        tensors |= naming.copies(tensors, aliases) | naming.zeros(skips.get(ALL, {}))
        aliases = {name: to for name, to in aliases.items() if name not in tensors}
        plan = {}
    tensors, config = _as_stored(tensors, _config(naming, skips, aliases, plan))
    metadata = {"format": "pt"} | {ALIAS_PREFIX + name: to for name, to in sorted(aliases.items())}
    target.mkdir(parents=True, exist_ok=True)
    try:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, target / WEIGHTS, metadata=metadata)
        _copy(program, source, target, model)
        if stock or (plan and not plan.get(REFUSED) and DECODE not in skips):
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
    tied = untie(whole)
    left = whole.clone()
    for phase, wanted in skips.items():
        drop(left, phase, wanted)
    _require_caches(left, program)
    return Naming(model.state_dict(), whole, left, program, tied)


def _require_caches(left: Program, program: Program) -> None:
    """Caches are those of transformers."""
    for name, slot in left.state.items():
        found = program.state.get(name)
        if found is not None and found.dtype != slot.dtype:
            raise CompileError(
                f"the cache {name!r} holds {found.dtype}, the architecture has {slot.dtype}",
                hint="leave out quantize-cache, and options such as Quantize(kv=8): transformers has caches of its own",
            )


def _plan(naming: Naming, model: nn.Module, skips: Skips, aliases: dict[str, str]) -> dict[str, Any]:
    """`quantization_config`; empty where transformers needs no help to run the folder."""
    native = ALL in skips and acts_on_skips(type(model), _written(naming, skips), naming.program.info.get(DEPTH, 0))
    absent = {} if native else absent_modules(naming.whole, model, skips.get(ALL, {}))
    modules = _modules(naming, skips.get(ALL, {}))
    if not modules and not absent and all(naming.tied.get(name) == to for name, to in aliases.items()):
        return {}
    return {"quant_method": METHOD, "version": VERSION, MODULES: modules, NOTHING: {}, PASSED: []} | absent


def _modules(naming: Naming, dropped: dict[str, list[int]]) -> dict[str, Any]:
    """The formats of rounded weights: those that the source has, where they are left, and those of the program."""
    before = naming.program.info["config"].get(KEY, {}).get(MODULES, {})
    names = {key.rpartition(".")[0] for key in naming.left.weights}
    kept = {name: form for name, form in before.items() if name in names}
    made = kept | {name: form.to_dict() for name, (form, _) in naming.sites.quantised.items()}
    return dict(sorted((made | formats_of_absent(naming.whole, dropped, made)).items()))


def _require_float(plan: dict[str, Any]) -> None:
    if modules := plan.get(MODULES):
        raise CompileError(
            f"transformers itself has no layer for the rounded weight of {next(iter(modules))!r}",
            hint="leave out `stock`: `import sylvester.transformers` adds such layers",
        )


def _written(naming: Naming, skips: Skips) -> dict[str, Any]:
    config = with_all_parts(_known(naming.program, "config"))
    return write_skips({k: v for k, v in config.items() if k != KEY}, skips, naming.program.info.get(DEPTH, 0))


def _config(naming: Naming, skips: Skips, aliases: dict[str, str], plan: dict[str, Any]) -> dict[str, Any]:
    """config.json; tensors that the architecture ties and the program has apart are said not to be tied."""
    config = _written(naming, skips)
    if not set(naming.tied) <= set(aliases):
        config |= {"tie_word_embeddings": False}
    return config | ({KEY: plan, WEIGHTS_KEY: GUARD} if plan else {})


def _as_stored(tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """In the half precision of the source, when that holds every value; else in float32.

    Steps and scales of rounded weights stay float32, and so does what is computed with them.
    """
    wanted = config.get("dtype") or config.get("torch_dtype")
    plain = {key: item for key, item in config.items() if key != "torch_dtype"}
    half = HALVES.get(str(wanted))
    floats = {
        n: t for n, t in tensors.items() if t.dtype == torch.float32 and not n.endswith((f".{SCALE}", f".{STEP}"))
    }
    if half is None or not all(torch.equal(t.to(half).to(t.dtype), t) for t in floats.values()):
        return tensors, plain | {"dtype": "float32"}
    dtype = "float32" if config.get(KEY, {}).get(MODULES) else wanted
    return tensors | {name: t.to(half) for name, t in floats.items()}, plain | {"dtype": dtype}


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
    expected = run_stock(folder, program.main.examples)
    most = ROUNDED if program.main.calls(*QUANTISED) else SAME
    found = next(iter(evaluate(program).values()))
    for name in (o.name for o in program.main.outputs if o.kind == "output"):
        error = relative_error(found[name], expected[name])
        if not error < most:
            raise CompileError(
                f"{name!r} of transformers differs by {error:.1e} from the program, expected at most {most:.0e}",
                hint="a skipped part writes more than its last linear layer does: skip other parts",
            )
