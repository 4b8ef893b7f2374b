"""A few lines beside a checkpoint that let it open where nobody imported moiety first."""

from pathlib import Path

from transformers import PretrainedConfig

from moiety.files import read_json, write_json, write_text

MODULE = "moiety_shim"
TEXT = '''\
"""Opens this checkpoint with trust_remote_code=True; needs `pip install moiety`."""

import moiety.experts.quantizer  # noqa: F401
from {module} import {name} as Configuration


class {name}(Configuration):
    """Stands for the class of the same name, which is what gets opened."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return Configuration.from_pretrained(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs):
        pass
'''


def shim(config_class: type[PretrainedConfig]) -> str:
    """Source of a module that registers moiety and then hands over to `config_class`.

    The class of that name in it only opens: transformers goes on with the configuration and
    model classes it would have used after `import moiety`, so nothing depends on the way in.
    """
    name = config_class.__name__
    stock = config_class.__module__.startswith("transformers.")
    return TEXT.format(name=name, module="transformers" if stock else config_class.__module__)


def write_shim(folder: Path, config_class: type[PretrainedConfig]) -> None:
    """Add the shim and the `auto_map` that names it to a checkpoint's folder.

    Only `trust_remote_code=True` makes use of them: without it a stock class opens as before.
    """
    write_text(folder / f"{MODULE}.py", shim(config_class))
    fields = read_json(folder / "config.json")
    fields["auto_map"] = {"AutoConfig": f"{MODULE}.{config_class.__name__}"}
    write_json(folder / "config.json", fields)
