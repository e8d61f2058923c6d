"""OSF (Nayak et al. 2025, orthogonal subspace fine-tuning): the lesser part of the base's SVD, trained.

    W = U diag(S) V; the file has U_low (out, k), S_low (k,), V_low (k, in) as they are after training
    delta W = U_low diag(S_low) V_low - U_0 diag(S_0) V_0,   with U_0, S_0, V_0 the k last triples of W

What is taken away is a function of W, whatever signs an SVD chooses. Reference: peft/tuners/osf/layer.py
(`get_delta_weight`, `merge`) and utils.py (`decompose_weight_matrix`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Edge, Finding, Param, Request, Shapes
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile
from adapterpack.io.patterns import Budget, Pattern
from adapterpack.methods._changes import replacements
from adapterpack.methods._formula import Maths, TransformChange
from adapterpack.methods._keys import KeyTable, floats
from adapterpack.methods._of_base import linear_shape
from adapterpack.methods._without import no_recipes

if TYPE_CHECKING:
    from adapterpack.backend import Array

peft_type = "OSF"
keep_dtype: frozenset[str] = frozenset()
recipes = no_recipes
_NAMES = ("U_low", "S_low", "V_low")
keys = KeyTable("osf_", {n: f"osf_svd_params.{n}" for n in _NAMES})


def parse(c: Checkpoint) -> Adapter:
    return keys.parse(c, "osf", "osf")


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    for module, params in a.modules.items():
        out, _, into = _sizes(module, params)
        yield TransformChange(
            module=module,
            params=params,
            shape=linear_shape(a, module, request, out=out, into=into),
            transform=_changed,
            derive=_lesser,
        )


def _sizes(module: str, params: Mapping[str, Param]) -> tuple[int, int, int]:
    """out, k and in."""
    u, s, v = (t.shape for t in floats(module, params, _NAMES))
    if len(u) != 2 or len(s) != 1 or len(v) != 2 or u[1] != s[0] or v[0] != s[0] or s[0] >= min(u[0], v[1]):
        raise InvalidFile(f"{module}: U_low {u}, S_low {s} and V_low {v} are no lesser part of an SVD")
    return u[0], s[0], v[1]


def _lesser(m: Maths, w: Array, found: Mapping[str, Array] | None) -> Mapping[str, Array]:
    """The k last singular triples of W. PEFT keeps them in the dtype of the base."""
    k = m["S_low"].shape[0]
    triple = m.torch.linalg.svd(w, full_matrices=False)
    top = triple[1].shape[0] - k
    u, s, v = triple[0][:, top:], triple[1][top:], triple[2][top:]
    lesser = {"U_0": u.contiguous(), "S_0": s.contiguous(), "V_0": v.contiguous()}
    return {name: m.lift(m.rounded(values)) for name, values in lesser.items()}


def _changed(m: Maths, w: Array) -> Array:
    now = (m["U_low"] * m["S_low"][None]) @ m["V_low"]
    before = (m["U_0"] * m["S_0"][None]) @ m["V_0"]
    return w + (now - before)


def ranks(a: Adapter) -> Mapping[str, int]:
    return {module: _sizes(module, params)[1] for module, params in a.modules.items()}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    budget = Budget()
    overrides = a.config.get("rank_pattern") or {}
    if not isinstance(overrides, dict):
        raise InvalidFile("rank_pattern in adapter_config.json is not an object")
    # Unlike LoRA's, its patterns may match anywhere in the path.
    patterns = [Pattern(k, template="(?s:.*?)(?:{})", where="rank_pattern", budget=budget) for k in overrides]
    for module, params in a.modules.items():
        try:
            out, k, into = _sizes(module, params)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, "train or save the adapter again")
            continue
        said = next((overrides[p.text] for p in patterns if p.matches(module)), a.config.get("effective_rank"))
        kept = _kept(said, min(out, into))
        if kept != min(out, into) - k:
            yield Finding(
                "rank-mismatch",
                module,
                f"the config keeps {kept} of {min(out, into)} singular directions, the tensors train {k}:"
                " PEFT refuses to load it",
                f'put "{re.escape(module)}": {min(out, into) - k} first in rank_pattern',
            )


def _kept(said: Any, most: int) -> int:
    """How many singular directions stay as they are: PEFT's `_resolve_rank`."""
    if said is None:
        return most // 2
    if type(said) not in (int, float) or said != said or abs(said) > 1e9:
        raise InvalidFile(f"effective_rank or rank_pattern in adapter_config.json has {said!r:.60}")
    rank = int(most * said) if isinstance(said, float) and 0 < said <= 1 else int(said)
    return max(min(most, rank), 0)


edges: Mapping[str, tuple[Edge, ...]] = {"osf": ()}
