"""VB-LoRA (Li et al. 2024): sub-vectors of A and B are mixtures of k vectors from one shared bank.

    (v, i) = topk(logits, k);  w = softmax(v);  row = sum_j w_j * bank[i_j]
    A = rows (r, in/b, b) -> (r, in);  B = rows (out/b, r, b) -> transpose(1, 2) -> (out, r);  delta W = B @ A

Encodings: `full-logits` holds all logits; `topk` the k indices and the first k-1 weights (the last one is
1 - sum). Reference: peft/tuners/vblora/layer.py (`_get_low_rank_matrix`) and model.py
(`_get_adapter_state_dict`, `_remap_adapter_state_dict_for_load`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import (
    Adapter,
    Change,
    Edge,
    Finding,
    Grade,
    Outcome,
    Param,
    Request,
    Shapes,
)
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import InvalidFile, LossRefused, Unsupported
from adapterpack.methods import _bank, _to_lora
from adapterpack.methods._changes import LowRankChange, replacements
from adapterpack.methods._keys import KeyTable, flag, positive, require
from adapterpack.methods._without import no_recipes
from adapterpack.tensor import DTYPES, Tensor, from_numpy

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

peft_type = "VBLORA"
BANK = "vblora_vector_bank"
FULL, TOPK = "full-logits", "topk"
keys = KeyTable(
    "vblora_",
    {
        "logits_A": "vblora_logits_A",
        "logits_B": "vblora_logits_B",
        "indices_A": "vblora_logits_A_topk_indices",
        "indices_B": "vblora_logits_B_topk_indices",
        "weights_A": "vblora_logits_A_topk_weights",
        "weights_B": "vblora_logits_B_topk_weights",
    },
    shared=(BANK,),
)
keep_dtype = frozenset({"weights_A", "weights_B"})
"""PEFT scatters the weights into a float32 matrix: 16-bit ones raise a dtype error."""
recipes = no_recipes

_ROWS = 4096
"""Sub-vectors treated at a time: bounds memory whatever the file's size."""
_FACTOR_NOISE = 32.0
"""softmax, logarithm and softmax again move a weight by its logit's last places: 2e-6 of the change at most."""
_ZERO_LOGIT = -200.0
"""Stands for a kept weight of 0: exp(-200) is 0 in float32, and it is finite."""


def parse(c: Checkpoint) -> Adapter:
    topk = any("_topk_indices" in key for key in c.tensors)
    a = keys.parse(c, "vblora", TOPK if topk else FULL)
    mixed = [m for m, params in a.modules.items() if topk == any(n.startswith("logits") for n in params)]
    if mixed:
        raise Unsupported(f"{mixed[0]}: full logits and top-k stand side by side in {c.name}")
    return a


class _Sizes:
    """k, the bank and what it allows."""

    def __init__(self, a: Adapter) -> None:
        self.k = positive(a.config, "topk", 2)
        if BANK not in a.shared:
            raise InvalidFile(
                f"{a.source.name} has no {BANK}",
                hint="PEFT loads it without a warning and with a random bank; save the adapter again",
            )
        self.bank = a.shared[BANK].tensor
        if len(self.bank.shape) != 2 or self.bank.dtype.kind != "float":
            raise InvalidFile(f"{a.shared[BANK].key} {self.bank.dtype} {self.bank.shape} is no vector bank")
        self.vectors, self.length = self.bank.shape
        if self.k > self.vectors:
            raise InvalidFile(f"topk is {self.k}, but the bank has {self.vectors} vectors")


def _sides(a: Adapter, module: str, sizes: _Sizes) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of A and of B, their shapes checked: (logits,) or (indices, weights)."""
    params = a.modules[module]
    names = ("logits",) if a.encoding == FULL else ("indices", "weights")
    found = {side: require(module, params, tuple(f"{n}_{side}" for n in names)) for side in "AB"}
    for side, tensors in found.items():
        last = (sizes.vectors,) if a.encoding == FULL else (sizes.k, sizes.k - 1)
        for tensor, size in zip(tensors, last, strict=True):
            if len(tensor.shape) != 3 or tensor.shape[2] != size:
                raise InvalidFile(f"{module}: {names} of {side} has shape {tensor.shape}, not (.., .., {size})")
        if a.encoding == TOPK:
            indices, weights = tensors
            if indices.dtype.kind != "int" or weights.dtype.kind != "float":
                raise InvalidFile(f"{module}: indices {indices.dtype} and weights {weights.dtype} of {side}")
            if indices.shape[:2] != weights.shape[:2]:
                raise InvalidFile(f"{module}: indices {indices.shape} and weights {weights.shape} of {side}")
        elif tensors[0].dtype.kind != "float":
            raise InvalidFile(f"{module}: logits of {side} are {tensors[0].dtype}")
    if found["A"][0].shape[0] != found["B"][0].shape[1]:
        raise InvalidFile(f"{module}: rank {found['A'][0].shape[0]} in A, {found['B'][0].shape[1]} in B")
    return found


def changes(a: Adapter, request: Request) -> Iterator[Change]:
    yield from replacements(a)
    sizes = _Sizes(a)
    two = a.encoding == TOPK and sizes.k == 2
    for module, params in a.modules.items():
        sides = _sides(a, module, sizes)
        out, into = sides["B"][0].shape[0] * sizes.length, sides["A"][0].shape[1] * sizes.length
        yield LowRankChange(
            module=module,
            factors=partial(_factors, sides, sizes),
            shape=(out, into),
            rank=sides["A"][0].shape[0],
            scale=1.0,
            uses=frozenset({p.key for p in params.values()} | {a.shared[BANK].key}),
            fan_in_fan_out=flag(a.config, "fan_in_fan_out"),
            # Bits of torch's logarithm, softmax and order: of two they can be had without it.
            torch=not two,
            mixes=two,
            factor_noise=_FACTOR_NOISE,
        )


def _factors(sides: Mapping[str, tuple[Tensor, ...]], sizes: _Sizes, xp: Backend) -> tuple[Array, Array]:
    """(B, A) in the operations of `_get_lora_matrices`."""
    a, b = (_bank.rows(sides[side], sizes.bank, sizes.k, xp) for side in "AB")
    return b.swapaxes(1, 2).reshape(-1, b.shape[1]), a.reshape(a.shape[0], -1)


def ranks(a: Adapter) -> Mapping[str, int]:
    side = "logits_A" if a.encoding == FULL else "indices_A"
    return {m: p[side].tensor.shape[0] for m, p in a.modules.items() if side in p and p[side].tensor.shape}


def index_dtype(vectors: int) -> str:
    """The dtype that PEFT writes indices in (model.py, `_get_adapter_state_dict`)."""
    for below, name in ((1 << 8, "U8"), (1 << 15, "I16"), (1 << 31, "I32")):
        if vectors < below:
            return name
    return "I64"


def _to_topk(a: Adapter, request: Request) -> Outcome:
    sizes = _Sizes(a)
    modules = {}
    for module in a.modules:
        sides = _sides(a, module, sizes)
        made: dict[str, Param] = {}
        for side in "AB":
            indices, weights = _topk(sides[side][0], sizes, request.xp)
            for name, tensor in ((f"indices_{side}", indices), (f"weights_{side}", weights)):
                made[name] = Param(keys.key(module, name), tensor)
        modules[module] = made
    logits = sum(p.tensor.numel for params in a.modules.values() for p in params.values())
    kept = logits // sizes.vectors * sizes.k
    return Outcome(
        replace(
            a,
            encoding=TOPK,
            config={**a.config, "save_only_topk_weights": True},
            modules=modules,
            changed=True,
        ),
        Grade.EQUIVALENT,
        dropped=(
            f"{logits - kept:,} of {logits:,} logits (all but the {sizes.k} largest of each sub-vector):"
            " training cannot resume from the result",
        ),
    )


def _topk(logits: Tensor, sizes: _Sizes, xp: Backend) -> tuple[Tensor, Tensor]:
    """Indices and the first k-1 weights of all sub-vectors, a few thousand at a time."""
    import numpy as np

    index_type = DTYPES[index_dtype(sizes.vectors)].numpy
    assert index_type is not None
    count = logits.shape[0] * logits.shape[1]
    indices = np.empty((count, sizes.k), dtype=index_type)
    weights = np.empty((count, sizes.k - 1), dtype=np.float32)
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        part = xp.torch.from_numpy(logits.rows(start, stop).astype(np.float32)).to(xp.device)
        if not bool(xp.torch.isfinite(part).all()):
            raise InvalidFile("a logit is NaN or infinite", hint="train again, or repair the checkpoint")
        top, chosen = part.topk(sizes.k, dim=-1)
        indices[start:stop] = chosen.cpu().numpy()
        weights[start:stop] = safe_weights(top.double().softmax(-1).cpu().numpy())
    shape = logits.shape[:2]
    return from_numpy(indices.reshape(*shape, -1)), from_numpy(weights.reshape(*shape, -1))


def safe_weights(softmax: Any) -> Any:
    """The first k-1 weights in float32, such that 1 - their sum is never negative.

    Args:
        softmax: (n, k) float64, rows sum to 1 and descend.

    PEFT's loader computes 1 - sum in float32 and takes the logarithm: -1.2e-7 becomes NaN. A float32 sum
    of m terms in any order stays at or below 1 if the exact sum is at most 1 - (m - 2) * 2^-25, for each
    of its roundings moves it by at most 2^-25. The first weight, the largest, gives way.
    """
    import numpy as np

    weights = softmax[:, :-1].astype(np.float32)
    terms = weights.shape[1]
    if terms < 2:
        return np.minimum(weights, np.float32(1))
    excess = weights.astype(np.float64).sum(-1) - (1 - (terms - 2) * 2.0**-25)
    over = excess > 0
    lowered = weights[over, 0].astype(np.float64) - excess[over]
    rounded = lowered.astype(np.float32)
    rounded = np.where(rounded > lowered, np.nextafter(rounded, np.float32(0)), rounded)
    weights[over, 0] = rounded
    return weights


def _mend_topk(a: Adapter, request: Request) -> Outcome:
    """Top-k as it should be: float32 weights, no negative last one, the flag set."""
    import numpy as np

    sizes = _Sizes(a)
    mended: list[str] = []
    modules = {}
    for module, params in a.modules.items():
        sides = _sides(a, module, sizes)
        made = dict(params)
        for side in "AB":
            name = f"weights_{side}"
            old = sides[side][1].numpy().astype(np.float32)
            flat = old.reshape(-1, sizes.k - 1) if sizes.k > 1 else old
            last = 1 - flat.sum(-1, keepdims=True, dtype=np.float64)
            negative = bool((last < 0).any()) or bool((1 - request.xp.f32(sides[side][1]).sum(-1) < 0).any())
            new = safe_weights(np.concatenate([flat, last], -1)).reshape(old.shape) if negative else old
            if negative or sides[side][1].dtype.name != "F32":
                made[name] = replace(params[name], tensor=from_numpy(new))
                mended.append(params[name].key)
        modules[module] = made
    wrong_flag = not flag(a.config, "save_only_topk_weights")
    if not mended and not wrong_flag:
        return Outcome(a, Grade.LOSSLESS, notes=("it already is top-k",))
    notes = [f"mended {len(mended)} weights tensors that PEFT cannot load or loads as NaN"] if mended else []
    notes += ["set save_only_topk_weights to true"] if wrong_flag else []
    config = {**a.config, "save_only_topk_weights": True}
    return Outcome(replace(a, config=config, modules=modules, changed=True), Grade.EQUIVALENT, notes=tuple(notes))


def _warm_start(a: Adapter, request: Request) -> Outcome:
    if not request.warm_start:
        raise LossRefused(
            "a top-k file has only the largest logits: the others are gone, and full logits cannot come back",
            hint="--warm-start writes logits that compute the same and let training start again",
        )
    xp, sizes = request.xp, _Sizes(a)
    modules = {}
    for module in a.modules:
        sides = _sides(a, module, sizes)
        made = {}
        for side, (index_tensor, weight_tensor) in sides.items():
            chosen = _bank.indices(index_tensor, sizes.vectors, xp)
            # The very logits that PEFT computes when it loads the top-k file.
            kept = xp.torch.log(_bank.all_weights(weight_tensor, xp))
            kept = kept.clamp_min(_ZERO_LOGIT)
            floor = kept.amin(-1, keepdim=True) - 1.0
            logits = floor.expand(*chosen.shape[:2], sizes.vectors).clone()
            logits.scatter_(-1, chosen, kept)
            made[f"logits_{side}"] = Param(keys.key(module, f"logits_{side}"), xp.tensor(logits))
        modules[module] = made
    config = {**a.config, "save_only_topk_weights": False}
    return Outcome(
        replace(a, encoding=FULL, config=config, modules=modules, changed=True),
        Grade.EQUIVALENT,
        notes=(
            "a warm start, not a resume: training can start again from here, but the logits that top-k dropped"
            " are gone and every one of them now lies 1.0 under the smallest kept one",
        ),
    )


def _fold(a: Adapter, request: Request) -> Outcome:
    dropped = "the vector bank and the logits: training as VB-LoRA cannot resume from the result"
    return _to_lora.fold(a, request, changes(a, request), dropped=dropped)


edges: Mapping[str, tuple[Edge, ...]] = {
    FULL: (
        Edge(TOPK, Grade.EQUIVALENT, _to_topk, compact=True),
        Edge("lora", Grade.EQUIVALENT, _fold),
        Edge(
            FULL,
            Grade.LOSSLESS,
            lambda a, _: Outcome(a, Grade.LOSSLESS, notes=("it already has full logits",)),
        ),
    ),
    TOPK: (
        Edge(FULL, Grade.EQUIVALENT, _warm_start),
        Edge("lora", Grade.EQUIVALENT, _fold),
        Edge(TOPK, Grade.LOSSLESS, _mend_topk, compact=True),
    ),
}


def findings(a: Adapter, shapes: Shapes | None) -> Iterator[Finding]:
    if BANK not in a.shared:
        yield Finding(
            "missing-bank",
            f"base_model.{BANK}",
            "the vector bank is missing: PEFT loads this without any warning and with a random bank",
            "save the adapter again",
        )
    said = flag(a.config, "save_only_topk_weights")
    if said != (a.encoding == TOPK):
        yield Finding(
            "wrong-topk-flag",
            "save_only_topk_weights",
            f"the config says {str(said).lower()}, the tensors are {a.encoding}: PEFT leaves random logits",
            f"set save_only_topk_weights to {str(not said).lower()} in adapter_config.json",
        )
    if BANK in a.shared:
        yield from _shape_findings(a)


def _shape_findings(a: Adapter) -> Iterator[Finding]:
    sizes = _Sizes(a)
    config = (("num_vectors", 256, sizes.vectors), ("vector_length", 256, sizes.length))
    for field, default, actual in config:
        said = a.config.get(field, default)
        if said != actual:
            yield Finding("bank-mismatch", field, f"the config says {said!r:.20}, the bank has {actual}")
    r = positive(a.config, "r", 4)
    for module, params in a.modules.items():
        try:
            sides = _sides(a, module, sizes)
        except InvalidFile as e:
            yield Finding("half-pair", module, e.message, "train or save the adapter again")
            continue
        rank = sides["A"][0].shape[0]
        if rank != r:
            yield Finding(
                "rank-mismatch",
                module,
                f"the config says rank {r}, the tensors have {rank}",
                f"set r to {rank}",
            )
        if a.encoding == TOPK:
            yield from _topk_findings(module, params, sides, sizes, at_hand=a.source.at_hand)


def _topk_findings(
    module: str,
    params: Mapping[str, Param],
    sides: Mapping[str, tuple[Tensor, ...]],
    sizes: _Sizes,
    *,
    at_hand: bool,
) -> Iterator[Finding]:
    import numpy as np

    fix = "adapterpack convert --to topk writes it right"
    for side, (indices, weights) in sides.items():
        index_key, weight_key = params[f"indices_{side}"].key, params[f"weights_{side}"].key
        if weights.dtype.name != "F32":
            yield Finding(
                "narrow-topk-weights",
                weight_key,
                f"topk_weights in {weights.dtype}: PEFT cannot load them",
                fix,
            )
        if not at_hand:
            continue
        chosen = indices.numpy().astype(np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < sizes.vectors):
            yield Finding(
                "index-outside-bank", index_key, f"an index lies outside the bank of {sizes.vectors} vectors"
            )
        if (np.diff(np.sort(chosen, -1), axis=-1) == 0).any():
            yield Finding("duplicate-index", index_key, "a sub-vector names one vector of the bank twice")
        last = 1 - weights.numpy().astype(np.float32).sum(-1, dtype=np.float32)
        if (last < 0).any():
            yield Finding(
                "negative-topk-weight",
                weight_key,
                f"the last weight of {int((last < 0).sum())} sub-vectors is negative: PEFT loads NaN",
                fix,
            )
