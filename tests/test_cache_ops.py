"""Quantised caches: records by hand and within error bounds, the pass and what it refuses, decoding on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sylvester as sv
from sylvester.backends import cpu_runtime
from sylvester.backends.cpu import Cpu
from sylvester.compiler.cache_ops import (
    BITS,
    attention_q,
    dequantize_records,
    kv_update_q,
    quantize_records,
    record_bytes,
)
from sylvester.compiler.causal_lm import chunked_error
from sylvester.compiler.check import random_state
from sylvester.compiler.ops import attention, hadamard, kv_update
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.progress import silent
from sylvester.compiler.target import Target
from sylvester.passes.quantize_cache import QuantizeCache
from tests import zoo
from tests.kernel_harness import supported
from tests.programs import program, reasons
from tests.test_bf16_cache import CAPACITY, HEADS, WIDTH, arrays, cached, operands

OTHER = "the other operand of its attention is no such cache, expected keys and values alike"
FASTEST = (supported()[-1].name,)
FEATURES = (1, 7, 16, 33, 64, 65, 128, 150)


def test_a_record_of_int8() -> None:
    found = quantize_records(torch.tensor([127.0, -127.0, 2.5, 3.5, -0.4]), 8)

    assert found.numpy()[:4].view(np.float32).tolist() == [1.0]
    assert found.numpy()[4:].view(np.int8).tolist() == [127, -127, 2, 4, *[0] * 12]


def test_a_record_of_int4() -> None:
    x = torch.zeros(70)
    x[:4], x[17], x[64:] = torch.tensor([-4.0, 11.0, 0.5, 1.5]), 2.0, torch.tensor([1.0, 16.0, 8, 8, 8, 8])

    found = quantize_records(x, 4).numpy()

    scales = (found[:8].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert scales.tolist() == [1.0, -4.0, 1.0, 1.0]
    numbers = found[8:].reshape(3, 16)
    assert numbers[0, :4].tolist() == [0x40, 0x6F, 0x44, 0x46]
    assert numbers[2].tolist() == [0, 15, 7, 7, 7, 7, *[0] * 10]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("d", FEATURES)
def test_errors_are_within_half_a_step(d: int, bits: int) -> None:
    x = torch.randn(50, d) * torch.logspace(-6, 6, 50)[:, None] + torch.linspace(-1, 1, 50)[:, None]

    records = quantize_records(x, bits)

    assert records.dtype == torch.uint8
    assert records.shape == (50, record_bytes(d, bits))
    error = (dequantize_records(records, d, bits) - x).abs()
    for part, wrong in zip(x.split(64, -1), error.split(64, -1), strict=True):
        span = x.abs().amax(-1) / 127 if bits == 8 else (part.amax(-1) - part.amin(-1)) / 15
        rounded = part.abs().amax(-1) * (2**-23 if bits == 8 else 2**-8)
        assert (wrong.amax(-1) <= span * 0.505 + rounded).all()


@pytest.mark.parametrize("bits", BITS)
def test_rows_that_are_special(bits: int) -> None:
    x = torch.randn(6, 40)
    x[0], x[1, 3], x[2, 0], x[3, 39], x[4] = 0, torch.nan, torch.inf, -torch.inf, 2

    records = quantize_records(x, bits)

    assert not records[0].any()
    found = dequantize_records(records, 40, bits)
    assert not dequantize_records(torch.zeros_like(records), 40, bits).any()
    assert found[1:4].isnan().all()
    torch.testing.assert_close(found[4], x[4])


def test_bytes_of_records() -> None:
    assert [record_bytes(d, 8) for d in (1, 16, 17, 64, 128)] == [20, 20, 36, 68, 132]
    assert [record_bytes(d, 4) for d in (1, 32, 33, 64, 65, 128, 256)] == [20, 20, 36, 36, 56, 72, 144]
    with pytest.raises(ValueError, match=r"numbers of 3 bits, expected one of \(8, 4\)"):
        record_bytes(64, 3)


def test_records_of_another_width_are_refused() -> None:
    q, records = torch.randn(1, 1, 1, 64), torch.zeros(1, 1, 3, 68, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"of 68, expected torch.uint8 of 36 bytes for 64 features"):
        attention_q(q, records, records, None, None, 0.1, False, 0, 0.0, 4)
    with pytest.raises(ValueError, match=r"records are torch.float32 of 68"):
        dequantize_records(records.float(), 64, 8)


@pytest.mark.parametrize("bits", BITS)
def test_ops_are_those_over_what_records_hold(bits: int) -> None:
    q, new, past = torch.randn(2, 4, 3, 20), torch.randn(2, 2, 3, 20), torch.tensor(5)
    cache = quantize_records(torch.randn(2, 2, 9, 20), bits)

    written = kv_update_q(cache, new, past, bits)

    assert written[:, :, :5].equal(cache[:, :, :5])
    assert written[:, :, 8:].equal(cache[:, :, 8:])
    rows = dequantize_records(quantize_records(new, bits), 20, bits)
    wide = kv_update(dequantize_records(cache, 20, bits), rows, past)
    assert dequantize_records(written, 20, bits).equal(wide)
    found = attention_q(q, written, cache, None, past, 0.3, True, 4, 2.0, bits)
    assert found.equal(attention(q, wide, dequantize_records(cache, 20, bits), None, past, 0.3, True, 4, 2.0))


def scores_error(x: Tensor, y: Tensor, v: Tensor, k: Tensor) -> float:
    """Relative error of attention with keys in int4, over queries x and keys y of the exact attention (q, k)."""
    exact = attention(x, k, v, None, None, 0.125, True, 0)
    rounded = dequantize_records(quantize_records(y, 4), 64, 4)
    return float((attention(x, rounded, v, None, None, 0.125, True, 0) - exact).norm() / exact.norm())


@pytest.mark.parametrize("seed", range(3))
def test_a_hadamard_transform_saves_int4_keys_from_outlier_channels(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 4, 64, 64, generator=random) for _ in range(3))
    outliers = torch.randperm(64, generator=random)[:3]
    q[..., outliers] /= 10
    k[..., outliers] *= 10

    plain = scores_error(q, k, v, k)
    turned = [hadamard(x, 64) for x in (q, k)]
    exact = attention(*turned, v, None, None, 0.125, True, 0)

    torch.testing.assert_close(exact, attention(q, k, v, None, None, 0.125, True, 0), rtol=1e-4, atol=1e-5)
    assert scores_error(*turned, v, turned[1]) <= 0.7 * plain


@pytest.fixture(scope="module")
def language_model() -> Program:
    case = zoo.case("llama-tied")
    return sv.trace(case.model, case.inputs)


@pytest.mark.parametrize(("bits", "allowed"), [(8, 2e-2), (4, 4e-1)])
def test_the_pass_on_a_language_model(language_model: Program, bits: int, allowed: float) -> None:
    after, ledger = Pipeline((QuantizeCache(bits),)).run(language_model)

    d = int(language_model.state["k0"].shape[-1])
    assert {(s.dtype, s.shape[-1]) for s in after.state.values()} == {(torch.uint8, record_bytes(d, bits))}
    assert ledger.rows[0].changes.counts() == {"cache": len(after.state)}
    sizes = f"a row of {d} features takes {record_bytes(d, bits)} bytes instead of {4 * d}"
    assert ledger.rows[0].changes.notes == [sizes]
    for name, entry in after.entries.items():
        old = language_model.entries[name]
        assert len(entry.calls(kv_update_q.target)) == len(old.calls(kv_update.target)) == len(after.state)
        reads = entry.calls(attention_q.target)
        assert len(reads) == (len(after.state) // 2 if name == "decode" else 0)
        assert len(reads) + len(entry.calls(attention.target)) == len(old.calls(attention.target))
    prefill, decode = ledger.rows[0].measured
    assert prefill.error == 0.0
    assert 0 < decode.error < allowed
    tokens = language_model.main.examples["input_ids"]
    assert 0 < chunked_error(after, tokens, (4, 1, tokens.shape[1] - 5)) < allowed


@pytest.mark.parametrize("bits", BITS)
def test_a_saved_program_and_its_random_records(language_model: Program, bits: int, tmp_path: Path) -> None:
    made, _ = Pipeline((QuantizeCache(bits),)).run(language_model)
    made.save(tmp_path)
    read = Program.load(tmp_path)

    entry = made.entries["decode"]
    state = random_state(made, entry)
    assert all(t.dtype == torch.uint8 for t in state.values())
    for name, value in read.run("decode", entry.examples, state).items():
        assert value.equal(made.run("decode", entry.examples, state)[name])
        assert value.isfinite().all()


def refused(made: Program, bits: int = 8) -> list[str]:
    after, ledger = Pipeline((QuantizeCache(bits),), check=False).run(made)
    assert {slot.dtype for slot in after.state.values()} == {slot.dtype for slot in made.state.values()}
    assert not any(entry.calls(kv_update_q.target, attention_q.target) for entry in after.entries.values())
    return reasons(ledger)


def test_caches_that_are_left() -> None:
    assert refused(cached(1)) == ["the cache holds torch.bfloat16, expected torch.float32"]
    read = refused(cached(1, torch.ops.aten.neg.default, torch.float32))
    assert read == ["%neg_default reads the cache, expected attention only", OTHER]
    assert refused(program(lambda x: x * 2, torch.randn(3))) == ["the program has no caches"]


def test_rows_that_do_not_fit_are_left() -> None:
    unlike = "keys and values have 16 and 8 features, expected as many of each"
    short = "a record is not smaller than a row of 4 float32 features"

    assert refused(cached(1, held=torch.float32, widths=(16, 8))) == [unlike]
    assert refused(cached(1, held=torch.float32, widths=(4, 4)), 4) == [short]


def test_bits_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"bits is 5, expected one of \(16, 8, 4\)"):
        QuantizeCache(5)


@pytest.mark.parametrize(("tokens", "bits"), [(1, 8), (1, 4), (13, 4)])
def test_decoding_on_the_cpu(tokens: int, bits: int, tmp_path: Path) -> None:
    made, _ = Pipeline((QuantizeCache(bits),), check=False).run(cached(tokens, held=torch.float32))
    manifest = Cpu().build(made, Target("cpu", isas=FASTEST), tmp_path, silent)
    engine = cpu_runtime.load(tmp_path, manifest, 3)
    state = engine.new_state("main", arrays(operands(tokens, 0)))
    assert {a.dtype for a in state.arrays.values()} == {np.dtype(np.uint8)}
    slots = {name: torch.from_numpy(a.copy()) for name, a in state.arrays.items()}
    for past in (0, tokens, 600, CAPACITY - tokens):
        if past == 600:
            slots = {k: quantize_records(torch.randn(1, HEADS, CAPACITY, WIDTH), bits) for k in slots}
            for name, array in state.arrays.items():
                array[...] = slots[name].numpy()
        given, state.position = operands(tokens, past), past
        expected = made.run("main", given, slots)
        slots = {name: expected[name] for name in slots}

        found = engine.run("main", arrays(given), state)

        torch.testing.assert_close(torch.from_numpy(found["y"]), expected["y"], rtol=1e-5, atol=2e-6)
        for name, array in state.arrays.items():
            np.testing.assert_array_equal(array, slots[name].numpy())
    engine.close()


def test_greedy_generation_is_that_of_the_program() -> None:
    case = zoo.case("llama-tied")
    ids = case.inputs["input_ids"][:, :9]
    found = []
    for name in ("reference", "cpu"):
        target = sv.Target(name, max_length=32, isas=FASTEST if name == "cpu" else ())
        with sv.compile(case.model, case.inputs, target=target, passes=[QuantizeCache(8)]) as compiled:
            assert {slot.dtype for slot in compiled.manifest.state.values()} == {"uint8"}
            found.append(compiled.generate(ids, max_new_tokens=16, stop=()).tolist())

    assert found[0] == found[1]
