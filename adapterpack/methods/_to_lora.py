"""Plain LoRA from methods whose change of W has exact low-rank factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adapterpack.adapter import Adapter, Change, Grade, Kind, Outcome, Param, Request
from adapterpack.errors import Unsupported
from adapterpack.methods import lora
from adapterpack.methods._changes import ReplaceChange
from adapterpack.methods._lora_modules import exactly
from adapterpack.tensor import Shape, Tensor

if TYPE_CHECKING:
    from adapterpack.backend import Array, Backend

_CARRIED = (
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "fan_in_fan_out",
    "peft_version",
)
"""Config fields that mean the same in every method."""


def fold(a: Adapter, request: Request, changes: Iterable[Change], *, dropped: str) -> Outcome:
    """The plain LoRA that has the factors of these changes, each scale folded into B, so that alpha = r.

    Args:
        changes: All of the adapter; what is merely replaced stays as it is.
        dropped: What is gone, in words.

    Raises:
        Unsupported: a change has no exact factors.
    """
    xp = request.xp
    factors: dict[str, dict[str, Tensor]] = {}
    for change in changes:
        if isinstance(change, ReplaceChange):
            continue
        found = change.load(xp).low_rank()
        if found is None or change.target != f"{change.module}.weight":
            raise Unsupported(
                f"the change of {change.target} has no exact low-rank form",
                hint="with the weights of the base the nearest one can be had: --base BASE and --rank, --energy or"
                " --max-error",
            )
        b = found.b if found.scale == 1 else found.b * found.scale
        embedding = getattr(change, "layer", Kind.LINEAR) is Kind.EMBEDDING
        factors[change.module] = parameters(xp, b, found.a, change.shape, embedding=embedding)
    return Outcome(from_factors(a, factors), Grade.EQUIVALENT, dropped=(dropped,))


def parameters(xp: Backend, b: Array, a: Array, shape: Shape, *, embedding: bool) -> dict[str, Tensor]:
    """The factors of a module under LoRA's names and in its shapes.

    Args:
        b: (out, r), f32.
        a: (r, in), or (r, in * k...) of a convolution, f32.
        shape: Logical, of the delta weight.
    """
    if embedding:
        return {"lora_embedding_A": xp.tensor(a), "lora_embedding_B": xp.tensor(b)}
    if len(shape) > 2:
        rank = a.shape[0]
        a, b = a.reshape(rank, *shape[1:]), b.reshape(-1, rank, *(1 for _ in shape[2:]))
    return {"lora_A": xp.tensor(a), "lora_B": xp.tensor(b)}


def from_factors(a: Adapter, factors: Mapping[str, Mapping[str, Tensor]]) -> Adapter:
    """A plain LoRA adapter with scale 1 (alpha = r) of every module.

    Args:
        a: The source: its targeting fields, replaced tensors and extra keys are kept.
        factors: Module to parameters under LoRA's names: `lora_A` (r, in) and `lora_B` (out, r); of a convolution
            (r, in, k...) and (out, r, 1...); of an embedding `lora_embedding_A` (r, entries) and
            `lora_embedding_B` (dim, r).
    """
    source = a.config
    config: dict[str, Any] = {"peft_type": lora.peft_type}
    config |= {field: source[field] for field in _CARRIED if field in source}
    if not config.get("target_modules"):
        # Without a list PEFT takes the architecture's default, and each method has its own.
        config["target_modules"] = sorted(factors)
    ranks = {m: next(t.shape[0] for n, t in pair.items() if n.endswith("_A")) for m, pair in factors.items()}
    # The largest, for readers that know no patterns.
    most = max(ranks.values())
    others = {exactly(module): rank for module, rank in ranks.items() if rank != most}
    bias = source.get("bias", "none")
    config |= {
        # Each method has its own word for "of adapted layers only": vera_only.
        "bias": "lora_only" if str(bias).endswith("_only") else bias,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }
    return Adapter(
        method="lora",
        encoding="lora",
        config=config,
        modules={
            module: {name: Param(lora.keys.key(module, name), tensor) for name, tensor in pair.items()}
            for module, pair in factors.items()
        },
        shared={},
        replaced=a.replaced,
        extra=a.extra,
        source=a.source,
        metadata={k: v for k, v in a.metadata.items() if k != "adapterpack"},
        changed=True,
    )
