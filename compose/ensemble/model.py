"""Ensembles as a transformers model: N stock models whose next-token distributions are mixed.

B batch, S tokens of a call, K of them with logits asked for, E experts, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from moiety.compose.ensemble.cache import EnsembleCache, Evidence
from moiety.compose.ensemble.config import EnsembleConfig, full_prior
from moiety.compose.ensemble.posterior import (
    Links,
    fed_log_probs,
    latest_log_probs,
    link,
    mix,
)
from moiety.errors import InputError
from moiety.experts.quantizer import check_complete


@dataclass
class EnsembleOutput(CausalLMOutputWithPast):
    """A causal language model's output, with the posterior over experts.

    `posterior` (B, S, E): what the tokens up to each one say about the experts, that is their
    weights before the next token. `logits` are log-probabilities in fp32.
    """

    posterior: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """What a forward pass starts from: its tokens and the evidence before them."""

    ids_BS: Tensor
    links: Links
    log_prior_BE: Tensor
    before_BEV: Tensor | None
    rows: int


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """`p(x_t | x_<t) = Σ_e w_e(t) p_e(x_t | x_<t)` with `w_e(t) ∝ prior_e Π_{s<t} p_e(x_s | x_<s)`.

    The weights are the posterior of a Bayesian mixture over whole sequences, as experts are mixed
    at inference in DEMix (Gururangan et al. 2022, arXiv:2108.05036, section 4) and
    Branch-Train-Merge (Li et al. 2022, arXiv:2208.03306). The product is over real (unpadded)
    tokens; the first one of a sequence, which nothing predicts, says nothing about the experts.
    A row of a batch is one sequence: packing several into one is not known to the posterior.

    Nothing is shared: each token costs E full forward passes, and E key-value caches are kept.
    The experts run one after another, so at the most one expert's logits of the call, the mixture
    and (with a cache) E · V log-probabilities a sequence are in memory at once. A long prompt can
    be fed in pieces (`generate(prefill_chunk_size=...)`).
    """

    config: EnsembleConfig
    config_class = EnsembleConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__(config)
        if not config.experts:
            raise InputError(
                "expected the experts' names under moiety.experts in the configuration, but there "
                "are none; build the ensemble from a recipe of kind ensemble"
            )
        made = [AutoModelForCausalLM.from_config(config.text_config) for _ in config.experts]
        self.experts = nn.ModuleList(made)
        self._no_split_modules = list(made[0]._no_split_modules or [])
        self._forced_E: Tensor | None = None
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Open a checkpoint as any model; InputError when weights are missing from it."""
        loaded = super().from_pretrained(*args, **kwargs)
        check_complete(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """What is tied inside every expert; experts share nothing with each other."""
        return {
            f"experts.{index}.{tied}": f"experts.{index}.{source}"
            for index, expert in enumerate(self.experts)
            for tied, source in expert.get_expanded_tied_weights_keys(all_submodels).items()  # pyright: ignore[reportCallIssue]
        }

    def get_input_embeddings(self) -> nn.Module:
        """The first expert's embeddings; every expert has its own."""
        return self.experts[0].get_input_embeddings()  # pyright: ignore[reportCallIssue]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: every expert has embeddings of its own."""
        raise InputError(
            "expected the embeddings of one expert to be set, but an ensemble has one for each; "
            "call set_input_embeddings on model.experts[i]"
        )

    def get_output_embeddings(self) -> None:
        """None: the experts' heads are mixed, there is not one."""
        return None

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the vocabulary is the packed experts' own."""
        raise InputError(
            "expected the vocabulary to stay as it was built, but it was to be resized; resize "
            "the finetunes and build the ensemble again"
        )

    @contextmanager
    def forced(self, expert: str | Sequence[float]) -> Iterator[None]:
        """Mix with constant weights inside the block: one expert by name, or a weight for each.

        Weights are in the experts' order and are scaled to add up to 1. The posterior is still
        followed and given out, so a cache stays usable after the block. InputError when there is
        no such expert or the weights do not fit.
        """
        names = self.config.experts
        if isinstance(expert, str):
            expert = [float(name == expert) for name in _known(expert, names)]
        if len(expert) != len(names):
            raise InputError(
                f"expected {len(names)} weights, one for each of {', '.join(names)}, "
                f"but got {len(expert)}"
            )
        weights = full_prior(names, dict(zip(names, map(float, expert), strict=True)))
        before = self._forced_E
        self._forced_E = torch.tensor(list(weights.values()), dtype=torch.float64).log()
        try:
            yield
        finally:
            self._forced_E = before

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
    ) -> EnsembleOutput:
        """The mixture's log-probabilities (B, K, V) after tokens (B, S), and the posterior.

        `attention_mask` (B, tokens so far) is 0 at padding. Raises InputError for what an
        ensemble has not: one stack of hidden states or attentions, another kind of cache or mask.
        """
        self._refuse_inner_states(output_attentions, output_hidden_states)
        cache = self._cache(past_key_values, use_cache)
        call = self._start(input_ids, attention_mask, cache, logits_to_keep)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": cache is not None,
        }
        logits_BKV, log_weights_BSE, latest = self._run(call, inputs, cache, keep)
        if cache is not None:
            cache.remember(_evidence(call, log_weights_BSE, latest), input_ids.shape[1])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BKV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        posterior_BSE = log_weights_BSE.softmax(-1).float()
        return EnsembleOutput(
            loss=loss, logits=logits_BKV, past_key_values=cache, posterior=posterior_BSE
        )

    def _run(
        self, call: _Call, inputs: dict[str, Any], cache: EnsembleCache | None, keep: Any
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mixture (B, K, V), log-weights (B, S, E) and what the cache is to keep of each expert."""
        mixed_BKV = total_BK = None
        log_weights: list[Tensor] = []
        latest: list[Tensor] = []
        for index, expert in enumerate(self.experts):
            past = None if cache is None else cache.experts[index]
            logits_BSV = expert(**inputs, past_key_values=past).logits.to(call.ids_BS.device)
            before_BV = None if call.before_BEV is None else call.before_BEV[:, index]
            fed_BS = fed_log_probs(logits_BSV, before_BV, call.ids_BS, call.links)
            prior_B1 = call.log_prior_BE[:, index, None]
            log_weights.append(prior_B1 + fed_BS.cumsum(1, dtype=torch.float64))
            if cache is not None:
                latest.append(latest_log_probs(logits_BSV, before_BV, call.links, call.rows))
            log_probs_BKV = logits_BSV[:, keep].float().log_softmax(-1)
            weight_BK = self._mixing_weight(index, log_weights[-1])[:, keep]
            if mixed_BKV is None or total_BK is None:
                mixed_BKV, total_BK = log_probs_BKV, weight_BK
            else:
                mixed_BKV, total_BK = mix(mixed_BKV, total_BK, log_probs_BKV, weight_BK)
        assert mixed_BKV is not None
        return mixed_BKV, torch.stack(log_weights, -1), latest

    def _mixing_weight(self, index: int, log_weight_BS: Tensor) -> Tensor:
        if self._forced_E is None:
            return log_weight_BS
        return torch.full_like(log_weight_BS, float(self._forced_E[index]))

    def _start(
        self,
        ids_BS: Tensor,
        attention_mask: Tensor | None,
        cache: EnsembleCache | None,
        logits_to_keep: int | Tensor,
    ) -> _Call:
        real_BS = _real_tokens(ids_BS, attention_mask)
        evidence = None if cache is None else cache.evidence
        rows = (
            _rows(ids_BS.shape[1], logits_to_keep) if cache is not None and cache.record_past else 1
        )
        if evidence is None:
            prior_E = torch.tensor(self.config.priors, dtype=torch.float64, device=ids_BS.device)
            log_prior_BE = prior_E.log().expand(len(ids_BS), -1)
            nothing_B = torch.zeros_like(real_BS[:, 0])
            return _Call(ids_BS, link(real_BS, nothing_B), log_prior_BE, None, rows)
        last = evidence.each(lambda tensor: tensor[:, -1].to(ids_BS.device))
        links = link(real_BS, last.known_BR)
        return _Call(ids_BS, links, last.log_weights_BRE, last.log_probs_BREV, rows)

    def _cache(self, given: Any, use_cache: bool | None) -> EnsembleCache | None:
        experts = len(self.experts)
        if given is None:
            wanted = self.config.get_text_config().use_cache if use_cache is None else use_cache
            return EnsembleCache(self.config.get_text_config(), experts) if wanted else None
        if isinstance(given, EnsembleCache) and len(given.experts) == experts:
            return given
        raise InputError(
            f"expected past_key_values to be an EnsembleCache for {experts} experts, but it is "
            f"{type(given).__name__}; pass that of an earlier output, or none"
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """The hook of `generate` that chooses a cache: ours, unless one is given or none wanted."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        wanted = generation_config.cache_implementation or "dynamic"
        if wanted not in ("dynamic", "static"):
            raise InputError(
                f"expected cache_implementation dynamic or static, but it is {wanted!r}; an "
                "ensemble keeps a cache of its own kind, which knows these two"
            )
        room = max(max_cache_length, generation_config.max_cache_len or 0)
        tokens = room if wanted == "static" else None
        cache = EnsembleCache(self.config.get_text_config(), len(self.experts), tokens)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None

    def _refuse_inner_states(self, attentions: bool | None, hidden_states: bool | None) -> None:
        asked = {"output_attentions": attentions, "output_hidden_states": hidden_states}
        for name, given in asked.items():
            if getattr(self.config, name) if given is None else given:
                raise InputError(
                    f"expected {name} to be off, because an ensemble has as many of them as "
                    "experts, but it is on; ask one of model.experts"
                )


def _known(expert: str, names: Sequence[str]) -> Sequence[str]:
    if expert not in names:
        raise InputError(f"expected one of the experts {', '.join(names)}, but got {expert!r}")
    return names


def _real_tokens(ids_BS: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which of the tokens fed are no padding (B, S)."""
    if attention_mask is None:
        return torch.ones_like(ids_BS, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        shape = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise InputError(
            f"expected an attention_mask (batch, tokens), 0 at padding, but it is {shape}; the "
            "posterior needs to know which tokens are real"
        )
    return attention_mask[:, -ids_BS.shape[1] :].bool().to(ids_BS.device)


def _rows(tokens: int, logits_to_keep: int | Tensor) -> int:
    """Positions to remember for `crop`: those whose logits were asked for and the one before.

    An assistant goes back by one token more than it drafted.
    """
    if isinstance(logits_to_keep, Tensor) or logits_to_keep == 0:
        return tokens
    return min(logits_to_keep + 1, tokens)


def _evidence(call: _Call, log_weights_BSE: Tensor, latest: list[Tensor]) -> Evidence:
    return Evidence(
        log_weights_BSE[:, -call.rows :].detach(),
        torch.stack(latest, 2).detach(),
        call.links.known_BS[:, -call.rows :],
    )
