"""Every configuration of PEFT's own test matrix: packed and unpacked byte for byte, and merged as PEFT merges it.

The table is matrix/cases.py. A method's rows: `pytest tests/test_matrix.py -k lokr`; those of LoRA without its
namesakes: `-k "[lora-"`; one row: `-k lokr-8-`. While a method is not in `methods.METHODS`, its rows are expected to
fail to merge; adding it there is all that its author does here, save for these lists:

- `LOOSE`: methods whose merge cannot be PEFT's to the last bit, with the reason;
- `FAILING`, `UNCHECKED`: rows of methods that are read, where we are still wrong. A row that passes must leave them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import oracle
import pytest
import torch
from matrix import models
from matrix.cases import CASES, Case
from peft import PeftModel, get_peft_model

import adapterpack
from adapterpack.errors import AdapterpackError, Unsupported
from adapterpack.methods import METHODS, UNMERGED

LOOSE: Mapping[str, str] = {}
"""`peft_type` to why its merge is held to `CLOSE`, not to PEFT's bits."""
CLOSE = 1e-5
"""Error of a loose method's change of one tensor, relative to it (Frobenius norms), beside one rounding to f32."""

FAILING: Mapping[str, str] = {}
"""Rows of methods that are read, but not merged as PEFT merges them: name to the reason."""
UNCHECKED: Mapping[str, str] = {}
"""Rows that `check` cannot hold against their base, though PEFT can run them."""

VARIANTS = {
    "kasa_config": "kasa",
    "use_bdlora": "bdlora",
    "monteclora_config": "monteclora",
    "velora_config": "velora",
}
"""Field of LoRA's config to what `inspect` calls the method that it turns on."""
_TRAINED = re.compile(r"\.lora_velora_embed\.|\.lora_monteclora_sampler\.")
"""Buffers that training moves and that are saved."""
_WRAPPED = re.compile(r"\.modules_to_save\.default\.")
_TYPES = {case.peft_type for case in CASES}


class Matrix:
    """Bases, adapters and PEFT's merges, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Made] = {}
        self._bases: dict[str, Path] = {}

    def base(self, kind: str) -> Path:
        if kind not in self._bases:
            self._bases[kind] = models.save_base(models.tiny(kind), self._root / "bases" / kind)
        return self._bases[kind]

    def make(self, case: Case) -> Made:
        if case.name not in self._made:
            self._made[case.name] = Made(case, self._root / "adapters" / case.name, self.base(case.kind))
        return self._made[case.name]


class Made:
    """An adapter that PEFT made, its base, and what PEFT makes of the two."""

    def __init__(self, case: Case, adapter: Path, base: Path) -> None:
        self.case, self.adapter, self.base = case, adapter, base
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = get_peft_model(models.tiny(case.kind), case.config())
        oracle.perturb(model, scale=0.2)
        _move_buffers(model)
        model.eval()
        model.save_pretrained(adapter)

    @property
    def original(self) -> dict[str, torch.Tensor]:
        return dict(models.tiny(self.case.kind).state_dict())

    def load(self) -> PeftModel:
        """The adapter on a fresh base, as PeftModel.from_pretrained loads it; nothing may be missing or left over."""
        model, result = oracle.peft_load(models.tiny(self.case.kind), self.adapter)
        assert result.clean, (result.missing, result.unexpected)
        return model

    @cached_property
    def merged(self) -> dict[str, torch.Tensor]:
        """PEFT's merge, in the base's names."""
        merged = self.load().merge_and_unload().state_dict()
        # LN tuning leaves saved modules in their wrappers.
        wrapped = {_WRAPPED.sub(".", name): t for name, t in merged.items() if _WRAPPED.search(name)}
        return {name: wrapped.get(name, merged.get(name)) for name in self.original}


def _move_buffers(model: PeftModel) -> None:
    g = torch.Generator().manual_seed(11)
    for name, buffer in model.named_buffers():
        if _TRAINED.search(name):
            buffer.add_(torch.randn(buffer.shape, generator=g) * 0.2)


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


def _param(case: Case, failing: Mapping[str, str]) -> object:
    """The case as a parameter, with what is known of its failing: no other fault may hide behind that."""
    marks = []
    if failing is FAILING and case.peft_type not in METHODS | UNMERGED:
        # A refusal it is, if only of the method as a whole, where one is asked for.
        raised = AssertionError if case.refused else Unsupported
        marks = [pytest.mark.xfail(reason=f"{case.peft_type} is not in methods.METHODS", raises=raised)]
    elif case.name in failing:
        marks = [pytest.mark.xfail(reason=failing[case.name], raises=(AdapterpackError, AssertionError))]
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [_param(case, {}) for case in CASES])
def test_files_come_back(case: Case, matrix: Matrix, tmp_path: Path) -> None:
    made = matrix.make(case)
    adapterpack.compress(made.adapter, tmp_path / "a.apack")
    adapterpack.unpack(tmp_path / "a.apack", tmp_path / "back")
    assert oracle.tree_hash(tmp_path / "back") == oracle.tree_hash(made.adapter)


@pytest.mark.parametrize("case", [_param(case, UNCHECKED) for case in CASES])
def test_inspect_knows_it_and_check_finds_it_healthy(case: Case, matrix: Matrix) -> None:
    made = matrix.make(case)
    name = next((v for field, v in VARIANTS.items() if case.fields.get(field)), case.peft_type.lower())
    assert adapterpack.inspect(made.adapter).method == name
    for base in (None, made.base):
        health = adapterpack.check(made.adapter, base=base)
        assert health.healthy, health.findings


@pytest.mark.parametrize("case", [_param(case, FAILING) for case in CASES if not case.refused])
def test_merges_as_peft_does(case: Case, matrix: Matrix, files, tmp_path: Path) -> None:
    made = matrix.make(case)
    expected, original = made.merged, made.original
    changed = {name for name in original if not files.same(expected[name], original[name])}
    assert changed, "PEFT changes nothing: the row proves nothing"
    adapterpack.merge(made.adapter, made.base, tmp_path / "merged", verify="full")
    merged = files.tensors(tmp_path / "merged")
    assert merged.keys() == original.keys()
    wrong = {name for name in merged if not files.same(merged[name], expected[name])}
    if case.peft_type in LOOSE:
        assert wrong <= changed, "tensors that PEFT leaves alone"
        wrong = {name for name in wrong if not _close(merged[name], expected[name], original[name])}
    assert not wrong, {name: _error(merged[name], expected[name], original[name]) for name in wrong}


@pytest.mark.parametrize("case", [_param(case, FAILING) for case in CASES if case.refused])
def test_refuses_what_peft_cannot_merge(case: Case, matrix: Matrix, tmp_path: Path) -> None:
    made = matrix.make(case)
    model = made.load()
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()
    with pytest.raises(AdapterpackError) as caught:
        adapterpack.merge(made.adapter, made.base, tmp_path / "merged")
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())
    assert re.search(case.refused, caught.value.message, re.IGNORECASE), caught.value.message


def _norm(t: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(t.double()))


def _error(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> str:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {tuple(ours.shape)}, not {theirs.dtype} {tuple(theirs.shape)}"
    return f"{_norm(ours.double() - theirs.double()) / _norm(theirs.double() - base.double()):.1e} of the change"


def _close(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    rounding = torch.finfo(ours.dtype).eps / 2 * _norm(theirs)
    return _norm(ours.double() - theirs.double()) <= CLOSE * _norm(theirs.double() - base.double()) + rounding


# -- the table and the lists -----------------------------------------------------------------------------


def test_the_table_is_whole() -> None:
    assert len(CASES) == len({(case.kind, case.config_class, repr(case.fields)) for case in CASES}) == 319
    assert sum(not case.refused for case in CASES) == 310
    assert len(_TYPES) == 35


def test_the_lists_name_what_is_there() -> None:
    assert LOOSE.keys() <= _TYPES
    assert FAILING.keys() | UNCHECKED.keys() <= {case.name for case in CASES if case.peft_type in METHODS}


def test_every_method_is_read() -> None:
    assert not _TYPES - METHODS.keys() - UNMERGED.keys()


def test_loose_still_means_close() -> None:
    base = models.tiny("MLP").lin0.weight.detach()
    theirs = base + 0.05 * torch.randn(base.shape, generator=torch.Generator().manual_seed(1))
    change = theirs.double() - base.double()
    assert _close(theirs, theirs, base)
    assert _close((base.double() + change * (1 + CLOSE / 2)).float(), theirs, base)
    assert not _close((base.double() + change * (1 + CLOSE * 2)).float(), theirs, base)
    assert not _close(theirs.half(), theirs, base)
