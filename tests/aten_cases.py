"""A table of calls of ATen ops: what the conformance suite runs on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tests.sampling import Case, b, c, edges, f, i, u, w

aten = torch.ops.aten


def unary() -> Iterator[Case]:
    smooth = (
        "exp",
        "tanh",
        "erf",
        "sigmoid",
        "silu",
        "sin",
        "cos",
        "expm1",
        "mish",
        "hardsigmoid",
        "hardswish",
        "relu",
        "relu6",
    )
    steps = ("floor", "ceil", "round", "trunc", "sign", "abs", "neg", "isnan", "isinf", "square", "logical_not")
    for name in (*smooth, *steps, "gelu", "softplus", "elu", "leaky_relu", "hardtanh", "log_sigmoid"):
        yield from c(getattr(aten, name).default, u("n", 3, "m", low=-6, high=6))
    for name in (*steps, "relu", "relu6", "sigmoid", "tanh", "exp", "hardtanh"):
        if name != "round":
            yield from c(getattr(aten, name).default, edges(4, 8))
    for name in ("log", "sqrt", "rsqrt", "log1p", "reciprocal", "log2", "log10"):
        yield from c(getattr(aten, name).default, u("n", "m", low=0.01, high=9))
    for name in ("neg", "abs", "sign", "square", "bitwise_not", "logical_not"):
        yield from c(getattr(aten, name).default, i("n", 6))
    yield from c((aten.logical_not.default, aten.bitwise_not.default), b("n", 6))
    yield from c(aten.gelu.default, u("n", "m", low=-6, high=6), approximate="tanh")
    yield from c(aten.softplus.default, u("n", "m", low=-9, high=9), 2.0, 5.0)
    yield from c(aten.elu.default, f("n", "m"), 1.5, 1.1, 0.7)
    yield from c(aten.leaky_relu.default, f("n", "m"), 0.2)
    yield from c(aten.hardtanh.default, f("n", "m"), -0.3, 0.4)


def binary() -> Iterator[Case]:
    for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "remainder", "rsub"):
        packet = getattr(aten, name)
        yield from c(packet.Tensor, f("n", 3, "m"), u(3, 1))
        yield from c(packet.Scalar, f("n", "m"), 2)
        if name != "div":
            yield from c(packet.Tensor, i("n", "m"), i("m", low=1))
            yield from c(packet.Scalar, i("n", "m"), 3)
    for name in ("eq", "lt", "ge"):
        yield from c(getattr(aten, name).Scalar, i("n", "m"), 0.5)
        yield from c(getattr(aten, name).Tensor, edges(16, 1), edges(16))
    yield from c((aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor), f("n", "m"), f("m"), alpha=0.5)
    yield from c(aten.add.Tensor, i("n", "m"), b("m"))
    yield from c(aten.mul.Tensor, f("n", "m"), i())
    yield from c(aten.mul.Tensor, f("n", "m"), b("m"))
    yield from c((aten.div.Tensor, aten.floor_divide.default), i("n", "m"), i("m", low=1))
    for mode in (None, "floor", "trunc"):
        yield from c(aten.div.Tensor_mode, f("n", "m"), u("m"), rounding_mode=mode)
        yield from c(aten.div.Tensor_mode, i("n", "m"), i("m", low=1), rounding_mode=mode)
        yield from c(aten.div.Scalar_mode, f("n", "m"), -0.7, rounding_mode=mode)
    yield from c((aten.floor_divide.default, aten.fmod.Tensor), u("n", "m", low=-900, high=900), u("m"))
    yield from c(aten.remainder.Tensor, u("n", "m", low=-900, high=900), u("m", low=-3, high=-0.1))
    yield from c(aten.fmod.Scalar, f("n", "m"), 0.3)
    for exponent in (0, 1, 2, 3, 4, 0.5, -0.5, -1, -2, 1.7):
        yield from c(aten.pow.Tensor_Scalar, u("n", "m"), exponent)
    yield from c(aten.pow.Tensor_Scalar, f("n", "m"), 3)
    yield from c(aten.pow.Tensor_Scalar, i("n", "m"), 4)
    yield from c(aten.pow.Tensor_Tensor, u("n", "m"), f("m"))
    yield from c(aten.pow.Tensor_Tensor, i("n", "m"), i("m", low=0, high=9))
    yield from c(aten.pow.Scalar, 2, f("n", "m"))
    logical = (aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default)
    bitwise = (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor)
    yield from c((*logical, *bitwise, aten.eq.Tensor, aten.ne.Tensor), b("n", "m"), b("m"))
    yield from c(bitwise, i("n", "m"), i("m"))
    yield from c(logical, i("n", "m", low=0, high=2), f("m"))
    yield from c((aten.bitwise_and.Scalar, aten.bitwise_or.Scalar, aten.bitwise_xor.Scalar), i("n", "m"), 5)
    for target in (aten.maximum.default, aten.minimum.default, aten.max.other, aten.min.other):
        yield from c(target, f("n", 1, "m"), f(3, "m"))
        yield from c(target, i("n", "m"), i("m"))
        yield from c(target, edges(16, 1), edges(16))
    yield from c(aten.atan2.default, f("n", "m"), f("m"))


def selection() -> Iterator[Case]:
    yield from c(aten.clamp.default, f("n", "m"), -0.5, 0.25)
    yield from c(aten.clamp.default, f("n", "m"), None, 0.25)
    yield from c(aten.clamp.default, i("n", "m"), min=-2)
    yield from c(aten.clamp.default, i("n", "m"), max="n")
    yield from c(aten.clamp.Tensor, f("n", "m"), f("m"), u("m", low=2))
    yield from c((aten.clamp_min.default, aten.clamp_max.default), f("n", "m"), 0.1)
    yield from c((aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default), edges(4, 8), 0.1)
    yield from c((aten.clamp_min.Tensor, aten.clamp_max.Tensor), f("n", "m"), f("m"))
    yield from c(aten.where.self, b("n", 1), f("n", "m"), f("m"))
    yield from c(aten.where.self, b("n", 1), i("n", "m"), f("m"))
    yield from c(aten.where.ScalarSelf, b("n", "m"), 2.0, f("n", "m"))
    yield from c(aten.where.ScalarOther, b("n", "m"), f("n", "m"), -math.inf)
    yield from c(aten.where.Scalar, b("n", "m"), 1.0, 0.0)
    yield from c(aten.masked_fill.Scalar, f("n", "m"), b("m"), -math.inf)
    yield from c(aten.masked_fill.Scalar, i("n", "m"), b("n", "m"), 7)
    yield from c(aten.masked_fill.Tensor, f("n", "m"), b("m"), f())
    yield from c((aten.addcmul.default, aten.addcdiv.default), f("n", "m"), f("m"), u("n", 1), value=0.5)
    yield from c((aten.lerp.Tensor,), f("n", "m"), f("m"), u("n", 1))
    yield from c((aten.lerp.Scalar,), f("n", "m"), f("m"), 0.3)
    yield from c(aten.prelu.default, f("n", 3, "m"), f(3))
    yield from c(aten.prelu.default, f("n", "m"), f(1))
    yield from c(aten.glu.default, f("n", 6), -1)
    yield from c(aten.glu.default, f(4, "n"), 0)
    yield from c(aten.nan_to_num.default, edges(4, 8), 0.5, 9.0, -9.0)
    yield from c(aten.nan_to_num.default, edges(4, 8), 0.0, 100.0, -100.0)


def conversion() -> Iterator[Case]:
    for dtype in (torch.int64, torch.int32, torch.bool):
        yield from c((aten.to.dtype, aten._to_copy.default), u("n", "m", low=-9, high=9), dtype=dtype)
    for source in (i("n", "m"), b("n", "m")):
        yield from c(aten.to.dtype, source, torch.float32)
    yield from c(aten.to.dtype_layout, i("n", "m"), dtype=torch.float32)
    yield from c(aten.to.device, f("n", "m"), torch.device("cpu"), torch.float32)
    same = (aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy)
    yield from c(tuple(packet.default for packet in same), f("n", "m"))
    yield from c(aten.dropout.default, f("n", "m"), 0.3, False)
    yield from c(aten.type_as.default, i("n", "m"), f("m"))
    yield from c((aten.full_like.default,), f("n", "m"), 0.3)
    yield from c((aten.zeros_like.default, aten.ones_like.default), i("n", "m"))
    yield from c(aten.zeros_like.default, f("n", "m"), dtype=torch.bool)
    yield from c(aten.full.default, [3, 4], -math.inf)
    yield from c(aten.full.default, [2, 4], True)
    yield from c(aten.new_full.default, f("n", "m"), ["m", 2], 1.5)
    yield from c((aten.new_zeros.default, aten.new_ones.default), f("n", "m"), ["m", 2])
    yield from c((aten.zeros.default, aten.ones.default), [3, 4])
    yield from c(aten.scalar_tensor.default, 0.25)
    yield from c(aten.arange.default, 9)
    yield from c(aten.arange.start, 2, 9, dtype=torch.float32)
    yield from c(aten.arange.start_step, 1, 12, 3)
    yield from c(aten.arange.start_step, 9, -2, -2)
    yield from c(aten.arange.start_step, 0.5, 3.0, 0.25)
    yield from c((aten.tril.default, aten.triu.default), f(2, "n", "m"))
    yield from c((aten.tril.default, aten.triu.default), b("n", "m"), -2)
    yield from c((aten.tril.default, aten.triu.default), f("n", 6), 1)
    yield from c(aten.eye.default, 4)
    yield from c(aten.eye.m, 3, 5)
    yield from c(aten.linspace.default, -1.0, 2.0, 7)


def views() -> Iterator[Case]:
    yield from c((aten.reshape.default, aten.view.default, aten._unsafe_view.default), f("n", 4, 6), ["n", 2, 12])
    yield from c(aten.reshape.default, f("n", 4, 6), [24, "n"])
    yield from c(aten.reshape.default, f(2, "n", "m"), [-1, "m"])
    yield from c(aten.reshape.default, f(1, "n", 1, 6), ["n", 6, 1])
    yield from c(aten.flatten.using_ints, f("n", 3, "m", 2), 1, 2)
    yield from c(aten.unflatten.int, f("n", 12), 1, [3, 4])
    yield from c(aten.squeeze.default, f(1, 4, 1, 3))
    yield from c(aten.squeeze.dim, f("n", 1, 3), 1)
    yield from c(aten.squeeze.dims, f(1, "n", 1, 3), [0, 2])
    yield from c(aten.unsqueeze.default, f("n", 3), -2)
    yield from c((aten.view_as.default, aten.expand_as.default), f("n", 3), f("n", 3))
    yield from c(aten.permute.default, f("n", 3, "m"), [2, -3, 1])
    yield from c(aten.transpose.int, f("n", 3, "m"), -1, 0)
    yield from c((aten.t.default, aten.numpy_T.default), f("n", "m"))
    yield from c(aten.mT.default, f("n", 3, "m"))
    yield from c((aten.expand.default, aten.broadcast_to.default), f("m", 3, 1), ["m", 3, 4])
    yield from c(aten.expand.default, f("n", 1), [-1, 4])
    for bounds in ((1, 3), (-2, None), (None, -1), (0, 2**63 - 1), (-99, 2), (1, 99)):
        yield from c(aten.slice.Tensor, f("n", 6), 1, *bounds)
    yield from c(aten.slice.Tensor, f("m", 9), -1, 1, 8, 3)
    yield from c(aten.slice.Tensor, f("m", 3), 0, -6)
    yield from c(aten.select.int, f("n", 4), 1, -2)
    yield from c(aten.select.int, f("n", 4), 0, -1)
    yield from c(aten.narrow.default, f("n", 6), 1, 2, 3)
    yield from c(aten.flip.default, f("n", 3, "m"), [0, -1])
    yield from c(aten.roll.default, f("n", "m"), [2, -9], [0, 1])
    yield from c(aten.roll.default, f("n", 6), [-7], [1])
    yield from c(aten.roll.default, f("n", 6), [4])
    yield from c(aten.repeat.default, f("n", 3), [2, 1, 3])
    yield from c(aten.repeat_interleave.self_int, f("n", 3), 2, 1)
    yield from c(aten.repeat_interleave.self_int, f("n", 3), 3)
    yield from c(aten.cat.default, [f("n", 3), f("n", 4), f("n", 1)], 1)
    yield from c(aten.cat.default, [f(1, "n"), f("m", "n")])
    yield from c(aten.cat.default, [i("n", 3), f("n", 2)], -1)
    yield from c(aten.stack.default, [f("n", 3), f("n", 3)], -1)
    yield from c(aten.split.Tensor, f("n", 7), 3, 1)
    yield from c((aten.split_with_sizes.default, aten.split.sizes), f("n", 7), [1, 4, 2], -1)
    yield from c(aten.chunk.default, f("n", 7), 3, 1)
    yield from c(aten.unbind.int, f(3, "n"))
    yield from c(aten.movedim.int, f("n", 3, "m"), 0, -1)
    yield from c((aten.swapaxes.default,), f("n", 3, "m"), 0, 2)
    yield from c(aten.pixel_shuffle.default, f("n", 8, 3, 5), 2)
    yield from c(aten.pixel_unshuffle.default, f("n", 2, 6, 4), 2)
    yield from c(aten.diff.default, f("n", 6))
    yield from c(aten.diff.default, i(6, "n"), 1, 0)
    yield from c(aten.unfold.default, f("n", 9), 1, 4, 2)
    yield from c(aten.diagonal.default, f(4, "n", 4), 0, 0, 2)


def gathers() -> Iterator[Case]:
    yield from c(aten.embedding.default, w(13, 6), i("n", "m", low=0, high=13))
    yield from c(aten.embedding.default, f("m", 6), i("n", 2, low=0, high=7))
    yield from c(aten.index_select.default, f("n", 9), 1, i(4, low=0, high=9))
    yield from c(aten.gather.default, f("n", 9), 1, i("n", 4, low=0, high=9))
    yield from c(aten.index.Tensor, f(7, "n"), [i(3, 2, low=-7, high=7)])
    yield from c(aten.index.Tensor, f(7, "n", 5), [i(3, 1, low=0, high=7), None, i(4, low=-5, high=5)])
    yield from c(aten.index.Tensor, f("n", 7, 5), [None, i(3, 1, low=0, high=7), i(4, low=-5, high=5)])
    yield from c(aten.index.Tensor, f("n", 7, "m"), [None, i(low=0, high=7)])
    yield from c((aten.pad.default, aten.constant_pad_nd.default), f("n", 4, "m"), [1, 2, 3, 0])
    yield from c(aten.constant_pad_nd.default, f("n", 4), [-1, 2], 0.5)
    yield from c(aten.constant_pad_nd.default, i("n", 4), [1, 2], 7)
    yield from c(aten.pad.default, f("n", 4), [1, 2], "constant", 2.0)
    for mode in ("reflect", "replicate", "circular"):
        yield from c(aten.pad.default, f(2, "n", 6), [2, 3], mode)
        yield from c(aten.pad.default, f(2, 3, 5, 6), [2, 3, 1, 2], mode)
    yield from c((aten.reflection_pad1d.default, aten.replication_pad1d.default), f(2, "n", 6), [2, 3])
    yield from c((aten.reflection_pad2d.default, aten.replication_pad2d.default), f(2, "n", 5, 6), [2, 3, 1, 2])
    yield from c(aten.upsample_nearest2d.vec, f("n", 3, 4, 5), None, [2.0, 3.0])
    yield from c(aten.upsample_nearest2d.vec, f("n", 3, 4, 6), [7, 9], None)
    yield from c(aten.upsample_nearest2d.default, f("n", 3, 4, 5), [8, 10])
    yield from c(aten.upsample_nearest1d.vec, f("n", 3, 5), None, [2.0])
    yield from c(aten.upsample_nearest1d.default, f("n", 3, 5), [12])
    yield from c(aten.upsample_linear1d.vec, f("n", 3, 5), None, False, [3.0])
    yield from c(aten.upsample_bilinear2d.vec, f("n", 3, 4, 5), None, False, [2.0, 2.0])
    yield from c(aten.upsample_bilinear2d.vec, f("n", 3, 4, 5), [7, 3], True, None)
    yield from c(aten.upsample_bilinear2d.vec, f("n", 3, 4, 5), [7, "n"], True, None)
    yield from c(aten.one_hot.default, i("n", "m", low=0, high=6), 6)


def reductions() -> Iterator[Case]:
    for name in ("sum", "mean", "prod", "amax", "amin", "max", "min", "any", "all", "argmax", "argmin"):
        yield from c(getattr(aten, name).default, f("n", 3, "m") if name != "prod" else u(3, "n"))
    for dims, keep in (([1], False), ([-1], True), ([0, 2], False), ([0, 2], True), ([0, 1, 2], False)):
        yield from c(
            (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default), f("n", 3, "m"), dims, keep
        )
        yield from c((aten.any.dims, aten.all.dims), b("n", 3, "m"), dims, keep)
    yield from c((aten.any.dim, aten.all.dim), i("n", 3, "m", low=0, high=2), 1, True)
    yield from c(aten.prod.dim_int, u("n", 5), 1)
    yield from c((aten.sum.default, aten.any.default, aten.all.default), b("n", "m"))
    yield from c((aten.sum.dim_IntList, aten.amax.default, aten.amin.default), i("n", "m"), [1])
    yield from c((aten.max.default, aten.min.default, aten.argmax.default), i("n", "m", low=-99, high=-2))
    yield from c(aten.sum.dim_IntList, i("n", "m"), [1], dtype=torch.float32)
    yield from c(aten.mean.dim, i("n", "m"), [1], dtype=torch.float32)
    yield from c(aten.sum.default, b("n", "m"), dtype=torch.int32)
    yield from c(aten.sum.dim_IntList, f("n", "m"), None)
    for keep in (False, True):
        yield from c((aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim), f("n", 3, "m"), 1, keep)
    for target in (aten.amax.default, aten.amin.default, aten.argmax.default, aten.argmin.default):
        yield from c(target, edges(16, 5), [0] if target in (aten.amax.default, aten.amin.default) else 0)
    yield from c((aten.max.dim, aten.min.dim), edges(5, 16), 0)
    variances = (aten.var, aten.std)
    for packet in variances:
        yield from c(packet.correction, f(4, "m"), [1], correction=0)
        yield from c(packet.correction, f("n", 3, "m"), [1, 2], correction=1, keepdim=True)
        yield from c(packet.correction, f(3, "m"))
        yield from c(packet.dim, f("n", 6), [1], False)
        yield from c(packet.dim, f("n", 6), [1], True, True)
        yield from c(packet.default, f(4, "m"), False)
    yield from c(aten.var_mean.correction, f("n", 6), [1], correction=0, keepdim=True)
    yield from c((aten.softmax.int, aten.log_softmax.int), f("n", 3, "m"), 1)
    yield from c((aten.softmax.int, aten.log_softmax.int), u("n", "m", low=-50, high=50), -1, torch.float32)
    yield from c((aten._softmax.default, aten._log_softmax.default), f("n", "m"), -1, False)
    yield from c(aten.logsumexp.default, u("n", "m", low=-50, high=50), [1], True)
    yield from c(aten.cumsum.default, f("n", 3, "m"), 1)
    yield from c(aten.cumsum.default, b("n", "m"), -1)
    yield from c(aten.cumsum.default, i("n", "m"), 0)
    yield from c(aten.linalg_vector_norm.default, f("n", "m"), 2, [-1], True)
    yield from c(aten.linalg_vector_norm.default, f("n", "m"), 1.0, [-1])
    yield from c(aten.norm.ScalarOpt_dim, f("n", "m"), 2, [-1], True)
    yield from c(aten.count_nonzero.default, f("n", "m"))
    yield from c(aten.count_nonzero.dim_IntList, i("n", "m", low=0, high=2), [1])


def norms() -> Iterator[Case]:
    yield from c(aten.layer_norm.default, f("n", "m", 6), [6], f(6), f(6), 1e-5)
    yield from c(aten.layer_norm.default, f("n", 3, 6), [3, 6])
    yield from c(aten.native_layer_norm.default, f("n", "m", 6), [6], f(6), f(6), 1e-5)
    yield from c(aten.rms_norm.default, f("n", "m", 6), [6], f(6), 1e-6)
    yield from c(aten.rms_norm.default, f("n", "m", 6), [6])
    yield from c(aten.group_norm.default, f("n", 6, "m"), 3, f(6), f(6))
    yield from c(aten.group_norm.default, f("n", 6, 4, 5), 2)
    yield from c(aten.instance_norm.default, f("n", 4, "m", 3), f(4), f(4), None, None, True, 0.1, 1e-5, False)
    yield from c(aten.batch_norm.default, f("n", 4, "m"), f(4), f(4), f(4), u(4), False, 0.1, 1e-5, False)
    yield from c(aten.batch_norm.default, f("n", 4), None, None, f(4), u(4), False, 0.1, 1e-5, False)


def pooling() -> Iterator[Case]:
    image = f("n", 3, 9, 11)
    for geometry in (([2, 2],), ([3, 2], [2, 1]), ([3, 3], [2, 2], [1, 1]), ([3], [2], [1])):
        yield from c((aten.max_pool2d.default, aten.avg_pool2d.default), image, *geometry)
    yield from c(aten.max_pool2d.default, image, [2, 2], [2, 2], [1, 1], [2, 1])
    yield from c(aten.max_pool2d.default, image, [2, 3], [2, 2], [0, 1], [1, 1], True)
    yield from c(aten.max_pool2d.default, f(3, 9, "m"), [2, 2])
    yield from c(aten.max_pool2d.default, edges(3, 9, 7), [2, 2])
    yield from c(aten.avg_pool2d.default, image, [3, 3], [2, 2], [1, 1], False, False)
    yield from c(aten.avg_pool2d.default, image, [2, 3], [2, 2], [1, 1], True, True)
    yield from c(aten.avg_pool2d.default, image, [2, 3], [2, 2], [0, 1], True, False)
    yield from c(aten.avg_pool2d.default, image, [2, 3], [2, 2], [0, 1], False, True, 5)
    yield from c((aten.max_pool1d.default, aten.avg_pool1d.default), f("n", 3, 11), [3], [2], [1])
    yield from c((aten.max_pool1d.default, aten.avg_pool1d.default), f("n", 3, 11), [3])
    yield from c((aten.max_pool3d.default, aten.avg_pool3d.default), f("n", 2, 4, 5, 6), [2, 2, 3])
    for size in ([1, 1], [3, 11], [4, 5], [12, 2]):
        yield from c((aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default), image, size)
    yield from c(aten.adaptive_avg_pool1d.default, f("n", 3, 11), [4])
    yield from c(aten.adaptive_avg_pool2d.default, f(2, 3, "m", 6), [1, 3])


def products() -> Iterator[Case]:
    for shift in ((), (w(6),)):
        yield from c(aten.linear.default, f("n", "m", 9), w(6, 9), *shift)
        yield from c(aten.linear.default, f(9), w(6, 9), *shift)
    yield from c(aten.linear.default, f("n", 9), f(6, 9), f(6))
    yield from c(aten.linear.default, f("n", 33), w(70, 33), w(70))
    yield from c(aten.matmul.default, f("n", 3, "m", 6), f(3, 6, 5))
    yield from c(aten.matmul.default, f("n", 6), f(6))
    yield from c(aten.matmul.default, f(6), f("n", 6, 5))
    yield from c(aten.matmul.default, f(6), f(6))
    yield from c((aten.mm.default, aten.matmul.default), f("n", 6), f(6, "m"))
    yield from c(aten.mm.default, f("n", 6), w(6, 5))
    yield from c(aten.bmm.default, f("n", 4, "m"), f("n", "m", 5))
    yield from c(aten.baddbmm.default, f("n", 4, 3), f("n", 4, 6), f("n", 6, 3), beta=0.5, alpha=2)
    yield from c(aten.addmm.default, f(3), f("n", 6), w(6, 3), beta=0.5, alpha=2)
    yield from c(aten.addmm.default, f(3), f("n", 6), w(6, 3))
    sdpa = aten.scaled_dot_product_attention.default
    yield from c(sdpa, f("n", 2, "m", 8), f("n", 2, "m", 8), f("n", 2, "m", 8))
    yield from c(sdpa, f("n", 2, "m", 8), f("n", 2, "m", 8), f("n", 2, "m", 8), None, 0.0, True)
    yield from c(sdpa, f("n", 2, 5, 8), f("n", 2, "m", 8), f("n", 2, "m", 6), f(5, "m"), scale=0.3)
    yield from c(sdpa, f("n", 4, 5, 8), f("n", 2, "m", 8), f("n", 2, "m", 8), enable_gqa=True)
    yield from c(sdpa, f("n", 5, 8), f("n", "m", 8), f("n", "m", 8), f("n", 5, "m"))
    yield from c(sdpa, f(5, 8), f("m", 8), f("m", 8))


def convolutions() -> Iterator[Case]:
    yield from c(aten.conv2d.default, f("n", 4, 9, "m"), f(6, 4, 3, 3), f(6), [2, 1], [1, 1])
    yield from c(aten.conv2d.default, f("n", 4, 9, 8), f(6, 2, 3, 2), None, [1, 1], [1, 0], [2, 1], 2)
    yield from c(aten.conv2d.default, f("n", 4, 9, 8), f(4, 1, 3, 3), f(4), [1, 1], [1, 1], [1, 1], 4)
    yield from c(aten.conv2d.default, f("n", 4, 5, "m"), f(7, 4, 1, 1), f(7))
    yield from c(aten.conv2d.padding, f("n", 4, 9, 8), f(6, 4, 3, 4), f(6), [1, 1], "same")
    yield from c(aten.conv2d.padding, f("n", 4, 9, 8), f(6, 4, 3, 3), f(6), [2, 2], "valid")
    yield from c(aten.conv1d.default, f("n", 4, "m"), f(6, 4, 3), f(6), [2], [1])
    yield from c(aten.conv1d.default, f("n", 4, "m"), f(4, 1, 3), None, [1], [2], [1], 4)
    yield from c(aten.conv1d.padding, f("n", 4, 9), f(6, 4, 4), None, [1], "same", [2])


FAMILIES = (unary, binary, selection, conversion, views, gathers, reductions, norms, pooling, products, convolutions)
CASES = tuple(case for family in FAMILIES for case in family())
