"""The shards of MiSS (Kang and Yin 2024) and of Bone, its name in PEFT before 0.19.

    standard   delta W = block.T, (out, r), laid side by side over all inputs
    mini       the same, and the block's mini_r columns are laid one below the other over all outputs
    bat        W' = W + W_ij @ block_i + block_i, W cut into r by r pieces ij, block (out / r, r, r)

Nothing in the file says how many inputs a module has, and of `mini` how many outputs. The first two are LoRA of
rank r exactly: A is the matrix of zeros and ones that folds the inputs.
Reference: peft/tuners/miss/layer.py (`get_delta_weight_miss`, `get_delta_weight`, `merge`); for Bone PEFT 0.17.1's
peft/tuners/bone/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Finding, Outcome, Request, Shapes
from adapterpack.errors import InvalidFile, Unsupported, WrongBase
from adapterpack.methods import _findings, _to_lora
from adapterpack.methods._changes import logical_shape, replacements
from adapterpack.methods._formula import DenseChange, Maths, TransformChange
from adapterpack.methods._keys import require
from adapterpack.tensor import Shape

if TYPE_CHECKING:
    from adapterpack.backend import Array

STANDARD, MINI, BAT = "standard", "mini", "bat"


def mode(config: Mapping[str, Any], known: tuple[str, ...]) -> str:
    """Which of the three it is. `init_weights` says so, and no tensor does.

    Raises:
        Unsupported: it is a word that is not known.
    """
    said = config.get("init_weights", True)
    if said is None or isinstance(said, bool):
        return STANDARD
    if said not in known:
        raise Unsupported(f"init_weights={said!r:.60} is unknown", hint=f"true, false, {' or '.join(known)}")
    return str(said)


def shape(a: Adapter, module: str) -> Shape:
    """Of a module's block: (r, out), (r, mini_r) or (out / r, r, r). Raises InvalidFile."""
    found = require(module, a.modules[module], ("block",))[0].shape
    if a.encoding == BAT:
        if len(found) != 3 or found[1] != found[2] or not all(found):
            raise InvalidFile(f"{module}: block {found} is not (out / r, r, r), as init_weights=bat wants it")
    elif len(found) != 2 or not all(found):
        raise InvalidFile(f"{module}: block {found} is not (r, out)")
    return found


def rank(a: Adapter, module: str) -> int:
    """Width of a module's shards. Raises InvalidFile."""
    found = shape(a, module)
    return found[-1] if a.encoding == BAT else found[0]


def changes(a: Adapter, request: Request, *, round_bat: bool) -> Iterator[Change]:
    """One change for each module.

    Args:
        round_bat: Does `bat` round what it adds to the dtype of the base before it is added?
    """
    yield from replacements(a)
    for module, params in a.modules.items():
        block = shape(a, module)
        out, into = _logical(a, module, block, request.shapes)
        if a.encoding == BAT:
            yield TransformChange(module=module, params=params, shape=(out, into), transform=partial(_bat, round_bat))
            continue
        yield DenseChange(
            module=module,
            params=params,
            shape=(out, into),
            delta=partial(_delta, out, into),
            factors=partial(_factors, out, into),
        )


def _logical(a: Adapter, module: str, block: Shape, shapes: Shapes | None) -> tuple[int, int]:
    """(out, in) of the module; without a base those of one shard, by which two adapters can still be compared.

    Raises:
        WrongBase: the module of the base cannot be cut into such shards.
    """
    r = rank(a, module)
    known = {STANDARD: block[-1], MINI: None, BAT: block[0] * r}[a.encoding]
    if shapes is None:
        return known or block[-1], r
    found = logical_shape(a, module, shapes, out=known)
    wrong = len(found) != 2 or found[1] < r
    if a.encoding == MINI:
        wrong = wrong or found[0] % block[-1] != 0
    elif a.encoding == BAT:
        wrong = wrong or found[1] % r != 0
    if wrong:
        raise WrongBase(f"{module} is {found} in the base: it cannot be cut into the shards of a block {block}")
    return found[0], found[1]


def _delta(out: int, into: int, m: Maths) -> Array:
    block = m["block"]
    r, columns = block.shape
    return block.T.repeat(out // columns, -(-into // r))[:, :into]


def _factors(out: int, into: int, m: Maths) -> tuple[Array, Array, float]:
    block = m["block"]
    r, columns = block.shape
    unit = m.torch.eye(min(r, columns), dtype=block.dtype, device=block.device)
    if r <= columns:
        return block.T.repeat(out // columns, 1), unit.repeat(1, -(-into // r))[:, :into], 1.0
    return unit.repeat(out // columns, 1), block.T.repeat(1, -(-into // r))[:, :into], 1.0


def _bat(round_bat: bool, m: Maths, w: Array) -> Array:
    block = m["block"]
    r = block.shape[-1]
    # (in / r, out / r, r, r)
    pieces = w.reshape(w.shape[0] // r, r, w.shape[1] // r, r).permute(2, 0, 1, 3)
    delta = (pieces @ block + block).permute(1, 2, 0, 3).reshape(w.shape)
    return w + (m.lift(m.rounded(delta)) if round_bat else delta)


def findings(a: Adapter) -> Iterator[Finding]:
    """What is wrong with the blocks, but for what only one of the methods has."""
    yield from _findings.of_factors(a, lambda module: rank(a, module), 64, pattern=False)


def fold(a: Adapter, request: Request, changed: Iterator[Change]) -> Outcome:
    """Plain LoRA; of `standard` and `mini`.

    Raises:
        WrongBase: the base does not say how wide the modules are.
    """
    if request.shapes is None:
        raise WrongBase(
            f"{a.method} needs the shapes of the base's modules: nothing in the file says how many inputs they have",
            hint="--base BASE; its config.json and safetensors headers are enough, no weights are read",
        )
    dropped = "the shards: training cannot resume from the result, whose A would be trained too"
    return _to_lora.fold(a, request, changed, dropped=dropped)
