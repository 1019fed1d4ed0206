"""The host: a frozen base, named adapters over it, and the route that says which tokens meet which.

The base's modules are never replaced or edited; each adapted site has a forward hook that adds the deltas of the current
route. With no route open, or an empty stack, the base is itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit import peft_files
from lorafit.adapter import Adapter, create, tables, whole_sites
from lorafit.errors import AdapterError, ConfigError
from lorafit.methods import Scaled, find, settings
from lorafit.model import experts, gguf
from lorafit.model.base import Base
from lorafit.model.body import Added
from lorafit.model.quant import QuantLinear
from lorafit.model.sites import Site, find_sites, select
from lorafit.native.lowrank import Frozen, LowRank, Remake, Run, products
from lorafit.native.rescale import rescale
from lorafit.packing import Packing
from lorafit.route import Route, Stack, StackLike, stack


class Host:
    """`adapters` by name, `sites` by path. A route must stay open until `backward()` ends: recomputed forwards read it."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.sites = find_sites(base.model)
        self.site_of = {site.module: site for site in self.sites.values() if site.kind != "experts"}
        self.adapters: dict[str, Adapter] = {}
        self._route: Route | None = None
        self._hooks: dict[str, list[Any]] = {}

    # --- adapters ------------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        method: str = "lora",
        targets: Sequence[str] = (),
        *,
        whole: Sequence[str] = (),
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Adapter:
        """A fresh adapter on the sites that `targets` mean (the method's own by default), with those of `whole` trained as they
        are. A fresh one changes nothing."""
        kind = find(method)
        made_for = self.base.quant.start if self.base.quant else None
        if kind.needs_codes and (made_for is None or made_for.method != method):
            raise ConfigError(
                f"method '{method}' needs a base in codes of its own: quant=nf4, in Python load(…, quant=Quant('nf4',"
                f" start=Start('{method}', …)))"
            )
        own = {key: default for key, (_, default) in settings(kind).items()}
        unknown = [key for key in options if key not in own]
        if unknown:
            raise AdapterError(f"method '{method}' has no setting '{unknown[0]}'; it has {', '.join(own) or 'none'}")
        made = create(
            select(self.sites, targets or kind.targets),
            method,
            own | options,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            whole=whole_sites(self.sites, whole),
            tables=tables(self.sites),
            tokens=self.base.new.ids if self.base.new is not None else (),
            seed=seed,
        )
        return self.attach(name, made)

    def attach(self, name: str, adapter: Adapter) -> Adapter:
        """Make an adapter routable under `name`."""
        if name in self.adapters:
            raise AdapterError(f"there is already an adapter '{name}'")
        adapter.to(self.base.device).eval()
        self.adapters[name] = adapter
        for path, _ in adapter.items():
            self._hook(self.sites[path])
        return adapter

    def load(self, path: str | Path, name: str) -> Adapter:
        """Read an adapter's folder (PEFT format) and attach it; strict, see peft_files.load."""
        found = peft_files.read_notes(Path(path)).get("new_tokens") or {}
        if there := self.base.new.to_json() if self.base.new is not None else {}:
            there = {text: i for text, i in there.items() if text in found}
        if found != there:
            raise AdapterError(
                f"{path} was trained with new tokens ({', '.join(found)}), which this base hasn't; load the base with"
                f" tokens={list(found)}"
            )
        return self.attach(name, peft_files.load(Path(path), self.sites, self.base.fingerprint))

    def save(self, name: str, folder: Path) -> None:
        """Write an adapter's files into an existing folder."""
        modules = [path for path, _ in self.base.model.named_modules()]
        made = self.adapters[name]
        made.notes.pop("quant_start", None)
        made.notes |= {"fingerprint": self.base.fingerprint, "base": self.base.name}
        if self.base.new is not None:
            made.notes["new_tokens"] = self.base.new.to_json()
        made.notes |= self.base.quant.notes() if self.base.quant else {"quant": "none"}
        peft_files.save(made, folder, self.sites, str(gguf.origin(self.base.path)), modules)

    def remove(self, name: str) -> None:
        """Forget an adapter; the base is as if it had never been there."""
        gone = self.adapters.pop(name)
        for path, _ in gone.items():
            if not any(path in other for other in self.adapters.values()):
                self._unhook(self.sites[path])

    # --- route ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def route(self, route: Route | StackLike) -> Iterator[None]:
        """Send tokens through adapters while the context is open. A name or a stack means every token."""
        made = route if isinstance(route, Route) else Route.all(route)
        unknown = made.names - set(self.adapters)
        if unknown:
            raise AdapterError(f"no adapter '{min(unknown)}'; there are: {', '.join(self.adapters) or 'none'}")
        before, self._route = self._route, made
        try:
            yield
        finally:
            self._route = before

    # --- forward -------------------------------------------------------------------------------------------------------

    def shares(self, names: Iterable[str]) -> bool:
        """Whether documents through these adapters may share their beginning: our own run through the layers, and nothing
        drawn for a token that another document would draw anew."""
        base = self.base
        if base.body is None or not (base.body.shares and base.plain_head and base.device.type == "cpu"):
            return False
        return not any(layer.draws for name in names for _, layer in self.adapters[name].items())

    def hidden(self, ids: Tensor, lengths: Packing | Sequence[int]) -> Tensor:
        """Last hidden states (tokens, width) of documents in ids (tokens,), under the open route. The documents' lengths say
        it all where they lie end to end; a Packing may share beginnings, where `shares` allows it."""
        packing = lengths if isinstance(lengths, Packing) else Packing.apart(lengths)
        if (body := self.base.body) is not None:
            return self.base.fast(ids, packing, self._products, self._low_ranks() if body.compiled else None)
        if packing.shared:
            raise AssertionError("only our own run through the layers takes documents that share their beginning")
        return self._documents(self.base.hidden, ids, packing.lengths)

    def logits(self, ids: Tensor, lengths: Sequence[int], positions: Tensor | None = None) -> Tensor:
        """Logits (tokens, vocabulary) by the model's own forward, under the open route; or those at `positions` (n,) alone,
        ascending, which a plain head is then all that is asked for."""
        if positions is None:
            return self._documents(self.base.logits, ids, lengths)
        if self.base.plain_head:
            return self.head(self._documents(self.base.hidden, ids, lengths)[positions], positions)
        return self._documents(self.base.logits, ids, lengths)[positions]

    def _documents(self, run: Any, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        if self.base.packs:
            whole: Tensor = run(ids, lengths)
            return whole
        parts, at, route = [], 0, self._route or Route.all(())
        for length in lengths:
            with self.route(route.within(at, length)):
                parts.append(run(ids[at : at + length], [length]))
            at += length
        return torch.cat(parts)

    def head(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Logits (n, vocabulary) of the hidden states (n, width) at these token positions (n,), ascending."""
        with self.route((self._route or Route.all(())).take(positions)):
            logits: Tensor = self.base.head(hidden)
        return logits

    @property
    def head_is_frozen(self) -> bool:
        """No adapter of the open route touches the output head."""
        names = self._route.names if self._route else set()
        heads = [s.path for s in self.sites.values() if s.head or s.tied]
        return not any(path in self.adapters[name] for name in names for path in heads)

    # --- merge ---------------------------------------------------------------------------------------------------------

    def merged_weight(self, site: Site, spec: StackLike) -> Tensor:
        """The site's weight with a stack's deltas added, (*lead, out, in), fp32: added in fp32, cast by the caller."""
        w = site.weight()
        whole: Tensor | None = None  # made by the first sum: no copy of the weight beside it
        for name in stack(spec):
            if site.path in self.adapters[name]:
                delta = self.adapters[name][site.path].delta_weight(w).detach().to(w.device)
                whole = w.float() + delta if whole is None else whole.add_(delta)
                del delta
        return w.float().clone() if whole is None else whole

    def merged_bias(self, site: Site, spec: StackLike) -> Tensor | None:
        """The site's bias (*lead, out) with a stack's deltas added, fp32; None where they change nothing of it."""
        bias = site.bias
        if bias is None:
            return None
        layers = [self.adapters[name][site.path] for name in stack(spec) if site.path in self.adapters[name]]
        deltas = [delta.detach() for layer in layers if (delta := layer.delta_bias(bias)) is not None]
        return sum(deltas, bias.float()) if deltas else None

    # --- hooks: the only place where an adapter meets a module -----------------------------------------------------------

    def _hook(self, site: Site) -> None:
        if site.path in self._hooks:
            return
        if site.kind == "experts":
            experts.attach(site.module, partial(self._after_experts, site.path.rsplit(".", 1)[0]))
            self._hooks[site.path] = []
            return
        hooks = [site.module.register_forward_hook(partial(self._after, site))]
        hooks += [head.register_forward_hook(partial(self._after_tied, site)) for _, head in site.tied]
        self._hooks[site.path] = hooks

    def _unhook(self, site: Site) -> None:
        for hook in self._hooks.pop(site.path):
            hook.remove()
        if site.kind == "experts" and not any(self.sites[path].module is site.module for path in self._hooks):
            experts.detach(site.module)

    def _layers(self, path: str, names: Stack) -> list[Any]:
        return [self.adapters[name][path] for name in names if path in self.adapters[name]]

    def _after(self, site: Site, module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        x = args[0].reshape(-1) if site.lookup else args[0].reshape(-1, args[0].shape[-1])
        mm = partial(_look_up, y.dtype) if site.lookup else _dense
        gain = site.gain
        if gain == 1:
            return self._add(site.path, x, y, lambda layer, x, y: layer(x, y, mm, site.weight))
        return self._add(site.path, x, y, lambda layer, x, y: layer(x, y / gain, mm, site.weight) * gain)

    def _after_tied(self, site: Site, module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        x = args[0].reshape(-1, args[0].shape[-1])
        return self._add(site.path, x, y, lambda layer, x, y: layer.turned(x, site.weight))

    def _add(self, path: str, x: Tensor, y: Tensor, delta: Any) -> Tensor | None:
        """y with the deltas of the open route added, or None where there are none."""
        route = self._route
        if route is None or not any(self._layers(path, names) for _, names in route.runs):
            return None
        rows = y.reshape(-1, y.shape[-1])
        if route.tokens not in (None, len(rows)):
            raise AssertionError(f"the route covers {route.tokens} tokens, {path} got {len(rows)}")
        if route.uniform is not None:
            return sum((delta(layer, x, rows) for layer in self._layers(path, route.uniform)), rows).view_as(y)
        out = []
        for xs, ys, (_, names) in zip(x.split(route.lengths()), rows.split(route.lengths()), route.runs, strict=True):
            out.append(sum((delta(layer, xs, ys) for layer in self._layers(path, names)), ys))
        return torch.cat(out).view_as(y)

    def _products(self, modules: Sequence[Any], x: Tensor, remake: Remake | None) -> Sequence[Tensor]:
        """What these modules, which share the input x (n, in), give under the open route: base products and deltas at once
        for the runs of tokens whose deltas need no other product of their size, and one after the other for the rest."""
        sites = [self.site_of[module] for module in modules]
        frozen = [
            module.frozen if isinstance(module, QuantLinear) else Frozen(module.weight, module.bias)
            for module in modules
        ]
        runs = self._route.runs if self._route else ((None, ()),)
        asked = [[self._asked(site, names) for site in sites] for _, names in runs]
        rows = [len(x) if length is None else length for length, _ in runs]
        if sum(rows) != len(x):
            raise AssertionError(f"the route covers {sum(rows)} tokens, {sites[0].path} got {len(x)}")
        given = [
            Run(n, [None if one is None or one.low is None else LowRank(*one.low) for one in ones])
            for n, ones in zip(rows, asked, strict=True)
        ]
        ys = products(x, frozen, given, remake)
        return [
            self._rest(site, x, y, rows, [names for _, names in runs], [ones[i] for ones in asked])
            for i, (site, y) in enumerate(zip(sites, ys, strict=True))
        ]

    def _asked(self, site: Site, names: Stack) -> Scaled | None:
        """What a stack adds to a site, if that can be had with the base's product; None if it can't."""
        layers = self._layers(site.path, names)
        if len(layers) == 1:
            found: Scaled | None = layers[0].scaled(site.weight)
            return found
        return None if layers else Scaled()

    def _rest(
        self,
        site: Site,
        x: Tensor,
        y: Tensor,
        rows: Sequence[int],
        stacks: Sequence[Stack],
        asked: Sequence[Scaled | None],
    ) -> Tensor:
        """y (n, out) with what the products didn't do for some of its runs of rows."""
        if all(one is not None and one.gain is None for one in asked):
            return y
        made = []
        for xs, ys, names, one in zip(x.split(rows), y.split(rows), stacks, asked, strict=True):
            if one is None:
                with self.route(names):
                    whole = self._after(site, site.module, (xs,), ys)
                made.append(ys if whole is None else whole)
            else:
                made.append(ys if one.gain is None else rescale(ys, one.gain, one.apart))
        return made[0] if len(made) == 1 else torch.cat(made)

    def _low_ranks(self) -> Added | None:
        """What the open route adds to the linear modules; None where that isn't one low-rank addition for all tokens."""
        stacks = {names for _, names in self._route.runs} if self._route else {()}
        found = {}
        for module, site in self.site_of.items():
            if site.kind != "linear" or site.head:
                continue
            layers = [layer for names in stacks for layer in self._layers(site.path, names)]
            if not layers:
                continue
            low = layers[0].low_rank() if len(layers) == len(stacks) == 1 else None
            if low is None:
                return None
            found[module] = low
        return found

    def _after_experts(self, module: str, parameter: str, x: Tensor, y: Tensor, rows: experts.Rows) -> Tensor:
        route, path = self._route, f"{module}.{parameter}"
        if route is None or not any(self._layers(path, names) for _, names in route.runs):
            return y
        everything = torch.arange(len(x), device=x.device)
        uniform = route.uniform
        out = y
        for names, index in [(uniform, everything)] if uniform is not None else route.groups(rows.token):
            if not len(index):
                continue
            mm = partial(experts.grouped, counts=rows.take(index).counts())
            for layer in self._layers(path, names):
                delta = layer(x[index], y[index], mm, self.sites[path].weight)
                out = out.index_add(0, index, delta.to(out.dtype))
        return out


def _dense(x: Tensor, m: Tensor) -> Tensor:
    return F.linear(x, m.to(x.dtype))


def _look_up(dtype: torch.dtype, x: Tensor, m: Tensor) -> Tensor:
    """A product with one-hot rows while x holds ids, an ordinary one after that."""
    return F.linear(x, m.to(x.dtype)) if x.is_floating_point() else F.embedding(x, m.t()).to(dtype)
