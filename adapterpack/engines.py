"""What each serving engine reads of an adapter, rejects, ignores and gets wrong: one table.

Each engine names the version that was looked at, each rule its source. `check --for` prints what the rules find in an
adapter; `convert --for` mends what it can and refuses to write anything in which a rule still finds a fault.
`proof` says how an engine was looked at: `run`, its own code was executed on our results (`tests/test_engines.py`,
with its answers frozen for machines that lack it), or `read`, its source was read, as cited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from adapterpack import engine_rules as rules
from adapterpack import peft_versions
from adapterpack.adapter import Finding
from adapterpack.engine_rules import Facts, Found
from adapterpack.errors import UsageError

REJECTED, MISREAD, IGNORED, NOTED = "rejected", "misread", "ignored", "noted"
"""What an engine does with it: an error; loaded at another value; loaded without it; loaded, but worth knowing."""


@dataclass(frozen=True)
class Rule:
    """One thing that an engine does not do as PEFT does.

    Attributes:
        code: Of the finding.
        effect: What the engine does.
        source: Where that is known from: file or issue.
        find: What of an adapter it concerns.
        fix: What to do; None: convert.
    """

    code: str
    effect: str
    source: str
    find: Callable[[Facts], Found]
    fix: str | None = None


@dataclass(frozen=True)
class Engine:
    """A reader of LoRA adapters.

    Attributes:
        name: As `--for` takes it.
        version: That the rules were taken from.
        proof: `run` or `read`, and by what.
        rules: What it does differently from PEFT.
        command: How to serve the result: format fields base, name, path, rank.
        keeps: Kinds of replaced tensors that it reads.
        saves: Names of modules_to_save that it reads.
        buckets: The values that its limit of ranks can have; none: any.
        peft: The oldest PEFT through which it may read the config; None: its own reader.
        one_scale: Are its adapters written with one scale and one rank?
        drops: Carried files that it takes for something else.
    """

    name: str
    version: str
    proof: str
    rules: tuple[Rule, ...]
    command: str
    keeps: frozenset[str] = frozenset()
    saves: frozenset[str] = frozenset()
    buckets: tuple[int, ...] = ()
    peft: peft_versions.Version | None = None
    one_scale: bool = True
    drops: tuple[str, ...] = ()

    def limit(self, rank: int) -> int:
        """What its limit of ranks must be set to."""
        return next((b for b in self.buckets if b >= rank), rank)


# -- the table ---------------------------------------------------------------------------------------------

_MERGE = "adapterpack merge it into the base"
_EXTRA = "adapterpack convert --for {engine} --extra split, or fold with --base; or merge it into the base"
_HELPER = "lora/peft_helper.py"


_saved = partial(rules.saved_modules, frozenset[str]())


def _vllm() -> Engine:
    saves = frozenset({"classifier", "score"})
    return Engine(
        name="vllm",
        version="0.33.0",
        proof="run: PEFTHelper.from_local_dir, validate_legal and LoRAModel.from_local_checkpoint",
        command="vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={path}",
        keeps=frozenset(),
        saves=saves,
        buckets=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        rules=(
            Rule("not-lora", REJECTED, "plugins/lora_resolvers, lora/peft_helper.py", rules.not_lora),
            Rule(
                "missing-field",
                REJECTED,
                f"{_HELPER}, from_dict",
                partial(rules.lacks, ("r", "lora_alpha", "target_modules")),
            ),
            Rule("dora", REJECTED, f"{_HELPER}; vllm#10849", rules.dora, _MERGE),
            Rule("lora-bias", REJECTED, _HELPER, rules.lora_bias, _MERGE),
            Rule("bias", REJECTED, f"{_HELPER}, validate_legal", rules.bias, _EXTRA),
            Rule("modules-to-save", REJECTED, f"{_HELPER}; vllm#9280", partial(rules.saved_modules, saves), _EXTRA),
            Rule(
                "saved-embeddings",
                IGNORED,
                "lora/utils.py, is_base_embedding_weights; vllm#32599",
                rules.saved_embeddings,
                _EXTRA,
            ),
            Rule(
                "token-rows", REJECTED, "lora/utils.py, parse_fine_tuned_lora_name; vllm#55796", rules.tokens, _EXTRA
            ),
            Rule("unknown-weight", REJECTED, "lora/utils.py, parse_fine_tuned_lora_name", rules.unknown),
            Rule("named-keys", REJECTED, "lora/utils.py, parse_fine_tuned_lora_name", rules.named_keys),
            Rule("convolution", REJECTED, "lora/lora_model.py, check_unexpected_modules", rules.conv, _MERGE),
            Rule("target-parameters", MISREAD, "vllm#41384, #52194, #47088", rules.parameters, _MERGE),
            Rule(
                "rank-too-large", REJECTED, "config/lora.py, MaxLoRARanks", partial(rules.max_rank, 512), "resize it"
            ),
            Rule("patterns", NOTED, f"{_HELPER}, get_rank_and_scaling", rules.patterns),
            Rule("no-base-name", NOTED, "plugins/lora_resolvers: equal to --model, string for string", rules.no_base),
        ),
    )


def _sglang() -> Engine:
    where = "srt/lora/lora.py"
    return Engine(
        name="sglang",
        version="0.5.23",
        proof="read",
        command="python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank}"
        " --lora-paths {name}={path}",
        drops=("added_tokens.json",),
        rules=(
            Rule("not-lora", REJECTED, f"{where}, LoRAAdapter", rules.not_lora),
            Rule(
                "missing-field",
                REJECTED,
                "srt/lora/lora_config.py",
                partial(rules.lacks, ("r", "lora_alpha", "target_modules")),
            ),
            Rule(
                "scale", MISREAD, f"{where}: lora_alpha / r; sglang#40835", partial(rules.misread, rules.alpha_over_r)
            ),
            Rule("mixed-ranks", REJECTED, "srt/lora/mem_pool.py, load_lora_weight_tensor", rules.mixed_ranks),
            Rule("target-pattern", REJECTED, "srt/lora/utils.py, get_normalized_target_modules", rules.targets_text),
            Rule("dora", REJECTED, "srt/lora/lora_manager.py", rules.dora, _MERGE),
            Rule("lora-bias", IGNORED, where, rules.lora_bias, _MERGE),
            Rule("bias", IGNORED, where, rules.bias, _EXTRA),
            Rule("modules-to-save", IGNORED, where, _saved, _EXTRA),
            Rule("saved-embeddings", IGNORED, where, rules.saved_embeddings, _EXTRA),
            Rule("token-rows", IGNORED, where, rules.tokens, _EXTRA),
            Rule("unknown-weight", IGNORED, where, rules.unknown),
            Rule("named-keys", IGNORED, where, rules.named_keys),
            Rule("attention", REJECTED, f"{where}, normalize_qkv_proj", rules.attention, _MERGE),
            Rule("convolution", IGNORED, "srt/lora/layers.py", rules.conv, _MERGE),
            Rule("target-parameters", MISREAD, "sglang#25528", rules.parameters, _MERGE),
            Rule("added-tokens", REJECTED, "srt/lora/lora_manager.py, validate_new_adapter", rules.added_tokens),
        ),
    )


def _punica(name: str, version: str, command: str, peft: peft_versions.Version, more: tuple[Rule, ...]) -> Engine:
    """LoRAX, and TGI, which took its adapters from there."""
    where = "adapters/lora.py"
    ignored = f"{where}, map_weights_for_model"
    return Engine(
        name=name,
        version=version,
        proof="read",
        command=command,
        peft=peft,
        rules=(
            Rule("not-lora", REJECTED, f"{where}, LoraConfig.load", rules.not_lora),
            Rule(
                "unknown-field", NOTED, "pyproject.toml: which PEFT; peft#2038", partial(rules.unknown_fields, peft)
            ),
            Rule("scale", MISREAD, f"{where}, get_scaling_factor", partial(rules.misread, rules.global_with_rslora)),
            Rule("mixed-ranks", REJECTED, f"{where}: torch.stack over layers", rules.mixed_ranks),
            Rule(
                "some-layers", IGNORED, f"{where}: a type that one layer lacks gives None", rules.some_layers, _MERGE
            ),
            Rule("embedding", IGNORED, ignored, rules.embedding, _MERGE),
            Rule("dora", IGNORED, ignored, rules.dora, _MERGE),
            Rule("lora-bias", IGNORED, ignored, rules.lora_bias, _MERGE),
            Rule("bias", IGNORED, ignored, rules.bias, _EXTRA),
            Rule("modules-to-save", IGNORED, f"{ignored}; lorax#231", _saved, _EXTRA),
            Rule("saved-embeddings", IGNORED, ignored, rules.saved_embeddings, _EXTRA),
            Rule("token-rows", IGNORED, ignored, rules.tokens, _EXTRA),
            Rule("unknown-weight", IGNORED, ignored, rules.unknown),
            Rule("named-keys", IGNORED, ignored, rules.named_keys),
            Rule("convolution", IGNORED, ignored, rules.conv, _MERGE),
            Rule("target-parameters", IGNORED, ignored, rules.parameters, _MERGE),
            *more,
        ),
    )


_TGI_LAYERS = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"))


def _llamacpp() -> Engine:
    where = "convert_lora_to_gguf.py"
    return Engine(
        name="llamacpp",
        version="converter of llama-cpp-python 0.3.36, engine of xllamacpp 2026.10",
        proof="run: converter and engine, logits against PEFT's",
        command="python convert_lora_to_gguf.py {path} --base {base} --outfile {name}.gguf"
        " && llama-server -m BASE.gguf --lora {name}.gguf",
        rules=(
            Rule("not-lora", REJECTED, where, rules.not_lora),
            Rule("missing-field", REJECTED, where, partial(rules.lacks, ("lora_alpha",))),
            Rule(
                "scale",
                MISREAD,
                f"{where}, set_gguf_parameters; llama-adapter.h",
                partial(rules.misread, rules.alpha_over_own_rank),
            ),
            Rule("conv1d", MISREAD, f"{where}, conversion/gpt2.py", rules.conv1d, _MERGE),
            Rule("tied-head", REJECTED, f"{where}; llama.cpp#9065", rules.tied_head, _MERGE),
            Rule("dora", REJECTED, where, rules.dora, _MERGE),
            Rule("lora-bias", REJECTED, where, rules.lora_bias, _MERGE),
            Rule("bias", REJECTED, where, rules.bias, _EXTRA),
            Rule(
                "modules-to-save",
                REJECTED,
                f"{where}; llama.cpp#11554, #9948",
                partial(rules.saved_norms, False),
                _EXTRA,
            ),
            Rule(
                "saved-norms", IGNORED, "llama-adapter.cpp: *_norm.weight", partial(rules.saved_norms, True), _EXTRA
            ),
            Rule("saved-embeddings", IGNORED, where, rules.saved_embeddings, _EXTRA),
            Rule("token-rows", REJECTED, where, rules.tokens, _EXTRA),
            Rule("unknown-weight", REJECTED, where, rules.unknown),
            Rule("named-keys", REJECTED, where, rules.named_keys),
            Rule("convolution", REJECTED, where, rules.conv, _MERGE),
            Rule("target-parameters", REJECTED, where, rules.parameters, _MERGE),
        ),
    )


def _peft(version: peft_versions.Version | None, text: str) -> Engine:
    table = [Rule("not-lora", NOTED, "it is read, as what it is", rules.not_lora)]
    old = version is not None and version < peft_versions.FORGIVING
    keeps = {"module", "embeddings", "bias", "tokens"}
    if version is not None:
        lost = partial(rules.lost_fields, version)
        table.append(Rule("lost-field", MISREAD, "peft/tuners/lora/config.py of each release", lost, _MERGE))
        keeps -= set() if peft_versions.knows(version, "trainable_token_indices") else {"tokens"}
    if version is not None and old:
        fields = partial(rules.unknown_fields, version)
        table += [
            Rule("unknown-field", REJECTED, "peft/config.py, from_peft_type; peft#2038", fields),
            Rule("patterns", MISREAD, "peft/tuners/lora/model.py before 0.14", rules.any_pattern),
        ]
    return Engine(
        name="peft" if version is None else f"peft=={text}",
        version=text,
        proof="run" if version is None else "read: config.py and model.py of each tagged release",
        command="PeftModel.from_pretrained(model, {path!r})",
        keeps=frozenset(keeps),
        peft=version,
        one_scale=old,
        rules=tuple(table),
    )


_OTHER_LAYERS = Rule(
    "other-layers",
    IGNORED,
    "utils/adapter.py, build_layer_weight_lookup",
    partial(rules.other_names, _TGI_LAYERS),
    _MERGE,
)
ENGINES: Mapping[str, Engine] = {
    e.name: e
    for e in (
        _vllm(),
        _sglang(),
        _punica(
            "tgi",
            "main, 45d95bd",
            "text-generation-launcher --model-id {base} --lora-adapters {name}={path}",
            (0, 10, 0),
            (_OTHER_LAYERS,),
        ),
        _punica(
            "lorax",
            "main, 03679f3",
            "lorax-launcher --model-id {base} --adapter-id {path} --adapter-source local",
            (0, 4, 0),
            (),
        ),
        _llamacpp(),
        _peft(None, "0.21.2"),
    )
}


def named(name: str) -> Engine:
    """The engine that a user names.

    Raises:
        UsageError: there is none.
    """
    head, equals, version = name.partition("==")
    if head == "peft" and equals:
        return _peft(peft_versions.parse(version), version)
    if name not in ENGINES:
        raise UsageError(f"no engine {name!r:.40}", hint=f"one of {', '.join(ENGINES)}, or peft==0.10")
    return ENGINES[name]


def findings(engine: Engine, f: Facts) -> Iterator[Finding]:
    """What the rules of an engine find in an adapter; what it does about it stands in the message."""
    convert = f"adapterpack convert SRC DST --for {engine.name}"
    for rule in engine.rules:
        for key, message in rule.find(f):
            yield Finding(
                rule.code,
                key,
                f"{rule.effect} by {engine.name} {engine.version}: {message} [{rule.source}]",
                (rule.fix or convert).format(engine=engine.name),
                warning=rule.effect == NOTED,
            )
