"""Plans of routes: every valid route once, in blocks of one expert."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiety.experts.kernels.cuda import routes
from moiety.experts.kernels.cuda.routes import plan_routes


def check(experts: Tensor, stack: int, block: int) -> None:
    plan = plan_routes(experts, stack, block)
    flat, rows = experts.reshape(-1), plan.row_R
    valid = (flat >= 0) & (flat < stack)
    assert bool((rows[~valid] < 0).all())
    assert sorted(rows[valid].tolist()) == list(range(int(valid.sum())))
    tokens = torch.arange(len(flat), device=flat.device) // experts.shape[1]
    assert torch.equal(plan.token_R[rows[valid].long()].long(), tokens[valid])
    of_row = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    of_row[rows[valid].long()] = flat[valid]
    seen = []
    blocks = zip(plan.expert_B.tolist(), plan.start_B.tolist(), plan.end_B.tolist(), strict=True)
    for expert, start, end in blocks:
        if expert < stack:
            taken = list(range(start, min(start + block, end)))
            assert taken and set(of_row[taken].tolist()) == {expert}
            seen += taken
    assert sorted(seen) == list(range(int(valid.sum())))


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(2, 40),
    active=st.integers(1, 3),
    stack=st.integers(1, 9),
    block=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
)
def test_few_routes_are_compared_and_many_sorted(
    gpu: Any, tokens: int, active: int, stack: int, block: int, seed: int
) -> None:
    torch.manual_seed(seed)
    experts = torch.randint(-1, stack + 1, (tokens, active), device=gpu.device)
    check(experts, stack, block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "_MOST_COMPARED", 0)
        check(experts, stack, block)


def test_one_token_needs_no_plan() -> None:
    plan = plan_routes(torch.tensor([[2, 0]]), 3, 8)
    assert (plan.mode, plan.blocks) == ("direct", 2)
