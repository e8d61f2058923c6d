"""What the values of an adapter's tensors tell: NaN, zeros, 16 bits in 32, and one tensor stored many times.

Each tensor is read once, a few MiB at a time.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapterpack.adapter import Adapter, Finding, Progress
from adapterpack.checkpoint import Checkpoint
from adapterpack.tensor import F32, Tensor, chunks, numpy_dtype

_BEGINS_AT_ZERO = (
    *("lora_B", "lora_embedding_A", "vera_lambda_b", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_b"),
    *("hira_B", "hira_embedding_A", "delora_B", "fourierft_spectrum", "waveft_spectrum", "shira_weight"),
    *("randlora_lambda", "gralora_B", "lily_B", "miss_block", "beft_bias", "poly_lora_B", "c3a_kernel"),
)
"""Parameters whose zeros mean that the module changes nothing, in whatever method (`reset_*_parameters` in PEFT)."""
_SHOWN = 3
_LEAST_BYTES = 4096
"""Of a tensor whose copies are worth a word."""
_PROJECTIONS = ("vera_A", "vera_B", "pvera_A", "pvera_B")


@dataclass(frozen=True)
class Seen:
    """What a tensor's values are like.

    Attributes:
        nan, infinite: How many.
        zero: Are all of them 0, and are there any?
        narrow: Do BF16 values hold all of an F32 tensor?
        digest: SHA-256 of its bytes.
    """

    nan: int
    infinite: int
    zero: bool
    narrow: bool
    digest: str


class Scans:
    """The values of tensors, each looked at once however often it is asked for.

    Args:
        progress: Told of the bytes read.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        # With the tensor itself, so that its id is not another's later.
        self._seen: dict[int, tuple[Tensor, Seen]] = {}

    def of(self, c: Checkpoint) -> dict[str, Seen]:
        """Key to what its values are like."""
        total, done, found = sum(t.nbytes for t in c.tensors.values()), 0, {}
        for key, tensor in c.tensors.items():
            if id(tensor) not in self._seen:
                self._seen[id(tensor)] = tensor, _look(tensor)
            found[key] = self._seen[id(tensor)][1]
            done += tensor.nbytes
            if self._progress:
                self._progress("values", done, total)
        return found


def _look(tensor: Tensor) -> Seen:
    import numpy as np

    floats = tensor.dtype.kind == "float" and tensor.dtype.numpy is not None
    nan = infinite = 0
    zero, narrow = tensor.numel > 0, tensor.dtype is F32 and tensor.numel > 0
    h = hashlib.sha256()
    for chunk in chunks(tensor.source):
        h.update(chunk)
        if not floats:
            zero = zero and not any(chunk)
            continue
        values = np.frombuffer(chunk, dtype=numpy_dtype(tensor.dtype))
        # A BF16 number is a F32 one whose last 16 bits are 0.
        narrow = narrow and not (values.view(np.uint32) & 0xFFFF).any()
        if tensor.dtype.bits < 32:
            values = values.astype(np.float32)
        zero = zero and not values.any()
        if not np.isfinite(values).all():
            nan += int(np.isnan(values).sum())
            infinite += int(np.isinf(values).sum())
    return Seen(nan, infinite, zero, narrow, h.hexdigest())


def value_findings(c: Checkpoint, seen: Mapping[str, Seen]) -> Iterator[Finding]:
    """What is wrong with the values, whatever the method."""
    again = "train or save it again"
    for key, s in seen.items():
        numel = c.tensors[key].numel
        if s.nan:
            yield Finding("nan", key, f"{s.nan:,} of {numel:,} values are NaN", again)
        if s.infinite:
            yield Finding("infinite", key, f"{s.infinite:,} of {numel:,} values are infinite", again)
    yield from _untrained(c, seen)
    yield from _copies(c, seen)
    yield from _narrow(c, seen)


def _untrained(c: Checkpoint, seen: Mapping[str, Seen]) -> Iterator[Finding]:
    start = [k for k in c.tensors if c.tensors[k].numel and _begins_at_zero(k)]
    zero = [k for k in start if seen[k].zero]
    fix = "was it trained, and saved after training?"
    if zero and len(zero) == len(start):
        yield Finding(
            "untrained",
            zero[0],
            f"all {len(zero)} parameters that begin at zero are zero: the adapter changes nothing",
            f"{fix} with ZeRO-3 or FSDP, gather the parameters first",
        )
    for key in zero:
        yield Finding("all-zero", key, "it is all zero: its module changes nothing", fix)


def _begins_at_zero(key: str) -> bool:
    parts = [p for p in key.split(".") if p not in ("weight", "default")]
    return parts[-1] in _BEGINS_AT_ZERO or (len(parts) > 1 and parts[-1].isdecimal() and parts[-2] in _BEGINS_AT_ZERO)


def _copies(c: Checkpoint, seen: Mapping[str, Seen]) -> Iterator[Finding]:
    """One tensor under several keys: RandLoRA's bases, tied heads."""
    alike: defaultdict[tuple[str, str, tuple[int, ...]], list[str]] = defaultdict(list)
    for key, t in c.tensors.items():
        if t.nbytes >= _LEAST_BYTES and not seen[key].zero:
            alike[seen[key].digest, t.dtype.name, t.shape].append(key)
    copies = {keys[0]: keys[1:] for keys in alike.values() if len(keys) > 1}
    if copies:
        wasted = sum(c.tensors[k].nbytes for keys in copies.values() for k in keys)
        n = sum(map(len, copies.values()))
        yield Finding(
            "duplicated-tensors",
            next(iter(copies)),
            f"{n} tensors are copies of others in the file, {wasted:,} bytes of"
            f" {sum(t.nbytes for t in c.tensors.values()):,}: {', '.join(next(iter(copies.values()))[:_SHOWN])}",
            "adapterpack compress SRC DST.apack stores each once",
            warning=True,
        )


def _narrow(c: Checkpoint, seen: Mapping[str, Seen]) -> Iterator[Finding]:
    floats = [k for k, t in c.tensors.items() if t.dtype.kind == "float" and t.numel]
    projections = [k for k in floats if _name(k) in _PROJECTIONS and seen[k].narrow]
    if projections:
        yield Finding(
            "rounded-projections",
            projections[0],
            "the projections are BF16 values in F32: they were drawn for a BF16 base, and a F32 base redraws others,"
            " which moves the change of W by about 2e-3",
            "keep them in the file, or convert --to seed, which records the dtype",
            warning=True,
        )
    wide = [k for k in floats if c.tensors[k].dtype is F32]
    if wide and all(seen[k].narrow for k in wide) and not all(seen[k].zero for k in wide):
        n = sum(c.tensors[k].nbytes for k in wide) // 2
        yield Finding(
            "wide-dtype",
            wide[0],
            f"all F32 values are BF16 ones: {n:,} bytes are zeros",
            "adapterpack compress SRC DST narrows what that holds exactly",
            warning=True,
        )


def _name(key: str) -> str:
    return [p for p in key.split(".") if p not in ("weight", "default")][-1]


# -- from headers -----------------------------------------------------------------------------------------


def shape_findings(c: Checkpoint) -> Iterator[Finding]:
    """What the header alone tells of the tensors."""
    if not c.tensors:
        yield Finding("empty", c.name, "it holds no tensors at all", "save the adapter again")
    for key, t in c.tensors.items():
        # VB-LoRA's top-1 has no weights to store: the last one is 1 - sum. AdaLoRA prunes modules to nothing.
        meant = c.peft_type == "ADALORA" or (key.endswith("_topk_weights") and t.shape[-1:] == (0,))
        if not t.numel and not meant:
            yield Finding(
                "zero-size",
                key,
                f"its shape is {t.shape}: it holds no value",
                "with DeepSpeed ZeRO-3, gather the parameters before saving",
            )


def dtype_findings(a: Adapter) -> Iterator[Finding]:
    """Trained parameters of several dtypes: which one PEFT computes in depends on the base and on a flag."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for params in (*a.modules.values(), a.shared):
        for p in params.values():
            if p.tensor.dtype.kind == "float":
                found[p.tensor.dtype.name].append(p.key)
    if len(found) > 1:
        few = min(found.values(), key=len)
        counts = ", ".join(f"{len(keys)} {name}" for name, keys in found.items())
        yield Finding(
            "mixed-dtypes",
            few[0],
            f"the parameters have several dtypes ({counts}): PEFT lifts them to float32 unless"
            " autocast_adapter_dtype is off, other engines cast them to the base's",
            "adapterpack convert --dtype makes them one, and says what that costs",
            warning=True,
        )
