# type: ignore  # Triton's own language and its launches are no Python to a type checker.
"""Which program takes which tokens of which expert, worked out on the device without a host sync.

T tokens, A active experts, R = T * A routes, E experts, M tokens a program takes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_COMPARED = 256


@dataclass(frozen=True)
class Plan:
    """Routes sorted by expert and cut into blocks of one expert's tokens.

    `mode` says how a block finds its tokens: `one` matrix for all, `direct` (each route a block) or
    `planned`. `token_R` is the token of each sorted route, `row_R` where each route was sorted to,
    below 0 if its expert does not exist; `expert_B`, `start_B` and `end_B` describe the blocks.
    """

    mode: str
    blocks: int
    token_R: Tensor
    row_R: Tensor
    expert_B: Tensor
    start_B: Tensor
    end_B: Tensor

    def blocks_of(self) -> list[Tensor]:
        """What the product reads: tokens of rows, then the blocks."""
        return [self.token_R, self.expert_B, self.start_B, self.end_B]


def plan_routes(experts_TA: Tensor, stack: int, block: int) -> Plan:
    """The plan for `stack` experts and `block` tokens a program."""
    routes = experts_TA.reshape(-1)
    if len(experts_TA) == 1:
        return Plan("direct", len(routes), *[routes] * 5)
    count = len(routes)
    blocks = min(count, count // block + min(stack, count))
    if count > _MOST_COMPARED or stack > _MOST_COMPARED:
        token_R, row_R, end_E = sort_routes(experts_TA, stack)
        return Plan("planned", blocks, token_R, row_R, *_blocks(end_E, blocks, block))
    token_R, row_R = routes.new_empty((2, count), dtype=torch.int32)
    expert_B, start_B, end_B = routes.new_empty((3, blocks), dtype=torch.int32)
    found = (token_R, row_R, expert_B, start_B, end_B)
    _compare[(1,)](
        routes,
        *found,
        count,
        blocks,
        stack,
        experts_TA.shape[1],
        BLOCK=block,
        R=triton.next_power_of_2(count),
        E=triton.next_power_of_2(stack + 1),
        B=triton.next_power_of_2(blocks),
        num_warps=8,
    )
    return Plan("planned", blocks, *found)


@triton.jit(do_not_specialize=["count", "blocks"])
def _compare(
    routes,
    token_of_row,
    row_of_route,
    block_expert,
    block_start,
    block_end,
    count,
    blocks,
    stack,
    active,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    B: tl.constexpr,
):
    """Few routes: everyone's place is the number of those before it."""
    place = tl.arange(0, R)
    expert_r = tl.load(routes + place, mask=place < count, other=-1).to(tl.int32)
    valid_r = (expert_r >= 0) & (expert_r < stack)
    expert_r = tl.where(valid_r, expert_r, E)
    smaller = expert_r[None, :] < expert_r[:, None]
    earlier = (expert_r[None, :] == expert_r[:, None]) & (place[None, :] < place[:, None])
    row_r = tl.sum((smaller | earlier).to(tl.int32), axis=1)
    tl.store(row_of_route + place, tl.where(valid_r, row_r, -1), mask=place < count)
    tl.store(token_of_row + row_r, place // active, mask=valid_r)

    expert_e = tl.arange(0, E)
    same = expert_r[None, :] == expert_e[:, None]
    count_e = tl.sum(same.to(tl.int32), axis=1)
    start_e = tl.sum((expert_r[None, :] < expert_e[:, None]).to(tl.int32), axis=1)
    blocks_e = (count_e + BLOCK - 1) // BLOCK
    after_e = tl.cumsum(blocks_e, axis=0)
    block = tl.arange(0, B)
    done = (after_e[None, :] <= block[:, None]) & (expert_e < stack)[None, :]
    expert_b = tl.sum(done.to(tl.int32), axis=1)
    own = expert_e[None, :] == expert_b[:, None]
    nth_b = block - tl.sum(tl.where(own, (after_e - blocks_e)[None, :], 0), axis=1)
    first_b = tl.sum(tl.where(own, start_e[None, :], 0), axis=1)
    last_b = first_b + tl.sum(tl.where(own, count_e[None, :], 0), axis=1)
    there = block < blocks
    tl.store(block_expert + block, expert_b, mask=there)
    tl.store(block_start + block, first_b + nth_b * BLOCK, mask=there)
    tl.store(block_end + block, last_b, mask=there)


def sort_routes(experts_TA: Tensor, stack: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the routes sorted by expert, where each route was sorted to, where experts end.

    The last has one number an expert; routes to none of the `stack` come behind all of them.
    """
    routes = experts_TA.reshape(-1)
    valid_R = (routes >= 0) & (routes < stack)
    key_R = torch.where(valid_R, routes, stack)
    order_R = key_R.argsort(stable=True)
    place_R = torch.arange(len(routes), dtype=torch.int32, device=routes.device)
    row_R = torch.empty_like(place_R).scatter_(0, order_R, place_R).masked_fill_(~valid_R, -1)
    count_E = key_R.new_zeros(stack + 1).scatter_add_(0, key_R, torch.ones_like(key_R))[:stack]
    token_R = (order_R // experts_TA.shape[1]).int()
    return token_R, row_R, count_E.cumsum(0)


def _blocks(end_E: Tensor, blocks: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The expert of each block, its first sorted route and the end of its expert's."""
    count_E = end_E.diff(prepend=end_E.new_zeros(1))
    blocks_E = (count_E + block - 1) // block
    after_E = blocks_E.cumsum(0)
    place_B = torch.arange(blocks, device=end_E.device)
    expert_B = torch.searchsorted(after_E, place_B, right=True)
    own_B = expert_B.clamp(max=len(end_E) - 1)
    nth_B = place_B - (after_E - blocks_E)[own_B]
    start_B = (end_E - count_E)[own_B] + nth_B * block
    return expert_B.int(), start_B.int(), end_E[own_B].int()
