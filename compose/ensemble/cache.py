"""What an ensemble remembers between calls: every expert's cache and the evidence so far.

B batch, R positions remembered, E experts, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, StaticCache

from moiety.errors import InputError


@dataclass(frozen=True)
class Evidence:
    """State after each of the last R positions, enough to go on from any of them.

    `log_weights_BRE` are unnormalised log-posteriors in fp64, `log_probs_BREV` the experts'
    log-probabilities in fp32 after the last real token, `known_BR` whether there was one.
    """

    log_weights_BRE: Tensor
    log_probs_BREV: Tensor
    known_BR: Tensor

    @property
    def rows(self) -> int:
        """R, the positions remembered."""
        return self.known_BR.shape[1]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Evidence":
        """The same with every tensor changed."""
        return Evidence(
            change(self.log_weights_BRE), change(self.log_probs_BREV), change(self.known_BR)
        )

    def after(self, earlier: "Evidence") -> "Evidence":
        """Both, the `earlier` positions first."""
        return Evidence(
            torch.cat([earlier.log_weights_BRE, self.log_weights_BRE], 1),
            torch.cat([earlier.log_probs_BREV, self.log_probs_BREV], 1),
            torch.cat([earlier.known_BR, self.known_BR], 1),
        )


class EnsembleCache(Cache):
    """Keys and values of every expert, and the evidence that the tokens were to each.

    `crop` can only go back to positions whose log-probabilities are still there, E · V numbers
    each. By default that is the last position alone. `activate_past_recording`, which assisted
    generation calls by itself, keeps those of every position of a call whose logits were asked
    for, of the one before, and of earlier calls as far as there is no gap, until the next `crop`.

    With `tokens` the keys and values lie in static tensors of that many tokens, as in
    transformers' StaticCache, which cannot be cropped.
    """

    def __init__(self, config: PretrainedConfig, experts: int, tokens: int | None = None) -> None:
        self.experts: list[Cache] = [
            DynamicCache(config=config) if tokens is None else StaticCache(config, tokens)
            for _ in range(experts)
        ]
        super().__init__(layers=[layer for cache in self.experts for layer in cache.layers])
        self.is_static = tokens is not None
        self.record_past = False
        self.evidence: Evidence | None = None

    @property
    def is_compileable(self) -> bool:
        """No: `generate` would compile unasked, with 4D masks, which hide where padding is."""
        return False

    def remember(self, evidence: Evidence, tokens: int) -> None:
        """Take the evidence after the last positions of a call of `tokens` tokens."""
        if self.record_past and self.evidence is not None and evidence.rows == tokens:
            evidence = evidence.after(self.evidence)
        self.evidence = evidence

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs to go back further than nowhere."""
        self.record_past = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; InputError beyond what is remembered."""
        if self.is_static:
            raise InputError(
                "expected a dynamic cache to crop, but this one is static; reset it and feed the "
                "tokens again, or make one without tokens"
            )
        evidence = self._evidence_without(-tokens_to_remove)
        super().crop(tokens_to_remove)
        self.evidence = evidence

    def _evidence_without(self, tokens: int) -> Evidence | None:
        length = self.get_seq_length()
        if self.evidence is None or tokens >= length:
            return None
        kept = self.evidence.rows - max(tokens, 0)
        if kept < 1:
            raise InputError(
                f"expected to go back at most {self.evidence.rows - 1} of the {length} tokens, "
                f"whose log-probabilities are kept, but crop was to remove {tokens}; call "
                "activate_past_recording on the cache before the tokens are fed, or start again"
            )
        return self.evidence.each(lambda tensor: tensor[:, kept - 1 : kept])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.evidence = None

    def reorder_cache(self, beam_idx: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take the sequences of the batch in another order, as beam search does."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self._change_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        super().batch_repeat_interleave(repeats)
        self._change_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        super().batch_select_indices(indices)
        self._change_batch(lambda tensor: tensor[indices])

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.evidence is not None:
            self.evidence = self.evidence.each(change)
