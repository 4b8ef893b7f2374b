"""Block recovery: it mends the block, keeps the masks and everything else, and never harms."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moiety.errors import InputError
from moiety.experts.calibrate import BlockBatch
from moiety.experts.pattern import Pattern
from moiety.experts.recovery import BlockRecovery, reconstruct

WIDTH = 16


class Block(nn.Module):
    """A residual two-layer block that takes a further argument and a keyword, and gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH)
        self.ffn = nn.ModuleDict({"up": nn.Linear(WIDTH, 24), "down": nn.Linear(24, WIDTH)})
        with torch.no_grad():
            for one in self.ffn.parameters():
                one.copy_(0.3 * torch.randn(one.shape, generator=generator))

    def forward(self, hidden: Tensor, scale: float, *, shift: float) -> tuple[Tensor, None]:
        """Hidden states (W, C, D) to hidden states."""
        inner = torch.tanh(self.ffn["up"](self.norm(hidden)))
        return hidden + scale * self.ffn["down"](inner) + shift, None


def batches(count: int = 6, dtype: torch.dtype = torch.float32) -> list[BlockBatch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        hidden = torch.randn(4, 10, WIDTH, generator=generator).to(dtype)
        mask = torch.ones(4, 10, dtype=torch.bool)
        mask[1, 7:] = False
        hidden[1, 7:] = 50.0
        made.append(BlockBatch(hidden, (1.0,), {"shift": 0.1}, mask))
    return made


def pruned(block: Block, given: list[BlockBatch]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Dense outputs and masks; the block's matrices become 2:4."""
    with torch.no_grad():
        targets = [batch.run(block) for batch in given]
        masks = {}
        for name in ("ffn.up", "ffn.down"):
            weight = block.get_submodule(name).get_parameter("weight")
            masks[name] = Pattern(2, 4).mask(weight.abs())
            weight.mul_(masks[name])
    return targets, masks


def weights(block: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in block.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_falls_and_only_kept_values_move(dtype: torch.dtype) -> None:
    block, given = Block(), batches(dtype=dtype)
    targets, masks = pruned(block, given)
    targets = [target.to(dtype) for target in targets]
    before, same = weights(block), dict(block.named_parameters())
    with torch.no_grad():
        report = reconstruct(block, given, targets, masks, BlockRecovery(epochs=10))
    assert report.error_after < 0.8 * report.error_before
    assert report.error_after == min(report.errors) == report.errors[report.best_epoch]
    assert report.errors[0] == report.error_before and len(report.errors) == 11
    assert (report.training_tokens, report.held_tokens) == (5 * 37, 37)
    for name, weight in block.named_parameters():
        assert weight is same[name]
        mask = masks.get(name.removesuffix(".weight"))
        if mask is None:
            assert torch.equal(weight, before[name])
        else:
            assert not weight[~mask].any()
            assert (weight != before[name])[mask].float().mean() > 0.5


def test_flags_gradients_and_modules_come_back() -> None:
    block, given = Block(), batches()
    targets, masks = pruned(block, given)
    block.norm.weight.grad = torch.full((WIDTH,), 3.0)
    flags = {"ffn.up.bias": False, "norm.weight": True, "ffn.up.weight": True}
    for name, flag in flags.items():
        block.get_parameter(name).requires_grad_(flag)
    reconstruct(block, given, targets, masks)
    for name, flag in flags.items():
        assert block.get_parameter(name).requires_grad == flag
    assert torch.equal(block.norm.weight.grad, torch.full((WIDTH,), 3.0))
    assert all(one.grad is None for name, one in block.named_parameters() if name != "norm.weight")
    assert type(block.ffn["up"]) is nn.Linear
    assert set(block.state_dict()) == set(weights(block))


def test_same_inputs_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        block, given = Block(), batches()
        targets, masks = pruned(block, given)
        torch.rand(3)
        reconstruct(block, given, targets, masks, BlockRecovery(seed=4))
        results.append(weights(block))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_it_is_never_worse() -> None:
    block, given = Block(), batches()
    targets, masks = pruned(block, given)
    targets[-1] = targets[0].flip(0)
    before = weights(block)
    settings = BlockRecovery(epochs=2, rate=0.9)
    report = reconstruct(block, given, targets, masks, settings)
    assert report.error_after <= report.error_before
    if report.best_epoch == 0:
        assert all(torch.equal(one, before[name]) for name, one in block.named_parameters())


def test_what_cannot_get_better_stays_as_it_was() -> None:
    block, given = Block(), batches()
    _, masks = pruned(block, given)
    before = weights(block)
    with torch.no_grad():
        targets = [batch.run(block) for batch in given]
    report = reconstruct(block, given, targets, masks)
    assert (report.best_epoch, report.error_after) == (0, 0.0)
    assert all(torch.equal(one, before[name]) for name, one in block.named_parameters())


def test_weights_outside_a_mask_need_not_be_zero() -> None:
    block, given = Block(), batches()
    before = weights(block)
    targets, masks = pruned(block, given)
    for name in masks:
        block.get_submodule(name).get_parameter("weight").data.copy_(before[f"{name}.weight"])
    reconstruct(block, given, [-one for one in targets], masks)
    for name, mask in masks.items():
        weight = block.get_submodule(name).get_parameter("weight")
        assert torch.equal(weight[~mask], before[f"{name}.weight"][~mask])
        assert not torch.equal(weight, before[f"{name}.weight"])


def test_one_batch_and_no_mask_are_enough() -> None:
    block, given = Block(), batches(1)
    targets, masks = pruned(block, given)
    report = reconstruct(block, given, targets, masks)
    assert report.error_after < report.error_before
    report = reconstruct(block, given, targets, {})
    assert report.errors == (report.error_before,)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("rate", 0.0), ("held_back", 1.0), ("seed", -1), ("target", "dense")],
)
def test_settings_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        BlockRecovery(**{field: value})


def test_what_does_not_fit_is_refused() -> None:
    block, given = Block(), batches()
    targets, masks = pruned(block, given)
    with pytest.raises(InputError, match="6 batches and 5 targets"):
        reconstruct(block, given, targets[:-1], masks)
    with pytest.raises(InputError, match=r"one \(4, 10, 8\) for \(4, 10, 16\)"):
        reconstruct(block, given, [one[..., :8] for one in targets], masks)
    with pytest.raises(InputError, match=r"ffn.up: expected a boolean mask of shape \(24, 16\)"):
        reconstruct(block, given, targets, {"ffn.up": masks["ffn.down"]})
    block.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="finite outputs"):
        reconstruct(block, given, targets, masks)
    assert type(block.ffn["up"]) is nn.Linear
