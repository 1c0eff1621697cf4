"""Fine-tunes the shipped language model on a new author: in float32, and with 8-bit products by HALO levels 0 and 2.

    python examples/finetune_halo.py [--text FILE.txt] [--steps 150] [--outliers 30] [--out out/halo]

Every run starts from the same weights and sees the same batches. What is done is kept every ten steps: after Ctrl-C
the same command goes on from there.
The folder gets losses.json, loss.svg, and a Hugging Face folder of every run. `--outliers` multiplies a few channels
of the model without changing what it computes, as large models have them: that is what rotations are for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import sylvester as sv
from sylvester.compiler.svg_plot import Series, plot

HERE = Path(__file__).parent
WINDOW, BATCH = 256, 8
HELD_OUT = 0.1
"""The last part of the text, which no run trains on."""
RUNS = ("fp32", "bf16", "level0", "level2", "level2-saved")
"""The last keeps what other layers save for the backward pass in int8 too."""
MEASURE_EVERY = 10
CHANNELS = 3
"""That are multiplied in every block."""


@dataclass
class Run:
    """One fine-tuning and where it is: `losses` are (step, held-out loss), `about` what decides them."""

    name: str
    about: str
    model: nn.Module
    step: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    losses: list[tuple[int, float]]


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, held = split(torch.tensor(tokenizer(options.text.read_text())["input_ids"]))
    print(f"{train.numel()} tokens to train on, {held.numel()} held out, {options.steps} steps of {BATCH * WINDOW}")
    found = {}
    for name in options.runs:
        run = resumed(name, options)
        fine_tune(run, train, held, options)
        run.model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
        found[name] = run.losses
    write(found, options.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=HERE / "data" / "wuthering-heights.txt", help="to learn from")
    parser.add_argument("--model", type=Path, default=HERE / "models" / "novels-7m", help="Hugging Face folder")
    parser.add_argument("--out", type=Path, default=Path("out/halo"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=3e-4, help="of AdamW, after a warm-up, falling to 0")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["fp32", "level0", "level2"])
    parser.add_argument("--format", choices=("int8", "fp8", "int4"), default="int8")
    parser.add_argument("--outliers", type=float, default=0.0, help="factor of a few channels; 0: none")
    options = parser.parse_args()
    if not options.text.is_file():
        parser.error(f"--text {options.text} is no file: give a text to learn from")
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, expected at least 1")
    return options


def split(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [n, WINDOW + 1] to train on, and those of the end."""
    count = (len(ids) - 1) // WINDOW
    if count < 2 * BATCH:
        raise SystemExit(f"the text has {len(ids)} tokens, expected at least {2 * BATCH * WINDOW + 1}")
    windows = torch.stack([ids[n * WINDOW : (n + 1) * WINDOW + 1] for n in range(count)])
    kept = max(1, int(HELD_OUT * count))
    return windows[:-kept], windows[-kept:]


def resumed(name: str, options: argparse.Namespace) -> Run:
    """A run from the start, or from where it stopped."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, use_cache=False)
    if options.outliers:
        inject(model, options.outliers)
    run = Run(
        name,
        about(options),
        model,
        loss_of(name, model, options.format),
        torch.optim.AdamW(model.parameters(), 0.0),
        [],
    )
    path = options.out / f"{name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["about"] != run.about:
            raise SystemExit(f"{path} is of another run, {state['about']}: give another --out, or delete it")
        model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.losses = [(int(step), float(loss)) for step, loss in state["losses"]]
    return run


def about(options: argparse.Namespace) -> str:
    return f"{options.text.name} {options.steps} {options.rate} {options.format} {options.outliers}"


def loss_of(name: str, model: nn.Module, format: str) -> Callable[[Tensor], Tensor]:
    """Windows [rows, WINDOW + 1] -> mean loss. The parameters are those of the model, whatever computes."""
    if name.startswith("level"):
        example = torch.zeros(2, WINDOW, dtype=torch.int64)
        level, saved = int(name[len("level")]), "int8" if name.endswith("saved") else "exact"
        module: nn.Module = sv.halo(model.train(), {"input_ids": example}, level, format, saved=saved)
        print(module.report)
    else:
        module = model

    def loss(windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            logits = module(input_ids=windows[:, :-1]).logits
        return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    return loss


@torch.no_grad()
def inject(model: nn.Module, factor: float) -> None:
    """Channels of the feed-forward part and of values times a factor, undone in the matrix that reads them."""
    for layer in model.model.layers:
        up, down = layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
        value, out = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        copies = out.shape[1] // value.shape[0]
        for channel in range(CHANNELS):
            up[channel] *= factor
            down[:, channel] /= factor
            value[channel] *= factor
            head, place = divmod(channel, layer.self_attn.head_dim)
            for copy in range(copies):
                out[:, (head * copies + copy) * layer.self_attn.head_dim + place] /= factor


def fine_tune(run: Run, train: Tensor, held: Tensor, options: argparse.Namespace) -> None:
    first = run.losses[-1][0] if run.losses else 0
    if not run.losses:
        run.losses.append((0, evaluate(run, held)))
    started = time.time()
    for step, rows in enumerate(batches(len(train), options.steps)):
        if step < first:
            continue
        for group in run.optimizer.param_groups:
            group["lr"] = options.rate * min(1.0, (step + 1) / 10, (options.steps - step) / options.steps)
        loss = run.step(train[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        done = step + 1
        if done % MEASURE_EVERY == 0 or done == options.steps:
            run.losses.append((done, evaluate(run, held)))
            keep(run, options.out)
            pace = (time.time() - started) / (done - first)
            print(
                f"{run.name} step {done}/{options.steps}: loss {loss.item():.3f}, held out {run.losses[-1][1]:.4f}, "
                f"{BATCH * WINDOW / pace:.0f} tokens/s, {(options.steps - done) * pace / 60:.1f} min left",
                flush=True,
            )


def batches(count: int, steps: int) -> Iterator[Tensor]:
    """Rows of each step: every pass over the text in another order."""
    random, waiting = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(waiting) < BATCH:
            waiting = torch.cat([waiting, torch.randperm(count, generator=random)])
        yield waiting[:BATCH]
        waiting = waiting[BATCH:]


@torch.no_grad()
def evaluate(run: Run, held: Tensor) -> float:
    losses = [run.step(part).item() * len(part) for part in held.split(BATCH)]
    return sum(losses) / len(held)


def keep(run: Run, folder: Path) -> None:
    """The state after the last measurement, replaced whole."""
    path = folder / f"{run.name}.pt"
    model, optimizer = run.model.state_dict(), run.optimizer.state_dict()
    state = {"about": run.about, "losses": run.losses, "model": model, "optimizer": optimizer}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def write(found: dict[str, list[tuple[int, float]]], folder: Path) -> None:
    (folder / "losses.json").write_text(json.dumps(found, indent=1))
    curves = [Series(name, tuple((float(s), loss) for s, loss in losses), True) for name, losses in found.items()]
    (folder / "loss.svg").write_text(plot(curves, "step", "held-out loss"))
    for name, losses in found.items():
        print(f"{name:8} {losses[0][1]:.4f} -> {losses[-1][1]:.4f}")
    print(f"curves: {folder / 'loss.svg'}")


if __name__ == "__main__":
    main()
