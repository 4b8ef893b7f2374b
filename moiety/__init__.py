"""moiety: several domain finetunes of one base model as one sparse, routed model.

Importing moiety is enough for `transformers` to open moiety's packed checkpoints. The
registration waits until transformers itself is imported, so that `import moiety` stays light.
"""

import wrapt

from moiety.version import __version__

__all__ = ["__version__"]


@wrapt.when_imported("transformers.modeling_utils")
def _register_packed_format(_module: object) -> None:
    import moiety.experts.quantizer  # noqa: F401


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register_models(_module: object) -> None:
    import moiety.compose.ensemble
    import moiety.compose.routed  # noqa: F401
