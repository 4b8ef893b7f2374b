"""An ensemble's mixture and posterior against their definition, on every way through the cache."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig

from moiety.compose.ensemble import EnsembleCache, EnsembleConfig, EnsembleForCausalLM
from moiety.errors import InputError

NAMES = ("law", "code", "maths")
PRIOR = {"law": 1.0, "code": 2.0, "maths": 5.0}
VOCABULARY = 64
PADDING = 2


def text_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": PADDING,
    }
    return LlamaConfig(**{**sizes, **changes})


def ensemble(
    config: Any = None, names: Sequence[str] = NAMES, prior: Any = None
) -> EnsembleForCausalLM:
    torch.manual_seed(0)
    made = EnsembleConfig(
        text_config=config or text_config(),
        moiety={"experts": list(names)},
        prior=PRIOR if prior is None else prior,
    )
    return EnsembleForCausalLM(made).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> EnsembleForCausalLM:
    return ensemble()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def defined(model: EnsembleForCausalLM, ids_S: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mixture (S, V) and posterior (S, E) of one sequence by their definition, in fp64."""
    probs = []
    for expert in copy.deepcopy(model).double().experts:
        logits = expert(input_ids=ids_S[None], use_cache=False).logits
        probs.append(logits[0].softmax(-1))
    probs_SVE = torch.stack(probs, -1)
    weights = []
    for position in range(len(ids_S)):
        weight_E = torch.tensor(model.config.priors, dtype=torch.float64)
        for earlier in range(position):
            weight_E = weight_E * probs_SVE[earlier, ids_S[earlier + 1]]
        weights.append(weight_E / weight_E.sum())
    posterior_SE = torch.stack(weights)
    return (probs_SVE * posterior_SE[:, None]).sum(-1).log(), posterior_SE


def check(output: Any, row: int, model: EnsembleForCausalLM, ids_S: Tensor) -> None:
    """One row's last positions are those of its real tokens `ids_S` alone."""
    log_mixture_SV, posterior_SE = defined(model, ids_S)
    real = slice(-len(ids_S), None)
    assert output.logits.dtype == output.posterior.dtype == torch.float32
    torch.testing.assert_close(
        output.logits[row, real].double(), log_mixture_SV, rtol=1e-4, atol=2e-5
    )
    torch.testing.assert_close(
        output.posterior[row, real].double(), posterior_SE, rtol=1e-4, atol=2e-5
    )


def test_the_mixture_is_the_one_defined(model: EnsembleForCausalLM) -> None:
    ids_BS = tokens(3, 14)
    output = model(ids_BS)
    for row, ids_S in enumerate(ids_BS):
        check(output, row, model, ids_S)
    torch.testing.assert_close(output.posterior[:, 0], torch.tensor([[1, 2, 5]]).expand(3, -1) / 8)
    sure_BS = output.posterior.amax(-1)
    assert (sure_BS[:, -1] > sure_BS[:, 0]).all()


def test_padding_is_no_evidence(model: EnsembleForCausalLM) -> None:
    """Left padding, with the positions that `generate` gives, and right padding."""
    ids_BS, lengths = tokens(3, 12), (12, 7, 1)
    left = torch.stack([torch.arange(12) >= 12 - n for n in lengths]).long()
    positions = (left.cumsum(1) - 1).clamp(min=0)
    padded = ids_BS.masked_fill(left == 0, PADDING)
    output = model(padded, attention_mask=left, position_ids=positions)
    for row, length in enumerate(lengths):
        check(output, row, model, ids_BS[row, -length:])
    right = left.flip(1)
    output = model(ids_BS.masked_fill(right == 0, PADDING), attention_mask=right)
    alone = model(ids_BS[1:2, :7])
    torch.testing.assert_close(output.posterior[1:2, :7], alone.posterior)
    assert torch.equal(output.posterior[1, 7:], output.posterior[1, 6:7].expand(5, -1))


def in_pieces(
    model: EnsembleForCausalLM, ids_BS: Tensor, mask_BS: Tensor, sizes: Sequence[int], **more: Any
) -> tuple[Tensor, Tensor]:
    """Logits and posterior of all tokens, fed in calls of these sizes."""
    cache, logits, posterior, end = None, [], [], 0
    positions = (mask_BS.cumsum(1) - 1).clamp(min=0)
    for size in sizes:
        part = slice(end, end := end + size)
        output = model(
            ids_BS[:, part],
            attention_mask=mask_BS[:, :end],
            position_ids=positions[:, part],
            past_key_values=cache,
            use_cache=True,
            **more,
        )
        cache = output.past_key_values
        logits.append(output.logits)
        posterior.append(output.posterior)
    return torch.cat(logits, 1), torch.cat(posterior, 1)


@pytest.mark.parametrize("sizes", [(6, *[1] * 10), (1, 7, 1, 1, 6), (15, 1), (3, 13)])
def test_any_pieces_give_what_the_whole_gives(
    model: EnsembleForCausalLM, sizes: tuple[int, ...]
) -> None:
    """With padding left, in the middle, right and none at all."""
    ids_BS, mask_BS = tokens(4, 16), torch.ones(4, 16, dtype=torch.long)
    mask_BS[1, :8] = mask_BS[2, 5:9] = mask_BS[3, :2] = mask_BS[3, 12:] = 0
    whole = in_pieces(model, ids_BS, mask_BS, (16,))
    for ours, theirs in zip(in_pieces(model, ids_BS, mask_BS, sizes), whole, strict=True):
        real = mask_BS.bool()
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=2e-5)
    one_a_time, _ = in_pieces(model, ids_BS[:1], mask_BS[:1], sizes, logits_to_keep=1)
    ends = torch.tensor(sizes).cumsum(0) - 1
    torch.testing.assert_close(one_a_time, whole[0][:1, ends], rtol=1e-4, atol=2e-5)


def test_logits_are_kept_where_asked_and_without_a_cache_all_the_same(
    model: EnsembleForCausalLM,
) -> None:
    ids_BS = tokens(2, 9)
    whole = model(ids_BS, use_cache=False)
    assert whole.past_key_values is None
    chosen = torch.tensor([0, 4, 7])
    assert torch.equal(model(ids_BS).logits, whole.logits)
    assert torch.equal(model(ids_BS, logits_to_keep=3).logits, whole.logits[:, -3:])
    assert torch.equal(model(ids_BS, logits_to_keep=chosen).logits, whole.logits[:, chosen])
    assert torch.equal(model(ids_BS, return_dict=False)[0], whole.logits)


def test_one_expert_alone_is_that_expert(model: EnsembleForCausalLM) -> None:
    ids_BS = tokens(2, 9)
    whole = model(ids_BS)
    for index, name in enumerate(NAMES):
        alone = model.experts[index](input_ids=ids_BS).logits.log_softmax(-1)
        with model.forced(name):
            forced = model(ids_BS)
        assert torch.equal(forced.logits, alone)
        assert torch.equal(forced.posterior, whole.posterior)
        prior = {other: float(other == name) for other in NAMES}
        assert torch.equal(ensemble(prior=prior)(ids_BS).logits, alone)
    assert torch.equal(model(ids_BS).logits, whole.logits)


def test_constant_weights_and_what_cannot_be_forced(model: EnsembleForCausalLM) -> None:
    ids_BS = tokens(2, 9)
    each = [expert(input_ids=ids_BS).logits.softmax(-1) for expert in model.experts]
    with model.forced((2, 2, 2)):
        uniform = model(ids_BS).logits
    torch.testing.assert_close(uniform.exp(), sum(each) / 3)
    with pytest.raises(InputError, match="experts law, code, maths, but got 'poetry'"):
        model.forced("poetry").__enter__()
    with pytest.raises(InputError, match=r"3 weights.* but got 2"):
        model.forced((0.5, 0.5)).__enter__()
    with pytest.raises(InputError, match="not all 0"):
        model.forced((0, 0, 0)).__enter__()


def test_equal_experts_are_one(model: EnsembleForCausalLM) -> None:
    same = ensemble(prior={})
    for expert in same.experts[1:]:
        expert.load_state_dict(same.experts[0].state_dict())
    ids_BS = tokens(2, 9)
    alone = same.experts[0](input_ids=ids_BS).logits.log_softmax(-1)
    output = same(ids_BS)
    torch.testing.assert_close(output.logits, alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(output.posterior, torch.full((2, 9, 3), 1 / 3))


def test_a_long_sequence_costs_no_precision() -> None:
    """Evidence of thousands of nats on both sides: the log-mixture is still normalised."""
    model = ensemble(text_config(initializer_range=1.0, max_position_embeddings=2048))
    output = model(tokens(1, 1500), logits_to_keep=200)
    torch.testing.assert_close(output.logits.logsumexp(-1), torch.zeros(1, 200), atol=2e-5, rtol=0)


def test_half_precision_experts_are_mixed_in_fp32() -> None:
    model = ensemble().bfloat16()
    ids_BS = tokens(2, 9)
    output = model(ids_BS)
    assert output.logits.dtype == torch.float32
    probs = [e(input_ids=ids_BS).logits.float().softmax(-1) for e in model.experts]
    mixed = sum(p * output.posterior[..., i, None] for i, p in enumerate(probs))
    torch.testing.assert_close(output.logits.exp(), mixed)
    with model.forced("code"):
        alone = model.experts[1](input_ids=ids_BS).logits.float().log_softmax(-1)
        assert torch.equal(model(ids_BS).logits, alone)


def test_the_loss_is_the_mixtures() -> None:
    model = ensemble().requires_grad_(True)
    ids_BS = tokens(2, 9)
    labels = ids_BS.masked_fill(torch.arange(9) < 4, -100)
    output = model(ids_BS, labels=labels)
    expected = -output.logits[:, 3:-1].gather(2, ids_BS[:, 4:, None]).mean()
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for expert in model.experts:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in expert.parameters())


def generate(model: Any, ids: Tensor, **more: Any) -> Tensor:
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PADDING, **more}
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 1.5},
        {"num_beams": 3},
        {"num_beams": 4, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampling", "beams", "sampled beams"],
)
def test_generation_is_the_same_with_the_cache_and_without(
    model: EnsembleForCausalLM, settings: dict[str, Any]
) -> None:
    ids_BS = tokens(3, 6)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :4] = mask_BS[1, :1] = 0
    ids_BS = ids_BS.masked_fill(mask_BS == 0, PADDING)
    more = {"attention_mask": mask_BS, **settings}
    cached = generate(model, ids_BS, **more)
    assert torch.equal(cached, generate(model, ids_BS, use_cache=False, **more))
    if not settings:
        for row, mask_S in enumerate(mask_BS):
            alone = generate(model, ids_BS[row : row + 1, mask_S == 1])[0]
            assert torch.equal(cached[row, mask_S.argmax() :][: len(alone)], alone)
        assert torch.equal(cached, generate(model, ids_BS, prefill_chunk_size=2, **more))
    static = generate(model, ids_BS, cache_implementation="static", **more)
    assert torch.equal(cached, static)


@pytest.mark.parametrize("sliding_window", [None, 8])
def test_assisted_generation_changes_nothing(sliding_window: int | None) -> None:
    """As the target (accepting some drafts, cropping others) and as the assistant."""
    fields = text_config().to_dict()
    fields.pop("model_type")
    config = MistralConfig(**{**fields, "sliding_window": sliding_window})
    model = ensemble(config, prior={"law": 8, "code": 1, "maths": 1})
    small: Any = copy.deepcopy(model.experts[0])
    prompt = tokens(1, 6)
    crops: list[int] = []
    original = EnsembleCache.crop

    def crop(self: EnsembleCache, tokens_to_remove: int) -> None:
        crops.append(tokens_to_remove)
        original(self, tokens_to_remove)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EnsembleCache, "crop", crop)
        for target, assistant in ((model, small), (small, model)):
            plain = generate(target, prompt, max_new_tokens=20)
            assert torch.equal(
                generate(target, prompt, max_new_tokens=20, assistant_model=assistant), plain
            )
    assert min(crops) < 0


def test_crop_goes_back_to_what_is_remembered(model: EnsembleForCausalLM) -> None:
    ids_BS = tokens(2, 12)
    whole = model(ids_BS)
    cache = EnsembleCache(model.config.get_text_config(), len(NAMES))
    cache.activate_past_recording()
    model(ids_BS[:, :6], past_key_values=cache)
    other = tokens(2, 3, seed=9)
    model(other[:, :2], past_key_values=cache)
    model(other[:, 2:], past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 4
    again = model(ids_BS[:, 4:], past_key_values=cache)
    torch.testing.assert_close(again.logits, whole.logits[:, 4:], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(again.posterior, whole.posterior[:, 4:], rtol=1e-4, atol=2e-5)
    cache.crop(-12)
    torch.testing.assert_close(model(ids_BS, past_key_values=cache).logits, whole.logits)
    cache.reset()
    torch.testing.assert_close(model(ids_BS, past_key_values=cache).logits, whole.logits)


def test_crop_refuses_to_go_further(model: EnsembleForCausalLM) -> None:
    ids_BS = tokens(2, 6)
    unrecorded = model(ids_BS).past_key_values
    with pytest.raises(InputError, match=r"at most 0 of the 6 tokens.*to remove 1; call activate"):
        unrecorded.crop(-1)
    cache = EnsembleCache(model.config.get_text_config(), len(NAMES))
    cache.activate_past_recording()
    model(ids_BS, past_key_values=cache, logits_to_keep=3)
    with pytest.raises(InputError, match=r"at most 3 of the 6 tokens.*to remove 4"):
        cache.crop(-4)
    assert cache.get_seq_length() == 6
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    with pytest.raises(ValueError, match="positive"):
        cache.crop(3)


def test_batches_are_reordered_repeated_and_selected(model: EnsembleForCausalLM) -> None:
    ids_BS = tokens(3, 8)
    whole = model(ids_BS)

    def after(change: Any, rows: list[int]) -> None:
        cache = model(ids_BS[:, :5]).past_key_values
        change(cache)
        output = model(ids_BS[rows, 5:], past_key_values=cache)
        torch.testing.assert_close(output.logits, whole.logits[rows, 5:], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(
            output.posterior, whole.posterior[rows, 5:], rtol=1e-4, atol=2e-5
        )

    after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0])
    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    after(lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1])


def test_what_an_ensemble_has_not_is_refused(model: EnsembleForCausalLM) -> None:
    ids_BS = tokens(1, 4)
    with pytest.raises(InputError, match="output_hidden_states to be off"):
        model(ids_BS, output_hidden_states=True)
    with pytest.raises(InputError, match="output_attentions to be off"):
        model(ids_BS, output_attentions=True)
    with pytest.raises(InputError, match="EnsembleCache for 3 experts, but it is DynamicCache"):
        model(ids_BS, past_key_values=DynamicCache())
    with pytest.raises(InputError, match=r"attention_mask \(batch, tokens\)"):
        model(ids_BS, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(InputError, match="dynamic or static, but it is 'offloaded_static'"):
        generate(model, ids_BS, cache_implementation="offloaded_static")
    with pytest.raises(InputError, match="build the ensemble again"):
        model.resize_token_embeddings(80)
    with pytest.raises(InputError, match="one for each"):
        model.set_input_embeddings(model.get_input_embeddings())
    with pytest.raises(InputError, match="there are none"):
        EnsembleForCausalLM(EnsembleConfig())
    with pytest.raises(InputError, match="a prior for every expert"):
        EnsembleConfig(moiety={"experts": ["a", "b"]}, prior={"a": 1.0})


def test_each_expert_keeps_its_own_tied_weights(model: EnsembleForCausalLM) -> None:
    assert len(model.all_tied_weights_keys) == len(NAMES)
    sources = set()
    for expert in model.experts:
        assert isinstance(expert, LlamaForCausalLM)
        assert expert.lm_head.weight is expert.model.embed_tokens.weight
        sources.add(expert.lm_head.weight.data_ptr())
    assert len(sources) == len(NAMES)
    untied = ensemble(text_config(tie_word_embeddings=False))
    assert not untied.all_tied_weights_keys
