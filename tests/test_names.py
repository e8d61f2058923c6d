"""Names on disk that are not the adapter's: nested models both ways, against PEFT; what is refused; laws."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers as tf
import zoo
from conftest import Files
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import adapterpack
from adapterpack.base import Base
from adapterpack.errors import WrongBase
from adapterpack.names import Disk

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
BOTH = ["q_proj", "down_proj", "qkv", "fc1", "linear_1"]
"""Modules of the text model, of the other tower and of what joins them."""
ENDS = ["embed_tokens", "lm_head"]
UNTIED = ("llava", "qwen2-vl", "qwen2.5-vl", "qwen2-audio")


class Nested:
    """A model of several parts, an adapter that PEFT trained on it, and what PEFT makes of both."""

    def __init__(self, root: Path, kind: str, dtype: str) -> None:
        made = zoo.model(kind, DTYPES[dtype])
        self.base = oracle.save_base(made, root / "base")
        self.names = zoo.disk_names(made, self.base)
        targets = BOTH + ENDS if kind in UNTIED else BOTH
        config = LoraConfig(r=3, lora_alpha=5, target_modules=targets)
        self.adapter = root / "adapter"
        oracle.make_adapter(self.adapter, config, base=oracle.load_base(self.base), scale=0.3)
        expected = oracle.peft_merge(self.base, self.adapter)
        assert expected.load.clean
        oracle.save_base(expected.model, root / "peft")
        self.expected = load_file(root / "peft" / "model.safetensors")

    def as_on_disk(self, destination: Path) -> Path:
        """The adapter with the names that transformers 4 gave the modules: those on disk."""
        modules = {n.rpartition(".")[0]: d.rpartition(".")[0] for n, d in self.names.items()}
        tensors = {}
        for key, tensor in load_file(self.adapter / "adapter_model.safetensors").items():
            key = key.removeprefix("base_model.model.")
            module = re.split(r"\.(?=lora_|base_layer)", key)[0]
            tensors[f"base_model.model.{modules[module]}{key.removeprefix(module)}"] = tensor
        return Files.edited(self.adapter, destination, dict.fromkeys(Files.tensors(self.adapter)) | tensors)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, str], Nested] = {}

    def get(kind: str, dtype: str = "f32") -> Nested:
        if (kind, dtype) not in made:
            made[kind, dtype] = Nested(tmp_path_factory.mktemp("nested"), kind, dtype)
        return made[kind, dtype]

    return get


def _same(merged: Path, expected: dict[str, torch.Tensor], names: dict[str, str] | None = None) -> None:
    found = load_file(merged / "model.safetensors")
    wanted = {(names or {}).get(n, n): t for n, t in expected.items()}
    assert found.keys() == wanted.keys()
    assert [n for n in found if not Files.same(found[n], wanted[n])] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_an_adapter_with_module_names_merges_into_names_on_disk(
    kind: str, dtype: str, nested: Any, tmp_path: Path
) -> None:
    """Trained under transformers 5, which names the modules of these models otherwise than it saves them."""
    n = nested(kind, dtype)
    result = adapterpack.merge(n.adapter, n.base, tmp_path / "m", verify="full")
    assert any(note.startswith("names on disk: model.language_model.* -> ") for note in result.notes)
    assert result.notes == adapterpack.merge(n.adapter, n.base, tmp_path / "d", dry_run=True).notes
    _same(tmp_path / "m", n.expected)
    zoo.loads_whole(tmp_path / "m")


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_an_adapter_with_names_on_disk_merges_into_them_and_into_module_names(
    kind: str, nested: Any, tmp_path: Path
) -> None:
    """Trained under transformers 4; the base is as it was, or saved with the new names."""
    n = nested(kind)
    old = n.as_on_disk(tmp_path / "old")
    assert adapterpack.merge(old, n.base, tmp_path / "m").notes == ()
    _same(tmp_path / "m", n.expected)
    back = {d: name for name, d in n.names.items()}
    new_base = zoo.renamed(n.base, tmp_path / "new-base", back)
    assert any("language_model" in note for note in adapterpack.merge(old, new_base, tmp_path / "m2").notes)
    _same(tmp_path / "m2", n.expected, back)
    zoo.loads_whole(tmp_path / "m2")
    # And no rule is needed where both are new.
    assert adapterpack.merge(n.adapter, new_base, tmp_path / "m3").notes == ()
    _same(tmp_path / "m3", n.expected, back)


def _text_model(kind: str, made: Any, directory: Path) -> Any:
    """The language model of a model of several parts, with its weights, saved on its own."""
    part = made.config.get_text_config()
    part.tie_word_embeddings = bool(made.config.tie_word_embeddings)
    text = {"llava": tf.LlamaForCausalLM, "gemma3": tf.Gemma3ForCausalLM, "mistral3": tf.MistralForCausalLM}[kind](
        part
    )
    weights = {k.replace("model.language_model.", "model."): v for k, v in made.state_dict().items()}
    missing, _ = text.load_state_dict({k: v for k, v in weights.items() if k in text.state_dict()}, strict=False)
    assert not missing
    return oracle.save_base(text, directory)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "mistral3"])
def test_a_text_models_adapter_merges_into_the_whole_and_the_other_way_round(
    kind: str, nested: Any, tmp_path: Path
) -> None:
    n = nested(kind)
    text = _text_model(kind, oracle.load_base(n.base), tmp_path / "text")
    # The vision tower has a q_proj of the same shape in a layer of the same number.
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(text), scale=0.3)
    expected = oracle.peft_merge(text, tmp_path / "a")
    adapterpack.merge(tmp_path / "a", text, tmp_path / "t")
    original = load_file(n.base / "model.safetensors")
    for base, before in ((n.base, "language_model.model."), (None, "model.language_model.")):
        if base is None:
            base = zoo.renamed(n.base, tmp_path / "new-base", {d: name for name, d in n.names.items()})
            original = load_file(base / "model.safetensors")
        result = adapterpack.merge(tmp_path / "a", base, tmp_path / before)
        assert result.tensors_changed == 4
        assert result.notes == (f"names on disk: model.* -> {before}* (4 tensors)",)
        changed = {n: t for n, t in expected.items() if n.endswith(("q_proj.weight", "down_proj.weight"))}
        _same(tmp_path / before, original | {before + n.removeprefix("model."): t for n, t in changed.items()})
        zoo.loads_whole(tmp_path / before)
    # The other way round: an adapter of the whole model that changes its text model alone.
    config = LoraConfig(r=3, target_modules=r".*language_model.*(q_proj|down_proj)")
    oracle.make_adapter(tmp_path / "b", config, base=oracle.load_base(n.base), scale=0.3)
    whole = oracle.peft_merge(n.base, tmp_path / "b")
    adapterpack.merge(tmp_path / "b", text, tmp_path / "t2")
    merged = load_file(tmp_path / "t2" / "model.safetensors")
    merged.pop("lm_head.weight", None)
    assert all(Files.same(t, whole[k.replace("model.", "model.language_model.", 1)]) for k, t in merged.items())
    zoo.loads_whole(tmp_path / "t2")
    # With its vision tower there is no place for it.
    with pytest.raises(WrongBase, match="lacks"):
        adapterpack.merge(n.adapter, text, tmp_path / "t3")


def test_towers_that_old_files_nest_once_more(nested: Any, tmp_path: Path) -> None:
    """LLaVA's files on the Hub say `vision_tower.vision_model.encoder`; transformers 5 has no `vision_model`."""
    n = nested("llava")
    deeper = {d: d.replace("vision_tower.", "vision_tower.vision_model.") for d in n.names.values()}
    base = zoo.renamed(n.base, tmp_path / "base", deeper)
    expected = oracle.peft_merge(base, n.adapter)
    adapterpack.merge(n.adapter, base, tmp_path / "m")
    _same(tmp_path / "m", {deeper[n.names[k]]: t for k, t in expected.items()})
    zoo.loads_whole(tmp_path / "m")


def test_a_tower_alone_that_its_adapter_does_not_name(tmp_path: Path) -> None:
    """CLIP's vision model: `encoder.layers` in transformers 5, `vision_model.encoder.layers` in older files."""
    plain = oracle.save_base(zoo.model("clip-vision"), tmp_path / "plain")
    names = {k: f"vision_model.{k}" for k in load_file(plain / "model.safetensors")}
    base = zoo.renamed(plain, tmp_path / "base", names)
    oracle.make_adapter(tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]), base=oracle.load_base(base))
    expected = oracle.peft_merge(base, tmp_path / "a")
    result = adapterpack.merge(tmp_path / "a", base, tmp_path / "m")
    assert result.notes == ("names on disk: encoder.* -> vision_model.encoder.* (2 tensors)",)
    _same(tmp_path / "m", expected, names)
    zoo.loads_whole(tmp_path / "m")


def test_a_body_without_its_prefix_and_old_layer_norms(workshop: Any, tmp_path: Path) -> None:
    """A BERT of the first days: no `bert.`, gamma and beta."""
    plain = workshop.base("bert")
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["LayerNorm", "pooler"])
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(plain), scale=0.3)
    old = {k: re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", k) for k in load_file(plain / "model.safetensors")}
    old = {k: "bert." + re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", v) for k, v in old.items()}
    base = zoo.renamed(plain, tmp_path / "base", old)
    expected = oracle.peft_merge(base, tmp_path / "a")
    result = adapterpack.merge(tmp_path / "a", base, tmp_path / "m", verify="full")
    assert sum("-> bert." in note for note in result.notes) == 3 and "10 tensors end otherwise" in result.notes[-1]
    _same(tmp_path / "m", expected, old)
    zoo.loads_whole(tmp_path / "m")


@pytest.mark.parametrize("kind", ["vit", "dinov2", "swin"])
def test_vision_models_whose_layers_have_other_names_on_disk(kind: str, tmp_path: Path) -> None:
    base = oracle.save_base(zoo.model(kind), tmp_path / "base")
    names = zoo.disk_names(oracle.load_base(base), base)
    assert any(n != d for n, d in names.items())
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "fc1", "fc2"], modules_to_save=["classifier"])
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(base), scale=0.3)
    expected = oracle.peft_merge(base, tmp_path / "a")
    assert expected.load.clean
    result = adapterpack.merge(tmp_path / "a", base, tmp_path / "m", verify="full")
    assert any("attention.q_proj -> attention." in note for note in result.notes)
    _same(tmp_path / "m", {names[k]: t for k, t in expected.items() if k in names})
    zoo.loads_whole(tmp_path / "m")
    # An adapter with the old names, on a base with the new ones.
    for pairs in (names, {d: n for n, d in names.items()}):
        found = Disk(list(pairs.values())).find(pairs)
        assert {t: found.on_disk(t) for t in pairs} == pairs


# ---------------------------------------------------------------- ties


@pytest.mark.parametrize("kind", ["llava-tied", "paligemma", "gemma3", "mistral3", "internvl", "aya"])
def test_the_ends_of_a_nested_model_are_found_and_tied(kind: str, nested: Any, tmp_path: Path) -> None:
    n = nested(kind)
    new_base = zoo.renamed(n.base, tmp_path / "new-base", {d: name for name, d in n.names.items()})
    for path, embedding, head in (
        (n.base, "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        (new_base, "model.language_model.embed_tokens.weight", "lm_head.weight"),
    ):
        if path == new_base and "lm_head.weight" in load_file(new_base / "model.safetensors"):
            continue
        with Base(path) as base:
            assert (base.embedding, base.head, base.tied) == (embedding, head, True)
            for name in ("lm_head.weight", "language_model.lm_head.weight"):
                assert base.has(name) and base.tensor(name) is base.tensors[embedding]
            assert not base.has("vision_tower.lm_head.weight") and not base.has("vision_tower.head.weight")


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2-audio", "llava"])
def test_an_untied_nested_head_is_its_own(kind: str, nested: Any) -> None:
    with Base(nested(kind).base) as base:
        assert base.head in base.tensors and base.embedding in base.tensors and not base.tied


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("kind", ["llava-tied", "gemma3"])
def test_tied_ends_of_a_nested_model_part(kind: str, module: str, nested: Any, tmp_path: Path) -> None:
    n = nested(kind)
    oracle.make_adapter(
        tmp_path / "a", LoraConfig(r=2, target_modules=[module]), base=oracle.load_base(n.base), scale=0.3
    )
    adapterpack.merge(tmp_path / "a", n.base, tmp_path / "m", verify="full")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    merged = zoo.loads_whole(tmp_path / "m")
    ends = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    before = load_file(n.base / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert [Files.same(end.detach(), before) for end in ends] == [module == "lm_head", module == "embed_tokens"]
    adapted, _ = oracle.peft_load(n.base, tmp_path / "a")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_embeddings_that_differ_are_not_tied_whatever_the_config_says(workshop: Any, tmp_path: Path) -> None:
    """transformers 5 keeps both then; mistral3 and internvl say `tied` by default."""
    base = Path(shutil.copytree(workshop.base("llama", tie=True), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    oracle.make_adapter(tmp_path / "a", config, base=oracle.load_base(base), scale=0.3)
    with Base(base) as opened:
        assert opened.says_tied and not opened.tied
    expected = oracle.peft_merge(base, tmp_path / "a")
    adapterpack.merge(tmp_path / "a", base, tmp_path / "m", verify="full")
    _same(tmp_path / "m", expected)


def test_the_text_models_embeddings_are_chosen_of_several(tmp_path: Path) -> None:
    def made(name: str, *weights: str) -> Base:
        (tmp_path / name).mkdir()
        save_file({w: torch.ones(4, 2) for w in weights}, tmp_path / name / "model.safetensors")
        return Base(tmp_path / name)

    thinker = "thinker.model.embed_tokens.weight"
    with made("omni", thinker, "talker.model.embed_tokens.weight", "thinker.lm_head.weight") as base:
        assert (base.embedding, base.head) == (thinker, "thinker.lm_head.weight")
    with made("mtp", "model.embed_tokens.weight", "model.layers.61.embed_tokens.weight") as base:
        assert base.embedding == "model.embed_tokens.weight"
    with made("other", "a.embed_tokens.weight", "b.embed_tokens.weight") as base:
        assert base.embedding is None and not base.tied
    with made("fuyu", "vision_embed_tokens.weight", "language_model.model.embed_tokens.weight") as base:
        assert base.head == "language_model.lm_head.weight"


# ---------------------------------------------------------------- what is refused

Q = "self_attn.q_proj.weight"


def _layers(stem: str, count: int = 2) -> list[str]:
    return [f"{stem}.layers.{n}.{Q}".removeprefix(".") for n in range(count)]


@pytest.mark.parametrize(
    ("stem", "disk"),
    [
        ("vision_tower.encoder", ["model"]),
        ("model.vision_tower.encoder", ["language_model.model"]),
        ("vision_tower", [""]),
        ("audio_tower", ["language_model.model", "vision_tower"]),
        ("model.visual", ["model", "model.language_model"]),
        ("model", ["vision_tower.encoder"]),
        ("model", ["vision_tower.model"]),
        ("", ["vision_tower"]),
        ("language_model.model", ["vision_tower", "audio_tower"]),
        ("model.decoder", ["model.encoder", "encoder"]),
        ("encoder", ["decoder", "model.decoder"]),
        ("encoder", ["vision_model.encoder", "text_model.layers"]),
        ("model", ["talker.model", "mtp"]),
        ("vit", ["model"]),
        ("model.vit", ["model"]),
        ("qformer.encoder", ["other.encoder"]),
    ],
)
def test_one_tower_is_never_another(stem: str, disk: list[str]) -> None:
    names = Disk([n for s in disk for n in _layers(s, 4)]).find(_layers(stem))
    assert [names.on_disk(t) for t in _layers(stem)] == [None, None] and not names.rules


@pytest.mark.parametrize(
    ("stem", "disk"),
    [
        ("model.language_model", "model.language_model.model"),
        ("model.language_model", "thinker.model"),
        ("model", "model.text_model"),
        ("model.text_model", "text_model.model"),
        ("", "model"),
        ("_orig_mod.model", "model"),
        ("bert.encoder", "encoder"),
        ("encoder", "bert.encoder"),
        ("model.decoder", "decoder"),
        ("timm_model", ""),
        ("model.vision_tower", "model.vision_tower.timm_model"),
        ("model.vision_tower.encoder", "vision_tower.vision_model.encoder"),
        ("model.visual", "thinker.visual"),
        ("model.vision_tower", "visual"),
    ],
)
def test_known_nestings_are_found_both_ways_beside_another_tower(stem: str, disk: str) -> None:
    beside = "audio_tower" if "vis" in stem else "vision_tower" if "encoder" not in stem else "talker.model"
    for old, new in ((stem, disk), (disk, stem)):
        names = Disk(_layers(new) + _layers(beside, 4)).find(_layers(old))
        assert [names.on_disk(t) for t in _layers(old)] == _layers(new)


@pytest.mark.parametrize(
    ("stem", "disk"),
    [
        ("language_model", ["model", "model.language_model"]),
        ("model", ["foo", "bar.model"]),
        ("encoder", ["encoder_q.encoder", "encoder_k.encoder"]),
        ("encoder", ["a.encoder", "b.encoder"]),
    ],
)
def test_two_ways_are_refused_and_named(stem: str, disk: list[str]) -> None:
    try:
        names = Disk([n for s in disk for n in _layers(s)]).find(_layers(stem))
    except WrongBase as e:
        assert all(f"{s}.layers.0" in e.message for s in disk) and e.hint
    else:
        assert stem == "encoder" and names.on_disk(_layers(stem)[0]) is None


def test_a_tower_with_fewer_layers_is_not_left_for_another_that_has_enough() -> None:
    disk = Disk(_layers("language_model.model", 2) + _layers("perceiver", 4))
    assert disk.find(_layers("model", 4)).on_disk(_layers("perceiver", 4)[3].replace("perceiver", "model")) is None
    # Names that would do as they stand, but not all of them, do not count.
    disk = Disk(_layers("model", 2) + _layers("model.language_model", 4))
    assert disk.find(_layers("model", 4)).on_disk(f"model.layers.1.{Q}") == f"model.language_model.layers.1.{Q}"


def test_two_targets_that_would_be_one_tensor_are_refused() -> None:
    targets = _layers("model") + _layers("model.language_model")
    names = Disk(_layers("language_model.model")).find(targets)
    with pytest.raises(WrongBase, match=r"would both be language_model\.model\.layers\.0"):
        names.refuse_doubles(targets)


def test_experts_move_with_their_layers_though_they_lie_apart() -> None:
    expert = "layers.0.mlp.experts.3.down_proj.weight"
    disk = Disk([*_layers("language_model.model"), f"language_model.model.{expert}"])
    fused = "model.language_model.layers.0.mlp.experts.down_proj"
    for targets in ([fused], [fused, *_layers("model.language_model")]):
        names = disk.find(targets)
        assert names.on_disk(fused) is None
        assert names.on_disk(f"model.language_model.{expert}") == f"language_model.model.{expert}"


# ---------------------------------------------------------------- laws

NESTINGS = ["model", "language_model", "text_model", "thinker"]
WORDS = ["foo", "bar", "bert", "backbone", "x1"]
OTHERS = ["vision_tower", "visual", "audio_tower", "talker", "encoder", "mtp"]


@given(
    path=st.lists(st.sampled_from(NESTINGS + WORDS), max_size=3),
    decoys=st.lists(st.lists(st.sampled_from(NESTINGS + WORDS + OTHERS), max_size=3), max_size=3),
    layers=st.integers(1, 6),
    data=st.data(),
)
def test_the_renaming_found_is_the_one_that_was_done(
    path: list[str], decoys: list[list[str]], layers: int, data: st.DataObject
) -> None:
    """A llama's names with other prefixes, among towers with the same names: found, or not; never another."""
    ends = ["norm.weight", "embed_tokens.weight"]
    tails = [f"layers.{n}.{m}" for n in range(4) for m in (Q, "self_attn.q_proj.bias", "mlp.up_proj.weight")] + ends
    wanted = data.draw(st.lists(st.sampled_from(tails), min_size=1, unique=True))
    true = {f"model.{t}": ".".join([*path, t]) for t in tails}
    other: set[str] = set()
    for words in decoys:
        # A decoy is another tower: its name says so, or nothing known is in the way of the true one.
        if set(words) & set(OTHERS) or (set(words) & set(WORDS) and not set(path) & set(WORDS)):
            other |= {".".join([*words, t]) for t in (*(f"layers.{n}.{Q}" for n in range(layers)), *ends)}
    targets = [f"model.{t}" for t in wanted]
    try:
        names = Disk(other | set(true.values())).find(targets)
    except WrongBase:
        return
    for target in targets:
        # As it stands it is taken where it is there: nobody could tell.
        assert names.on_disk(target) in (true[target], None) or set(targets) <= other | set(true.values())
    if not other:
        assert [names.on_disk(t) for t in targets] == [true[t] for t in targets]


@given(kind=st.sampled_from(zoo.KINDS), back=st.booleans(), data=st.data())
def test_any_part_of_a_nested_models_names_is_found_or_refused(
    kind: str, back: bool, data: st.DataObject, all_names: dict[str, dict[str, str]]
) -> None:
    names = all_names[kind]
    if back:
        names = {d: m for m, d in names.items()}
    targets = data.draw(st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=6, unique=True))
    found = Disk(list(names.values())).find(targets)
    assert [found.on_disk(t) for t in targets] == [names[t] for t in targets]


@pytest.fixture(scope="module")
def all_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    found = {}
    for kind in zoo.KINDS:
        made = zoo.model(kind)
        names = zoo.disk_names(made, oracle.save_base(made, tmp_path_factory.mktemp("names")))
        # A tied head is its embedding on disk.
        found[kind] = {m: d for m, d in names.items() if m != "lm_head.weight" or d.endswith("lm_head.weight")}
    return found


def test_check_and_verify_know_the_names_too(nested: Any, tmp_path: Path) -> None:
    n = nested("gemma3")
    assert adapterpack.check(n.adapter, base=n.base).healthy
    old = n.as_on_disk(tmp_path / "old")
    adapterpack.merge(n.adapter, n.base, tmp_path / "m")
    for adapter in (n.adapter, old):
        assert adapterpack.verify(adapter, tmp_path / "m", base=n.base).equal
    # One after the other, one with the old names and one with the new.
    adapterpack.merge([n.adapter, old], n.base, tmp_path / "two")
    adapterpack.merge([old, old], n.base, tmp_path / "same")
    _same(tmp_path / "two", load_file(tmp_path / "same" / "model.safetensors"))
