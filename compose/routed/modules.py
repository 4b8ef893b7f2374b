"""Routed layers: what every expert has of its own, applied by each token's route.

B batch, S sequence, T tokens (B x S), D model width, E experts, A active experts, O/I out/in
features, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moiety.experts import kernels
from moiety.experts.dense import linear
from moiety.experts.modules import PackedModule
from moiety.experts.pattern import Pattern
from moiety.routers import Flow, Router
from moiety.routers.router import EPSILON, normalised


class Routes:
    """The routes of the tokens in hand: set by one router, read by the layers it decides for."""

    weights_TA: Tensor
    experts_TA: Tensor

    def set(self, router: Router, hidden: Tensor) -> None:
        """Route hidden states (B, S, D)."""
        _logits_TE, self.weights_TA, self.experts_TA = router(hidden)

    def mix(self, experts_ED: Tensor) -> Tensor:
        """Each token's weighted sum of the experts' vectors (E, D) -> (T, D)."""
        chosen_TAD = experts_ED[self.experts_TA]
        return (self.weights_TA.to(chosen_TAD.dtype)[..., None] * chosen_TAD).sum(1)


class RoutedLinear(PackedModule):
    """A linear layer that is another one for every token: `(W + Σ_a w_a Δ_a) x + b + Σ_a w_a b_a`.

    `experts` (E, O, K) or flat (E, n) with its masks and scales are the packed matrices Δ, whole
    weights where there is no `weight` (O, I); `experts_bias` (E, O) their biases, differences to
    `bias` where that is.
    """

    def __init__(
        self,
        stock: nn.Linear,
        experts: int,
        pattern: Pattern,
        values: str | None,
        routes: Routes,
        *,
        base: bool,
    ) -> None:
        super().__init__(pattern, values)
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self._routes = routes
        self._empty("experts", (experts,), stock.out_features, stock.in_features)
        self.weight = _frozen(stock.weight) if base else None
        self.bias = self.experts_bias = None
        if stock.bias is not None:
            self.bias = _frozen(stock.bias) if base else None
            self.experts_bias = _frozen(stock.bias.new_empty(experts, stock.out_features))

    def _is_single(self) -> bool:
        return False

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        routes = self._routes
        input_TI = input.reshape(-1, self.in_features)
        base_TO = None if self.weight is None else linear(input_TI, self.weight, self.bias)
        output_TO = kernels.sparse_routed_linear(
            input_TI, self.weights("experts"), routes.experts_TA, routes.weights_TA, base_TO
        )
        if self.experts_bias is not None:
            output_TO = output_TO + routes.mix(self.experts_bias).to(output_TO.dtype)
        return output_TO.reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, pattern and kind of values, shown by print(model)."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        base = "dense base" if self.weight is not None else "no base"
        return f"{sizes}, {base}, {self._stored_as()}"


def route_norm(norm: nn.Module, experts: int, routes: Routes) -> None:
    """Give an RMS norm another scale for every token: `norm(x) + (Σ_a w_a δ_a) ⊙ n(x)`.

    `experts` (E, D), a new parameter of the norm, holds the differences δ to its own weight; n is
    x over its root mean square.
    """
    weight = norm.get_parameter("weight")
    norm.experts = _frozen(weight.new_empty(experts, *weight.shape))
    _remember(norm, routes)
    norm.__class__ = _with_change(type(norm), _change_norm)


def _change_norm(norm: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", EPSILON)))
    change = _routes(norm).mix(norm.get_parameter("experts")).reshape(input.shape)
    return output + (change.float() * normalised(input, epsilon)).to(output.dtype)


def route_embedding(embedding: nn.Embedding, experts: int, routes: Routes) -> None:
    """Give token embeddings differences for every expert: `base(v) + Σ_a w_a δ_a(v)`.

    `experts` (E, V, D), a new parameter, holds the dense differences. The route is that of the
    token's own base embedding, so it knows the word and nothing of its context.
    """
    embedding.experts = _frozen(embedding.weight.new_empty(experts, *embedding.weight.shape))
    _remember(embedding, routes)
    embedding.__class__ = _with_change(type(embedding), _change_embedding)


def _change_embedding(module: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    routes = _routes(module)
    assert isinstance(module.router, Router)
    routes.set(module.router, output)
    change_TAD = module.get_parameter("experts")[routes.experts_TA, input.reshape(-1, 1)]
    weights_TA1 = routes.weights_TA.to(change_TAD.dtype)[..., None]
    scale = getattr(module, "embed_scale", 1.0)
    return output + ((weights_TA1 * change_TAD).sum(1) * scale).reshape(output.shape)


@functools.cache
def _with_change(stock: type[Any], change: Callable[[Any, Tensor, Tensor], Tensor]) -> type[Any]:
    """A module's class with a change to its output, inside `forward`.

    There, and not in a hook, whoever moves weights about (accelerate's offloading) sees it.
    """

    def forward(self: Any, input: Tensor) -> Tensor:
        return change(self, input, stock.forward(self, input))

    return type(f"Routed{stock.__name__}", (stock,), {"forward": forward})


def route_before(site: nn.Module, routes: Routes) -> None:
    """Let the `router` of a module decide on that module's own input, before it runs."""
    _remember(site, routes)
    site.register_forward_pre_hook(_decide, with_kwargs=True)


def _decide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert isinstance(module.router, Router)
    _routes(module).set(module.router, args[0] if args else kwargs["hidden_states"])


def follow(decoder: nn.Module, first: nn.Module, flow: Flow) -> None:
    """Tell a model's flow what the decoder is given and what its first block is given."""
    for module in (decoder, first):
        module.__dict__["_flow"] = flow
    decoder.register_forward_pre_hook(_begin, with_kwargs=True)
    first.register_forward_pre_hook(_enter, with_kwargs=True)
    decoder.register_forward_hook(_end)


def _begin(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids_BS = args[0] if args else kwargs.get("input_ids")
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    decoder.__dict__["_flow"].begin(ids_BS, mask)


def _enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden_BSD = args[0] if args else kwargs["hidden_states"]
    flow = block.__dict__["_flow"]
    flow.enter(hidden_BSD, kwargs.get("past_key_values"), kwargs.get("position_ids"))


def _end(decoder: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    decoder.__dict__["_flow"].end()


def _remember(module: nn.Module, routes: Routes) -> None:
    module.__dict__["_routes"] = routes


def _routes(module: nn.Module) -> Routes:
    return module.__dict__["_routes"]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
