"""Base models: shards and their index, names and prefixes, ties, and what config.json alone says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import Workshop
from safetensors.torch import load_file, save_file

from adapterpack import limits
from adapterpack.architectures import linear_shape
from adapterpack.base import CONFIG, INDEX, SINGLE, Base
from adapterpack.errors import AdapterpackError, ChangedWhileReading, InvalidFile, Unsupported, WrongBase
from adapterpack.tensor import BF16, F16, F32

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def sharded(workshop: Workshop, tmp_path: Path) -> Path:
    """A copy of a base of several shards."""
    return Path(shutil.copytree(workshop.base("llama", shard="60KB"), tmp_path / "base"))


def _index(base: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((base / INDEX).read_text())
    change(index)
    (base / INDEX).write_text(json.dumps(index))


def _made(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    path.mkdir()
    save_file(tensors, path / SINGLE)
    if config is not None:
        (path / CONFIG).write_text(json.dumps(config))
    return path


# ---------------------------------------------------------------- shards


def test_shards_are_one_model(workshop: Workshop, sharded: Path) -> None:
    with Base(sharded) as many, Base(workshop.base("llama")) as one:
        assert len(many.shards) > 2 and list(one.shards) == [SINGLE]
        assert many.tensors.keys() == one.tensors.keys()
        assert all(many.tensors[name].equals(tensor) for name, tensor in one.tensors.items())
        for shard, header in many.shards.items():
            theirs = load_file(sharded / shard)
            assert {n: t.bytes() for n, t in header.tensors.items()} == {
                n: t.view(torch.uint8).numpy().tobytes() for n, t in theirs.items()
            }


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(InvalidFile, match=f"names {gone.name}, which is missing"):
        Base(sharded)


def test_a_truncated_shard_is_an_error(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(InvalidFile, match=shard.name):
        Base(sharded)


def test_an_index_that_names_a_missing_tensor_is_an_error(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*"))[0].name
    _index(sharded, lambda i: i["weight_map"].update({"model.ghost.weight": shard}))
    with pytest.raises(InvalidFile, match=r"says that model\.ghost\.weight is in"):
        Base(sharded)


def test_an_index_that_puts_a_tensor_in_another_shard_is_an_error(sharded: Path) -> None:
    first, second, *_ = (p.name for p in sorted(sharded.glob("model-*")))

    def swap(index: dict[str, Any]) -> None:
        name = next(n for n, s in index["weight_map"].items() if s == first)
        index["weight_map"][name] = second

    _index(sharded, swap)
    with pytest.raises(InvalidFile, match="which does not hold it"):
        Base(sharded)


def test_a_tensor_that_the_index_does_not_list_is_an_error(sharded: Path) -> None:
    _index(sharded, lambda i: i["weight_map"].pop(Q))
    with pytest.raises(InvalidFile, match=f"does not list {Q}"):
        Base(sharded)


def test_a_tensor_in_two_shards_is_an_error(sharded: Path) -> None:
    where = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(s for s in where.values() if s != where[Q])
    save_file(load_file(sharded / other) | {Q: torch.zeros(64, 64)}, sharded / other)
    with pytest.raises(InvalidFile, match=f"{Q} stands in two shards"):
        Base(sharded)


@pytest.mark.parametrize(
    "name",
    ["../base2/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b", "C:x", None, 3, ["x"]],
    ids=str,
)
def test_an_index_never_leads_outside_its_directory(workshop: Workshop, sharded: Path, name: object) -> None:
    shutil.copytree(workshop.base("llama"), sharded.parent / "base2")
    _index(sharded, lambda i: i["weight_map"].update({Q: name}))
    with pytest.raises(InvalidFile, match="the name"):
        Base(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ("[]", "object is wanted"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "stands twice"),
        ('{"weight_map": {"a": "config.json"}}', "not a valid safetensors file"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "not a valid safetensors file"),
    ],
)
def test_a_malformed_index_is_an_error(sharded: Path, index: str, message: str) -> None:
    (sharded / INDEX).write_text(index)
    with pytest.raises(InvalidFile, match=message):
        Base(sharded)


def test_an_index_of_too_many_shards_is_refused_before_any_is_opened(sharded: Path) -> None:
    many = {f"t{i}": f"s{i}.safetensors" for i in range(limits.SHARDS + 1)}
    (sharded / INDEX).write_text(json.dumps({"weight_map": many}))
    with pytest.raises(InvalidFile, match=r"names 10,001 shards"):
        Base(sharded)


def test_no_descriptor_is_left_open_when_a_base_is_refused(sharded: Path) -> None:
    _index(sharded, lambda i: i["weight_map"].pop(Q))
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208 - it is no directory of files
    for _ in range(5):
        with pytest.raises(InvalidFile):
            Base(sharded)
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_a_shard_that_changes_is_found_out(sharded: Path) -> None:
    with Base(sharded) as base:
        base.check_unchanged()
        os.utime(sorted(sharded.glob("model-*"))[1], ns=(1, 1))
        with pytest.raises(ChangedWhileReading):
            base.check_unchanged()


# ---------------------------------------------------------------- what is no base


def test_other_forms_of_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(Unsupported, match=r"as pytorch_model\.bin only"):
        Base(tmp_path)


@pytest.mark.parametrize("kind", ["empty", "file", "absent", "fifo", "config-fifo"])
def test_what_is_no_model_directory_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "base"
    if kind == "file":
        path.write_text("x")
    elif kind == "fifo":
        path.mkdir()
        os.mkfifo(path / SINGLE)
    elif kind == "config-fifo":
        path.mkdir()
        os.mkfifo(path / CONFIG)
    elif kind == "empty":
        path.mkdir()
    for weights in (True, False):
        with pytest.raises(InvalidFile):
            Base(path, weights=weights)


def test_a_config_alone_is_enough_for_shapes_and_for_nothing_else(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": "llama"}))
    with Base(tmp_path, weights=False) as base:
        assert base.tensors == {} and base.has(Q)
    with pytest.raises(InvalidFile, match="it is no base model"):
        Base(tmp_path)


# ---------------------------------------------------------------- config-only shapes


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_shapes_from_the_config_are_those_of_the_headers(workshop: Workshop, tmp_path: Path, kind: str) -> None:
    path = workshop.base(kind)
    shutil.copy(path / CONFIG, tmp_path / CONFIG)
    model = oracle.tiny_model(kind)
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert len(layers) > 4
    with Base(path) as full, Base(tmp_path, weights=False) as bare:
        for name, module in layers.items():
            assert bare.shape(f"{name}.weight") == tuple(module.weight.shape) == full.shape(f"{name}.weight"), name
            conv1d = type(module).__name__ == "Conv1D"
            assert bare.conv1d(name) is full.conv1d(name) is conv1d
        assert bare.dtype is full.dtype is F32


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "unheard-of"},
        {"model_type": ["llama"]},
        {"model_type": "llama"},
        {
            "model_type": "llama",
            "hidden_size": "64",
            "num_attention_heads": 4,
            "intermediate_size": 9,
            "vocab_size": 9,
        },
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0, "intermediate_size": 9, "vocab_size": 9},
        {
            "model_type": "llama",
            "hidden_size": -64,
            "num_attention_heads": 4,
            "intermediate_size": 9,
            "vocab_size": 9,
        },
        {
            "model_type": "llama",
            "hidden_size": 64.0,
            "num_attention_heads": 4,
            "intermediate_size": 9,
            "vocab_size": 9,
        },
        {"model_type": "llama", "text_config": {"model_type": "bert"}},
    ],
    ids=str,
)
def test_a_config_that_does_not_say_gives_an_error_and_never_a_guess(config: dict[str, Any]) -> None:
    with pytest.raises(WrongBase):
        linear_shape(config, "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("said", [["gpt2"], {"a": 1}, None, 3, "gpt2"], ids=str)
def test_any_model_type_can_be_asked_for_conv1d(tmp_path: Path, said: object) -> None:
    base = _made(tmp_path / "b", {"a.c_attn.weight": torch.ones(2, 2)}, {"model_type": said})
    with Base(base) as opened:
        assert opened.conv1d("a.c_attn") is (said == "gpt2")


@pytest.mark.parametrize(("dtype", "want"), [("f32", F32), ("bf16", BF16), ("f16", F16)])
def test_the_dtype_is_that_of_most_weights(workshop: Workshop, dtype: str, want: object) -> None:
    with Base(workshop.base("llama", dtype)) as base:
        assert base.dtype is want


# ---------------------------------------------------------------- names


def test_a_body_saved_without_its_prefix_is_found(tmp_path: Path) -> None:
    base = _made(tmp_path / "b", {"layers.0.q.weight": torch.ones(2, 2), "layers.1.q.weight": torch.ones(2, 2)})
    with Base(base) as opened:
        opened.bind(["model.layers.0.q.weight", "model.layers.1.q.weight"])
        assert opened.on_disk("model.layers.1.q.weight") == "layers.1.q.weight"
        assert opened.name_notes == ["names on disk: model.* -> * (2 tensors)"]


def test_a_model_saved_with_a_prefix_more_is_found(tmp_path: Path) -> None:
    base = _made(tmp_path / "b", {"bert.layer.0.q.weight": torch.ones(2, 2), "cls.weight": torch.ones(2, 2)})
    with Base(base) as opened:
        opened.bind(["layer.0.q.weight"])
        assert opened.on_disk("layer.0.q.weight") == "bert.layer.0.q.weight"
        assert opened.on_disk("cls.weight") == "cls.weight"
        assert opened.name_notes == ["names on disk: layer.* -> bert.layer.* (1 tensors)"]


def test_names_as_they_stand_need_no_prefix(workshop: Workshop) -> None:
    with Base(workshop.base("llama")) as base:
        base.bind([Q])
        assert base.on_disk(Q) == Q and base.name_notes == []
        base.bind(["encoder.nothing.weight"])
        assert base.on_disk("encoder.nothing.weight") is None and base.name_notes == []
        with pytest.raises(WrongBase, match=r"has no tensor encoder\.nothing"):
            base.tensor("encoder.nothing.weight")


def test_one_prefix_must_do_for_all_names(tmp_path: Path) -> None:
    base = _made(tmp_path / "b", {"a.x.weight": torch.ones(2), "b.y.weight": torch.ones(2)})
    with Base(base) as opened:
        opened.bind(["x.weight", "y.weight"])
        assert opened.on_disk("x.weight") is None and opened.on_disk("y.weight") is None


def test_two_prefixes_that_would_do_are_an_error(tmp_path: Path) -> None:
    base = _made(tmp_path / "b", {"a.x.weight": torch.ones(2), "b.x.weight": torch.ones(2)})
    with Base(base) as opened, pytest.raises(WrongBase, match=r"could be several .*: a\.x\.weight or b\.x\.weight"):
        opened.bind(["x.weight"])


# ---------------------------------------------------------------- ties


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_tied_embeddings_are_recognised(workshop: Workshop, kind: str, tie: bool) -> None:
    with Base(workshop.base(kind, tie=tie)) as base:
        assert base.tied is tie
        head = "lm_head.weight"
        assert base.has(head)
        assert base.tensor(head) is base.tensors[base.embedding if tie else head]


def test_a_tie_that_the_config_leaves_to_its_default_is_recognised_by_the_missing_head(
    workshop: Workshop, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(workshop.base("llama", tie=True), tmp_path / "b"))
    config = json.loads((path / CONFIG).read_text())
    del config["tie_word_embeddings"]
    (path / CONFIG).write_text(json.dumps(config))
    with Base(path) as base:
        assert base.tied
    config["architectures"] = ["LlamaModel"]
    (path / CONFIG).write_text(json.dumps(config))
    with Base(path) as base:
        assert not base.tied


def test_a_body_without_a_head_has_nothing_tied(workshop: Workshop) -> None:
    with Base(workshop.base("bert")) as base:
        assert not base.tied and not base.has("lm_head.weight")


def test_every_refusal_is_of_the_one_error_tree(tmp_path: Path) -> None:
    for index in ('{"weight_map": {"a": "x"}}', "{", '{"weight_map": 1}'):
        (tmp_path / INDEX).write_text(index)
        with pytest.raises(AdapterpackError):
            Base(tmp_path)
