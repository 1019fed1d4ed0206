"""The body of a Llama-like decoder as a list of products and kernels, run on packed documents.

It reads the weights of transformers' own modules and edits nothing; the modules stay what generation, other tools and the
tests use. What happens between the products is our own: one sweep for residual and norm, one for rotary angles, one for
the gated activation, attention per document, nothing kept twice. A family is taken only if it is known by name here and
gives what its modules give on a probe (see base.probe).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit.native.attention import attend
from lorafit.native.gated import ACTIVATIONS, gated
from lorafit.native.kernel import wide
from lorafit.native.lowrank import Remake
from lorafit.native.norm import add_rms_norm, again, rms_norm
from lorafit.native.rotary import rotate

# Decoder layers that are exactly: norm, attention with rotary angles (norms of q and k in some), norm, gated product.
LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}

# The outputs of linear modules that share an input x (n, in), which can be made again in the backward.
Products = Callable[[Sequence[nn.Module], Tensor, Remake | None], Sequence[Tensor]]


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
        self.between: Callable[[], object] | None = None  # called before each layer, and after it on the way back

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
            linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
            if not known or len(linears) != 7 or any(type(m) is not nn.Linear for m in linears):
                return None
        return Body(inner, act)

    def hidden(self, ids: Tensor, lengths: Sequence[int], products: Products = plain_products) -> Tensor:
        """Last hidden states (tokens, width) of documents that lie end to end in ids (tokens,)."""
        inner = self.inner
        h: Tensor = inner.embed_tokens(ids)
        cos, sin = self._angles(h, lengths)
        y: Tensor | None = None  # what the layer before adds to h
        for layer in inner.layers:
            if self.between is not None:
                self._call_between(h)
            run = partial(self._layer, layer, cos=cos, sin=sin, lengths=lengths, products=products)
            if self.checkpointing and torch.is_grad_enabled():
                h, y = checkpoint(run, h, y, use_reentrant=False)
            else:
                h, y = run(h, y)
        norm = inner.norm
        assert y is not None
        return add_rms_norm(h, y, norm.weight, norm.variance_epsilon)[1]

    def _call_between(self, h: Tensor) -> None:
        between = self.between
        assert between is not None

        def on_the_way_back(gradient: Tensor) -> None:
            between()

        between()
        if h.requires_grad:
            h.register_hook(on_the_way_back)

    def agrees(self, ids: Tensor, lengths: Sequence[int]) -> bool:
        """Whether each layer, given what the module before it gave, gives what its module gives, up to rounding. Layer by
        layer, because the rounding of thirty bf16 layers would hide a mistake."""
        states = [
            self.inner(doc[None], use_cache=False, output_hidden_states=True).hidden_states
            for doc in ids.split(lengths)
        ]
        given = [torch.cat([state[0] for state in parts]) for parts in zip(*states, strict=True)]
        cos, sin = self._angles(given[0], lengths)
        share, floor = (0.03, 2**-7) if given[0].dtype.itemsize < 4 else (1e-4, 1e-6)
        for number, (layer, x, want) in enumerate(zip(self.inner.layers, given, given[1:], strict=False), 1):
            h, y = self._layer(layer, x, None, cos=cos, sin=sin, lengths=lengths, products=plain_products)
            got = h + y
            if number == len(self.inner.layers):
                got = rms_norm(got, self.inner.norm.weight, self.inner.norm.variance_epsilon)
                x = torch.zeros_like(x)
            off, moved, size = (t.float().norm() for t in (got - want, want - x, want))
            if not off <= share * moved + floor * size:
                return False
        return len(given) == len(self.inner.layers) + 1

    def _angles(self, h: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines (tokens, head width) of each token's place in its document."""
        positions = torch.cat([torch.arange(n, device=h.device) for n in lengths])
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
        lengths: Sequence[int],
        products: Products,
    ) -> tuple[Tensor, Tensor]:
        """The stream h and what this layer's gated product adds to it, both (n, width)."""
        first, second, attn, mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn, layer.mlp
        remake: Remake | None = None
        if y is None:
            x = rms_norm(h, first.weight, first.variance_epsilon)
        else:
            h, x, rstd = add_rms_norm(h, y, first.weight, first.variance_epsilon)
            remake = Remake(again, (h, first.weight, rstd))
        q, k, v = (
            t.unflatten(1, (-1, attn.head_dim)) for t in products([attn.q_proj, attn.k_proj, attn.v_proj], x, remake)
        )
        if hasattr(attn, "q_norm"):
            q = rms_norm(q, attn.q_norm.weight, attn.q_norm.variance_epsilon)
            k = rms_norm(k, attn.k_norm.weight, attn.k_norm.variance_epsilon)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        window = attn.sliding_window if hasattr(attn, "sliding_window") else self.window
        a = attend(q, k, v, lengths, attn.scaling, window)
        (o,) = products([attn.o_proj], a, None)
        h, x, rstd = add_rms_norm(h, o, second.weight, second.variance_epsilon)
        gate, up = products([mlp.gate_proj, mlp.up_proj], x, Remake(again, (h, second.weight, rstd)))
        m = gated(gate, up, self.act)
        (down,) = products([mlp.down_proj], m, Remake(partial(_gated_again, act=self.act), (gate, up)))
        return h, down


@torch.no_grad()
def _gated_again(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gated(gate.detach(), up.detach(), act)
