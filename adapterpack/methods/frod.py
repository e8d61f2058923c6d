"""FRoD (doi 10.1609/aaai.v40i31.39813): weights of one kind share a basis V; each keeps directions U of its own.

    W = U diag(L) V^T;   W' = U (S + diag(l)) V^T,   S sparse, at places that all modules of a kind share

V comes from all weights of a kind (a category: `self_attn_k_proj`), U from V and the module's own weight. PEFT makes
U of a V that it makes again, and loads the stored V over it; here U is the stored V's, as in training. Encodings:
`basis` holds V and the places; `seed` leaves both to the base and `projection_prng_key`.
Reference: peft/tuners/frod/model.py (`_init_frod_projections`, `_projection_from_weights`, `_category_from_key`) and
layer.py (`_calculate_frod_u_and_lambda`, `get_delta_weight`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported
from adapterpack.methods import _model_order
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, flag, floats
from adapterpack.methods._of_base import linear_shape, seed
from adapterpack.methods._without import no_ranks, no_recipes
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

peft_type = "FROD"
keep_dtype: frozenset[str] = frozenset()
ranks = no_ranks
recipes = no_recipes
BASIS, SEED = "basis", "seed"
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
keys = KeyTable(
    "frod_",
    {"lambda_l": "frod_lambda_l", "lambda_s_values": "frod_lambda_s_values"},
    shared=tuple(f"{name}.*" for name in _SHARED),
)
_MOST_INPUTS = 1 << 14
"""Widest layer whose places are drawn again: PEFT permutes the square of it."""


def parse(c: Checkpoint) -> Adapter:
    a = keys.parse(c, "frod", BASIS)
    return a if a.shared else replace(a, encoding=SEED)


def category(module: str) -> str:
    """Of modules that share a basis: the last two parts of the path, or one where a number stands before it."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    bases = _Bases(a, request) if a.encoding == SEED else None
    for module, params in a.modules.items():
        into, places = _sizes(module, params)
        shape = linear_shape(a, module, request, into=into, conv1d=True)
        shared = {} if bases is not None else _shared(a, module, into, places)
        yield TransformChange(
            module=module,
            params={**params, **shared},
            shape=shape,
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            transform=partial(_changed, module, bases),
            derive=partial(_directions, module, bases),
            settings={} if bases is None else bases.settings,
            reads=frozenset() if bases is None else bases.reads - {f"{module}.weight"},
        )


def _sizes(module: str, params: Mapping[str, Param]) -> tuple[int, int]:
    """Input features, and places of S."""
    lambda_l, values = (t.shape for t in floats(module, params, ("lambda_l", "lambda_s_values")))
    if len(lambda_l) != 1 or len(values) != 1 or values[0] > lambda_l[0] * (lambda_l[0] - 1):
        raise InvalidFile(f"{module}: lambda_l {lambda_l} and lambda_s_values {values} are no parameters of FRoD")
    return lambda_l[0], values[0]


def _shared(a: Adapter, module: str, into: int, places: int) -> Mapping[str, Param]:
    """V (in, in), the places (2, n) and the size (2,) of a module's category, under the names that a formula uses."""
    kind = category(module)
    missing = [f"base_model.{n}.{kind}" for n in _SHARED if f"{n}.{kind}" not in a.shared]
    if missing:
        raise InvalidFile(f"{module} takes {', '.join(missing)}, which the file lacks", hint="save the adapter again")
    v, indices, size = (a.shared[f"{n}.{kind}"] for n in _SHARED)
    floats(module, {"V": v}, ("V",))
    if v.tensor.shape != (into, into):
        raise InvalidFile(f"{v.key} has shape {v.tensor.shape}, {module} has {into} input features")
    for p, wanted in ((indices, (2, places)), (size, (2,))):
        if p.tensor.shape != wanted or p.tensor.dtype.name != "I64":
            raise InvalidFile(f"{p.key} is {p.tensor.dtype} {p.tensor.shape}, not I64 {wanted}")
    return {"V": v, "indices": indices, "size": size}


def _places(m: Maths, module: str, bases: _Bases | None) -> Array:
    """(2, n): row and column of each value of S. Raises InvalidFile for one outside of it."""
    if bases is not None:
        return bases.of(module, m.xp)[1]
    found, into = m["indices"], m["lambda_l"].shape[0]
    if m["size"].tolist() != [into, into] or (found.numel() and not 0 <= int(found.min()) <= int(found.max()) < into):
        raise InvalidFile(f"{module}: the places of S do not lie in a matrix of {into} by {into}")
    return found


def _basis(m: Maths, module: str, bases: _Bases | None) -> Array:
    """V, in the dtype of the base, which PEFT keeps it in."""
    return m.rounded(m["V"] if bases is None else m.lift(m.xp.round(bases.of(module, m.xp)[0], m.dtype)))


def _directions(
    module: str, bases: _Bases | None, m: Maths, w: Array, found: Mapping[str, Array] | None
) -> Mapping[str, Array]:
    """U, (out, in), f64: W V^-T, each column divided by its norm. PEFT, too, computes this in f64."""
    if found is not None:
        return found
    torch, v = m.torch, m.xp.f64(_basis(m, module, bases))
    w = m.xp.f64(w)
    try:
        bi = torch.linalg.solve(v, w.T).T
    except RuntimeError:
        bi = w @ torch.linalg.pinv(v, rtol=1e-6).T
    norms = torch.linalg.norm(bi, dim=0)
    u = torch.zeros_like(bi)
    apart = norms > 1e-12
    u[:, apart] = bi[:, apart] / norms[apart]
    return {"U": u}


def _changed(module: str, bases: _Bases | None, m: Maths, w: Array) -> Array:
    # In the dtype of the base from here on, operation by operation, as in PEFT.
    u = m.rounded(m.lift(m["U"]))
    values, diagonal = (m.rounded(m[name]) for name in ("lambda_s_values", "lambda_l"))
    diagonal = m.torch.diag_embed(diagonal)
    rows, columns = _places(m, module, bases)
    sparse = m.torch.zeros_like(diagonal).index_put_((rows, columns), values, accumulate=True)
    w = m.rounded(w)
    delta = u @ (sparse + diagonal) @ _basis(m, module, bases).T - w
    return w + delta


@dataclass
class _Bases:
    """V and the places of S of every category, made of the base's weights again when they are first asked for."""

    adapter: Adapter
    request: Request
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _made: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    _kinds: dict[str, list[str]] = field(default_factory=dict)
    _weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.adapter.config
        self._key = seed(config, "projection_prng_key")
        self._rate = _fraction(config, "sparse_rate", 0.01)
        self._alpha = _fraction(config, "regularization_alpha", 1e-3)
        self._order()
        shapes = self.request.shapes
        if shapes is None:
            return
        for kind, modules in self._kinds.items():
            widths = {linear_shape(self.adapter, m, self.request, conv1d=True)[1] for m in modules}
            if len(widths) > 1 or max(widths) > _MOST_INPUTS:
                raise Unsupported(
                    f"the basis of {kind} is not in the file, and its layers have {sorted(widths)} inputs",
                    hint="save the adapter with save_projection=True",
                )
            self._weights |= {m: shapes.tensor(f"{m}.weight") for m in modules}

    @property
    def settings(self) -> Mapping[str, float]:
        return {"key": self._key, "rate": self._rate, "alpha": self._alpha}

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(f"{m}.weight" for m in self._weights)

    def _order(self) -> None:
        """The modules of each category by layer, as PEFT stacks them. One of two in the same layer counts: the last.

        Raises:
            Unsupported: the order in which the model defines them matters and is not known.
        """
        modules, known = _model_order.in_order(self.adapter.modules)
        layers: dict[str, dict[int, str]] = {}
        for n, module in enumerate(modules):
            own = layers.setdefault(category(module), {})
            index = _layer(module)
            if not known and ((index is None and len(modules) > 1 and self._many(module)) or index in own):
                raise Unsupported(
                    f"the basis of {category(module)} is not in the file, and depends on the order of its layers",
                    hint="save the adapter with save_projection=True",
                )
            own[n if index is None else index] = module
        self._kinds = {kind: [own[i] for i in sorted(own)] for kind, own in sorted(layers.items())}

    def _many(self, module: str) -> bool:
        return sum(category(m) == category(module) for m in self.adapter.modules) > 1

    def of(self, module: str, xp: Backend) -> tuple[Array, Array]:
        """V (in, in), f32, and the places (2, n) of a module's category."""
        with self._lock:
            if not self._made:
                self._make(xp)
            return self._made[category(module)]

    def _make(self, xp: Backend) -> None:
        """On the CPU, as PEFT does wherever the model is."""
        torch = xp.torch
        generator = torch.Generator().manual_seed(self._key)
        for kind, modules in self._kinds.items():
            matrices = []
            for module in modules:
                w = xp.f32(self._weights[module]).cpu()
                shape = linear_shape(self.adapter, module, self.request, conv1d=True)
                crossed = self._crossed(module, shape)
                matrices.append(w.T if crossed else w)
            v = _joint_basis(torch, matrices, self._alpha)
            places = _draw(torch, generator, v.shape[0], self._rate)
            self._made[kind] = v.to(xp.device), places.to(xp.device)

    def _crossed(self, module: str, shape: tuple[int, int]) -> bool:
        """Does the stored weight lie as (in, out)?"""
        shapes = self.request.shapes
        conv1d = None if shapes is None else shapes.conv1d(module)
        return self._weights[module].shape != shape or bool(
            shape[0] == shape[1] and (flag(self.adapter.config, "fan_in_fan_out") if conv1d is None else conv1d)
        )


def _fraction(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise InvalidFile(f"{name} in adapter_config.json is {value!r:.60}, not between 0 and 1")
    return float(value)


def _layer(module: str) -> int | None:
    """The number behind `layers`, else the first number of the path; None if there is none."""
    parts = module.split(".")
    if "layers" in parts[:-1]:
        text = parts[parts.index("layers") + 1]
        if text.isdecimal():
            return int(text)
    return next((int(part) for part in parts if part.isdecimal()), None)


def _joint_basis(torch: Any, matrices: list[Array], alpha: float) -> Array:
    """V, (in, in): the hierarchical joint decomposition of all matrices, (out, in) each, f32."""
    stacked = torch.cat(matrices, dim=0)
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True).Vh.T
    q, r = torch.linalg.qr(stacked)
    dim = r.shape[1]
    mean = torch.zeros((dim, dim), dtype=r.dtype)
    for part in q.split([len(m) for m in matrices]):
        mean += torch.linalg.inv(part.T @ part + alpha * torch.eye(dim, dtype=r.dtype))
    mean /= len(matrices)
    return r.T @ torch.linalg.eigh(mean)[1]


def _draw(torch: Any, generator: Any, into: int, rate: float) -> Array:
    """Places off the diagonal, (2, n), drawn without repetition."""
    off = into * (into - 1)
    n = min(int(into * into * rate), off)
    if rate > 0 and off > 0:
        n = max(1, n)
    if not n:
        return torch.empty(2, 0, dtype=torch.long)
    drawn = torch.randperm(off, generator=generator)[:n]
    rows, columns = drawn // (into - 1), drawn % (into - 1)
    return torch.stack([rows, columns + (columns >= rows)])


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    said = flag(a.config, "save_projection", True)
    if said != (a.encoding == BASIS):
        there = "are not there: PEFT refuses to load it" if said else "are there: PEFT ignores them"
        yield Finding(
            "wrong-projection-flag",
            "save_projection",
            f"the config says {str(said).lower()}, and the projections {there}",
            f"set save_projection to {str(not said).lower()} in adapter_config.json",
        )
    if a.encoding == SEED:
        yield Finding(
            "no-projection",
            "save_projection",
            "the bases are not in the file, and other libraries, or another number of threads, make other ones",
            "save the adapter with save_projection=True where it was trained",
            warning=True,
        )
    used = set()
    for module, params in a.modules.items():
        try:
            into, places = _sizes(module, params)
            if a.encoding == BASIS:
                used |= {p.key for p in _shared(a, module, into, places).values()}
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, e.hint or "train or save the adapter again")
    for p in a.shared.values():
        if p.key not in used:
            yield Finding("unused-projection", p.key, "no module of the file is of this kind", warning=True)


edges: Mapping[str, tuple[Edge, ...]] = {BASIS: (), SEED: ()}
