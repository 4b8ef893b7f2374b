"""Results of other models do not get into one file."""

from typing import Any, cast

import pytest

from experiments.pruning import check_same_models
from moiety.errors import InputError


class Measured:
    """Stands in for a lab whose base is at 1 nat on both domains."""

    def losses(self, _weights: Any) -> dict[str, float]:
        """What the base gives."""
        return {"code": 1.0, "law": 1.0}


def test_the_same_base_is_taken_up_to_rounding() -> None:
    check_same_models(cast(Any, Measured()), {"code": 1.001, "law": 0.999})


@pytest.mark.parametrize("base", [{"code": 1.0, "law": 1.1}, {"code": 1.0}])
def test_another_base_is_refused(base: dict[str, float]) -> None:
    with pytest.raises(InputError, match="on law"):
        check_same_models(cast(Any, Measured()), base)
