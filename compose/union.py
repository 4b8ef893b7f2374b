"""One tokenizer for models whose vocabularies differ: mergekit gives each the tokens of all."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from moiety.errors import InputError
from moiety.progress import SILENT, Progress


def unite(models: Sequence[Path], out: Path, progress: Progress = SILENT) -> None:
    """Write every model into a folder of `out`, by its number, with the tokens of all.

    The tokenizer is the first model's with the others' tokens added. A model's weights stay as
    they are; its embeddings get a row for each token it had not, made of the others' rows. Raises
    InputError when mergekit cannot do it.
    """
    for chosen in progress.track(range(len(models)), "one tokenizer", len(models)):
        settings = {
            "merge_method": "linear",
            "models": [
                {"model": str(model), "parameters": {"weight": int(number == chosen)}}
                for number, model in enumerate(models)
            ],
            "tokenizer": {"source": "union"},
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_merge(
                    MergeConfiguration.model_validate(settings),
                    str(out / str(chosen)),
                    options=MergeOptions(copy_tokenizer=True, quiet=True),
                )
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"expected models whose tokenizers mergekit can unite, but for {models[chosen]}: "
                f"{error}"
            ) from error
