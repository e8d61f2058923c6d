"""What can be mended without a loss: one function for each fault that has one right repair.

What a repair may touch: the config, the names of tensors, and values that PEFT cannot load as they are. What counted
when PEFT loaded the file still counts; where PEFT failed, or dropped tensors, the result computes what was trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterpack.adapter import Adapter, Finding, Method, Param, Request
from adapterpack.backend import Backend
from adapterpack.base import Base
from adapterpack.checkpoint import Checkpoint
from adapterpack.errors import AdapterpackError
from adapterpack.health import configs, fields, naming, scope
from adapterpack.methods import vblora
from adapterpack.methods._keys import PREFIX, render
from adapterpack.methods._lora_modules import exactly, first_match, pattern_field
from adapterpack.recipes import METADATA_KEY
from adapterpack.tensor import Tensor

_PATTERNS = ("alpha_pattern", "rank_pattern")


@dataclass(frozen=True)
class Patient:
    """A checkpoint that is being mended, and what is known of it.

    Attributes:
        method, adapter: None while its keys cannot be read.
        model: The base, bound to the adapter's names; None without one.
        base_name: The base on the Hub that the user named.
        xp: Where maths runs, made when it is first wanted.
    """

    checkpoint: Checkpoint
    method: Method | None
    adapter: Adapter | None
    model: Base | None
    base_name: str | None
    xp: Callable[[], Backend]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config


Mended = tuple[Checkpoint, str] | None
"""The checkpoint without the fault and what was done, in words; None: there is no one right repair."""


def mend(patient: Patient, finding: Finding) -> Mended:
    """Mend one fault; None where it cannot be."""
    mender = MENDERS.get(finding.code)
    try:
        return None if mender is None else mender(patient, finding)
    except AdapterpackError:
        # Another fault stands before it; it is tried again once that one is gone.
        return None


def _edited(
    c: Checkpoint,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Other fields, or other tensors; a field that is given as `...` goes."""
    if config is not None:
        merged = {**c.config, **config}
        c = replace(c, config={k: v for k, v in merged.items() if v is not ...}, config_bytes=None)
    if tensors is not None:
        c = replace(c, tensors=tensors, weights=None, weights_sha256=None)
    return c


def _said(before: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """`r: 5 -> 2`, field by field."""
    parts = []
    for name, value in new.items():
        old = f"{before[name]!r:.60}" if name in before else "nothing"
        parts.append(f"{name}: {old} -> {'nothing' if value is ... else f'{value!r:.120}'}")
    return "; ".join(parts)


def _config(p: Patient, new: Mapping[str, Any], why: str) -> Mended:
    return _edited(p.checkpoint, new), f"{_said(p.config, new)} ({why})"


# -- keys ---------------------------------------------------------------------------------------------------


def _respell(p: Patient, finding: Finding) -> Mended:
    if p.method is None:
        return None
    found = (r for r in naming.respellings(p.method.keys, p.checkpoint) if r.code == finding.code and r.clear)
    first = next(found, None)
    return None if first is None else _renamed(p.checkpoint, first.keys)


def _renamed(c: Checkpoint, moved: Mapping[str, str]) -> Mended:
    tensors = {moved.get(key, key): tensor for key, tensor in c.tensors.items()}
    if len(tensors) != len(c.tensors):
        return None
    old, new = next(iter(moved.items()))
    return _edited(c, tensors=tensors), f"{len(moved):,} keys renamed, {old} -> {new}"


def _drop_twin(p: Patient, finding: Finding) -> Mended:
    if p.method is None:
        return None
    c, other = p.checkpoint, naming.twins(p.method.keys, p.checkpoint).get(finding.key)
    if other is None or not c.tensors[finding.key].equals(c.tensors[other]):
        return None
    kept = {key: tensor for key, tensor in c.tensors.items() if key != finding.key}
    return _edited(c, tensors=kept), f"left out: {other} has the same bytes"


def _rename_modules(p: Patient, finding: Finding) -> Mended:
    """Keys as transformers 5 names the base's modules; patterns pinned, for their words may be the old names."""
    if p.model is None or p.adapter is None:
        return None
    moved: dict[str, str] = {}
    other = {**naming.renamed_modules(p.adapter, p.model), **naming.old_names(p.adapter, p.model)}
    for old, new in other.items():
        before, after = (f"{PREFIX}{name.rpartition('.')[0]}." for name in (old, new))
        moved |= {k: after + k.removeprefix(before) for k in p.checkpoint.tensors if k.startswith(before)}
    if not moved:
        return None
    names = {m: _module_of(params, moved, m) for m, params in p.adapter.modules.items()}
    pinned: dict[str, Any] = {f: _pinned(p, f, names) for f in _PATTERNS if p.config.get(f)}
    # The same words may mean modules of another tower, too.
    pinned["target_modules"] = sorted(n for m, n in names.items() if m not in p.adapter.parameters)
    renamed = _renamed(_edited(p.checkpoint, pinned), moved)
    return None if renamed is None else (renamed[0], f"{renamed[1]}; {' and '.join(pinned)} name each module in full")


def _module_of(params: Mapping[str, Param], moved: Mapping[str, str], module: str) -> str:
    """The new path of a module, from the new key of one of its parameters."""
    key = next(iter(params.values())).key
    tail = key.removeprefix(f"{PREFIX}{module}")
    return moved.get(key, key).removeprefix(PREFIX).removesuffix(tail)


# -- config -------------------------------------------------------------------------------------------------


def _fill_null(p: Patient, finding: Finding) -> Mended:
    known = fields.known(p.checkpoint.peft_type)
    if known is None or finding.key not in configs.nulls(p.config, known):
        return None
    value = configs.filled(finding.key, known[finding.key])
    if value is None:
        value = _from_tensors(p, finding.key)
    return None if value is None else _config(p, {finding.key: value}, "PEFT cannot load null")


def _from_tensors(p: Patient, field: str) -> int | None:
    if p.adapter is None or p.method is None:
        return None
    if field == "r":
        said = {**p.config, "r": p.config.get("r") or 1}
        ranks = Counter(p.method.ranks(replace(p.adapter, config=said)).values())
        return ranks.most_common(1)[0][0] if ranks else None
    bank = p.adapter.shared.get(vblora.BANK)
    if bank is not None and field in ("num_vectors", "vector_length") and len(bank.tensor.shape) == 2:
        return bank.tensor.shape[field == "vector_length"]
    if field == "topk" and p.adapter.encoding == vblora.TOPK:
        found = {q.tensor.shape[-1] for m in p.adapter.modules.values() for n, q in m.items() if "indices" in n}
        return found.pop() if len(found) == 1 else None
    return None


def _alpha(p: Patient, finding: Finding) -> Mended:
    """The alpha of the metadata where PEFT fails; PEFT's default written out where that is what it took."""
    recorded = configs.metadata_alpha(p.checkpoint)
    if finding.key in p.config:
        if recorded is None:
            return None
        value: float = int(recorded) if recorded.is_integer() else recorded
        return _config(p, {finding.key: value}, "as the metadata of the tensor file says; PEFT fails on null")
    known = fields.known(p.checkpoint.peft_type)
    if recorded is not None or known is None:
        return None
    return _config(p, {finding.key: known[finding.key]}, "PEFT's default, which counted; now it is said")


def _ranks(p: Patient, finding: Finding) -> Mended:
    """r and rank_pattern as the tensors have it: scales do not change, for PEFT takes the tensors' rank or fails."""
    known = fields.known(p.checkpoint.peft_type)
    if p.adapter is None or p.method is None or known is None or "r" not in known:
        return None
    ranks = p.method.ranks(p.adapter)
    values = Counter(ranks.values())
    if not values:
        return None
    new: dict[str, Any] = {"r": values.most_common(1)[0][0]}
    if len(values) > 1 or p.config.get("rank_pattern"):
        if "rank_pattern" not in known:
            return None
        new["rank_pattern"] = {exactly(m): rank for m, rank in sorted(ranks.items()) if rank != new["r"]}
    return _config(p, new, "as the tensors have it")


def _bank(p: Patient, finding: Finding) -> Mended:
    value = _from_tensors(p, finding.key)
    return None if value is None else _config(p, {finding.key: value}, "as the vector bank has it")


def _patterns(p: Patient, finding: Finding) -> Mended:
    """Patterns of which one alone matches each module, with the value that counted."""
    if p.adapter is None or p.method is None:
        return None
    clash = [f for f in _PATTERNS if _overlapping(p.config, p.adapter, f)]
    if not clash:
        return None
    names = {m: m for m in p.adapter.modules}
    new = {field: _pinned(p, field, names) for field in clash}
    return _config(p, new, "one pattern for each module; what counted when PEFT loaded the file, still counts")


def _overlapping(config: Mapping[str, Any], a: Adapter, field: str) -> bool:
    patterns, values = pattern_field(config, field)
    return any(len({str(values[p.text]) for p in patterns if p.matches(m)}) > 1 for m in a.modules)


def _pinned(p: Patient, field: str, names: Mapping[str, str]) -> dict[str, Any]:
    """A pattern for each module whose value is not the default, under its name of today."""
    assert p.adapter is not None and p.method is not None
    if field == "rank_pattern":
        r = p.config.get("r")
        return {exactly(names.get(m, m)): v for m, v in sorted(p.method.ranks(p.adapter).items()) if v != r}
    patterns, values = pattern_field(p.config, field)
    found = {m: first_match(patterns, values, m) for m in sorted(p.adapter.modules)}
    return {exactly(names[m]): v for m, v in found.items() if v is not None}


def _targets(p: Patient, finding: Finding) -> Mended:
    if p.adapter is None:
        return None
    modules = sorted(m for m in p.adapter.modules if m not in p.adapter.parameters)
    new: dict[str, Any] = {"target_modules": modules}
    if p.config.get("exclude_modules"):
        new["exclude_modules"] = None
    made = _edited(p.checkpoint, new)
    # Names in full leave nothing to layers_to_transform.
    if scope.untargeted(replace(p.adapter, config=made.config)):
        return None
    return made, f"target_modules names the {len(modules)} modules that have tensors, in full"


# -- switches -------------------------------------------------------------------------------------------------


def _switch(p: Patient, finding: Finding) -> Mended:
    found = configs.switches(p.checkpoint).get(finding.key)
    return None if found is None else _config(p, {finding.key: found[0]}, "as the tensors have it")


def _topk(p: Patient, finding: Finding) -> Mended:
    """VB-LoRA's own conversion of top-k to itself: float32, no negative last weight, the flag."""
    if p.adapter is None or p.method is None:
        return None
    if p.adapter.encoding != vblora.TOPK:
        return _config(p, {"save_only_topk_weights": False}, "as the tensors have it")
    if finding.code == "wrong-topk-flag":
        return _config(p, {"save_only_topk_weights": True}, "as the tensors have it")
    return _through(p, vblora.TOPK)


def _projection(p: Patient, finding: Finding) -> Mended:
    if p.adapter is None:
        return None
    if p.adapter.encoding == "projection":
        return _config(p, {"save_projection": True}, "the file has them; PEFT ignored them and drew others")
    if METADATA_KEY not in p.checkpoint.metadata:
        # Only with a digest is it certain that they are the ones of the training.
        return None
    return _through(p, "projection")


def _through(p: Patient, to: str) -> Mended:
    """By a conversion of the method's own."""
    assert p.adapter is not None and p.method is not None
    edge = next((e for e in p.method.edges.get(p.adapter.encoding, ()) if e.to == to), None)
    if edge is None:
        return None
    outcome = edge.run(p.adapter, Request(p.xp(), p.model))
    made = render(outcome.adapter)
    c = replace(
        p.checkpoint,
        config=made.config,
        config_bytes=made.config_bytes,
        tensors=made.tensors,
        metadata=made.metadata,
        weights=None,
        weights_sha256=None,
    )
    return c, "; ".join(outcome.notes) or f"written anew as {to}"


# -- around it --------------------------------------------------------------------------------------------


def _reference(p: Patient, finding: Finding) -> Mended:
    if p.base_name is None:
        return None
    return _config(p, {"base_model_name_or_path": p.base_name}, "the base that was named")


def _rewrite(p: Patient, finding: Finding) -> Mended:
    metadata = {"format": "pt", **p.checkpoint.metadata}
    if finding.code == "no-format":
        metadata["format"] = "pt"
    c = replace(p.checkpoint, metadata=metadata, weights=None, weights_sha256=None)
    return c, "a safetensors file that says so"


MENDERS: Mapping[str, Callable[[Patient, Finding], Mended]] = {
    "wrapper-in-key": _respell,
    "doubled-prefix": _respell,
    "missing-prefix": _respell,
    "adapter-name-in-key": _respell,
    "duplicate-key": _drop_twin,
    "renamed-modules": _rename_modules,
    "old-names": _rename_modules,
    "null-field": _fill_null,
    "alpha-missing": _alpha,
    "rank-mismatch": _ranks,
    "bank-mismatch": _bank,
    "overlapping-patterns": _patterns,
    "no-targets": _targets,
    "not-targeted": _targets,
    "wrong-flag": _switch,
    "wrong-topk-flag": _topk,
    "narrow-topk-weights": _topk,
    "negative-topk-weight": _topk,
    "wrong-projection-flag": _projection,
    "base-reference": _reference,
    "no-format": _rewrite,
    "pickle": _rewrite,
}
"""Code of a finding to its repair. Keys come first: nothing else can be read before."""
