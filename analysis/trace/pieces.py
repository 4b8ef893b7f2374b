"""The piece of text that each token stands for, so that the pieces of a window join to its text.

A character that spans several tokens (emoji, most CJK in byte-level vocabularies) belongs to the
token that completes it; the tokens before it get the empty piece.
"""

from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Pieces:
    """Cuts the text of windows into one piece a token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """The pieces of one window of token ids, special tokens written out.

        A beginning-of-sequence token in front is not part of the document: its piece is empty.
        The pieces join to what the tokenizer decodes the rest of the window to.
        """
        if ids and ids[0] == self._tokenizer.bos_token_id:
            return ["", *self._cut(ids[1:])]
        return self._cut(ids)

    def _cut(self, ids: Sequence[int]) -> list[str]:
        text = self._decode(ids)
        pieces = [self._decode_alone(token) for token in ids]
        if "".join(pieces) == text:
            return pieces
        return _slices(text, self._grow(ids))

    def _grow(self, ids: Sequence[int]) -> list[int]:
        """How many characters each further token completes.

        Decodes a few tokens of context with each token, as streaming engines do, so the work is
        linear in the length of the window.
        """
        lengths: list[int] = []
        start = settled = 0
        for stop in range(1, len(ids) + 1):
            known, grown = self._decode(ids[start:settled]), self._decode(ids[start:stop])
            complete = len(grown) > len(known) and not grown.endswith(INCOMPLETE)
            lengths.append(len(grown) - len(known) if complete else 0)
            if complete:
                start, settled = settled, stop
        return lengths

    def _decode_alone(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self._decode([token])
        return self._alone[token]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _slices(text: str, lengths: Sequence[int]) -> list[str]:
    """Cut `text` at the running sum of `lengths`; the last piece takes what is left."""
    if not lengths:
        return []
    stops = [min(stop, len(text)) for stop in accumulate(lengths)]
    stops[-1] = len(text)
    return [text[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
