"""Models that train in 8 bits: the parameters and gradients of the model, dropout, heads, what is refused."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

import sylvester as sv
from sylvester.compiler import halo_ops
from sylvester.compiler.errors import CompileError, InputError, TraceError

HALO = halo_ops.HALO_LINEAR
PLAIN = {"bos_token_id": 0, "eos_token_id": 0}


class Block(nn.Module):
    """Pre-norm attention, written out, and an FFN."""

    def __init__(self, width: int = 32, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x):
        batch, tokens, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind()
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        seen = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.dropout(self.down(F.gelu(self.up(self.norms[1](x)))))


class Small(nn.Module):
    """A language model with a tied head."""

    def __init__(self, width: int = 32, blocks: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, dropout=dropout) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def ids(*shape: int, high: int = 64) -> torch.Tensor:
    return torch.randint(high, shape)


def loss(module, tokens):
    return F.cross_entropy(module(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(module, value):
    return dict(
        zip(dict(module.named_parameters()), torch.autograd.grad(value, list(module.parameters())), strict=True)
    )


def require_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        error = (found[name] - wanted).norm() / (wanted.norm() + 1e-6)
        assert error <= tolerance, f"{name}: {error}"


def calls(module):
    return [n for n in module._graphs[True, torch.device("cpu")].graph.nodes if n.target is HALO]


@pytest.mark.parametrize(("format", "tolerance"), [("exact", 1e-5), ("int8", 0.06), ("fp8", 0.12)])
def test_gradients_are_those_of_the_model(format, tolerance):
    model, tokens = Small(), ids(3, 17)
    module = sv.halo(model, (ids(2, 9),), 2, format)
    require_same(gradients(module, loss(module, tokens)), gradients(model, loss(model, tokens)), tolerance)
    assert len(calls(module)) == len(module.report.rewritten) == 8


def test_parameters_are_those_of_the_model(tmp_path):
    model = Small()
    module = sv.halo(model, (ids(2, 9),))
    assert [(n, id(p)) for n, p in module.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert module.head.weight is module.embed.weight
    assert module.state_dict().keys() == model.state_dict().keys()
    other, tokens = Small(), ids(2, 9)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(tokens), model(tokens))
    module.load_state_dict(Small().state_dict())
    assert not torch.equal(other(tokens), model(tokens))


def test_a_copy_has_parameters_of_its_own():
    module, tokens = sv.halo(Small(), (ids(2, 9),)), ids(2, 9)
    other = copy.deepcopy(module)
    assert torch.equal(other(tokens), module(tokens))
    nn.init.zeros_(other.norm.weight)
    assert not torch.equal(other(tokens), module(tokens))


def test_written_attention_trains_in_linear_memory():
    module = sv.halo(Small(), (ids(2, 9),))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        module(ids(2, 40))
    assert not any(shape[-2:] == (40, 40) for shape in kept)


def test_dropout_follows_the_mode_of_the_module():
    model, tokens = Small(dropout=0.5), ids(2, 9)
    assert sv.halo(model, (tokens,)).training
    module = sv.halo(model.eval(), (tokens,), 1, "exact")
    assert not module.training
    torch.testing.assert_close(module(tokens), model(tokens))
    module.train(), model.train()
    assert not torch.equal(module(tokens), module(tokens))
    results = []
    for trained in (module, model):
        torch.manual_seed(0)
        results.append(trained(tokens))
    torch.testing.assert_close(*results)


def test_heads_and_patterns_stay_as_they_are():
    report = sv.halo(Small(), (ids(2, 9),), skip="*.down.*").report
    assert report.kept == {
        "embed.weight": "it is the head: head=True rewrites it as well",
        "blocks.0.down.weight": "left out by '*.down.*'",
        "blocks.1.down.weight": "left out by '*.down.*'",
    }
    assert "6 linear layers" in str(report)
    assert "embed.weight" in sv.halo(Small(), (ids(2, 9),), head=True).report.rewritten
    both = sv.halo(Small(), (ids(2, 9),), skip=("*qkv*", "head.*"), head=True).report
    assert list(both.kept) == ["blocks.0.qkv.weight", "blocks.1.qkv.weight", "embed.weight"]


def stacked(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def test_the_last_linear_of_a_classifier_is_its_head():
    kept = sv.halo(
        stacked(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3), nn.Softmax(-1)), (torch.randn(2, 8),)
    ).report.kept
    assert list(kept) == ["2.weight"]
    encoder = stacked(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.LayerNorm(8))
    assert sv.halo(encoder, (torch.randn(2, 8),)).report.kept == {}


@pytest.mark.parametrize(("level", "forward", "backward"), [(1, 2, 2), (2, 2, 4)])
def test_the_joint_graph_shows_every_rotation(level, forward, backward):
    module = sv.halo(Small(blocks=1), (ids(2, 9),), level)
    with contextlib.ExitStack() as stack:
        graph = aot_export_joint_with_descriptors(stack, module, (ids(2, 9),)).graph_module.graph
    targets = Counter(str(node.target) for node in graph.nodes)
    assert targets["sylvester.hadamard.default"] == 4 * (forward + backward)
    assert targets["sylvester.halo_mm.default"] == 4 * 3
    assert targets["aten.mm.default"] == 3


class Products(nn.Module):
    """Layers written as products, a shared weight, a masked one, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.shared = nn.Parameter(torch.randn(12, 12)), nn.Linear(12, 12)
        self.b, self.experts = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(2, 12, 12))
        self.register_buffer("mask", (torch.rand(12, 12) < 0.5).float(), persistent=False)

    def forward(self, x, *, y):
        x = self.shared(self.shared(x @ self.w)).relu()
        x = F.linear(x, self.w * self.mask, self.b) + torch.addmm(self.b, y, self.w)[:, None]
        with torch.no_grad():
            size = self.shared(x).norm()
        x = x / size
        return {"x": torch.einsum("bti,eio->beto", x, self.experts), "n": 3}


def test_products_of_any_spelling():
    model, given = Products(), {"x": torch.randn(2, 5, 12), "y": torch.randn(2, 12)}
    module = sv.halo(model, given, 3, "exact")
    assert len(calls(module)) == 6
    assert module.report.rewritten == ("w", "shared.weight")
    assert list(module.report.kept) == ["experts"]
    given = {"x": torch.randn(3, 7, 12), "y": torch.randn(3, 12)}
    assert module(**given)["n"] == 3
    found, expected = (gradients(m, m(given["x"], y=given["y"])["x"].square().sum()) for m in (module, model))
    require_same(found, expected, 1e-5)


def huggingface(name):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 90, **PLAIN}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **small)
        return transformers.GPT2LMHeadModel(config), 8, "transformer.wte.weight"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **small}
    if name == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, **sizes)
        return transformers.LlamaForCausalLM(config), 14, "lm_head.weight"
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)), 13, "classifier.weight"


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_huggingface_models(name):
    model, count, head = huggingface(name)
    given = {"input_ids": ids(2, 12, high=90), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    given["labels"] = ids(2, high=2) if name == "bert" else given["input_ids"]
    module = sv.halo(model.eval(), given, 2, "exact")
    assert (len(module.report.rewritten), list(module.report.kept)) == (count, [head])
    given["attention_mask"][0, 9:] = 0
    found, expected = module(**given), model(**given)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.logits[1], expected.logits[1], atol=1e-5, rtol=1e-4)
    require_same(gradients(module, found.loss), gradients(model, expected.loss), 1e-4)


class Forked(nn.Module):
    """Does in training what it does not in evaluation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(8, 8)

    def forward(self, x):
        if self.how == "values":
            return self.layer(x) if len(x) and float(x.sum()) > 0 else x
        if self.training and self.how == "noise":
            return self.layer(x + torch.randn_like(x)).relu() + x
        return self.layer(x * 2 if self.training else x).relu() + x


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (
            stacked(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),
            "BatchNorm1d '1' changes its running statistics",
        ),
        (Forked("noise"), "training draws random numbers by aten.randn_like"),
        (Forked("scale"), "in training the model computes something else than in evaluation"),
        (Forked("values"), "depends on the values of a tensor"),
    ],
)
def test_models_that_cannot_be_traced_for_training(model, error):
    with pytest.raises(TraceError, match=error):
        sv.halo(model, (torch.randn(4, 8),))


def test_frozen_statistics_are_no_obstacle():
    model = stacked(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model[1].eval()
    x = torch.randn(4, 8)
    found = sv.halo(model, (x,), 1, "exact")(x)
    torch.testing.assert_close(found, model(x))


def test_a_format_that_the_device_lacks():
    module = sv.halo(Small(blocks=1), (ids(2, 9),), format="fp8", simulate=False)
    assert "simulated in float32: CPUs do not multiply fp8" in str(module.report)
    with pytest.raises(CompileError, match="training in fp8 on cpu is simulated in float32: CPUs do not multiply fp8"):
        module(ids(2, 9))


def test_refusals():
    model, tokens = Small(), ids(2, 9)
    with pytest.raises(TypeError, match="model is a str"):
        sv.halo("gpt2", (tokens,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level is 4"):
        sv.halo(model, (tokens,), 4)
    with pytest.raises(ValueError, match="format is 'int6'"):
        sv.halo(model, (tokens,), format="int6")
    with pytest.raises(CompileError, match=r"no weight matches \['\*.q_proj.\*'\]"):
        sv.halo(model, (tokens,), skip="*.q_proj.*")
    with pytest.raises(CompileError, match="no linear layer is left to train in int8: weight: it is the head"):
        sv.halo(nn.Linear(8, 2), (torch.randn(4, 8),))
    module = sv.halo(model, (tokens,))
    with pytest.raises(InputError, match=r"input 'ids' is torch.float32\[2, 9\], expected torch.int64\[\*, \*\]"):
        module(tokens.float())
    with pytest.raises(TypeError, match="missing a required argument: 'ids'"):
        module()
    nn.init.constant_(module.get_parameter("blocks.1.up.weight"), float("inf"))
    with pytest.raises(CompileError, match=r"the weight of the layer 'blocks\.1\.up' holds a NaN or an infinity"):
        module(tokens)
