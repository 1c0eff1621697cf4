"""conv2d, general and depthwise, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sylvester.codegen.conv2d import Conv2d, conv2d
from tests.kernel_harness import export, load, run, supported, team

# convolution, batch, height, width
CASES = [
    (Conv2d(3, 8, (3, 3), padding=(1, 1)), 2, 9, 11),
    (Conv2d(3, 20, (4, 4), stride=(4, 4)), 1, 16, 20),
    (Conv2d(6, 9, (3, 2), (2, 1), (1, 0), (1, 2), groups=3), 2, 10, 13),
    (Conv2d(7, 33, (1, 1)), 2, 8, 9),
    (Conv2d(8, 30, (1, 1), stride=(2, 2)), 1, 9, 9),
    (Conv2d(64, 30, (3, 3), padding=(1, 1)), 1, 20, 20),
    (Conv2d(80, 40, (1, 3), stride=(1, 2), padding=(0, 1)), 1, 1, 101),
    (Conv2d(5, 5, (3, 3), padding=(1, 1), groups=5), 2, 7, 9),
    (Conv2d(5, 5, (3, 3), (2, 2), (2, 2), (2, 2), groups=5), 2, 12, 9),
    (Conv2d(4, 4, (1, 4), (1, 2), (0, 3), (1, 2), groups=4), 2, 1, 17),
    (Conv2d(3, 3, (5, 5), padding=(4, 4), groups=3), 1, 2, 2),
    (Conv2d(40, 40, (3, 3), padding=(1, 1), groups=40), 1, 5, 40),
    (Conv2d(2, 4, (5, 5), padding=(4, 4)), 1, 2, 3),
    (Conv2d(4, 5, (7, 7), (2, 2), (3, 3)), 1, 70, 75),
    (Conv2d(3, 3, (7, 7), padding=(3, 3), groups=3), 2, 7, 7),
    (Conv2d(3, 3, (7, 7), padding=(3, 3), groups=3), 1, 14, 14),
    (Conv2d(3, 3, (7, 7), padding=(3, 3), groups=3), 1, 150, 67),
    (Conv2d(3, 3, (3, 3), (2, 2), (1, 1), groups=3), 2, 113, 112),
    (Conv2d(2, 2, (3, 5), (3, 3), (1, 1), (2, 1), groups=2), 1, 61, 200),
    (Conv2d(2, 2, (3, 3), (3, 3), (1, 1), groups=2), 1, 4, 1),
    (Conv2d(2, 2, (1, 70), padding=(0, 69), groups=2), 1, 1, 300),
    (Conv2d(2, 2, (11, 9), (2, 1), (5, 4), groups=2), 1, 40, 33),
]
CALL = "(t, p[0], p[1], p[2], p[3], i[0], i[1], i[2], i[3], i[4]);"


def scratch(n: int, conv: Conv2d) -> str:
    return f"conv{n}_scratch(i[2], i[3])" if conv.depthwise else f"conv{n}_scratch"


SOURCE = "".join(
    conv2d(f"conv{n}", case[0]) + export(f"conv{n}", f"conv{n}{CALL}", scratch(n, case[0]))
    for n, case in enumerate(CASES)
)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_conv2d(isa, threads, case):
    conv, n, h, w = CASES[case]
    rng = np.random.default_rng(case)
    x = rng.standard_normal((n, conv.channels, h, w), np.float32)
    weight = rng.standard_normal((conv.out_channels, conv.channels // conv.groups, *conv.kernel), np.float32)
    bias = rng.standard_normal(conv.out_channels, np.float32)
    x64, weight64 = torch.from_numpy(x).double(), torch.from_numpy(weight).double()
    where = (conv.stride, conv.padding, conv.dilation, conv.groups)
    exact = torch.nn.functional.conv2d(x64, weight64, None, *where).numpy()
    size = torch.nn.functional.conv2d(x64.abs(), weight64.abs(), None, *where).numpy()
    lib = load(SOURCE, isa)
    with team(lib, threads) as made:
        for shift in (None, bias):
            y = np.full(exact.shape, np.nan, np.float32)
            assert run(lib, made, f"conv{case}", [n, h, w, *exact.shape[2:]], [y, x, weight, shift]) == 0
            expected = exact + (0 if shift is None else shift[:, None, None])
            assert (np.abs(y - expected) <= 3e-6 * size + 1e-6).all()


def test_groups_must_divide():
    with pytest.raises(ValueError, match="groups 3"):
        Conv2d(4, 6, (1, 1), groups=3)
