"""The fields of adapter_config.json that PEFT 0.21.2 knows, for each of its methods, and their defaults.

Read from its config classes (`peft/tuners/*/config.py`); a test holds the table against the installed PEFT.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

VERSION = "0.21.2"
"""The release that the table was read from."""

_ALL = "auto_mapping base_model_name_or_path inference_mode=false peft_type peft_version revision task_type"
"""What every class has."""

# A word is a field; `name=default` where the default is not null.
_FIELDS = {
    "ADALORA": (
        "beta1=0.85 beta2=0.85 deltaT=1 init_r=12 orth_reg_weight=0.5 rank_pattern target_r=8 tfinal=0 "
        "tinit=0 total_step"
    ),
    "ADAMSS": (
        "asa_importance_beta=0.85 asa_schedule_exponent=3.0 asa_target_subspaces=50 asa_uncertainty_beta=0.85 "
        "final_warmup=1000 init_warmup=50 init_weights=orthogonal layers_pattern layers_to_transform "
        "mask_interval=100 modules_to_save num_subspaces=5 r=100 random_seed=0 subspace_rank=1 "
        "svd_threshold=0.1 target_modules use_asa=false use_dynamic_rank=false"
    ),
    "ADAPTION_PROMPT": "adapter_layers adapter_len target_modules",
    "BEFT": "init_weights=true modules_to_save target_modules",
    "BOFT": (
        "bias=none boft_block_num=0 boft_block_size=4 boft_dropout=0.0 boft_n_butterfly_factor=1 "
        "exclude_modules fan_in_fan_out=false init_weights=true layers_pattern layers_to_transform "
        "modules_to_save target_modules"
    ),
    "C3A": (
        "bias=none block_size=256 block_size_pattern={} init_weights=xavier_uniform layers_pattern "
        "layers_to_transform modules_to_save target_modules"
    ),
    "CARTRIDGE": (
        "modules_to_save num_attention_heads num_frozen_tokens=1 num_layers num_transformer_submodules "
        "num_virtual_tokens token_dim"
    ),
    "CPT": (
        "cpt_mask cpt_token_ids cpt_tokens_type_mask modules_to_save num_attention_heads num_layers "
        "num_transformer_submodules num_virtual_tokens opt_loss_decay_factor=1.0 opt_projection_epsilon=0.1 "
        "opt_projection_format_epsilon=0.1 opt_weighted_loss_type=none token_dim tokenizer_name_or_path"
    ),
    "DEFT": (
        "alpha bias=none decomposition_method=relu deft_dropout=0.0 exclude_modules fan_in_fan_out=false "
        "init_scale=1.0 init_weights=true layers_pattern layers_to_transform modules_to_save para=false r=8 "
        "target_modules"
    ),
    "DELORA": (
        "bias=none delora_lambda=15 exclude_modules init_weights=true lambda_pattern={} layers_pattern "
        "layers_to_transform module_dropout=0.0 modules_to_save r=8 rank_pattern={} target_modules"
    ),
    "FOURIERFT": (
        "bias=none exclude_modules fan_in_fan_out=false init_weights=false layers_pattern layers_to_transform "
        "modules_to_save n_frequency=1000 n_frequency_pattern={} random_loc_seed=777 scaling=150.0 "
        "target_modules"
    ),
    "FROD": (
        "bias=none fan_in_fan_out=false frod_dropout=0.0 init_weights=true layers_pattern layers_to_transform "
        "modules_to_save progressbar=true projection_prng_key=0 regularization_alpha=0.001 "
        "runtime_offload_base_weight=false save_projection=true sparse_rate=0.01 target_modules"
    ),
    "GLORA": (
        "bias=none config_A_B=lora config_C=lora config_D_E=constant init_weights=true modules_to_save r=8 "
        "target_modules"
    ),
    "GRALORA": (
        "alpha=64 bias=none fan_in_fan_out=false gralora_dropout=0.0 gralora_k=2 hybrid_r=0 init_weights=true "
        "layers_pattern layers_to_transform modules_to_save r=32 target_modules"
    ),
    "HIRA": (
        "exclude_modules fan_in_fan_out=false hira_dropout=0.0 init_weights=true layers_pattern "
        "layers_to_transform modules_to_save r=32 rank_pattern={} target_modules"
    ),
    "HRA": (
        "apply_GS=false bias=none exclude_modules init_weights=true layers_pattern layers_to_transform "
        "modules_to_save r=8 target_modules"
    ),
    "IA3": (
        "exclude_modules fan_in_fan_out=false feedforward_modules init_ia3_weights=true modules_to_save "
        "target_modules"
    ),
    "LILY": (
        "exclude_modules init_weights=true layers_pattern layers_to_transform modules_to_save num_B=2 r=32 "
        "scaling=1.0 stride_A=1 target_modules"
    ),
    "LN_TUNING": "exclude_modules modules_to_save target_modules",
    "LOHA": (
        "alpha=8 alpha_pattern={} exclude_modules init_weights=true layers_pattern layers_to_transform "
        "module_dropout=0.0 modules_to_save r=8 rank_dropout=0.0 rank_pattern={} target_modules "
        "use_effective_conv2d=false"
    ),
    "LOKR": (
        "alpha=8 alpha_pattern={} decompose_both=false decompose_factor=-1 exclude_modules init_weights=true "
        "layers_pattern layers_to_transform module_dropout=0.0 modules_to_save r=8 rank_dropout=0.0 "
        "rank_dropout_scale=false rank_pattern={} target_modules use_effective_conv2d=false"
    ),
    "LORA": (
        "alora_invocation_tokens alpha_pattern={} arrow_config bias=none corda_config "
        "ensure_weight_tying=false eva_config exclude_modules fan_in_fan_out=false init_lora_weights=true "
        "kasa_config layer_replication layers_pattern layers_to_transform loftq_config={} lora_alpha=8 "
        "lora_bias=false lora_dropout=0.0 lora_ga_config megatron_config megatron_core=megatron.core "
        "modules_to_save monteclora_config qalora_group_size=16 r=8 rank_pattern={} runtime_config={} "
        "target_modules target_parameters trainable_token_indices use_bdlora use_dora=false use_qalora=false "
        "use_rslora=false velora_config"
    ),
    "MISS": (
        "bias=none exclude_modules init_weights=true layers_pattern layers_to_transform mini_r=1 "
        "miss_dropout=0.0 modules_to_save r=64 target_modules"
    ),
    "MULTITASK_PROMPT_TUNING": (
        "modules_to_save num_attention_heads num_layers num_ranks=1 num_tasks=1 num_transformer_submodules "
        "num_virtual_tokens prompt_tuning_init=RANDOM prompt_tuning_init_state_dict_path "
        "prompt_tuning_init_task=0 prompt_tuning_init_text token_dim tokenizer_kwargs tokenizer_name_or_path"
    ),
    "OFT": (
        "bias=none block_share=false coft=false eps=6e-05 exclude_modules fan_in_fan_out=false "
        "init_weights=true layers_pattern layers_to_transform module_dropout=0.0 modules_to_save "
        "num_cayley_neumann_terms=5 oft_block_size=32 r=0 target_modules use_cayley_neumann=true"
    ),
    "OSF": "effective_rank init_weights=true modules_to_save rank_pattern target_modules target_svd_config",
    "PEANUT": (
        "act_fn=relu depth=0 exclude_modules init_weights=true layers_pattern layers_to_transform "
        "modules_to_save r=32 scaling=1.0 target_modules"
    ),
    "POLY": (
        "exclude_modules init_weights=true modules_to_save n_skills=4 n_splits=1 n_tasks=1 poly_type=poly r=8 "
        "target_modules"
    ),
    "PREFIX_TUNING": (
        "encoder_hidden_size init_weights modules_to_save num_attention_heads num_layers "
        "num_transformer_submodules num_virtual_tokens prefix_projection=false token_dim"
    ),
    "PROMPT_TUNING": (
        "modules_to_save num_attention_heads num_layers num_transformer_submodules num_virtual_tokens "
        "prompt_tuning_init=RANDOM prompt_tuning_init_text token_dim tokenizer_kwargs tokenizer_name_or_path"
    ),
    "PSOFT": (
        "ab_svd_init=psoft_init cayley_neumann_eps exclude_modules fan_in_fan_out=false init_weights=true "
        "layers_pattern layers_to_transform modules_to_save num_cayley_neumann_terms=5 psoft_alpha=32 "
        "psoft_dropout=0.0 psoft_mag_a=true psoft_mag_b=true psoft_orth=true psoft_svd=full "
        "psoft_svd_lowrank_niter=10 r=32 random_seed=0 target_modules use_cayley_neumann=false"
    ),
    "PVERA": (
        "bias=none d_initial=0.1 fan_in_fan_out=false generator_seed init_weights=true layers_pattern "
        "layers_to_transform modules_to_save projection_prng_key=0 pvera_dropout=0.0 r=256 "
        "sample_at_inference=false save_projection=true target_modules"
    ),
    "P_TUNING": (
        "encoder_dropout=0.0 encoder_hidden_size encoder_num_layers=2 encoder_reparameterization_type=MLP "
        "modules_to_save num_attention_heads num_layers num_transformer_submodules num_virtual_tokens "
        "token_dim"
    ),
    "RANDLORA": (
        "bias=none fan_in_fan_out=false init_weights=true layers_pattern layers_to_transform modules_to_save "
        "projection_prng_key=0 r=32 randlora_alpha=640 randlora_dropout=0.0 save_projection=true sparse=false "
        "target_modules very_sparse=false"
    ),
    "ROAD": "group_size=64 init_weights=true modules_to_save target_modules variant=road_1",
    "SHADOW": (
        "auxiliary_loss_weight=0.05 exclude_modules init_weights=true layers_pattern layers_to_transform "
        "modules_to_save r=8 shadow_alpha=0.1 shadow_dropout=0.2 shadow_hidden_size shadow_intermediate_size "
        "shadow_model=mirror shadow_num_attention_heads shadow_num_hidden_layers share_embeddings=true "
        "target_modules update_hidden_size"
    ),
    "SHIRA": (
        "fan_in_fan_out=false init_weights=true mask_type=random modules_to_save r=32 random_seed target_modules"
    ),
    "SUPERTUNING": (
        "init_weights=true lora_alpha lora_dropout=0.0 modules_to_save r save_precomputed_indices=true "
        "select_top=true sparsity=0.99 target_modules"
    ),
    "TINYLORA": (
        "bias=none fan_in_fan_out=false init_v_bound=0.02 init_weights=true layers_pattern "
        "layers_to_transform modules_to_save projection_seed=42 r=2 save_projection=true target_modules "
        "tinylora_dropout=0.0 u=64 weight_tying=0.0"
    ),
    "TRAINABLE_TOKENS": "init_weights=true target_modules token_indices=[]",
    "UNILORA": (
        "bias=none fan_in_fan_out=false init_theta_d_bound=0.02 init_weights=true layers_pattern "
        "layers_to_transform modules_to_save proj_seed=42 r=4 save_indices=false target_modules "
        "theta_d_length=256 unilora_dropout=0.0"
    ),
    "VBLORA": (
        "bias=none exclude_modules fan_in_fan_out=false init_logits_std=0.1 init_vector_bank_bound=0.02 "
        "layers_pattern layers_to_transform modules_to_save num_vectors=256 r=4 save_only_topk_weights=false "
        "target_modules topk=2 vblora_dropout=0.0 vector_length=256"
    ),
    "VERA": (
        "bias=none d_initial=0.1 fan_in_fan_out=false init_weights=true layers_pattern layers_to_transform "
        "modules_to_save projection_prng_key=0 r=256 save_projection=true target_modules vera_dropout=0.0"
    ),
    "WAVEFT": (
        "bias=none exclude_modules fan_in_fan_out=false init_weights=true layers_pattern layers_to_transform "
        "modules_to_save n_frequency=2592 n_frequency_pattern={} proportional_parameters=false "
        "random_loc_seed=777 scaling=25.0 target_modules use_idwt=true wavelet_family=db1"
    ),
    "XLORA": (
        "adapters enable_softmax=true enable_softmax_topk=false global_scaling_weight=1.0 hidden_size "
        "layerwise_scalings=false scaling_pass_value=0.0 softmax_temperature=1.0 top_k_lora "
        "use_trainable_adapters=false xlora_depth=1 xlora_dropout_p=0.2 xlora_size=2048"
    ),
}
_EXTENDS = {"ADALORA": "LORA"}


@cache
def known(peft_type: str) -> dict[str, Any] | None:
    """Field to default of a method's config class; None: PEFT has no such method."""
    if peft_type not in _FIELDS:
        return None
    parent = known(_EXTENDS[peft_type]) if peft_type in _EXTENDS else None
    words = f"{_ALL} {_FIELDS[peft_type]}".split()
    pairs = (word.partition("=") for word in words)
    return (parent or {}) | {name: _value(text) if given else None for name, given, text in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
