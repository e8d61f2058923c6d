"""The configurations of PEFT's own test matrix, `TEST_CASES` of its tests/test_custom_models.py, grouped by method.

PEFT's table has 331 rows (0.20 and 0.21); twelve of them stand there twice (ten of WaveFT, one of LoHa and of SHiRA),
so that there are 319 here. PEFT merges all but the nine that say why not: 310 here, 322 of its own.

A row is a model (`models.py`), `target_modules` (a string is a pattern, a list are names) and the other fields of the
config. PEFT's defaults are not repeated. The models are f32 and all sizes tiny, which is what the ranks go by.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft import (
    AdaLoraConfig,
    AdamssConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    KasaConfig,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MontecloraConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PeftConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeloraConfig,
    VeraConfig,
    WaveFTConfig,
)
from peft.tuners.lora.config import BdLoraConfig


@dataclass(frozen=True)
class Row:
    """One row before it has a name.

    Attributes:
        kind: Of the model.
        fields: Of the PEFT config.
        refused: PEFT cannot merge it: a pattern that the message of our refusal must hold. Empty: it is merged.
    """

    kind: str
    fields: Mapping[str, Any]
    refused: str = ""


@dataclass(frozen=True)
class Case(Row):
    """One row of the table.

    Attributes:
        name: Of the test: method, number, model.
        config_class: Of PEFT.
    """

    name: str = ""
    config_class: type[PeftConfig] = PeftConfig

    def config(self) -> PeftConfig:
        """A config of its own: PEFT changes those that it is given."""
        return self.config_class(**copy.deepcopy(dict(self.fields)))

    @cached_property
    def peft_type(self) -> str:
        return str(self.config().peft_type.value)


def row(kind: str, targets: str | list[str] | None = None, *, refused: str = "", **fields: Any) -> Row:
    return Row(kind, fields if targets is None else {"target_modules": targets, **fields}, refused)


def method(name: str, config_class: type[PeftConfig], *rows: Row) -> list[Case]:
    return [Case(r.kind, r.fields, r.refused, f"{name}-{n}-{r.kind}", config_class) for n, r in enumerate(rows, 1)]


BOTH = ["lin0", "lin1"]
# What a refusal must speak of.
GROUPS = r"groups"
ROUTED = r"rout"

CASES = (
    # -- LoRA and its variants ---------------------------------------------------------------------------
    *method(
        "lora",
        LoraConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("MLP", ["lin0"], lora_alpha=4, lora_dropout=0.1),
        row("EmbConv1D", ["conv1d"]),
        row("EmbConv1D", ["emb"]),
        row("EmbConv1D", ["emb", "conv1d"]),
        row("EmbConv1D", ["conv1d"], trainable_token_indices={"emb": [0, 10]}),
        row("Conv1d", ["conv1d"]),
        row("Conv2d", ["conv2d"]),
        row("Conv2d", ["conv2d", "lin0"]),
        row("Conv2dGroups", ["conv2d"], refused=GROUPS),
        row("Conv2dGroups2", ["conv2d"], refused=GROUPS),
        row("Conv3d", ["conv3d"]),
        row("Conv3d", ["conv3d", "lin0"]),
        row("MHA", ["mha"]),
        row("MHA", ["mha", "lin0"]),
    ),
    *method(
        "lora-dora",
        LoraConfig,
        row("MLP", ["lin0"], use_dora=True),
        row("MLP", BOTH, use_dora=True),
        row("MLP", "lin1", use_dora=True, lora_alpha=32),
        row("EmbConv1D", ["conv1d"], use_dora=True),
        row("EmbConv1D", ["emb"], use_dora=True),
        row("EmbConv1D", ["emb", "conv1d"], use_dora=True),
        row("Conv1d", ["conv1d"], use_dora=True),
        row("Conv2d", ["conv2d"], use_dora=True),
        row("Conv2d", ["conv2d", "lin0"], use_dora=True),
        row("Conv2dGroups", ["conv2d"], use_dora=True, refused=GROUPS),
        row("Conv2dGroups2", ["conv2d"], use_dora=True, refused=GROUPS),
        row("Conv3d", ["conv3d"], use_dora=True),
        row("Conv3d", ["conv3d", "lin0"], use_dora=True),
    ),
    *method(
        "lora-bias",
        LoraConfig,
        row("MLP", BOTH, lora_bias=True, lora_alpha=32),
        row("Conv2d", ["conv2d"], lora_bias=True, lora_alpha=32),
        row("Conv3d", ["conv3d"], lora_bias=True, lora_alpha=32),
    ),
    *method(
        "lora-parameters",
        LoraConfig,
        row("MlpUsingParameters", target_parameters=["lin0.weight"]),
        row("MLP", ["lin0"], target_parameters=["lin1.weight"]),
    ),
    *method(
        "lora-bdlora",
        LoraConfig,
        row("MLP", BOTH, use_bdlora=BdLoraConfig(target_modules_bd_a=["lin0"], match_strict=False)),
        row("MLP", BOTH, use_bdlora=BdLoraConfig(target_modules_bd_b=["lin1"], nblocks=2, match_strict=False)),
        row(
            "MLP",
            BOTH,
            use_bdlora=BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2),
        ),
    ),
    # KaSA takes a rank below both dimensions of the weight.
    *method("lora-kasa", LoraConfig, row("MLP", ["lin0"], kasa_config=KasaConfig(), r=4)),
    *method("lora-mica", LoraConfig, row("MLP", ["lin0"], init_lora_weights="mica", r=4)),
    *method("lora-monteclora", LoraConfig, row("MLP", ["lin0"], monteclora_config=MontecloraConfig(num_samples=2))),
    *method(
        "lora-velora",
        LoraConfig,
        row("MLP", ["lin0"], velora_config=VeloraConfig(num_groups=2, init_type="random")),
        row("MLP", BOTH, velora_config=VeloraConfig(num_groups=2, init_type="batch_average")),
        row("MLP", ["lin0"], velora_config=VeloraConfig(num_groups=2, init_type="batch_average_once")),
    ),
    # -- other low-rank changes --------------------------------------------------------------------------
    *method(
        "adalora",
        AdaLoraConfig,
        row("MLP", ["lin0"], init_lora_weights=False, total_step=1, orth_reg_weight=0),
        row("MLP", BOTH, init_lora_weights=False, total_step=1),
        row("Conv2d", ["conv2d"], init_lora_weights=False, total_step=1),
        row("Conv2d", ["conv2d", "lin0"], init_lora_weights=False, total_step=1),
    ),
    *method(
        "vera",
        VeraConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("EmbConv1D", ["conv1d"]),
    ),
    *method(
        "pvera",
        PveraConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("EmbConv1D", ["conv1d"]),
    ),
    *method(
        "vblora",
        VBLoRAConfig,
        row("MLP", "lin0", vector_length=1, num_vectors=5),
        row("MLP", ["lin0"], vector_length=1, num_vectors=5),
        row("MLP", ["lin1"], vector_length=2, num_vectors=5),
        row("MLP", BOTH, vector_length=1, num_vectors=5),
        row("MLP", ["lin0"], modules_to_save=["lin1"], vector_length=1, num_vectors=5),
        row("EmbConv1D", ["conv1d"], vector_length=1, num_vectors=2),
    ),
    *method(
        "unilora",
        UniLoraConfig,
        row("MLP", "lin0", theta_d_length=101),
        row("MLP", ["lin0"], theta_d_length=101),
        row("MLP", ["lin1"], theta_d_length=101),
        row("MLP", BOTH, theta_d_length=101),
        row("MLP", ["lin0"], modules_to_save=["lin1"], theta_d_length=101),
        row("EmbConv1D", ["conv1d"], theta_d_length=101),
    ),
    *method(
        "tinylora",
        TinyLoraConfig,
        row("MLP", "lin0", r=2, u=16),
        row("MLP", ["lin0"], r=2, u=16),
        row("MLP", ["lin1"], r=2, u=16),
        row("MLP", BOTH, r=2, u=32),
        row("MLP", ["lin0"], modules_to_save=["lin1"], r=2, u=16),
        row("MLP", BOTH, r=2, u=8, weight_tying=1.0),
        row("EmbConv1D", ["conv1d"], r=2, u=16, init_v_bound=0.5),
        row("EmbConv1D", ["emb"], r=2, u=16),
    ),
    # The default scaling gives NaN at large steps.
    *method(
        "randlora",
        RandLoraConfig,
        row("MLP", "lin0", randlora_alpha=1),
        row("MLP", ["lin0"], randlora_alpha=1),
        row("MLP", ["lin1"], randlora_alpha=1),
        row("MLP", BOTH, randlora_alpha=1),
        row("MLP", BOTH, sparse=True, randlora_alpha=1),
        row("MLP", BOTH, very_sparse=True, randlora_alpha=1),
        row("MLP", ["lin0"], modules_to_save=["lin1"], randlora_alpha=1),
    ),
    *method(
        "frod",
        FrodConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
    ),
    *method(
        "gralora",
        GraloraConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("MLP", BOTH, modules_to_save=["lin1"]),
        row("MLP", BOTH, modules_to_save=["lin1"], hybrid_r=4),
        row("EmbConv1D", ["conv1d"], gralora_k=1),
    ),
    *method(
        "glora",
        GloraConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("MLP", BOTH, modules_to_save=["lin1"]),
    ),
    *method(
        "delora",
        DeloraConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], module_dropout=0.1),
    ),
    *method(
        "adamss",
        AdamssConfig,
        row("MLP", "lin0", r=8),
        row("MLP", ["lin0"], r=8),
        row("MLP", ["lin1"], r=2),
        row("MLP", BOTH, r=8),
        row("MLP", BOTH, r=8, num_subspaces=3, subspace_rank=2),
        row("MLP", BOTH, r=8, num_subspaces=6, use_asa=True, asa_target_subspaces=3),
        row("MLP", ["lin0"], r=8, num_subspaces=3, use_dynamic_rank=True, svd_threshold=0.1),
    ),
    *method(
        "peanut",
        PeanutConfig,
        row("MLP", "lin0", r=2, depth=0, act_fn="relu"),
        row("MLP", ["lin0"], r=2, depth=0, act_fn="relu"),
        row("MLP", ["lin1"], r=2, depth=0, act_fn="relu"),
        row("MLP", BOTH, r=2, depth=0, act_fn="relu"),
        row("MLP", "lin0", r=2, depth=1, act_fn="gelu"),
    ),
    *method(
        "lily",
        LilyConfig,
        row("MLP", "lin0", r=2, stride_A=1, num_B=2, refused=ROUTED),
        row("MLP", ["lin0"], r=2, stride_A=1, num_B=2, refused=ROUTED),
        row("MLP", ["lin1"], r=2, stride_A=1, num_B=2, refused=ROUTED),
        row("MLP", BOTH, r=2, stride_A=1, num_B=2, refused=ROUTED),
        row("MLP", ["lin0"], r=4, stride_A=1, num_B=2, refused=ROUTED),
    ),
    # -- Hadamard and Kronecker products -----------------------------------------------------------------
    *method(
        "loha",
        LoHaConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("MLP", ["lin0"], alpha=4, module_dropout=0.1),
        row("MLP", "lin0", rank_dropout=0.5),
        row("Conv2d", ["conv2d"]),
        row("Conv2d", ["conv2d", "lin0"]),
        row("Conv2d", ["conv2d"], use_effective_conv2d=True),
        row("Conv2d", ["conv2d", "lin0"], use_effective_conv2d=True),
        row("Conv1d", ["conv1d"]),
        row("Conv1d", ["conv1d"], r=2),
        row("Conv1dGroups", ["conv1d"], r=4),
        row("Conv1dBigger", ["conv1d"], r=2, use_effective_conv2d=True),
        row("Conv1dBigger", ["conv1d"], r=2, use_effective_conv2d=False),
        row("Conv2d1x1", ["conv2d"]),
        row("Conv2dGroups", ["conv2d"]),
        row("Conv2dGroups2", ["conv2d"]),
    ),
    *method(
        "lokr",
        LoKrConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("MLP", ["lin0"], alpha=4, module_dropout=0.1),
        row("MLP", "lin0", rank_dropout=0.5),
        row("MLP", "lin0", decompose_both=True, r=1, alpha=1),
        row("Conv1d", ["conv1d"]),
        row("Conv1d", ["conv1d"], r=2),
        row("Conv1dGroups", ["conv1d"], r=4),
        row("Conv1dBigger", ["conv1d"], r=2, use_effective_conv2d=True),
        row("Conv1dBigger", ["conv1d"], r=2, use_effective_conv2d=False),
        row("Conv2d", ["conv2d"]),
        row("Conv2d", ["conv2d", "lin0"]),
        row("Conv2d", ["conv2d"], use_effective_conv2d=True),
        row("Conv2d", ["conv2d", "lin0"], use_effective_conv2d=True),
        row("Conv2d1x1", ["conv2d"]),
        row("Conv2d", ["conv2d", "lin0"], use_effective_conv2d=True, decompose_both=True),
        row("Conv2d", ["conv2d", "lin0"], use_effective_conv2d=True, decompose_factor=4),
        row("Conv2d", ["conv2d", "lin0"], use_effective_conv2d=True, decompose_both=True, decompose_factor=4),
        row("Conv2dGroups", ["conv2d"]),
        row("Conv2dGroups2", ["conv2d"]),
    ),
    *method(
        "hira",
        HiraConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("MLP", ["lin0"], hira_dropout=0.1),
        row("EmbConv1D", ["conv1d"]),
        row("EmbConv1D", ["emb"]),
        row("EmbConv1D", ["emb", "conv1d"]),
        row("Conv1d", ["conv1d"]),
        row("Conv2d", ["conv2d"]),
        row("Conv2d", ["conv2d", "lin0"]),
        row("Conv3d", ["conv3d"]),
        row("Conv3d", ["conv3d", "lin0"]),
    ),
    # -- vectors, biases, rows ---------------------------------------------------------------------------
    *method(
        "ia3",
        IA3Config,
        row("MLP", "lin0", feedforward_modules=[]),
        row("MLP", "lin0", feedforward_modules="lin0"),
        row("MLP", ["lin0"], feedforward_modules=[]),
        row("MLP", ["lin0"], feedforward_modules=["lin0"]),
        row("MLP", ["lin1"], feedforward_modules=[]),
        row("MLP", ["lin1"], feedforward_modules=["lin1"]),
        row("MLP", BOTH, feedforward_modules=[]),
        row("MLP", BOTH, feedforward_modules=BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"], feedforward_modules=["lin0"]),
        row("EmbConv1D", ["conv1d"], feedforward_modules=["conv1d"]),
        row("EmbConv1D", ["conv1d", "lin0"], feedforward_modules=["conv1d", "lin0"]),
        row("EmbConv1D", ["conv1d"], feedforward_modules=["conv1d"], modules_to_save=["lin0"]),
        row("Conv2d", ["conv2d"], feedforward_modules=[]),
        row("Conv2d", ["conv2d"], feedforward_modules=["conv2d"]),
        row("Conv2d", ["conv2d", "lin0"], feedforward_modules=[]),
        row("Conv2d", ["conv2d", "lin0"], feedforward_modules=["conv2d"]),
        row("Conv2d", ["conv2d", "lin0"], feedforward_modules=["conv2d", "lin0"]),
        row("Conv3d", ["conv3d"], feedforward_modules=[]),
        row("Conv3d", ["conv3d"], feedforward_modules=["conv3d"]),
        row("Conv3d", ["conv3d", "lin0"], feedforward_modules=[]),
        row("Conv3d", ["conv3d", "lin0"], feedforward_modules=["conv3d"]),
        row("Conv3d", ["conv3d", "lin0"], feedforward_modules=["conv3d", "lin0"]),
    ),
    *method(
        "beft",
        BeftConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", ["lin1"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
    ),
    *method(
        "ln_tuning",
        LNTuningConfig,
        row("MLP_LayerNorm", "layernorm0"),
        row("MLP_LayerNorm", ["layernorm0"]),
        row("MLP_LayerNorm", ["layernorm0"], modules_to_save=["layernorm1"]),
        row("MLP_LayerNorm", "lin0"),
        row("MLP_LayerNorm", ["lin0"]),
    ),
    *method(
        "trainable_tokens",
        TrainableTokensConfig,
        row("EmbConv1D", ["emb"], token_indices=[0, 1, 3], init_weights=False),
    ),
    # -- rotations and reflections -----------------------------------------------------------------------
    *method(
        "oft",
        OFTConfig,
        row("MLP", "lin0", r=2, oft_block_size=0, use_cayley_neumann=False),
        row("MLP", ["lin0"], r=2, oft_block_size=0, use_cayley_neumann=False),
        row("MLP", ["lin0"], r=2, oft_block_size=0, modules_to_save=["lin1"], use_cayley_neumann=False),
        row("MLP", ["lin0"], r=2, oft_block_size=0, module_dropout=0.1, use_cayley_neumann=False),
        row("MLP", ["lin0"], r=2, oft_block_size=0, coft=True, eps=1e-2),
        row("MLP", ["lin0"], r=2, oft_block_size=0, block_share=True, use_cayley_neumann=False),
        row("MLP", ["lin0"], r=2, oft_block_size=0, coft=True, eps=1e-2, block_share=True),
        row("MLP", ["lin0"], r=0, oft_block_size=2, use_cayley_neumann=True),
        row("MLP", ["lin0"], r=0, oft_block_size=2, use_cayley_neumann=False),
        row("MLP", ["lin0"], r=0, oft_block_size=2, coft=True, eps=1e-2, block_share=True, use_cayley_neumann=True),
        row("MLP", ["lin0"], r=0, oft_block_size=2, coft=True, eps=1e-2, block_share=True, use_cayley_neumann=False),
        row("EmbConv1D", ["emb"], r=1, oft_block_size=0),
        row("EmbConv1D", ["emb"], r=1, oft_block_size=0, block_share=True),
        row("Conv2d", ["conv2d"], r=5, oft_block_size=0),
        row("Conv2d", ["conv2d"], r=5, oft_block_size=0, coft=True),
        row("Conv2d", ["conv2d"], r=5, oft_block_size=0, block_share=True),
        row("Conv2d", ["conv2d"], r=5, oft_block_size=0, coft=True, block_share=True),
    ),
    *method(
        "boft",
        BOFTConfig,
        row("MLP", ["lin1"], boft_block_size=2),
        row("MLP", ["lin1"], modules_to_save=["lin0"], boft_block_size=2),
        row("MLP", ["lin1"], boft_block_size=2, boft_dropout=0.1),
        row("MLP", ["lin1"], boft_block_size=2, boft_block_num=0, boft_n_butterfly_factor=1),
        row("MLP", ["lin1"], boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=1),
        row("MLP", ["lin1"], boft_block_size=10, boft_block_num=0, boft_n_butterfly_factor=2),
        row("Conv2d", ["conv2d"], boft_block_size=45, boft_block_num=0, boft_n_butterfly_factor=1),
        row("Conv2d", ["conv2d"], boft_block_size=0, boft_block_num=1, boft_n_butterfly_factor=1),
        row("MLP2", ["lin1"], boft_block_size=2, boft_block_num=0, boft_n_butterfly_factor=3),
        row("MLP2", ["lin1"], boft_block_size=0, boft_block_num=8, boft_n_butterfly_factor=3),
        row("Conv2d2", ["conv2d"], boft_block_size=2, boft_block_num=0, boft_n_butterfly_factor=2),
        row("Conv2d2", ["conv2d"], boft_block_size=2, boft_block_num=0, boft_n_butterfly_factor=3),
    ),
    *method(
        "hra",
        HRAConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("Conv2d", ["conv2d"]),
    ),
    *method(
        "road",
        RoadConfig,
        row("MLP", "lin0", group_size=2),
        row("MLP", ["lin0"], group_size=2),
        row("MLP", ["lin1"], group_size=2),
        row("MLP", BOTH, group_size=2),
        row("MLP", ["lin0"], variant="road_2", group_size=2),
        row("MLP", ["lin0"], variant="road_4", group_size=2),
    ),
    *method(
        "psoft",
        PsoftConfig,
        row("MLP", "lin0", r=4, psoft_alpha=4),
        row("MLP", ["lin0"], r=4, psoft_alpha=4),
        row("MLP", ["lin1"], r=2, psoft_alpha=2),
        row("MLP", BOTH, r=2, psoft_alpha=2),
        row("MLP", ["lin0"], modules_to_save=["lin1"], r=4, psoft_alpha=4),
        row("MLP", ["lin0"], r=4, psoft_alpha=4, psoft_mag_a=False, psoft_mag_b=False),
        row("MLP", ["lin0"], r=4, psoft_alpha=4, psoft_svd="lowrank", psoft_svd_lowrank_niter=10),
        row(
            "MLP",
            ["lin0"],
            r=4,
            psoft_alpha=4,
            use_cayley_neumann=True,
            num_cayley_neumann_terms=5,
            cayley_neumann_eps=0.9,
        ),
        row("MLP", ["lin0"], r=4, psoft_alpha=4, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False),
        row("MLP", ["lin0"], r=4, psoft_alpha=4, ab_svd_init="pissa_init"),
    ),
    *method(
        "deft",
        DeftConfig,
        row("MLP", "lin0"),
        row("MLP", ["lin0"]),
        row("MLP", BOTH),
        row("MLP", ["lin0"], decomposition_method="qr"),
        row("MLP", ["lin0"], modules_to_save=["lin1"]),
        row("MLP", ["lin0"], decomposition_method="qr", alpha=16),
        row("MLP", ["lin0"], decomposition_method="relu", para=True),
        row("MLP", ["lin0"], decomposition_method="qr", para=True),
        row("EmbConv1D", ["conv1d"]),
    ),
    *method("osf", OSFConfig, row("MLP"), row("MLP", target_svd_config={"lin0.weight": 5, "lin1.weight": 1})),
    *method(
        "miss",
        MissConfig,
        row("MLP", "lin0", r=2),
        row("MLP", ["lin0"], r=2),
        row("MLP", BOTH, r=2),
        row("MLP", ["lin0"], modules_to_save=["lin1"], r=2),
        row("MLP", "lin0", r=2, init_weights="bat"),
        row("MLP", ["lin0"], r=2, init_weights="bat"),
        row("MLP", BOTH, r=2, init_weights="bat"),
        row("MLP", ["lin0"], modules_to_save=["lin1"], r=2, init_weights="bat"),
    ),
    # -- few values at many places -----------------------------------------------------------------------
    *method(
        "shira",
        ShiraConfig,
        row("MLP", "lin0", r=1),
        row("MLP", ["lin0"], r=1),
        row("MLP", ["lin1"], r=1),
        row("MLP", BOTH, r=1, random_seed=56),
    ),
    *method(
        "supertuning",
        SupertuningConfig,
        row("MLP", "lin0", sparsity=0.5),
        row("MLP", ["lin0"], sparsity=0.5),
        row("MLP", ["lin1"], sparsity=0.5),
        row("MLP", BOTH, sparsity=0.5, select_top=False),
        row("MLP", ["lin0"], sparsity=0.5, r=2),
    ),
    # These two do not begin at no change unless told to.
    *method(
        "fourierft",
        FourierFTConfig,
        row("MLP", "lin0", n_frequency=10, init_weights=True),
        row("MLP", ["lin0"], n_frequency=10, init_weights=True),
        row("MLP", ["lin1"], n_frequency=10, init_weights=True),
        row("MLP", ["lin0"], n_frequency=10, modules_to_save=["lin1"], init_weights=True),
        row("MLP", BOTH, n_frequency=10, modules_to_save=["lin1"], init_weights=True),
        row("MLP", BOTH, n_frequency_pattern={"lin0": 5, "lin1": 10}, modules_to_save=["lin1"], init_weights=True),
    ),
    *method(
        "c3a",
        C3AConfig,
        row("MLP", "lin0", block_size=2, init_weights=True),
        row("MLP", ["lin0"], block_size=2, init_weights=True),
        row("MLP", ["lin1"], block_size=2, init_weights=True),
        row("MLP", ["lin0"], block_size=10, modules_to_save=["lin1"], init_weights=True),
        row("MLP", BOTH, block_size=10, modules_to_save=["lin1"], init_weights=True),
        row("MLP", BOTH, block_size_pattern={"lin0": 5, "lin1": 10}, modules_to_save=["lin1"], init_weights=True),
    ),
    *method(
        "waveft",
        WaveFTConfig,
        row("MLP", "lin0", n_frequency=8),
        row("MLP", ["lin0"], n_frequency=8),
        row("MLP", ["lin1"], n_frequency=8),
        row("MLP", BOTH, n_frequency=8),
        row("MLP", ["lin0"], modules_to_save=["lin1"], n_frequency=8),
        row("MLP", ["lin0"], n_frequency=8, scaling=25.0, wavelet_family="db1"),
        row("MLP", "lin1", n_frequency=8, use_idwt=False),
        row("MLP", "lin0", n_frequency=16, wavelet_family="sym2"),
        row("MLP", "lin0", n_frequency=16, wavelet_family="sym2", use_idwt=False),
        row("MLP", "lin0", n_frequency=16, wavelet_family="db1", proportional_parameters=True),
    ),
)
