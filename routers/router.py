"""The router of our own composites: any kind of `RouterSpec`, one module.

B batch, S sequence, T tokens (B x S), D model width, E experts, A active experts, H horizons,
W features (D for the token and D for each horizon).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

from moiety.errors import InputError
from moiety.routers import native
from moiety.routers.flow import Flow
from moiety.routers.spec import RouterSpec

PRIMES = (2654435761, 40503, 2246822519, 3266489917)
MODULUS = 2**31 - 1
EPSILON = 1e-6


class Router(nn.Module):
    """Chooses experts and their weights for every token, scaled to a mean square of 1 first.

    `weight` (E, W) is all there is to learn, None for kinds that learn nothing; logits are
    `features @ weightᵀ`. A gate is linear in its context, so what has to be remembered of earlier
    tokens is E numbers a horizon, kept by the model's `flow`. Zeros prefer no expert.
    """

    weight: nn.Parameter | None

    def __init__(
        self, width: int, experts: int, spec: RouterSpec, flow: Flow | None = None, number: int = 0
    ) -> None:
        super().__init__()
        spec.check(experts)
        self.spec, self.experts, self.width = spec, experts, width
        self.top_k, self.number = spec.active(experts), number
        self._flow = Flow(spec.horizons) if flow is None else flow
        remembers = flow is not None and bool(spec.horizons)
        self._start = self._flow.reserve(experts * len(spec.horizons)) if remembers else None
        self._shape = native.shape_of(spec, width, experts, self._start)
        features = width * (1 + len(spec.context))
        self.weight = nn.Parameter(torch.zeros(experts, features)) if spec.learned else None
        if spec.kind == "sigmoid":
            self.register_buffer("selection_bias", torch.zeros(experts))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, S, D) or (T, D) to logits (T, E), weights and experts (T, A)."""
        found = None if torch.compiler.is_compiling() else self._compiled(hidden)
        return self._plain(hidden) if found is None else found

    def _compiled(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same by the compiled gate, where that works on these."""
        library, weight, memory = native.library(), self.weight, None
        if library is None or self._shape is None or weight is None:
            return None
        if not native.fits(hidden, weight):
            return None
        if self._shape.horizons:
            memory = None if self._start is None else self._flow.memory()
            if memory is None:
                return None
        bias_E = None
        if self.spec.kind == "sigmoid":
            bias_E = self.get_buffer("selection_bias").float()
        return library.route(self._shape, memory, hidden, weight, bias_E, EPSILON)

    def _plain(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = self._logits(hidden)
        kind = self.spec.kind
        if kind == "sigmoid":
            return logits_TE, *self._by_sigmoid(logits_TE)
        if self.spec.learned:
            return logits_TE, *self._by_softmax(logits_TE)
        if kind in ("constant", "uniform"):
            return logits_TE, *self._fixed(logits_TE)
        return logits_TE, *self._hashed(logits_TE)

    def features(self, hidden: Tensor) -> Tensor:
        """What logits are linear in, in fp32: (T, W), the token, then each horizon's mean."""
        hidden_BSD = _as_batch(_scaled(hidden)).float()
        if not self.spec.context:
            return hidden_BSD.reshape(-1, self.width)
        features_BSFD = torch.cat([hidden_BSD[:, :, None], self._flow.wide_means(hidden_BSD)], 2)
        return features_BSFD.reshape(-1, self.width * (1 + len(self.spec.context)))

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.weight is None:
            rows = hidden.numel() // hidden.shape[-1]
            return torch.zeros((rows, self.experts), device=hidden.device)
        hidden_BSD = _as_batch(_scaled(hidden))
        rows_ND = self.weight.to(hidden.dtype).view(-1, self.width)
        each_BSN = linear(hidden_BSD, rows_ND).float()
        if self.spec.context:
            each_BSEF = each_BSN.view(*each_BSN.shape[:2], self.experts, -1)
            logits_BSE = self._flow.logits(each_BSEF, self._start)
        else:
            logits_BSE = each_BSN
        if self.spec.score == "absolute":
            logits_BSE = logits_BSE.abs()
        if self.spec.kind == "sequence":
            evidence_BSE1 = logits_BSE.log_softmax(-1)[..., None]
            sums_BSE = self._flow.sums(evidence_BSE1, self._start)[..., 0]
            logits_BSE = sums_BSE.log_softmax(-1)
        return logits_BSE.reshape(-1, self.experts)

    def _by_softmax(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        if self.top_k == 1:
            experts_T1 = logits_TE.argmax(-1, keepdim=True)
            return torch.ones_like(experts_T1, dtype=logits_TE.dtype), experts_T1
        weights_TA, experts_TA = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        if self.spec.mass is not None:
            before_TA = weights_TA.cumsum(-1) - weights_TA
            weights_TA = torch.where(before_TA < self.spec.mass, weights_TA, 0.0)
        return weights_TA / weights_TA.sum(-1, keepdim=True), experts_TA

    def _by_sigmoid(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = logits_TE.sigmoid()
        bias_E = self.get_buffer("selection_bias").float()
        experts_TA = (scores_TE + bias_E).topk(self.top_k, dim=-1).indices
        weights_TA = scores_TE.gather(1, experts_TA)
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True).clamp(min=1e-20)
        if self.spec.mass is not None:
            before_TA = weights_TA.cumsum(-1) - weights_TA
            weights_TA = torch.where(before_TA < self.spec.mass, weights_TA, 0.0)
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        return weights_TA, experts_TA

    def _fixed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        given = self.spec.weights or (1 / self.experts,) * self.experts
        weights_TE = torch.tensor(given, device=logits_TE.device).expand_as(logits_TE)
        return weights_TE, torch.arange(self.experts, device=logits_TE.device).expand_as(logits_TE)

    def _hashed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """One expert by the token's id; for `random`, by its position and this router too."""
        ids_BS = self._flow.ids_BS
        if ids_BS is None:
            raise InputError(
                f"expected token ids, because routers of kind {self.spec.kind} look at them, but "
                "the model was given embeddings; pass input_ids"
            )
        mixed_T = ids_BS.reshape(-1).to(logits_TE.device) * PRIMES[0] + self.spec.seed * PRIMES[1]
        if self.spec.kind == "random":
            mixed_T = _scrambled(mixed_T) + (self.number + 1) * PRIMES[2]
            if self._flow.position_BS is not None:
                mixed_T = (
                    mixed_T + self._flow.position_BS.reshape(-1).to(mixed_T.device) * PRIMES[3]
                )
        experts_TA = (_scrambled(mixed_T) % self.experts)[:, None]
        return torch.ones(experts_TA.shape, device=logits_TE.device), experts_TA

    def extra_repr(self) -> str:
        """Sizes and what of the kind is not the default, shown by print(model)."""
        told = self.spec.model_dump(exclude_defaults=True, exclude={"kind", "top_k"})
        return ", ".join(
            [
                f"{self.spec.kind}, width={self.width}, experts={self.experts}",
                f"top_k={self.top_k}",
                *(f"{name}={value}" for name, value in told.items()),
            ]
        )


def _as_batch(hidden: Tensor) -> Tensor:
    return hidden if hidden.ndim == 3 else hidden.reshape(1, -1, hidden.shape[-1])


def _scaled(hidden: Tensor) -> Tensor:
    return normalised(hidden, EPSILON).to(hidden.dtype)


def normalised(hidden: Tensor, epsilon: float) -> Tensor:
    """Hidden states (..., D) over their root mean square, in fp32."""
    return rms_norm(hidden.float(), hidden.shape[-1:], eps=epsilon)


def _scrambled(value_T: Tensor) -> Tensor:
    """Integers mixed to the last bit: a multiplicative hash, its high half folded on the low."""
    low_T = (value_T % MODULUS) * 48271 % MODULUS
    return (low_T ^ (low_T >> 13)) * 69621 % MODULUS
