"""LastLogits: `start` gives the last logits of `prefill` and the same caches, with less work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import sylvester as sv
from sylvester.compiler import generation
from sylvester.compiler.compiled import Compiled
from sylvester.compiler.cost import node_cost
from sylvester.compiler.errors import ContractBroken, Unsupported
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Entry, Program, value
from sylvester.compiler.trace import capture
from sylvester.passes import last_logits
from sylvester.passes.last_logits import LastLogits
from tests import zoo
from tests.programs import program, reasons
from tests.test_derive_decode import Gpt, derived, gpt

aten = torch.ops.aten


def started(**methods: object) -> Program:
    return Pipeline((LastLogits(),))(derived(gpt(**methods), max_length=24))


def empty(made: Program, batch: int, tokens: int) -> dict[str, Tensor]:
    return {k: torch.zeros(batch, int(s.shape[1]), tokens, int(s.shape[3])) for k, s in made.state.items()}


def flops(entry: Entry) -> int:
    return sum(node_cost(node).flops for node in entry.calls())


@pytest.mark.nightly
@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_the_zoo_starts_with_the_last_logits_of_prefill(name: str) -> None:
    case = zoo.case(name)
    made = sv.trace(case.model, case.inputs)
    tokens = zoo.tokens(3, 9)
    key = next(iter(made.entries["prefill"].examples))

    whole, found = (made.run(entry, {key: tokens}, empty(made, 3, 9)) for entry in ("prefill", "start"))

    names = [o.name for o in made.entries["start"].outputs if o.kind == "output"]
    assert len(names) == 1
    torch.testing.assert_close(found[names[0]], whole[names[0]][:, -1:], rtol=1e-4, atol=1e-5)
    assert all(found[key].equal(whole[key]) for key in made.state)


def test_only_the_last_token_goes_through_what_follows_the_last_attention() -> None:
    made = started()

    tokens = [list(map(str, value(n).shape[1:-1])) for n in made.entries["start"].calls(aten.linear.default)]

    length = str(value(made.entries["start"].placeholders("input")[0]).shape[1])
    assert tokens == [[length]] * 4 + [["1"]] * 3
    assert flops(made.entries["start"]) < 0.75 * flops(made.entries["prefill"])
    assert made.weights.nbytes == derived(gpt(), max_length=24).weights.nbytes


def test_a_single_token_is_its_own_last() -> None:
    made = started()
    tokens = torch.tensor([[4], [7]])

    whole, found = (made.run(entry, {"ids": tokens}, empty(made, 2, 1)) for entry in ("prefill", "start"))

    torch.testing.assert_close(found["out0"], whole["out0"])


class Twice(Gpt):
    """The normed stream before the head is a result too, so it is needed for every token."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(ids) + self.positions(ids)
        q, k, v = (hidden.unsqueeze(1) for _ in range(3))
        hidden = torch.tanh(hidden + self.attend(q, k, v).squeeze(1))
        return self.head(hidden), hidden


def test_other_results_are_left_to_prefill() -> None:
    model = Twice().eval()
    made = Pipeline((LastLogits(),))(derived(capture(model, (torch.randint(37, (2, 7)),)), max_length=24))

    assert [o.name for o in made.entries["start"].outputs if o.kind == "output"] == ["out0"]


def test_an_entry_to_start_from_is_required() -> None:
    forward = program(nn.Linear(3, 4), torch.randn(2, 3))

    with pytest.raises(Unsupported, match="no entry 'prefill' with caches"):
        Pipeline((LastLogits(),))(forward)


def test_logits_that_mix_tokens_are_left_with_a_reason() -> None:
    made = derived(gpt(), max_length=24)
    entry = made.entries["prefill"]
    end = entry.graph.output_node()
    mixed = entry.emit(aten.cumsum.default, entry.results()[0], 1, before=end)
    end.args = ((mixed, *entry.results()[1:]),)

    after, ledger = Pipeline((LastLogits(),)).run(made)

    assert list(after.entries) == ["prefill", "decode"]
    assert reasons(ledger) == ["it is not known to treat each token by itself"]


def test_the_check_catches_a_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(entry: Entry, operand: object, symbol: object, before: object) -> object:
        made = original(entry, operand, symbol, before)
        if made is not operand and made != 1:
            row = made.args[0]
            row.args = (*row.args[:2], 0)
        return made

    original = last_logits._last
    monkeypatch.setattr(last_logits, "_last", first)

    with pytest.raises(ContractBroken, match="'out0' of 'start' differs from 'prefill'"):
        started()


def run_generation(
    compiled: Compiled, entries: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[list[int]]]:
    """Entries that were run and the tokens, for an artefact that has only `entries`."""
    runner, used = compiled._runner, []
    kept = {name: runner.manifest.entries[name] for name in entries}
    monkeypatch.setattr(runner, "manifest", dataclasses.replace(runner.manifest, entries=kept))
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda entry, *rest: (used.append(entry), run(entry, *rest))[1])
    prompt = zoo.case("llama-gqa").inputs["input_ids"].numpy()
    return used, [step.tolist() for step in generation.steps(runner, prompt, generation.Options(3, stop=()))]


def test_generation_starts_with_start_where_there_is_one() -> None:
    case = zoo.case("llama-gqa")
    results = {}
    with sv.compile(case.model, case.inputs, target=sv.Target("reference", max_length=32)) as compiled:
        for entries in (("prefill", "decode", "start"), ("prefill", "decode")):
            with pytest.MonkeyPatch.context() as patch:
                used, results[entries] = run_generation(compiled, entries, patch)
            assert used == [entries[-1] if "start" in entries else "prefill", "decode", "decode"]
        assert compiled.manifest.main == "prefill"

    first, second = results.values()
    assert first == second
