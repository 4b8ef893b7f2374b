"""Routes while a model writes: the prompt is prefilled, then one token after another decoded.

W windows, P prompt tokens, N new tokens, C tokens fed (P + N - 1), T tokens of a pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moiety.analysis.trace.columns import LayerRoutes, Tokens, in_order, layer_routes
from moiety.analysis.trace.watching import Watching
from moiety.routers import Gate, Route
from moiety.text import Windows


class Generation:
    """Reads batches by greedy `generate`: windows are prompts, `new_tokens` are written after.

    The last token written is never fed, so it has no routes and no row; nor have tokens after an
    end of sequence. Losses are those of written tokens only: a prefill for generation gives no
    logits of its prompt. Gates that see only some of the tokens fed (those of a routed output
    head) are left out.
    """

    def __init__(self, model: Any, watching: Watching, new_tokens: int, padding: int) -> None:
        self._model, self._new_tokens, self._padding = model, new_tokens, padding
        head = model.get_output_embeddings()
        self._watching = watching if head is None else watching.without(head)
        self._device = model.get_input_embeddings().weight.device

    def layers(self) -> Sequence[Gate]:
        """The gates whose routes are given."""
        return self._watching.gates

    def __call__(self, batch: Windows) -> tuple[Tokens, list[LayerRoutes]]:
        """The batch's tokens and every gate's routes of them."""
        ids_WP, mask_WP = _left_padded(batch, self._padding)
        routes: list[Route] = []
        with self._watching.watch(routes.append):
            output = self._model.generate(
                ids_WP.to(self._device),
                attention_mask=mask_WP.to(self._device),
                max_new_tokens=self._new_tokens,
                do_sample=False,
                pad_token_id=self._padding,
                return_dict_in_generate=True,
                output_logits=True,
            )
        layers = self._joined(routes, len(ids_WP))
        written_WN = output.sequences[:, ids_WP.shape[1] :].cpu()
        logits_WNV = torch.stack(output.logits, 1)
        return self._tokens(ids_WP, mask_WP, written_WN, logits_WNV), layers

    def _tokens(
        self, ids_WP: Tensor, mask_WP: Tensor, written_WN: Tensor, logits_WNV: Tensor
    ) -> Tokens:
        logs_WNV = logits_WNV.float().log_softmax(-1).cpu()
        loss_WN = -logs_WNV.gather(-1, written_WN[..., None])[..., 0]
        ended_WN = _ended(written_WN, self._model.generation_config.eos_token_id)
        fed = slice(None, written_WN.shape[1] - 1)
        unknown_WP = torch.full(ids_WP.shape, torch.nan)
        phase_WC = torch.cat([torch.zeros_like(ids_WP), torch.ones_like(written_WN)[:, fed]], 1)
        return Tokens(
            ids_WC=torch.cat([ids_WP, written_WN[:, fed]], 1),
            kept_WC=torch.cat([mask_WP.bool(), ~ended_WN[:, fed]], 1),
            phase_WC=phase_WC,
            loss_WC=torch.cat([unknown_WP, loss_WN[:, fed]], 1),
        )

    def _joined(self, routes: Sequence[Route], windows: int) -> list[LayerRoutes]:
        """Each gate's routes of all passes, in the order of windows, then tokens."""
        gates = self._watching.gates
        count = len(gates)
        calls = (routes[start : start + count] for start in range(0, len(routes), count))
        passes = [in_order(call, gates, len(call[0].experts_TA)) for call in calls]
        every = [[layer_routes(one[at]) for one in passes] for at in range(count)]
        return [
            LayerRoutes(
                _in_a_row([one.weights_TA for one in layer], windows),
                _in_a_row([one.experts_TA for one in layer], windows),
                _in_a_row([one.entropy_T for one in layer], windows),
            )
            for layer in every
        ]


def _in_a_row(passes: list[Tensor], windows: int) -> Tensor:
    """Passes (W x tokens of the pass, ...) as one tensor (W x C, ...)."""
    parts = [values.view(windows, -1, *values.shape[1:]) for values in passes]
    return torch.cat(parts, 1).flatten(0, 1)


def _left_padded(batch: Windows, padding: int) -> tuple[Tensor, Tensor]:
    lengths_W = batch.mask_WC.sum(1)
    longest = int(lengths_W.max())
    ids_WP = torch.full((len(batch), longest), padding)
    mask_WP = torch.zeros((len(batch), longest), dtype=torch.int64)
    for row, length in enumerate(lengths_W.tolist()):
        ids_WP[row, longest - length :] = batch.ids_WC[row, :length]
        mask_WP[row, longest - length :] = 1
    return ids_WP, mask_WP


def _ended(written_WN: Tensor, end: int | list[int] | None) -> Tensor:
    """Which tokens come after the end of their sequence."""
    ends = torch.tensor([] if end is None else [end] if isinstance(end, int) else end)
    is_end_WN = torch.isin(written_WN, ends.to(written_WN.dtype))
    return (is_end_WN.int().cumsum(1) - is_end_WN.int()) > 0
