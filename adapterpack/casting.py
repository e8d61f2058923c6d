"""Other dtypes for an adapter's parameters: what a cast may touch, and which casts change no value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from adapterpack.adapter import Adapter, Method, Param
from adapterpack.tensor import F32, DType, Tensor, cast, narrowest


def _mapped(method: Method, a: Adapter, change: Callable[[Tensor], Tensor]) -> Adapter:
    """Apply `change` to every float parameter that PEFT loads in any dtype.

    `replaced` and `extra` stay as they are: they are weights of the base, or unknown.
    """

    def over(params: Mapping[str, Param]) -> dict[str, Param]:
        return {
            name: replace(p, tensor=change(p.tensor)) if _free(method, name, p) else p for name, p in params.items()
        }

    new = replace(a, modules={m: over(p) for m, p in a.modules.items()}, shared=over(a.shared))
    same = all(x.tensor is y.tensor for x, y in zip(a.params(), new.params(), strict=True))
    return a if same else replace(new, changed=True)


def _free(method: Method, name: str, p: Param) -> bool:
    return name not in method.keep_dtype and p.tensor.dtype.kind == "float"


def cast_to(method: Method, a: Adapter, dtype: DType) -> Adapter:
    """Every parameter in `dtype`; those that PEFT can load in float32 only stay."""
    return _mapped(method, a, lambda t: cast(t, dtype))


def narrow(method: Method, a: Adapter) -> Adapter:
    """Every parameter in the narrowest dtype that holds all its values: PEFT lifts them to float32 again."""
    return _mapped(method, a, lambda t: cast(t, narrowest(t)))


def same_values(x: Adapter, y: Adapter) -> bool:
    """Do two adapters have the same parameters with the same values, whatever their dtypes?"""
    if (x.method, x.encoding, x.replaced) != (y.method, y.encoding, y.replaced):
        return False
    if x.modules.keys() != y.modules.keys() or x.shared.keys() != y.shared.keys():
        return False
    pairs = [(p, y.modules[m]) for m, p in x.modules.items()] + [(x.shared, y.shared)]
    return all(
        ours.keys() == theirs.keys() and all(_same_values(p.tensor, theirs[n].tensor) for n, p in ours.items())
        for ours, theirs in pairs
    )


def _same_values(x: Tensor, y: Tensor) -> bool:
    if x is y or x.dtype == y.dtype:
        return x is y or x.equals(y)
    if x.shape != y.shape or not x.dtype.kind == y.dtype.kind == "float":
        return False
    wide = x.dtype if x.dtype.bits >= y.dtype.bits else y.dtype
    # Lifted to the wider one both keep their values; BF16 and F16 hold each other's in F32.
    wide = F32 if wide.bits == 16 else wide
    return cast(x, wide).equals(cast(y, wide))
