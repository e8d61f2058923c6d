"""LoRA that began with a part of the base (PiSSA, OLoRA, CorDA, LoRA-GA), as plain LoRA on the pristine base.

Such an adapter was trained on W - s B0 A0, with B0 A0 its first values. On W itself the trained change is

    s B A - s B0 A0 = s [B, -B0] [A; A0]

of twice the rank (peft/tuners/lora/model.py, `subtract_mutated_init`). B0 A0 comes from the initial adapter, or for
PiSSA and OLoRA from the base's weights again: as a product it is a function of W (the best approximation of rank r;
the projection onto the first r columns), whatever signs an SVD or QR chooses. How far f32 lets two machines disagree
about it is measured against f64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Grade, LowRank, Outcome, Param
from adapterpack.backend import Backend
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, Unsupported, UsageError, WrongBase
from adapterpack.methods import _lowrank, lora
from adapterpack.methods._keys import flag
from adapterpack.methods._lora_modules import Module, Scaling, exactly, modules
from adapterpack.methods._lora_variants import moved_base
from adapterpack.tensor import Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array

    Start = tuple[Array, Array, float]

_DETERMINISTIC = ("pissa", "olora")
_SAME_START = 1e-3
"""How far, relatively, a start may be from the one that the base gives: f32 on another machine stays far below."""
_MARGIN = 1e-6
"""How far, relatively, what an SVD or QR keeps must stand apart from what it drops."""
_REASONS = {
    "loftq": "LoftQ trained on quantised weights, which no low rank leads to from the pristine base",
    "pissa_niter": "a randomised SVD without a recorded seed made its start",
    "corda": "its start depends on the samples that it was made with",
    "lora_ga": "its start depends on the gradients that it was made with",
}
_HINT = (
    "--init INIT_ADAPTER: the adapter as it was before training (PEFT's save_pretrained, right after get_peft_model)"
)


def without_start(trained: Checkpoint, initial: Checkpoint, xp: Backend, base: Base | None = None) -> Outcome:
    """The trained change of the pristine base, from the adapter before and after training. Exact.

    Args:
        trained: What `init_lora_weights` says began with a part of the base.
        initial: The same adapter, untrained.
        base: Its weights, to prove that the start is this base's, where the start is a function of the weights.

    Raises:
        UsageError: the adapter left the base alone.
        InvalidFile: `initial` is not the start of this adapter.
        Unsupported: LoftQ, DoRA, bare parameters.
        WrongBase: the base has other weights than the start was made of.
    """
    kind = _kind(trained)
    if kind == "loftq":
        raise Unsupported(
            f"{trained.name}: {_REASONS[kind]}", hint="merge it with PEFT, into the base that LoftQ made"
        )
    a, start = _plain(trained), _plain(initial)
    ours, theirs = ({m.name: m for m in modules(x)} for x in (a, start))
    if ours.keys() != theirs.keys():
        odd = min(ours.keys() ^ theirs.keys())
        raise InvalidFile(f"{initial.name} is not the start of {trained.name}: only one of them adapts {odd}")
    scales = Scaling(a.config), Scaling(start.config)
    pairs = {}
    for name, m in ours.items():
        first = theirs[name]
        same = m.shape == first.shape and m.rank == first.rank and m.embedding == first.embedding
        if not same or not math.isclose(scales[0](name, m.rank), scales[1](name, m.rank), rel_tol=1e-12):
            raise InvalidFile(
                f"{initial.name} is not the start of {trained.name}: {name} has another shape, rank or scale there"
            )
        factors = first.pair[1], first.pair[0]
        b, lora_a = (xp.native(t) for t in factors)
        _check_start(kind, first, xp.f32(b), xp.f32(lora_a), initial.name)
        if base is not None and kind in _DETERMINISTIC and not m.embedding and not m.convolution:
            _same_start(kind, m, LowRank(xp.f32(b), xp.f32(lora_a), scales[1](name, m.rank)), base, xp)
        pairs[name] = b, lora_a
    return Outcome(_joined(a, ours, pairs, xp), Grade.EQUIVALENT, dropped=("the start that training went from",))


def without_own_start(trained: Checkpoint, base: Base, xp: Backend) -> tuple[Outcome, float]:
    """The same with the start made again from the base's weights, as PEFT does it on loading.

    Returns:
        The outcome, and the largest relative error of a module's change that the start may have: twice the distance
        between f32 here and f64.

    Raises:
        Unsupported: the start is no function of the base's weights.
        WrongBase: the base lacks modules, or has other shapes.
    """
    kind = _kind(trained)
    if kind not in _DETERMINISTIC:
        raise Unsupported(f"{trained.name}: {_REASONS[kind]}", hint=None if kind == "loftq" else _HINT)
    a = _plain(trained)
    base.need_weights()
    if base.scheme is not None:
        raise Unsupported(f"the base is {base.scheme.name}: its start was made of other weights", hint=_HINT)
    base.require([f"{m}.weight" for m in a.modules], a.config)
    scaling = Scaling(a.config)
    found, pairs, worst = {m.name: m for m in modules(a)}, {}, 0.0
    for name, m in found.items():
        if m.embedding or m.convolution:
            raise Unsupported(f"{name} is no linear layer: PEFT starts it at random", hint=_HINT)
        scale = scaling(name, m.rank)
        w = _weight(kind, m, base, xp)
        start, exact = (_start(kind, xp, lift(w), m.rank, scale, name) for lift in (xp.f32, xp.f64))
        b, lora_a = m.pair[1], m.pair[0]
        change = _lowrank.distance(xp, LowRank(xp.f32(b), xp.f32(lora_a), scale), start)
        off = _lowrank.distance(xp, start, exact)
        worst = max(worst, 2 * off / change if change else (math.inf if off else 0.0))
        pairs[name] = start.b, start.a
    note = f"the start was made again from {base.path}; in f32 it is uncertain by {worst:.1e} of the change"
    return Outcome(
        _joined(a, found, pairs, xp), Grade.EQUIVALENT, ("the start that training went from",), (note,)
    ), worst


def refuse(trained: Checkpoint) -> Unsupported:
    """Why such an adapter cannot become plain LoRA by itself, and what it takes."""
    kind = _kind(trained)
    if kind in _DETERMINISTIC:
        reason = "its start, a part of the base's weights, is not in the file"
        return Unsupported(f"{trained.name}: {reason}", hint=f"--base BASE makes it again; exact: {_HINT}")
    return Unsupported(f"{trained.name}: {_REASONS[kind]}", hint=None if kind == "loftq" else _HINT)


def _kind(c: Checkpoint) -> str:
    said = c.config.get("init_lora_weights", True)
    kind = moved_base(c.config)
    if c.peft_type != lora.peft_type or kind is None:
        raise UsageError(
            f"{c.name} was trained with init_lora_weights={said!r:.40}, which leaves the base alone",
            hint="--init goes with PiSSA, OLoRA, CorDA and LoRA-GA",
        )
    return "pissa_niter" if kind == "pissa" and str(said).lower() != "pissa" else kind


def _plain(c: Checkpoint) -> Adapter:
    """Its tensors, read as LoRA's. Raises Unsupported for what is more than a product."""
    config = {k: v for k, v in c.config.items() if k not in ("corda_config", "lora_ga_config")}
    a = lora.parse(replace(c, config={**config, "init_lora_weights": True}, config_bytes=None))
    if flag(a.config, "use_dora"):
        raise Unsupported(f"{c.name} is DoRA too: its change is no product", hint="merge it with PEFT")
    if a.parameters:
        raise Unsupported(f"{c.name} adapts bare parameters, which keep their own start", hint="merge it with PEFT")
    return a


def _check_start(kind: str, m: Module, b: Array, a: Array, name: str) -> None:
    """Raise InvalidFile for factors that no such start has, as those of a trained adapter."""
    if m.embedding or m.convolution:
        # PEFT starts them as plain LoRA, and leaves their base alone.
        if b.abs().sum() * a.abs().sum() != 0:
            raise InvalidFile(f"{name}: {m.name} does not start at zero, as all but linear layers do")
        return
    wanted = {"pissa": (b, a.T), "pissa_niter": (b, a.T), "olora": (b,)}.get(kind, ())
    bound = _SAME_START if m.pair[0].dtype.bits == 32 else 0.05
    for factor in wanted:
        gram = factor.double().T @ factor.double()
        off = gram - gram.diag().diag()
        if not float(off.norm()) <= bound * float(gram.norm()):
            raise InvalidFile(
                f"{name} is no start of {kind}: the factors of {m.name} are not orthogonal",
                hint="it must be the adapter from before training",
            )


def _same_start(kind: str, m: Module, start: LowRank, base: Base, xp: Backend) -> None:
    """Raise WrongBase unless the base's weights give this start."""
    base.require([f"{m.name}.weight"], {})
    again = _start(kind, xp, xp.f32(_weight(kind, m, base, xp)), m.rank, start.scale, m.name)
    off = _lowrank.distance(xp, start, again)
    if not off <= _SAME_START * _lowrank.norm(xp, again):
        raise WrongBase(
            f"{m.name}.weight of the base does not give the start that the initial adapter has",
            hint="is it the base that was trained on?",
        )


def _weight(kind: str, m: Module, base: Base, xp: Backend) -> Array:
    """(out, in), in the base's dtype."""
    target = f"{m.name}.weight"
    w = xp.native(base.tensor(target))
    if base.conv1d(m.name):
        if kind == "olora":
            raise Unsupported(f"{m.name} lies as (in, out): PEFT cannot start OLoRA there", hint=_HINT)
        w = w.T
    if tuple(w.shape) != m.shape:
        raise WrongBase(f"{target} has shape {tuple(w.shape)}, the adapter's change {m.shape}")
    return w


def _start(kind: str, xp: Backend, w: Array, rank: int, scale: float, name: str) -> LowRank:
    """The start that W gives. Raises Unsupported where W leaves a choice: another machine may make another one."""
    b, a, margin = _START[kind](xp, w, rank, scale)
    if not margin > _MARGIN:
        raise Unsupported(
            f"the weights of {name} do not say what its start was: there is more than one of rank {rank}", hint=_HINT
        )
    return LowRank(b, a, scale)


def _pissa(xp: Backend, w: Array, rank: int, scale: float) -> Start:
    """peft/tuners/lora/layer.py, `pissa_init`; unique if the last singular value stands apart from the next."""
    u, s, vh = xp.torch.linalg.svd(w, full_matrices=False)
    root = xp.torch.diag(xp.torch.sqrt(s[:rank] / scale))
    margin = float((s[rank - 1] - s[rank]) / s[0]) if rank < len(s) else 1.0
    return u[:, :rank] @ root, root @ vh[:rank], margin


def _olora(xp: Backend, w: Array, rank: int, scale: float) -> Start:
    """peft/tuners/lora/layer.py, `olora_init`; unique if the first columns of W are independent.

    The scale is not taken out of the factors: PEFT takes `scale * Q R` from W.
    """
    q, r = xp.torch.linalg.qr(w)
    diagonal = r.diag()[:rank].abs()
    return q[:, :rank], r[:rank], float(diagonal.min() / r.abs().max())


_START: Mapping[str, Callable[[Backend, Array, int, float], Start]] = {"pissa": _pissa, "olora": _olora}


def _joined(
    a: Adapter, found: Mapping[str, Module], starts: Mapping[str, tuple[Array, Array]], xp: Backend
) -> Adapter:
    """[B, -B0] and [A; A0] in every module, and a config of twice the rank and the same scale."""
    params = {name: dict(p) for name, p in a.modules.items()}
    for name, m in found.items():
        names = ("lora_embedding_A", "lora_embedding_B") if m.embedding else ("lora_A", "lora_B")
        start_b, start_a = starts[name]
        values = _cat(xp, m.pair[0], start_a, 0), _cat(xp, m.pair[1], -start_b, 1)
        for own, value in zip(names, values, strict=True):
            params[name][own] = Param(params[name][own].key, xp.tensor(value))
    return replace(a, config=_config(a, found), modules=params, changed=True)


def _cat(xp: Backend, trained: Tensor, start: Array, dim: int) -> Array:
    old = xp.native(trained)
    if old.dtype != start.dtype:
        # Either holds the other's values in f32.
        old, start = xp.f32(old), xp.f32(start)
    return xp.torch.cat([old, start], dim)


def _config(a: Adapter, found: Mapping[str, Module]) -> dict[str, Any]:
    config = {**a.config, "init_lora_weights": True}
    if not flag(config, "use_rslora"):
        # 2 alpha / 2 r is alpha / r to the last bit.
        config |= {"r": 2 * config.get("r", 8), "lora_alpha": 2 * config.get("lora_alpha", 8)}
        for field in ("rank_pattern", "alpha_pattern"):
            config[field] = {k: 2 * v for k, v in (config.get(field) or {}).items()}
        return config
    scaling = Scaling(config)
    made = {name: (2 * m.rank, 2 * m.rank * scaling(name, m.rank)) for name, m in found.items()}
    rank, alpha = max(made.values())
    return {
        **config,
        "use_rslora": False,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(n): r for n, (r, _) in made.items() if r != rank},
        "alpha_pattern": {exactly(n): x for n, (r, x) in made.items() if (r, x) != (rank, alpha)},
    }
