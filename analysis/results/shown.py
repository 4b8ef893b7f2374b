"""How notebooks show results: as a card."""


class Shown:
    """A result that a notebook shows as its answer and its few numbers."""

    def _repr_html_(self) -> str:
        from moiety.analysis.reporting.card import card_of

        return card_of(self)
