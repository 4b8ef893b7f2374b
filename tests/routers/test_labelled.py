"""Labelled text: one domain's, and windows that switch domain inside."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moiety.errors import InputError
from moiety.routers.labelled import hold_back, of_domain, stitched
from moiety.text import Windows

OWN = {"law": 2, "code": 0, "poems": 3}
START = 999


def _windows(rows: list[list[int]]) -> Windows:
    length = max(map(len, rows))
    return Windows(
        ids_WC=torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        mask_WC=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        document_W=torch.arange(len(rows)),
        bytes_W=torch.tensor([len(row) for row in rows]),
    )


def _data(start: list[int], short: int = 5) -> dict[str, Windows]:
    """Each domain counts in its own hundreds; the poems are short documents."""
    long = {
        name: _windows(
            [start + list(range(base + 50 * row, base + 50 * row + 40)) for row in (0, 1)]
        )
        for name, base in (("law", 100), ("code", 300))
    }
    poems = [start + list(range(base, base + short)) for base in (500, 520, 540)]
    return {**long, "poems": _windows(poems)}


def _owner(token: int) -> int:
    return {1: 2, 3: 0, 5: 3}[token // 100]


def _runs(own_C: list[int]) -> list[int]:
    """Lengths of the stretches of one own expert."""
    cuts = [at for at in range(1, len(own_C)) if own_C[at] != own_C[at - 1]]
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, len(own_C)], strict=True)]


def test_one_domain_has_one_label_and_no_padding_counts() -> None:
    text = of_domain(_windows([[7, 8, 9], [7]]), own=4)
    assert text.own_WC.tolist() == [[4, 4, 4], [4, -1, -1]]
    sizes = [len(batch) for batch in of_domain(_windows([[1]] * 5), 0).batches(2)]
    assert sizes == [2, 2, 1]
    again = torch.cat([batch.own_WC for batch in text.batches(1)])
    assert torch.equal(again, text.own_WC)


@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([None, "law", "poems"]))
def test_stitched_windows_switch_domain_and_know_every_owner(
    seed: int, shortest: int, around: str | None
) -> None:
    text = stitched(_data([]), OWN, 6, seed, shortest, around=around)
    assert text.ids_WC.shape == (6, 40)
    assert bool((text.mask_WC == 1).all())
    for ids_C, own_C in zip(text.ids_WC.tolist(), text.own_WC.tolist(), strict=True):
        assert own_C == [_owner(token) for token in ids_C]
        *whole, _last = _runs(own_C)
        assert whole
        assert all(min(shortest, 20) <= run <= 20 for run in whole)


def test_long_documents_give_consecutive_tokens_and_short_ones_come_whole() -> None:
    text = stitched(_data([]), OWN, 30, seed=1, shortest=10)
    inside = cut = 0
    for ids_C, own_C in zip(text.ids_WC.tolist(), text.own_WC.tolist(), strict=True):
        for at in range(1, 40):
            if own_C[at] != own_C[at - 1]:
                continue
            if own_C[at] == 3 and ids_C[at] != ids_C[at - 1] + 1:
                assert ids_C[at - 1] % 20 == 4
                assert ids_C[at] % 20 == 0
                cut += 1
            else:
                assert ids_C[at] == ids_C[at - 1] + 1
                inside += 1
    assert inside > 500
    assert cut > 20


@pytest.mark.parametrize("around", ["law", "code", "poems"])
def test_around_a_domain_every_second_segment_is_its_own(around: str) -> None:
    text = stitched(_data([]), OWN, 40, seed=3, shortest=8, around=around)
    starts = []
    for own_C in text.own_WC.tolist():
        segments = [own_C[0], *(b for a, b in itertools.pairwise(own_C) if a != b)]
        its_own = [own == OWN[around] for own in segments]
        assert all(a != b for a, b in itertools.pairwise(its_own))
        starts.append(its_own[0])
    assert 5 < sum(starts) < 35
    assert {int(own) for own in text.own_WC.unique()} == set(OWN.values())


def test_stitching_is_seeded_and_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    data = _data([])
    first = stitched(data, OWN, 4, seed=1)
    turned = stitched(dict(reversed(data.items())), OWN, 4, seed=1)
    assert torch.equal(first.ids_WC, turned.ids_WC)
    assert not torch.equal(first.ids_WC, stitched(data, OWN, 4, seed=2).ids_WC)
    by_domain = [stitched(data, OWN, 4, seed=1, around=name).ids_WC for name in data]
    assert not torch.equal(by_domain[0], by_domain[1])
    assert torch.equal(state, torch.get_rng_state())


def test_a_start_token_of_all_windows_stays_at_the_start() -> None:
    text = stitched(_data([START]), OWN, 10, seed=0)
    assert bool((text.ids_WC[:, 0] == START).all())
    assert not bool((text.ids_WC[:, 1:] == START).any())
    assert torch.equal(text.own_WC[:, 0], text.own_WC[:, 1])


def test_domains_of_one_expert_are_no_switch() -> None:
    own = {"law": 1, "code": 1, "poems": 0}
    text = stitched(_data([]), own, 20, seed=0, shortest=10, around="law")
    own_WC = torch.where(text.ids_WC >= 500, 0, 1)
    assert torch.equal(text.own_WC, own_WC)
    assert not bool(((text.ids_WC >= 300) & (text.ids_WC < 400)).any())


def test_what_cannot_be_stitched_is_refused() -> None:
    data = _data([])
    with pytest.raises(InputError, match="at least two experts"):
        stitched(data, dict.fromkeys(data, 1), 2, seed=0)
    with pytest.raises(InputError, match="at least two experts"):
        stitched({"law": data["law"]}, OWN, 2, seed=0)
    with pytest.raises(InputError, match="tokens of 'code' to stitch"):
        stitched(data | {"code": data["code"].select(slice(0))}, OWN, 2, seed=0)
    with pytest.raises(InputError, match="'maths'"):
        stitched(data, OWN, 2, seed=0, around="maths")
    for count, shortest in ((0, 4), (2, 0)):
        with pytest.raises(InputError, match="at least 1"):
            stitched(data, OWN, count, 0, shortest)


def test_a_quarter_of_the_documents_is_held_back() -> None:
    kept, held_back = hold_back({"law": _windows([[n] for n in range(8)]), "code": _windows([[1]])})
    assert kept["law"].document_W.tolist() == [0, 1, 2, 4, 5, 6]
    assert held_back["law"].document_W.tolist() == [3, 7]
    assert len(kept["code"]) == len(held_back["code"]) == 1
