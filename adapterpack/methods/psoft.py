"""PSOFT (Wu et al. 2025, "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation").

    W ~ B0 A0, the part of rank r of the base's SVD, divided by the scale: B0 = U S / scale, A0 = V^T
    delta W = scale * B0 (R - I) A0,   scale = psoft_alpha / r
    R = diag(b) (I - Q)^-1 (I + Q) diag(a), Q skew-symmetric (Cayley); or its Neumann series; or a free matrix

B0 and A0 are not in the file: they come from the weights, and the sign of each pair of singular vectors is the SVD's
own. It matters: R mixes them. Reference: peft/tuners/psoft/layer.py (`_build_psoft_ab_cache_buffers`, `OrthLayer`,
`get_delta_weight`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import AdapterpackError, InvalidFile, WrongBase
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, flag, floats, positive
from adapterpack.methods._of_base import choice, linear_shape, lowrank_svd, number, seed, signs
from adapterpack.methods._without import no_recipes

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "PSOFT"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
keys = KeyTable("psoft_", {n: f"psoft_R.{n}" for n in ("weight", "vector_a", "vector_b")})
_MOST_TERMS = 1_000
"""Of the Neumann series, and power iterations: each is a product of matrices."""


@dataclass(frozen=True)
class _Settings:
    """The config's word on R, and on what A0 and B0 are.

    Attributes:
        terms: Of the Neumann series; None: Cayley's transform itself.
        eps: The largest norm of Q that the series may have; None: any.
        pissa: Are the roots of the singular values in both factors, or all of them in B0?
        lowrank: Power iterations and seed of a randomised SVD; None: the exact one.
    """

    rank: int
    scale: float
    orth: bool
    mag_a: bool
    mag_b: bool
    terms: int | None
    eps: float | None
    pissa: bool
    lowrank: tuple[int, int] | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Settings:
        """Raises InvalidFile for what PEFT refuses too."""
        rank = positive(config, "r", 32)
        series = flag(config, "use_cayley_neumann")
        eps = config.get("cayley_neumann_eps") if series else None
        if eps is not None and not (type(eps) is float and 0 < eps < 1):
            raise InvalidFile(f"cayley_neumann_eps in adapter_config.json is {eps!r:.60}, not between 0 and 1")
        kind = choice(config, "psoft_svd", "full", ("full", "lowrank"))
        niter = config.get("psoft_svd_lowrank_niter", 10)
        if kind == "lowrank" and (type(niter) is not int or not 0 <= niter <= _MOST_TERMS):
            raise InvalidFile(f"psoft_svd_lowrank_niter in adapter_config.json is {niter!r:.60}")
        return cls(
            rank=rank,
            scale=number(config, "psoft_alpha", 32) / rank,
            orth=flag(config, "psoft_orth", True),
            mag_a=flag(config, "psoft_mag_a", True),
            mag_b=flag(config, "psoft_mag_b", True),
            terms=positive(config, "num_cayley_neumann_terms", 5, _MOST_TERMS) if series else None,
            eps=eps,
            pissa=choice(config, "ab_svd_init", "psoft_init", ("psoft_init", "pissa_init")) == "pissa_init",
            lowrank=(niter, seed(config, "random_seed")) if kind == "lowrank" else None,
        )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        r = self.rank
        wanted: dict[str, tuple[int, ...]] = {"weight": (r * (r - 1) // 2,) if self.orth else (r, r)}
        return wanted | {n: (r,) for n, has in (("vector_a", self.mag_a), ("vector_b", self.mag_b)) if has}

    @property
    def numbers(self) -> Mapping[str, float]:
        niter, start = self.lowrank or (-1, 0)
        return {
            "scale": self.scale,
            "terms": self.terms or 0,
            "eps": self.eps or 0,
            "pissa": self.pissa,
            "lowrank": niter,
            "seed": start,
        }


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "psoft", "psoft")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    s = _Settings.of(a.config)
    for module, params in a.modules.items():
        _check(module, params, s)
        shape = linear_shape(a, module, request)
        if request.shapes is not None and s.rank > min(shape):
            raise WrongBase(f"{module}.weight has shape {shape}: it has no part of rank {s.rank}")
        yield TransformChange(
            module=module,
            params=params,
            shape=shape,
            transform=partial(_changed, s),
            derive=partial(_principal, s),
            settings=s.numbers,
        )


def _check(module: str, params: Mapping[str, Param], s: _Settings) -> None:
    """Raise InvalidFile unless the module has the tensors that the config speaks of, and no others."""
    floats(module, params, tuple(s.shapes))
    for name, p in params.items():
        if name not in s.shapes:
            raise InvalidFile(
                f"{p.key} is there, and psoft_mag_{name[-1]} is false: PEFT would ignore it",
                hint=f"set psoft_mag_{name[-1]} to true in adapter_config.json if it was trained so",
            )
        if p.tensor.shape != s.shapes[name]:
            raise InvalidFile(f"{p.key} has shape {p.tensor.shape}, not {s.shapes[name]} of rank {s.rank}")


def _principal(s: _Settings, m: Maths, w: Array, found: Mapping[str, Array] | None) -> Mapping[str, Array]:
    """A0 (r, in) and B0 (out, r). On the CPU, whose signs are the ones that PEFT gets where it loads."""
    torch, r = m.torch, s.rank
    if s.lowrank is None:
        u, sigma, vh = torch.linalg.svd(w.cpu(), full_matrices=False)
    else:
        u, sigma, vh = lowrank_svd(torch, w, r, *s.lowrank)
    u, sigma, vh = u[:, :r], sigma[:r] / s.scale, vh[:r]
    if s.pissa:
        root = torch.diag(torch.sqrt(sigma))
        a, b = root @ vh, u @ root
    else:
        a, b = vh, u @ torch.diag(sigma)
    if found is not None:
        turn = signs(b, found["B0"].cpu())
        a, b = turn[:, None] * a, b * turn
    return {"A0": a.contiguous().to(m.xp.device), "B0": b.contiguous().to(m.xp.device)}


def _changed(s: _Settings, m: Maths, w: Array) -> Array:
    r = _rotation(s, m)
    delta = m["B0"] @ (r - _eye(m, s.rank)) @ m["A0"] * s.scale
    return w + m.lift(m.rounded(delta))


def _eye(m: Maths, size: int) -> Array:
    return m.lift(m.torch.eye(size, device=m.xp.device))


def _rotation(s: _Settings, m: Maths) -> Array:
    """R, (r, r)."""
    r = m["weight"]
    if s.orth:
        rows, columns = m.torch.triu_indices(s.rank, s.rank, 1, device=m.xp.device)
        q = m.torch.zeros_like(_eye(m, s.rank)).index_put((rows, columns), r)
        q = q - q.T
        eye = _eye(m, s.rank)
        r = m.torch.linalg.solve(eye - q, eye + q, left=False) if s.terms is None else _series(s, m, q)
    if s.mag_b:
        r = m["vector_b"][:, None] * r
    return r * m["vector_a"][None, :] if s.mag_a else r


def _series(s: _Settings, m: Maths, q: Array) -> Array:
    """I + 2 Q + 2 Q^2 + ... + Q^(t-1), whose last term counts once. Of 1 and 2 terms I and I + 2 Q; of 3 as of 4."""
    assert s.terms is not None
    if s.eps is not None:
        norm = m.torch.linalg.norm(q, ord="fro")
        if m.torch.isfinite(norm) and norm > s.eps:
            q = q * (s.eps / (norm + 1e-12))
    r = _eye(m, s.rank)
    if s.terms > 1:
        r = r + q * 2
    if s.terms > 2:
        power = q @ q
        r = r + power * 2
        for _ in range(3, s.terms - 1):
            power = power @ q
            r = r + power * 2
        r = r + power @ q
    return r


def ranks(a: Adapter) -> Mapping[str, int]:
    rank = positive(a.config, "r", 32)
    return dict.fromkeys(a.modules, rank)


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    s = _Settings.of(a.config)
    for module, params in a.modules.items():
        try:
            _check(module, params, s)
        except AdapterpackError as e:
            yield Finding("config-mismatch", module, e.message, e.hint or "train or save the adapter again")


edges: Mapping[str, tuple[Edge, ...]] = {"psoft": ()}
