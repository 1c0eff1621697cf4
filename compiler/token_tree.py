"""Trees of tokens, written as the depth of each token in preorder: its parent is the last one before it, a level up.

Continuations of a text share their beginnings in a tree, and are verified together (Miao et al., SpecInfer, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tree_visible(keys: int, past: Tensor | int, depths: Tensor, window: int) -> Tensor:
    """Boolean [queries, keys]: query i sees the keys before `past`, and of those after it its ancestors and itself.

    Row past + j of a cache holds token j of the tree, whose position is past + depths[j]. A `window` > 0 keeps the keys
    of the last `window` positions.
    """
    rows, count = torch.arange(keys, device=depths.device), depths.shape[0]
    token = (rows - past).clamp(0, count - 1)
    seen = torch.where(rows < past, True, _ancestors(depths)[:, token] & (rows < past + count))
    return seen & (tree_positions(keys, past, depths) > (past + depths)[:, None] - window) if window else seen


def tree_positions(keys: int, past: Tensor | int, depths: Tensor) -> Tensor:
    """int64 [keys]: the position of what each row of a cache holds; rows after those of the tree have the last."""
    rows = torch.arange(keys, device=depths.device)
    return torch.where(rows < past, rows, past + depths[(rows - past).clamp(0, depths.shape[0] - 1)])


def _ancestors(depths: Tensor) -> Tensor:
    """Boolean [n, n]: j is i, or all tokens after j up to i are deeper than j."""
    n = depths.shape[0]
    later = torch.ones(n, n, dtype=torch.bool, device=depths.device).triu(1)
    deeper = torch.where(later, depths, depths.amax() + 1).cummin(1).values
    return ((deeper > depths[:, None]) & later).T | torch.eye(n, dtype=torch.bool, device=depths.device)


def path_to(depths: Sequence[int], token: int) -> list[int]:
    """The tokens from the root of the tree to this one."""
    path = [token]
    for other in range(token - 1, -1, -1):
        if depths[other] == depths[path[0]] - 1:
            path.insert(0, other)
    return path
