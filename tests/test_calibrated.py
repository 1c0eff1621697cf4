"""Quantize with calibration data: fitted layers, figures, static scales, what is kept of interrupted runs, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sylvester as sv
from sylvester.compiler import knobs
from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.finished import KIND
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report, silent, watching
from sylvester.compiler.quantization import round_weight
from sylvester.compiler.quantized_rows import LARGEST
from sylvester.compiler.store import store
from sylvester.passes.quantize import Quantize
from tests import zoo
from tests.programs import ops, program


def chain(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
    y = torch.tanh(F.linear(x, a, bias))
    return F.linear(torch.tanh(F.linear(y, b)) * torch.sigmoid(F.linear(y, c)), a)


def correlated(rows: int, k: int = 64) -> Tensor:
    mix = torch.randn(k // 4, k, generator=torch.Generator().manual_seed(1)) / (k // 4) ** 0.5
    return torch.randn(rows, k // 4) @ mix + 0.05 * torch.randn(rows, k)


def calibrated(function=chain, names: str = "abc") -> Program:
    weights = {name: torch.randn(64, 64) / 8 for name in names} | {"bias": torch.randn(64)}
    made = program(function, torch.randn(2, 3, 64), weights=weights)
    made.calibration = Calibration(tuple({"x0": correlated(40)[None]} for _ in range(5)))
    return made


def quantized(made: Program, step: Quantize) -> tuple[Program, Changes]:
    after, ledger = Pipeline((step,)).run(made)
    return after, ledger.rows[0].changes


def error(made: Program, after: Program) -> float:
    """On data that was not fitted to."""
    x = {"x0": correlated(300)[None]}
    found, expected = (p.run("forward", x)["y0"].double() for p in (after, made))
    return float((found - expected).norm() / expected.norm())


def straight(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
    y = torch.tanh(F.linear(x, a, bias))
    return torch.tanh(F.linear(y, b)) * torch.sigmoid(F.linear(y, c))


@pytest.mark.parametrize("weights", [4, 3])
def test_gptq_moves_the_outputs_less(weights: int) -> None:
    made = calibrated(straight)

    errors = {m: error(made, quantized(made, Quantize(weights, method=m))[0]) for m in ("rtn", "mse", "gptq")}

    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["gptq"] < 0.8 * errors["mse"]


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("activations", [16, 8, 4])
def test_figures_say_what_each_layer_lost(method: str, activations: int) -> None:
    made = calibrated(straight)

    _, changes = quantized(made, Quantize(4, activations, method=method))

    assert [(f.where, f.name) for f in changes.figures] == [(k, n) for k in "abc" for n in ("sqnr dB", "max/rms")]
    sqnr = {f.where: f.value for f in changes.figures if f.name == "sqnr dB"}
    rows = torch.cat([s["x0"][0] for s in made.calibration.fit])
    peak = float(rows.abs().max() / rows.square().mean().sqrt())
    assert changes.figures[1].value == pytest.approx(peak, rel=1e-5)
    assert all((10 if activations == 4 else 17) < value < 45 for value in sqnr.values())


def test_the_figure_of_a_layer_is_that_of_its_op() -> None:
    made = calibrated(straight)

    after, changes = quantized(made, Quantize(4))

    x, w = torch.cat([s["x0"][0] for s in made.calibration.fit]), made.weights["a"]
    y = F.linear(x.double(), w.double())
    found = dialect.linear_w4(x, after.weights["a.int4"], after.weights["a.scales"])
    expected = 10 * torch.log10(y.square().sum() / (found - y).square().sum())
    assert changes.figures[0].value == pytest.approx(float(expected), abs=0.01)


def test_later_layers_see_what_earlier_ones_lost() -> None:
    """The inputs of the second layer come through the rounded first one."""
    made = calibrated(straight)
    _, exact = quantized(made, Quantize(3, 16, method="gptq", per_layer={"a": "float"}))
    after, rough = quantized(made, Quantize(3, 4, method="gptq", per_layer={"b": 8, "c": 8}))

    def peak(changes: Changes) -> float:
        return next(f.value for f in changes.figures if (f.where, f.name) == ("b", "max/rms"))

    inputs = [
        torch.tanh(
            dialect.linear_w3(s["x0"], after.weights["a.int3"], after.weights["a.scales"], made.weights["bias"], 4)
        )
        for s in made.calibration.fit
    ]
    rows = torch.cat([x[0] for x in inputs])
    assert peak(rough) == pytest.approx(float(rows.abs().max() / rows.square().mean().sqrt()), rel=1e-4)
    assert peak(rough) != pytest.approx(peak(exact), rel=1e-4)


def test_a_weight_that_is_read_twice_is_rounded_once() -> None:
    made = calibrated()

    after, changes = quantized(made, Quantize(4, method="gptq", static=True))

    assert changes.counts() == {"linear": 3}
    assert len(after.main.calls(dialect.linear_w4.target)) == 4
    assert changes.notes == [
        "a is read more than once: a scale per row instead of a static one",
        "a is read more than once: fitted to the inputs of its first layer",
    ]
    assert error(made, after) < 0.2


def test_a_layer_that_shares_a_table_has_no_static_scale() -> None:
    ids = torch.randint(11, (2, 5))
    tied = program(lambda x, table: F.linear(F.embedding(x, table), table), ids, weights={"table": torch.randn(11, 64)})
    tied.calibration = Calibration(({"x0": ids},))

    after, changes = quantized(tied, Quantize(8, static=True))

    assert changes.notes == ["table is an embedding too: a scale per row instead of a static one"]
    assert sorted(after.weights) == ["table.int8", "table.scales"]


@pytest.mark.parametrize("activations", [8, 4])
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_static_scales_come_from_calibration(activations: int, method: str) -> None:
    made = calibrated(straight)

    after, _ = quantized(made, Quantize(8, activations, method=method, static=True))

    assert sorted(k for k in after.weights if "step" in k) == ["a.step", "b.step"]
    most = max(float(s["x0"].abs().max()) for s in made.calibration.fit) / LARGEST[activations]
    step = after.weights["a.step"]
    assert (step.dtype, step.shape) == (torch.float32, (1,))
    assert float(step) == pytest.approx(most, rel=1e-6) if method == "rtn" else 0.2 * most < float(step) <= most
    first, *others = after.main.calls(dialect.linear_w8.target)
    assert {node.args[5].meta["bind"].key for node in others} == {"b.step"}
    assert first.args[5].meta["bind"].key == "a.step"
    assert error(made, after) < (0.02 if activations == 8 else 0.35)
    if method == "mse" and activations == 4:
        widest, _ = quantized(made, Quantize(8, 4, static=True))
        assert error(made, after) < error(made, widest)


@pytest.mark.parametrize(
    ("step", "what"),
    [
        (Quantize(method="gptq"), "method='gptq'"),
        (Quantize(static=True), "static=True"),
        (Quantize(method="gptq", static=True), "method='gptq' and static=True"),
    ],
)
def test_missing_calibration(step: Quantize, what: str) -> None:
    made = calibrated()
    for made.calibration in (None, Calibration(())):
        with pytest.raises(CompileError, match=f"{what} needs calibration data\n(.*\n)*hint: compile"):
            Pipeline((step,)).run(made)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_calibration_with_nan(method: str) -> None:
    made = calibrated()
    made.calibration.fit[3]["x0"][0, 5, 7] = torch.nan

    with pytest.raises(CompileError, match="calibration sample 3 gives the layer of 'a' inputs that are not finite"):
        quantized(made, Quantize(method=method))


def test_an_input_that_samples_lack() -> None:
    made = calibrated()
    made.calibration = Calibration(({"y": torch.zeros(1, 2, 64)},))

    with pytest.raises(CompileError, match="a calibration sample has no 'x0'"):
        quantized(made, Quantize())


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(knobs.REUSE.name, "1")
    monkeypatch.setenv(knobs.CACHE.name, str(tmp_path))


def interrupted_at(done: int):
    def watch(stage: str, finished: int, total: int) -> None:
        if finished == done:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("method", ["mse", "gptq"])
@pytest.mark.usefixtures("keeping")
def test_an_interrupted_run_goes_on(method: str) -> None:
    made, step = calibrated(straight), Quantize(4, method=method)
    with pytest.raises(KeyboardInterrupt), watching(interrupted_at(2)):
        step.run(made.clone())
    assert len(store(KIND).sizes()) == 2

    after, changes = quantized(made, step)

    assert changes.notes == ["reused 2 of 3 layers of an earlier run"]
    again, changes = quantized(made, step)
    assert changes.notes == ["reused 3 of 3 layers of an earlier run"]
    for found in (again, quantized_anew(made, step)):
        assert set(found.weights) == set(after.weights)
        assert all(found.weights[k].equal(after.weights[k]) for k in after.weights)


def quantized_anew(made: Program, step: Quantize) -> Program:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(knobs.REUSE.name, "0")
        after, changes = quantized(made, step)
    assert not changes.notes
    return after


@pytest.mark.usefixtures("keeping")
def test_what_decides_the_fit_decides_what_is_reused() -> None:
    made, step = calibrated(straight), Quantize(4, method="gptq")
    quantized(made, step)

    def reused(other: Program, step: Quantize = step) -> list[str]:
        return quantized(other, step)[1].notes

    assert reused(made, Quantize(4, method="gptq", group=64)) == []
    assert reused(made, Quantize(4, method="mse")) == []
    for change in ("sample", "unrounded", "rounded"):
        other = made.clone()
        if change == "sample":
            other.calibration = Calibration((*made.calibration.fit[:4], {"x0": correlated(40)[None]}))
        else:
            key = "bias" if change == "unrounded" else "a"
            other.weights[key] = other.weights[key] * 1.5
        assert reused(other) == []
    static = Quantize(4, 8, method="gptq", static=True)
    assert reused(made, static) == []
    short = Quantize(4, method="gptq", per_layer={"a": 16})
    for factor in (1.0, 1.5):
        other = made.clone()
        other.weights["a"] = other.weights["a"] * factor
        assert reused(other, short) == []
    last = made.clone()
    last.weights["c"] = last.weights["c"] * 1.5
    assert reused(last) == ["reused 2 of 3 layers of an earlier run"]


@pytest.mark.usefixtures("keeping")
def test_a_damaged_layer_is_rounded_anew() -> None:
    made, step = calibrated(straight), Quantize(4, method="mse")
    after, _ = quantized(made, step)
    for path in store(KIND).folder.glob("[!.]*/*"):
        path.write_bytes(path.read_bytes()[:-7])

    again, changes = quantized(made, step)

    assert changes.notes == []
    assert all(again.weights[k].equal(after.weights[k]) for k in after.weights)


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("knob", [(knobs.REUSE, "0"), (knobs.CACHE_SIZE, "0")], ids=lambda knob: knob[0].name)
def test_nothing_is_kept_with_reuse_off(knob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(knob[0].name, knob[1])
    made = calibrated(straight)

    for _ in range(2):
        assert quantized(made, Quantize(4, method="mse"))[1].notes == []
    assert not store(KIND).folder.exists()


def test_progress_of_each_layer() -> None:
    seen: list[tuple[str, int, int]] = []
    with watching(lambda *step: seen.append(step)):
        Quantize(4, method="mse").run(calibrated(straight))
        report("outside", 0, 1)
    report("nobody", 0, 1)

    assert seen == [*(("quantize layer", i, 3) for i in range(4)), ("outside", 0, 1)]
    silent("nobody", 0, 1)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "t5"])
def test_models_of_the_zoo_are_fitted(name: str) -> None:
    case = zoo.case(name)
    made = sv.trace(case.model, case.inputs)
    inputs = {k: v for k, v in made.main.examples.items()}
    made.calibration = Calibration((inputs, inputs))

    after, ledger = Pipeline((Quantize(8, 8, method="gptq", per_layer={"*.0.*": "w8a16"}),)).run(made)

    changes = ledger.rows[0].changes
    applied = [a for a in changes.applied if a.rule != "embedding"]
    assert len(applied) > 8
    assert all(f.value > 25 for f in changes.figures if f.name == "sqnr dB")
    assert ledger.rows[0].measured[0].error < 0.2
    assert "aten.linear" not in {op for entry in after.entries for op in ops(after, entry)} or changes.refused


def test_the_cpu_runs_what_was_fitted() -> None:
    case = zoo.case("llama-tied")
    made = sv.trace(case.model, case.inputs)
    made.calibration = Calibration((dict(case.inputs),))
    step = Quantize(4, 8, method="gptq", static=True, per_layer={"lm_head*": 8, "*.1.*": "w3a16"})

    found = {}
    for target in ("reference", sv.Target("cpu", isas=("avx2",))):
        with sv.compile(made, target=target, passes=(step,)) as compiled:
            found[str(target)] = torch.as_tensor(compiled(**case.inputs).logits)
            assert compiled.manifest.passes == (str(step),)

    first, second = found.values()
    assert float((first - second).norm() / first.norm()) < 0.02


def test_both_numbers_and_scales_without_data_are_those_of_the_weight_alone() -> None:
    made = calibrated(straight)

    after, _ = quantized(made, Quantize(4))

    numbers, scales = round_weight(made.weights["b"], 4, 32)
    assert after.weights["b.int4"].equal(numbers)
    assert after.weights["b.scales"].equal(scales)


@pytest.mark.parametrize("step", [Quantize(16), Quantize(8), Quantize(4, method="gptq")])
def test_a_layer_may_read_a_vector(step: Quantize) -> None:
    made = program(F.linear, torch.randn(64), weights={"a": torch.randn(48, 64) / 8})
    made.calibration = Calibration(tuple({"x0": torch.randn(64)} for _ in range(4)))
    after, _ = quantized(made, step)
    x = {"x0": torch.randn(64)}
    before, found = (p.run("forward", x)["y0"] for p in (made, after))

    assert found.shape == (48,)
    assert float((found - before).norm() / before.norm()) < (0.02 if step.weights > 4 else 0.3)
