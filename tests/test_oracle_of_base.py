"""Methods that take the base's weights to know what their parameters mean: the merges are PEFT's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
from bitexact import assert_merges_like_peft
from peft import AdamssConfig, DeftConfig, FrodConfig, GloraConfig, OSFConfig, PeanutConfig, PsoftConfig

from adapterpack.methods import peanut

_KUD = ["k_proj", "up_proj", "down_proj"]
_BERT = ["query", "intermediate.dense"]


def _with(cls: Any, **common: Any) -> Any:
    return lambda **fields: lambda: cls(**{**common, **fields})


_psoft = _with(PsoftConfig, r=6, psoft_alpha=9, target_modules=_KUD)
PSOFT = (
    cases.Case("psoft-llama", _psoft()),
    cases.Case("psoft-bert", _psoft(target_modules=_BERT, ab_svd_init="pissa_init"), "bert"),
    cases.Case("psoft-opt", _psoft(target_modules=["q_proj", "fc1", "project_in"], psoft_mag_a=False), "opt"),
    cases.Case("psoft-free", _psoft(psoft_orth=False, psoft_mag_b=False)),
    cases.Case("psoft-lowrank", _psoft(psoft_svd="lowrank", random_seed=11, psoft_svd_lowrank_niter=3)),
    *(
        cases.Case(f"psoft-neumann-{t}", _psoft(use_cayley_neumann=True, num_cayley_neumann_terms=t))
        for t in (1, 2, 3, 5)
    ),
    cases.Case(
        "psoft-neumann-eps",
        _psoft(use_cayley_neumann=True, num_cayley_neumann_terms=6, cayley_neumann_eps=0.5, modules_to_save=["norm"]),
    ),
    cases.Case("psoft-rank-1", _psoft(r=1)),
)
_deft = _with(DeftConfig, r=5, target_modules=_KUD)
DEFT = (
    cases.Case("deft-relu", _deft()),
    cases.Case("deft-qr", _deft(decomposition_method="qr", alpha=7)),
    cases.Case("deft-para", _deft(decomposition_method="qr", para=True)),
    cases.Case("deft-para-relu", _deft(para=True)),
    cases.Case("deft-gpt2", _deft(target_modules=["c_attn", "c_proj"], alpha=3), "gpt2"),
    cases.Case("deft-bert-bias", _deft(target_modules=_BERT, bias="deft_only"), "bert"),
    cases.Case("deft-wide", _deft(r=500)),
)
_osf = _with(OSFConfig, effective_rank=20, target_modules=_KUD)
OSF = (
    cases.Case("osf-llama", _osf()),
    cases.Case("osf-half", _osf(effective_rank=None, target_modules=_BERT), "bert"),
    cases.Case("osf-patterns", _osf(effective_rank=0.75, rank_pattern={"k_proj": 5, r"layers\\.1": 0.9})),
    cases.Case("osf-opt", _osf(target_modules=["project_in", "fc1", "fc2"], modules_to_save=["lm_head"]), "opt"),
)
_peanut = _with(PeanutConfig, r=6, target_modules=_KUD)
PEANUT = (
    cases.Case("peanut-llama", _peanut(scaling=0.7)),
    cases.Case("peanut-deep", _peanut(depth=3, act_fn="gelu")),
    cases.Case("peanut-bert", _peanut(depth=1, act_fn="tanh", target_modules=_BERT), "bert"),
)
ACTIVATIONS = tuple(
    cases.Case(f"peanut-{act}", _peanut(depth=1, act_fn=act, target_modules=["k_proj"]))
    for act in sorted(peanut._ACTIVATIONS)
)
_FORMS = ("config_A_B", "config_C", "config_D_E")
_glora = _with(GloraConfig, r=5, target_modules=_KUD)
GLORA = (
    cases.Case("glora-llama", _glora()),
    cases.Case("glora-bert", _glora(target_modules=_BERT), "bert"),
    cases.Case("glora-bert-bias", _glora(bias="all", target_modules=_BERT), "bert"),
    cases.Case(
        "glora-none", _glora(config_A_B="none", config_C="vector", config_D_E="none", target_modules=_BERT), "bert"
    ),
    *(
        cases.Case(
            f"glora-{ab}-{c}-{de}", _glora(config_A_B=ab, config_C=c, config_D_E=de, target_modules=["fc1"]), "opt"
        )
        for ab, c, de in (("vector", "none", "vector"), ("constant", "vector", "constant"), ("lora", "none", "none"))
    ),
)
_frod = _with(FrodConfig, target_modules=_KUD, progressbar=False)
FROD = tuple(
    case
    for save in (True, False)
    for word in ("projection" if save else "seed",)
    for case in (
        cases.Case(f"frod-{word}-llama", _frod(save_projection=save)),
        cases.Case(f"frod-{word}-gpt2", _frod(save_projection=save, target_modules=["c_attn", "c_proj"]), "gpt2"),
        cases.Case(
            f"frod-{word}-bert",
            _frod(
                save_projection=save,
                target_modules=["key", "attention.output.dense", "output.dense", "pooler.dense"],
                projection_prng_key=9,
                sparse_rate=0.1,
                bias="frod_only",
            ),
            "bert",
        ),
        # One layer, of fewer rows than columns: V lies transposed.
        cases.Case(
            f"frod-{word}-wide",
            _frod(save_projection=save, target_modules=["k_proj", "down_proj"]),
            over={"num_hidden_layers": 1},
        ),
        # Both halves of the model have layers of one number and kind.
        cases.Case(f"frod-{word}-opt", _frod(save_projection=save, target_modules=["project_in", "fc2"]), "opt"),
        cases.Case(f"frod-{word}-whisper", _frod(save_projection=save, target_modules=["q_proj", "fc1"]), "whisper"),
    )
)
_adamss = _with(AdamssConfig, r=8, num_subspaces=3, subspace_rank=2, target_modules=_KUD)
ADAMSS = (
    cases.Case("adamss-llama", _adamss()),
    cases.Case("adamss-bert", _adamss(target_modules=_BERT, random_seed=5), "bert"),
    cases.Case("adamss-whole", _adamss(r=500, num_subspaces=4, use_dynamic_rank=True, target_modules=_BERT), "bert"),
    cases.Case("adamss-asa", _adamss(use_asa=True, target_modules=["fc1"], modules_to_save=["lm_head"]), "opt"),
)
# The base's own weights are saved with the adapter of a head.
_HEAD = ["lm_head", "q_proj"]
HEADS = (
    cases.Case("adamss-head", _adamss(target_modules=_HEAD)),
    cases.Case("deft-head", _deft(target_modules=_HEAD)),
    cases.Case("frod-head", _frod(target_modules=_HEAD)),
    cases.Case("glora-head", _glora(target_modules=_HEAD)),
    cases.Case("osf-head", _osf(target_modules=_HEAD)),
    cases.Case("peanut-head", _peanut(target_modules=_HEAD)),
    cases.Case("psoft-head", _psoft(target_modules=_HEAD)),
)
# Files in the dtype of the base.
NARROW = tuple(
    cases.Case(f"{name}-narrow", make(), autocast=False)
    for name, make in (
        ("adamss", _adamss),
        ("deft", _deft),
        ("frod", _frod),
        ("glora", _glora),
        ("osf", _osf),
        ("peanut", _peanut),
        ("psoft", _psoft),
    )
)
CASES = (*HEADS, *NARROW, *FROD, *ADAMSS, *PSOFT, *DEFT, *OSF, *PEANUT, *GLORA)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_is_peft_bit_for_bit(case, dtype, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case, dtype), workshop.base_of(case, dtype), tmp_path)


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_activations_are_transformers_bit_for_bit(case, workshop, files, tmp_path: Path) -> None:
    assert_merges_like_peft(workshop, files, workshop.adapter(case), workshop.base_of(case), tmp_path)
