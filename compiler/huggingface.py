"""Load a Hugging Face folder from disk: the model in float32, example inputs made from its config, facts about it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface_parts import plan_skips, tie
from sylvester.compiler.huggingface_quantized import KEY, is_ours, with_all_parts
from sylvester.compiler.inputs import Tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
BATCH, LENGTH, TARGET_LENGTH, SAMPLES = 2, 11, 7, 8000


def load_folder(path: str | Path, *, whole: bool = False) -> tuple[nn.Module, Tensors, dict[str, Any]]:
    """The model of a folder with config.json and safetensors weights, example inputs, `facts_of` it plus `tokenizer`.

    Parts of layers that the config skips are in the model where its class does not leave them out, or with `whole`;
    `skips` in the facts says which are to be dropped, and `absent` which weights have no values. `source` and `config`
    say where the model is from. Nothing is downloaded and no code of the folder is run. Raises `CompileError`.
    """
    folder = Path(path)
    config = _read_json(folder / "config.json", "a Hugging Face folder has one")
    _check_files(folder)
    if KEY in config and not is_ours(config):
        raise CompileError(f"the weights in {str(folder)!r} are quantized", hint="give the full-precision checkpoint")
    model, skipped = _load(folder, config, whole)
    info = facts_of(model) | skipped | {"source": str(folder.resolve()), "config": config}
    tokenizer = folder / "tokenizer.json"
    info["tokenizer"] = str(tokenizer) if tokenizer.exists() else None
    return model.eval(), example_inputs(model), info


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    if not path.exists():
        raise CompileError(f"there is no {path.name} in {str(path.parent)!r}", hint=hint)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompileError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CompileError(f"{str(path)!r} holds a {type(data).__name__}, expected an object")
    return data


def _check_files(folder: Path) -> None:
    """Weights must be there as safetensors, and every shard that the index names."""
    if (folder / INDEX).exists():
        shards = _shards(folder / INDEX)
        if missing := [name for name in shards if not (folder / name).exists()]:
            raise CompileError(f"missing weight files {missing} of {len(shards)} in {str(folder)!r}")
        return
    if (folder / WEIGHTS).exists():
        return
    if any((folder / name).exists() for name in PICKLES):
        hint = "pickles can run code; load them where you trust them and call save_pretrained(folder)"
        raise CompileError(f"the weights in {str(folder)!r} are pickles, expected {WEIGHTS}", hint=hint)
    raise CompileError(f"there is no {WEIGHTS} in {str(folder)!r}", hint="download the weights along with config.json")


def _shards(index: Path) -> list[str]:
    """The weight files that an index names: files of its own folder."""
    places = _read_json(index, "").get("weight_map")
    if not isinstance(places, dict):
        found = type(places).__name__
        raise CompileError(f"`weight_map` of {str(index)!r} is a {found}, expected an object of file names")
    names = list(places.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CompileError(f"{str(index)!r} names the file {name!r}, expected one in the same folder")
    return sorted(set(names))


def _load(folder: Path, config: dict[str, Any], whole: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what its config skips; parts are dropped from the graph, so all of them are loaded."""
    with _silent() as transformers:
        cls = _architecture(transformers, config)
        whole_config = with_all_parts(config)
        plan = plan_skips(cls, whole_config, whole)
        if is_ours(config) and "config" not in plan.options:
            plan.options["config"] = cls.config_class.from_dict(whole_config)
        model, report = _from_pretrained(cls, folder, ignore_mismatched_sizes=True, **plan.options)
    missing = tie(model, folder, report["missing_keys"])
    _check_report(folder, report, [] if plan.incomplete else missing)
    return cast(nn.Module, model), plan.facts(missing)


def _from_pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    """The model in float32 and the report of what was loaded."""
    if is_ours(_read_json(folder / "config.json", "")):
        import sylvester.compiler.huggingface_quantizer  # noqa: F401  (registers the loader)
    try:
        return cls.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            attn_implementation=_attention(cls), output_loading_info=True, **options,
        )  # fmt: skip
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(f"cannot load {str(folder)!r}: {_first_line(error)}") from error


def run_stock(folder: Path, inputs: Tensors) -> Any:
    """What transformers computes with a folder, as a user of it would."""
    with _silent() as transformers:
        cls = _architecture(transformers, _read_json(folder / "config.json", ""))
        model = _from_pretrained(cls, folder)[0].eval()
    with torch.no_grad():
        return model(**inputs)


def _attention(cls: Any) -> str:
    """One op where the architecture has it; written out where it has not, as with capped scores."""
    return "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"


def _architecture(transformers: Any, config: dict[str, Any]) -> Any:
    """The class that the config names, else the base model of its type."""
    names = config.get("architectures") or []
    if not names:
        return transformers.AutoModel
    cls = getattr(transformers, names[0], None)
    if cls is None:
        hint = f"transformers {transformers.__version__} does not have it; code that comes with a model is never run"
        raise CompileError(f"unknown architecture {names[0]!r}", hint=hint)
    return cls


def _check_report(folder: Path, report: dict[str, Any], missing: list[str]) -> None:
    if missing:
        raise CompileError(f"the weights in {str(folder)!r} lack {len(missing)} tensors, the first is {missing[0]!r}")
    for key, found, expected in sorted(report["mismatched_keys"], key=str):
        raise CompileError(f"weight {key!r} is {list(found)}, the config makes it {list(expected)}")


@contextlib.contextmanager
def _silent() -> Iterator[Any]:
    """transformers without progress bars and log lines; its settings are put back."""
    try:
        import transformers
    except ImportError as error:
        hint = "pip install 'sylvester[hf]'"
        raise CompileError("reading a Hugging Face folder needs transformers", hint=hint) from error
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield transformers
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def facts_of(model: nn.Module) -> dict[str, Any]:
    """`kind`, `max_length` and `eos_token_ids` of a model with a Hugging Face config; nothing for any other."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return {}
    kind = _kind(model, config)
    facts: dict[str, Any] = {"kind": kind, "architecture": type(model).__name__}
    if (length := _max_length(model, _text(config))) and kind in ("causal-lm", "encoder"):
        facts["max_length"] = length
    if kind in ("causal-lm", "seq2seq"):
        facts["eos_token_ids"] = _eos(model, config)
    return facts


def _kind(model: nn.Module, config: Any) -> str:
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        return "image"
    if main in ("input_features", "input_values"):
        return "audio"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq" if hasattr(model, "decoder") or hasattr(model, "model") else "encoder"
    return "causal-lm" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _max_length(model: nn.Module, config: Any) -> int | None:
    """The longest sequence; position tables that start after a padding row hold fewer positions than rows."""
    length = next((n for name in LENGTHS if isinstance(n := getattr(config, name, None), int)), None)
    if length is None:
        return None
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == length]
    padded = [t.padding_idx + 1 for t in tables if t.padding_idx is not None and t.num_embeddings != config.vocab_size]
    return length - max(padded, default=0)


def _eos(model: nn.Module, config: Any) -> list[int]:
    for source in (getattr(model, "generation_config", None), config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def example_inputs(model: nn.Module) -> Tensors:
    """Seeded inputs that fit the config, with distinct sizes above 1."""
    config: Any = model.config
    random = torch.Generator().manual_seed(0)
    match _kind(model, config):
        case "image":
            return {"pixel_values": torch.randn(_image_shape(config), generator=random)}
        case "audio":
            return _audio(model, config, random)
        case "seq2seq":
            source, target = _tokens(config, LENGTH, random), _tokens(config, TARGET_LENGTH, random)
            return {"input_ids": source, "decoder_input_ids": target}
        case kind:
            length = min(LENGTH, _max_length(model, _text(config)) or LENGTH)
            ids = {"input_ids": _tokens(config, length, random)}
            return ids if kind == "causal-lm" else ids | {"attention_mask": _mask(length)}


def _tokens(config: Any, length: int, random: torch.Generator) -> Tensor:
    return torch.randint(_text(config).vocab_size, (BATCH, length), generator=random)


def _mask(length: int) -> Tensor:
    """All tokens but the last of the first row count."""
    mask = torch.ones((BATCH, length), dtype=torch.int64)
    mask[0, -1] = 0
    return mask


def _image_shape(config: Any) -> tuple[int, ...]:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return (BATCH, getattr(config, "num_channels", 3), height, width)


def _audio(model: nn.Module, config: Any, random: torch.Generator) -> Tensors:
    if getattr(model, "main_input_name", "") == "input_values":
        return {"input_values": torch.randn((BATCH, SAMPLES), generator=random)}
    frames = 2 * getattr(config, "max_source_positions", 1500)
    features = {"input_features": torch.randn((BATCH, config.num_mel_bins, frames), generator=random)}
    decodes = getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_decoder")
    return features | ({"decoder_input_ids": _tokens(config, TARGET_LENGTH, random)} if decodes else {})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
