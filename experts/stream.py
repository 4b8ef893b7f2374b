"""A model one decoder block at a time: weights come from disk when needed and go again.

Nothing but the skeleton (no weights), the calibration hidden states and the block in hand is in
memory. W windows of a batch, C context length, D model width.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moiety.errors import InputError
from moiety.experts.calibrate import BlockBatch, decoder_blocks
from moiety.experts.device import CPU
from moiety.text import Windows

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward pass that has shown what it was run for."""


class StreamedModel:
    """The decoder blocks of a checkpoint, loaded one by one in fp32.

    `tensors` maps names to dense weights (see `unpack.dense_view`). Blocks and batches are on
    `device`; the embeddings' part is done on the CPU. Raises InputError when the architecture has
    no list of decoder blocks or a weight is absent.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        tensors: Mapping[str, Tensor],
        device: str | torch.device = CPU,
    ) -> None:
        self.tensors, self.device = tensors, torch.device(device)
        self.dtype = _dtype(config)
        self.model = skeleton(config)
        self.prefix, self.blocks = decoder_blocks(self.model)
        self._calls: dict[int, list[Call]] = {}
        for name, _ in self.blocks.named_parameters():
            self._spelling(f"{self.prefix}.{name}")

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, index: int, module: str) -> str:
        """Full name of a module of block `index`."""
        return f"{self.prefix}.{index}.{module}"

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights in fp32; they are dropped when the context ends."""
        block = self.blocks[index]
        self._load(block, f"{self.prefix}.{index}")
        try:
            yield block
        finally:
            _drop_weights(block)

    def _load(self, module: nn.Module, prefix: str) -> None:
        for name, parameter in list(module.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            tensor = self._tensor(f"{prefix}.{name}", parameter.shape)
            tensor = tensor.to(self.device, torch.float32, copy=True)
            loaded = nn.Parameter(tensor, requires_grad=False)
            setattr(module.get_submodule(owner), attribute, loaded)
        for name, buffer in list(module.named_buffers()):
            if buffer.is_meta:
                owner, _, attribute = name.rpartition(".")
                tensor = self._tensor(f"{prefix}.{name}", buffer.shape)
                module.get_submodule(owner).register_buffer(attribute, tensor)
        module.to(self.device)

    def _spelling(self, name: str) -> str:
        """What the checkpoint calls a weight."""
        base = f"{self.model.base_model_prefix}."
        spellings = (name, name.removeprefix(base), base + name)
        found = next((spelling for spelling in spellings if spelling in self.tensors), None)
        if found is None:
            raise InputError(
                f"expected the weight {name} of {type(self.model).__name__} in the checkpoint, "
                "but it is missing; models whose checkpoints transformers converts while loading, "
                "mixtures of experts among them, cannot be pruned block by block"
            )
        return found

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        tensor = self.tensors[self._spelling(name)]
        if tensor.shape != shape:
            raise InputError(
                f"{name}: expected shape {tuple(shape)}, as the configuration says, "
                f"but the checkpoint has {tuple(tensor.shape)}"
            )
        return tensor

    def capture(self, windows: Windows, batch_size: int) -> list[BlockBatch]:
        """The first block's inputs for every batch of windows, hidden states in the model's dtype.

        Also records how the model calls each block. Windows are padded on the right, where causal
        attention never looks, so no attention mask is passed.
        """
        with self._outer_modules():
            batches = [
                BlockBatch(self._first_input(part.ids_WC).to(self.device, self.dtype), (), {}, mask)
                for part in windows.batches(batch_size)
                for mask in (part.mask_WC.to(self.device, torch.bool),)
            ]
            sizes = {len(batch.mask_WC) for batch in batches}
            calls = {size: self._record_calls(windows.ids_WC[:size]) for size in sizes}
            self._calls = send_to_device(calls, self.device)
        return batches

    def enter(self, index: int, batches: list[BlockBatch]) -> None:
        """Give the batches the arguments with which the model calls block `index`."""
        for batch in batches:
            batch.arguments, batch.keywords = self._calls[len(batch.mask_WC)][index]

    @contextlib.contextmanager
    def _outer_modules(self) -> Iterator[None]:
        """Modules outside the blocks load their own weights when they are first called."""
        inner = {id(module) for block in self.blocks for module in block.modules()}
        names = {
            name: module
            for name, module in self.model.named_modules()
            if id(module) not in inner and any(True for _ in module.parameters(recurse=False))
        }
        handles = []
        for name, module in names.items():
            if isinstance(module, nn.Embedding):
                self._map_embedding(name, module)
            else:
                handles.append(module.register_forward_pre_hook(_load_plain(self, name)))
            handles.append(module.register_forward_hook(_in_fp32))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in names.values():
                _drop_weights(module)

    def _map_embedding(self, name: str, module: nn.Embedding) -> None:
        """A table of embeddings stays in its own dtype, mapped from its file, not copied."""
        tensor = self._tensor(f"{name}.weight", module.weight.shape)
        module.weight = nn.Parameter(tensor, requires_grad=False)

    @torch.no_grad()
    def _first_input(self, ids_WC: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def listen(_block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen.append(keywords["hidden_states"] if not arguments else arguments[0])
            raise _Stop

        handle = self.blocks[0].register_forward_pre_hook(listen, with_kwargs=True)
        try:
            with contextlib.suppress(_Stop):
                self.model(input_ids=ids_WC, use_cache=False)
        finally:
            handle.remove()
        if not seen or seen[0].is_meta:
            raise InputError(
                f"expected {type(self.model).__name__} to feed its blocks from its embeddings, "
                "but it does not; such models cannot be pruned block by block"
            )
        return seen[0]

    @torch.no_grad()
    def _record_calls(self, ids_WC: Tensor) -> list[Call]:
        """Arguments (without the hidden states) of each block for one batch."""
        hidden_WCD = self._first_input(ids_WC)
        originals = list(self.blocks)
        for gives_tuple in (False, True):
            calls: list[Call] = []
            for index, block in enumerate(originals):
                last = index == len(originals) - 1
                self.blocks[index] = _Recorder(block, calls, hidden_WCD, gives_tuple, last)
            try:
                with contextlib.suppress(_Stop):
                    self.model(input_ids=ids_WC, use_cache=False)
            except (_WrongOutput, ValueError):
                continue
            finally:
                for index, block in enumerate(originals):
                    self.blocks[index] = block
            return calls
        raise InputError(
            f"expected the blocks of {type(self.model).__name__} to pass hidden states on, "
            "but they do not"
        )


class _WrongOutput(Exception):
    """A block got something else than what the block before it put out."""


class _Recorder(nn.Module):
    """Stands in for a block: notes how it is called and passes the hidden states on."""

    def __init__(
        self, block: nn.Module, calls: list[Call], hidden: Tensor, gives_tuple: bool, last: bool
    ) -> None:
        super().__init__()
        self.__dict__["_original"] = block
        self.__dict__["_state"] = (calls, hidden.shape, gives_tuple, last)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Record the call; end the pass at the last block."""
        calls, shape, gives_tuple, last = self.__dict__["_state"]
        hidden = keywords.pop("hidden_states", None)
        hidden, rest = (arguments[0], arguments[1:]) if hidden is None else (hidden, arguments)
        if not isinstance(hidden, Tensor) or hidden.shape != shape:
            raise _WrongOutput
        calls.append((rest, keywords))
        if last:
            raise _Stop
        return (hidden,) if gives_tuple else hidden


def _drop_weights(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _load_plain(stream: StreamedModel, name: str) -> Any:
    def load(module: nn.Module, _inputs: Any) -> None:
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                tensor = stream._tensor(f"{name}.{attribute}", parameter.shape)
                setattr(module, attribute, nn.Parameter(tensor.float(), requires_grad=False))

    return load


def _in_fp32(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return output.float() if isinstance(output, Tensor) else output


def _dtype(config: PretrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights (meta device); buffers that no checkpoint holds are computed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        persistent = set(module.state_dict(keep_vars=True))
        absent = [
            (name, buffer)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and name not in persistent
        ]
        for name, buffer in absent:
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        if absent:
            model._init_weights(module)
    return model.eval()
