"""The configuration of an ensemble: its experts' names, their prior and their architecture."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec

from moiety.compose.shim import write_shim
from moiety.errors import InputError

MODEL_TYPE = "moiety_ensemble"


def full_prior(experts: Sequence[str], prior: Mapping[str, float]) -> dict[str, float]:
    """Every expert's share before any token is seen, adding up to 1; equal where none is given.

    Raises InputError unless `prior` is empty or has a weight for every expert and no other name.
    """
    if not prior:
        return dict.fromkeys(experts, 1 / len(experts))
    if set(prior) != set(experts):
        raise InputError(
            f"expected a prior for every expert ({', '.join(experts)}), but it has "
            f"{', '.join(prior)}; name each expert once, or none for equal ones"
        )
    total = sum(prior.values())
    if min(prior.values()) < 0 or not 0 < total < float("inf"):
        raise InputError(
            f"expected prior weights of at least 0, not all 0, but they are {dict(prior)!r}"
        )
    return {name: prior[name] / total for name in experts}


class EnsembleConfig(PretrainedConfig):
    """What an ensemble is made of.

    `moiety["experts"]` are the experts' names in order, `prior` their weights before any token is
    seen (empty: equal), `text_config` the stock configuration that all of them have, and
    `quantization_config` how their linears are packed, by names such as
    `experts.0.model.layers.0.mlp.gate_proj`. Raises InputError when the prior does not fit.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults = {  # noqa: RUF012
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: dict[str, Any] | PretrainedConfig | None = None
    moiety: dict[str, Any] | None = None
    prior: dict[str, float] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the prior; transformers also makes configurations without any expert."""
        super().__post_init__(**kwargs)
        if self.experts:
            full_prior(self.experts, self.prior or {})

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names in order."""
        return tuple((self.moiety or {}).get("experts", ()))

    @property
    def priors(self) -> list[float]:
        """Each expert's share before any token is seen, adding up to 1."""
        return list(full_prior(self.experts, self.prior or {}).values())

    @property
    def vocab_size(self) -> int:
        """The experts' vocabulary."""
        return self.get_text_config().vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The experts' longest sequence."""
        return self.get_text_config().max_position_embeddings

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write `config.json` and the module that opens it with `trust_remote_code=True`."""
        super().save_pretrained(save_directory, **kwargs)
        write_shim(Path(save_directory), type(self))
