"""The body of a Llama-like decoder as a list of products and kernels, run on packed documents.

It reads the weights of transformers' own modules and edits nothing; the modules stay what generation, other tools and the
tests use. What happens between the products is our own: one sweep for residual and norm, one for rotary angles, one for
the gated activation, attention per document, nothing kept twice. A family is taken only if it is known by name here and
gives what its modules give on a probe (see base.probe).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit.model.ahead import Ahead
from lorafit.model.quant import QuantLinear
from lorafit.native import build
from lorafit.native.attention import attend
from lorafit.native.gated import ACTIVATIONS, gated
from lorafit.native.kernel import wide
from lorafit.native.lowrank import Remake
from lorafit.native.norm import add_rms_norm, again, rms_norm
from lorafit.native.rotary import rotate
from lorafit.packing import Packing

# Decoder layers that are exactly: norm, attention with rotary angles (norms of q and k in some), norm, gated product.
LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}

# The outputs of linear modules that share an input x (n, in), which can be made again in the backward.
Products = Callable[[Sequence[Any], Tensor, Remake | None], Sequence[Tensor]]

# The one low-rank addition (a, b, scale) to each module that has one.
Added = Mapping[nn.Module, tuple[Tensor, Tensor, float]]


def plain_products(modules: Sequence[nn.Module], x: Tensor, remake: Remake | None = None) -> list[Tensor]:
    """Each module's own product: the base without adapters."""
    return [module(x) for module in modules]


class Body:
    """`of` a model, or None where its family isn't known."""

    def __init__(self, inner: Any, act: str) -> None:
        self.inner, self.act = inner, act
        # Mistral's layers all have the window of the config. Others ignore it there, or say it layer by layer.
        mistral = type(inner.layers[0]).__name__ == "MistralDecoderLayer"
        self.window: int | None = inner.config.sliding_window if mistral else None
        self.checkpointing = False
        self.shares = True  # documents of a row that begin alike may share their beginning
        self.compiled = False  # layers go through torch.compile where a gradient is wanted and `added` says it all
        self.between: Callable[[], object] | None = None  # called before each layer, and after it on the way back
        self.ahead = Ahead.of(inner.layers)

    @staticmethod
    def of(model: Any) -> Body | None:
        """The body of a transformers causal language model whose decoder layers are of a known family."""
        inner = getattr(model, "base_model", None)
        layers = getattr(inner, "layers", None)
        act = ACTIVATIONS.get(getattr(model.config.get_text_config(), "hidden_act", ""))
        if not layers or act is None or not hasattr(inner, "rotary_emb"):
            return None
        if model.dtype not in (torch.float32, torch.bfloat16):
            return None  # transformers' norms compute in fp32 whatever the type, ours would not
        for layer in layers:
            kind = type(layer)
            known = kind.__name__ in LAYERS and kind.__module__.startswith("transformers.models.")
            linears = [type(m) for m in layer.modules() if isinstance(m, nn.Linear | QuantLinear)]
            if not known or len(linears) != 7 or not {*linears} <= {nn.Linear, QuantLinear}:
                return None
        return Body(inner, act)

    def hidden(
        self, ids: Tensor, packing: Packing, products: Products = plain_products, added: Added | None = None
    ) -> Tensor:
        """Last hidden states (tokens, width) of documents that lie in ids (tokens,) as `packing` says.

        `added` says what `products` adds to the modules, where low-rank additions are all there is.
        """
        if not (self.compiled and build.on() and torch.is_grad_enabled()):
            added = None
        inner = self.inner
        h: Tensor = inner.embed_tokens(ids)
        cos, sin = self._angles(h, packing)
        y: Tensor | None = None  # what the layer before adds to h
        for number, layer in enumerate(inner.layers):
            self._call_between(number, h)
            run = partial(self._layer, layer, cos=cos, sin=sin, packing=packing, products=products, added=added)
            if self.checkpointing and torch.is_grad_enabled():
                h, y = checkpoint(run, h, y, use_reentrant=False)
            else:
                h, y = run(h, y)
        norm = inner.norm
        assert y is not None
        return add_rms_norm(h, y, norm.weight, norm.variance_epsilon)[1]

    def _call_between(self, number: int, h: Tensor) -> None:
        """What is to be done before a layer, and on the way back when its backward is over."""
        between, ahead = self.between, self.ahead
        if between is None and ahead is None:
            return

        def on_the_way_back(gradient: Tensor) -> None:
            if between is not None:
                between()
            if ahead is not None:
                ahead(number - 2)

        if between is not None:
            between()
        if ahead is not None:
            ahead(number + 1)
        if h.requires_grad:
            h.register_hook(on_the_way_back)

    def agrees(self, ids: Tensor, lengths: Sequence[int], given: Sequence[Tensor], coarse: bool) -> bool:
        """Whether each layer, given what the module before it gave, gives what its module gives, up to rounding. Layer by
        layer, because the rounding of thirty bf16 layers would hide a mistake.

        `given` are the modules' states (tokens, width) for these documents, each alone: before the first layer, after each,
        and after the last one's norm; see base.alone. `coarse`: rounding shows in them, see Base.coarse.
        """
        layers = self.inner.layers
        if len(given) != len(layers) + 1 or not torch.equal(self.inner.embed_tokens(ids), given[0]):
            return False
        packing = Packing.apart(lengths)
        cos, sin = self._angles(given[0], packing)
        share, floor = (0.03, 2**-7) if coarse else (1e-4, 1e-6)
        for number, (layer, x, want) in enumerate(zip(layers, given[:-1], given[1:], strict=True), 1):
            h, y = self._layer(layer, x, None, cos=cos, sin=sin, packing=packing, products=plain_products)
            got = h + y
            if number == len(layers):
                got = rms_norm(got, self.inner.norm.weight, self.inner.norm.variance_epsilon)
                x = torch.zeros_like(x)
            off, moved, size = (t.float().norm() for t in (got - want, want - x, want))
            if not off <= share * moved + floor * size:
                return False
        return True

    def _angles(self, h: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Cosines and sines (tokens, head width) of each token's place in its document."""
        positions = packing.positions.to(h.device)
        cos, sin = (wide(t[0]) for t in self.inner.rotary_emb(h[None], positions[None]))
        return cos, sin

    def _layer(
        self,
        layer: Any,
        h: Tensor,
        y: Tensor | None,
        *,
        cos: Tensor,
        sin: Tensor,
        packing: Packing,
        products: Products,
        added: Added | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream h and what this layer's gated product adds to it, both (n, width). With `added`, compiled."""
        attn = layer.self_attn
        window = attn.sliding_window if hasattr(attn, "sliding_window") else self.window
        if added is None:
            parts = _parts(layer, self.act, lambda module: module)
            h, q, k, v = before(parts, h, y, cos, sin, products)
            a = attend(q, k, v, packing.lengths, attn.scaling, window, packing.before)
            return after(parts, h, a, products)

        def linear(module: Any) -> Linear:
            return Linear(module.weight, module.bias, *added.get(module, (None, None, 0.0)))

        first, second = _compiled()
        parts = _parts(layer, self.act, linear)
        h, q, k, v = first(parts, _any_length(h), y, _any_length(cos), _any_length(sin), linear_products)
        a = attend(q, k, v, packing.lengths, attn.scaling, window, packing.before)
        h, y = second(parts, h, _any_length(a), linear_products)
        return h, y


class Linear(NamedTuple):
    """A linear module and the one low-rank addition to it as tensors, see LowRank."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float


class _Parts(NamedTuple):
    """What the two halves of a layer read of it; a linear is a module, or a `Linear` where they are compiled."""

    first: Tensor  # gains of the norms
    second: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    head_dim: int
    act: str
    qkv: tuple[Any, Any, Any]
    o: Any
    gate_up: tuple[Any, Any]
    down: Any


def _parts(layer: Any, act: str, linear: Callable[[nn.Module], Any]) -> _Parts:
    norm, attn, mlp = layer.input_layernorm, layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attn, name).weight if hasattr(attn, name) else None for name in ("q_norm", "k_norm"))
    return _Parts(
        norm.weight,
        layer.post_attention_layernorm.weight,
        q_norm,
        k_norm,
        norm.variance_epsilon,
        attn.head_dim,
        act,
        (linear(attn.q_proj), linear(attn.k_proj), linear(attn.v_proj)),
        linear(attn.o_proj),
        (linear(mlp.gate_proj), linear(mlp.up_proj)),
        linear(mlp.down_proj),
    )


def before(
    parts: _Parts, h: Tensor, y: Tensor | None, cos: Tensor, sin: Tensor, products: Products
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer up to its attention: the stream h + y (n, width), and q, k, v (n, heads, head width)."""
    remake: Remake | None = None
    if y is None:
        x = rms_norm(h, parts.first, parts.eps)
    else:
        h, x, rstd = add_rms_norm(h, y, parts.first, parts.eps)
        remake = Remake(again, (h, parts.first, rstd))
    q, k, v = (t.unflatten(1, (-1, parts.head_dim)) for t in products(parts.qkv, x, remake))
    if parts.q_norm is not None and parts.k_norm is not None:
        q, k = rms_norm(q, parts.q_norm, parts.eps), rms_norm(k, parts.k_norm, parts.eps)
    return h, rotate(q, cos, sin), rotate(k, cos, sin), v


def after(parts: _Parts, h: Tensor, a: Tensor, products: Products) -> tuple[Tensor, Tensor]:
    """A layer from its attention a (n, heads · head width) on: the stream, and what the gated product adds to it."""
    (o,) = products([parts.o], a, None)
    h, x, rstd = add_rms_norm(h, o, parts.second, parts.eps)
    gate, up = products(parts.gate_up, x, Remake(again, (h, parts.second, rstd)))
    m = gated(gate, up, parts.act)
    (down,) = products([parts.down], m, Remake(partial(_gated_again, act=parts.act), (gate, up)))
    return h, down


def linear_products(linears: Sequence[Any], x: Tensor, remake: Remake | None = None) -> list[Tensor]:
    """The products of `Linear`s in torch's own operations and gradients, which torch.compile takes as they are."""
    found = []
    for linear in linears:
        y = F.linear(x, linear.weight, linear.bias)
        if linear.a is not None:
            y = y + F.linear(F.linear(x, linear.a.to(x.dtype)), linear.b.to(x.dtype)) * linear.scale
        found.append(y)
    return found


@cache
def _compiled() -> tuple[Any, Any]:
    """The two halves compiled, for every layer of every base: weights are arguments."""
    return torch.compile(before), torch.compile(after)


def _any_length(x: Tensor) -> Tensor:
    """x, whose first dimension is compiled as one of any size."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


@torch.no_grad()
def _gated_again(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gated(gate.detach(), up.detach(), act)
