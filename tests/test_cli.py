"""The command line: exit codes, one line per error, JSON that holds what is promised, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
from peft import LoraConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import load_file, save_file

CLI = [sys.executable, "-m", "adapterpack"]


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


def run(*args: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> Done:
    done = subprocess.run(
        [*CLI, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    oracle.save_base(oracle.tiny_model("llama"), root / "base")
    targets = ["q_proj", "k_proj", "down_proj"]
    oracle.make_adapter(root / "lora", LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    vb = {"r": 4, "num_vectors": 40, "vector_length": 16, "target_modules": targets}
    oracle.make_adapter(root / "vblora", VBLoRAConfig(**vb), scale=1.0)
    oracle.make_adapter(root / "vera", VeraConfig(r=4, target_modules=targets))
    return root


def test_every_verb_holds_the_promised_json(place: Path, tmp_path: Path) -> None:
    base = place / "base"
    calls: dict[str, tuple[Sequence[str | Path], set[str]]] = {
        "inspect": (
            [place / "vblora"],
            {"method", "encoding", "base_model", "modules", "tensors", "bytes", "resumable"},
        ),
        "check": ([place / "lora"], {"healthy", "findings"}),
        "convert": (
            [place / "vblora", tmp_path / "top", "--to", "topk"],
            {"output", "bytes_in", "bytes_out", "grade", "dropped", "max_rel_error"},
        ),
        "compress": (
            [place / "vblora", tmp_path / "small"],
            {"output", "bytes_in", "bytes_out", "grade", "dropped", "max_rel_error"},
        ),
        "verify": (
            [place / "vblora", tmp_path / "top"],
            {"equal", "max_abs_error", "max_rel_error", "modules", "findings"},
        ),
        "merge": (
            [place / "lora", "--into", base, "--output", tmp_path / "merged"],
            {"output", "modules_merged", "tensors_changed", "tensors_copied", "bytes_written", "unmatched"},
        ),
    }
    for verb, (args, fields) in calls.items():
        done = run(verb, *args, "--json")
        assert done.code == 0, done.err
        assert done.json["schema"] == f"adapterpack.{verb}/1"
        assert fields <= done.json.keys(), verb
    module = run("verify", place / "vblora", tmp_path / "top", "--json").json["modules"][0]
    assert {"name", "max_abs_error", "rel_error"} <= module.keys()
    inspected = run("inspect", tmp_path / "top", "--json").json
    assert (inspected["encoding"], inspected["resumable"], inspected["modules"]) == ("topk", False, 6)
    merged = run("inspect", place / "lora", "--json").json
    assert merged["bytes"] == oracle.adapter_bytes(place / "lora")


def test_bytes_are_those_of_the_directories(place: Path, tmp_path: Path) -> None:
    done = run("compress", place / "vblora", tmp_path / "small", "--json").json
    assert done["bytes_in"] == oracle.adapter_bytes(place / "vblora")
    assert done["bytes_out"] == oracle.adapter_bytes(tmp_path / "small") < done["bytes_in"]
    merged = run("merge", place / "lora", "--into", place / "base", "--output", tmp_path / "m", "--json").json
    assert merged["bytes_written"] == oracle.adapter_bytes(tmp_path / "m")
    assert (merged["modules_merged"], merged["tensors_changed"]) == (6, 6)
    assert merged["tensors_copied"] == len(load_file(tmp_path / "m" / "model.safetensors")) - 6


def test_quiet_prints_the_path_and_nothing_else(place: Path, tmp_path: Path) -> None:
    assert run("compress", place / "vblora", tmp_path / "s", "-q") == Done(0, f"{tmp_path / 's'}\n", "")
    assert run("inspect", place / "vblora", "-q") == Done(0, "", "")
    assert run("check", place / "lora", "-q") == Done(0, "", "")
    assert run("verify", place / "vblora", tmp_path / "s", "-q") == Done(0, "", "")


def test_a_dry_run_writes_nothing_and_foretells_the_bytes(place: Path, tmp_path: Path) -> None:
    for verb, args in {
        "convert": [place / "vblora", tmp_path / "x", "--to", "lora"],
        "compress": [place / "vblora", tmp_path / "x"],
        "merge": [place / "lora", "--into", place / "base", "--output", tmp_path / "x"],
    }.items():
        planned = run(verb, *args, "--dry-run", "--json")
        assert planned.code == 0
        assert list(tmp_path.iterdir()) == []
        done = run(verb, *args, "--json").json
        size = "bytes_written" if verb == "merge" else "bytes_out"
        assert planned.json[size] == done[size] == oracle.adapter_bytes(tmp_path / "x")
        for file in (tmp_path / "x").iterdir():
            file.unlink()
        (tmp_path / "x").rmdir()


def test_a_plan_of_a_merge_names_what_is_computed_and_what_it_takes(place: Path, tmp_path: Path) -> None:
    args = ["merge", place / "lora", "--into", place / "base", "--output", tmp_path / "x", "--dry-run"]
    rows = dict(line.split("  ", 1) for line in run(*args).out.splitlines() if "  " in line)
    rows = {name.strip(): text.strip() for name, text in rows.items()}
    tensors = load_file(place / "base" / "model.safetensors")
    assert rows["tensors"] == f"6 to compute, {len(tensors) - 6} to copy byte for byte"
    assert rows["memory"].startswith("about ") and rows["arithmetic"] in ("numpy", "torch cpu")
    assert "model.layers.*.self_attn.q_proj.weight x 2" in rows["touched"]
    planned = run(*args, "--json").json
    touched = [t for name, t in tensors.items() if name.split(".")[-2] in ("q_proj", "k_proj", "down_proj")]
    assert planned["bytes_computed"] == sum(t.numel() * t.element_size() for t in touched)
    assert len(planned["touched"]) == len(touched) == 6 and planned["reused"] == []
    assert run(*args, "--device", "cpu", "--rounding", "once", "--json").json["arithmetic"] == "numpy"
    assert list(tmp_path.iterdir()) == []


def test_digests_are_recorded_on_request_and_jobs_are_at_least_one(place: Path, tmp_path: Path) -> None:
    args = ["merge", place / "lora", "--into", place / "base", "--output", tmp_path / "x"]
    for jobs in ("0", "-1", "x"):
        done = run(*args, "--jobs", jobs)
        assert done.code == 2 and "--jobs" in done.err and list(tmp_path.iterdir()) == []
    assert run(*args, "--jobs", "1", "--digest", "-q") == Done(0, f"{tmp_path / 'x'}\n", "")
    said = json.loads((tmp_path / "x" / "adapterpack_lineage.json").read_text())
    weights = (tmp_path / "x" / "model.safetensors").read_bytes()
    assert said["files"]["written"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()


def _spoil(place: Path, tmp_path: Path, name: str, change: Any) -> Path:
    target = tmp_path / name
    target.mkdir()
    for file in (place / "lora").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    change(target)
    return target


def _config(**fields: Any) -> Any:
    def change(target: Path) -> None:
        path = target / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _tensors(change: Any) -> Any:
    def spoil(target: Path) -> None:
        path = target / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def test_bad_input_gives_one_line_and_the_right_code(place: Path, tmp_path: Path) -> None:
    base, out = place / "base", tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    fifo = tmp_path / "fifo"
    fifo.mkdir()
    (fifo / "adapter_config.json").write_bytes((place / "lora" / "adapter_config.json").read_bytes())
    os.mkfifo(fifo / "adapter_model.safetensors")

    def truncate(target: Path) -> None:
        path = target / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-7])

    def to_nan(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values()))[0] = float("nan")

    def foreign(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)

    def unknown(tensors: dict[str, Any]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C"] = next(iter(tensors.values())).clone()

    existing = tmp_path / "existing"
    existing.mkdir()
    truncated = _spoil(place, tmp_path, "truncated", truncate)
    nan = _spoil(place, tmp_path, "nan", _tensors(to_nan))
    stranger = _spoil(place, tmp_path, "stranger", _tensors(foreign))
    extra = _spoil(place, tmp_path, "extra", _tensors(unknown))
    pissa = _spoil(place, tmp_path, "pissa", _config(init_lora_weights="pissa"))
    into = ["--into", base, "--output", out]
    cases: list[tuple[int, str, list[str | Path]]] = [
        (1, "invalid", ["inspect", tmp_path / "nowhere"]),
        (1, "invalid", ["inspect", empty]),
        (1, "invalid", ["inspect", fifo]),
        (1, "invalid", ["check", truncated]),
        (1, "exists", ["compress", place / "vblora", existing]),
        (1, "invalid", ["merge", nan, *into]),
        (1, "wrong-base", ["merge", stranger, *into]),
        (4, "loss-refused", ["merge", extra, *into]),
        (1, "unsupported", ["merge", pissa, *into]),
        (1, "wrong-base", ["convert", place / "vera", out, "--to", "lora"]),
        (1, "unsupported", ["convert", place / "lora", out, "--to", "topk"]),
        (4, "loss-refused", ["convert", place / "lora", out, "--dtype", "bf16"]),
        (2, "usage", ["convert", place / "lora", out]),
        (2, "usage", ["convert", place / "lora", out, "--dtype", "int8"]),
        (2, "usage", ["compress", place / "lora", tmp_path / "out.gguf"]),
        (2, "usage", ["compress", place / "lora", place / "lora" / "inside"]),
        (2, "usage", ["verify", place / "lora", place / "lora", "--max-error", "nan"]),
        (2, "usage", ["frobnicate"]),
        (1, "write-failed", ["compress", place / "lora", tmp_path / "no" / "parent"]),
    ]
    before = {p: oracle.tree_hash(p) for p in (base, place / "lora", place / "vera", nan, extra)}
    for code, name, args in cases:
        done = run(*args)
        lines = done.err.strip().splitlines()
        assert done.code == code, (args, done)
        assert lines[0].startswith("error: ") and len(lines) <= 2, (args, done.err)
        assert "Traceback" not in done.err
        assert all(line.startswith("hint: ") for line in lines[1:])
        as_json = run(*args, "--json")
        assert as_json.code == code
        assert as_json.json["error"]["code"] == name, (args, as_json.out)
        assert set(as_json.json["error"]) == {"code", "message", "hint"}
        assert not out.exists()
    assert before == {p: oracle.tree_hash(p) for p in before}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".adapterpack")]


def test_differences_and_faults_are_exit_code_3(place: Path, tmp_path: Path) -> None:
    scaled = _spoil(place, tmp_path, "scaled", _config(lora_alpha=12))
    done = run("verify", place / "lora", scaled)
    assert done.code == 3
    assert "different" in done.out and "self_attn.q_proj" in done.out
    zero = _spoil(place, tmp_path, "zero", _tensors(lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k]))
    done = run("check", zero, "--json")
    assert done.code == 3
    assert {f["code"] for f in done.json["findings"] if not f["warning"]} == {"all-zero", "untrained"}
    assert run("merge", zero, "--into", place / "base", "--output", tmp_path / "m").code == 1


def test_overwrite_replaces_and_nothing_else_does(place: Path, tmp_path: Path) -> None:
    assert run("compress", place / "vblora", tmp_path / "x").code == 0
    first = oracle.tree_hash(tmp_path / "x")
    assert run("compress", place / "vera", tmp_path / "x").code == 1
    assert oracle.tree_hash(tmp_path / "x") == first
    assert run("compress", place / "vera", tmp_path / "x", "--overwrite").code == 0
    assert oracle.tree_hash(tmp_path / "x") != first
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert run("compress", place / "vera", place / "vera", "--overwrite").code == 2


def test_several_adapters_are_a_list_and_a_subfolder_chooses(place: Path, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for file in (place / "lora").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    done = run("inspect", tmp_path)
    assert done.code == 2
    assert "blue, red" in done.err
    assert run("inspect", tmp_path, "--subfolder", "red", "--json").json["modules"] == 6
    assert run("inspect", tmp_path, "--subfolder", "../x").code == 2


def test_one_safetensors_file_with_its_config_beside_it_is_a_source(place: Path) -> None:
    done = run("inspect", place / "lora" / "adapter_model.safetensors", "--json")
    assert done.json["modules"] == 6


def test_a_single_traceback_only_on_request(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "nowhere", env={"ADAPTERPACK_DEBUG": "1"})
    assert done.code == 1
    assert "Traceback" in done.err


@pytest.mark.parametrize(
    "args", [["--version"], ["inspect", "SRC"], ["inspect", "SRC", "--base", "BASE"], ["check", "SRC"]]
)
def test_looking_never_imports_torch(place: Path, args: list[str]) -> None:
    words = [str(place / {"SRC": "vblora", "BASE": "base"}[a]) if a in ("SRC", "BASE") else a for a in args]
    code = f"""
import sys
sys.argv = ["adapterpack", *{words!r}]
from adapterpack.cli import main
try:
    main()
finally:
    assert not {{"torch", "peft", "transformers"}} & sys.modules.keys()
    if {args[0]!r} in ("--version", "inspect"):
        assert "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "AssertionError" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing(place: Path, tmp_path: Path, number: int, code: int) -> None:
    # A base that takes a while: the signal comes while it is written.
    wait = """
import sys, time
from adapterpack.io import safetensors
from adapterpack.containers import peft
def slow(*args):
    print("writing", flush=True)
    time.sleep(60)
peft.safetensors.write = slow
from adapterpack.cli import main
main()
"""
    args = [sys.executable, "-c", wait, "convert", str(place / "vblora"), str(tmp_path / "x"), "--to", "topk"]
    child = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    time.sleep(0.1)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error(place: Path) -> None:
    command = f"{sys.executable} -m adapterpack inspect {place / 'lora'} --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("0", "")


def test_help_names_every_option_of_the_design() -> None:
    options = {
        "inspect": "--base",
        "check": "--base",
        "convert": "--to --dtype --base --max-error --warm-start --overwrite --dry-run",
        "compress": "--lossless --equivalent --max-error --base --overwrite --dry-run",
        "verify": "--base --max-error --device",
        "merge": "--into --output --weight --rounding --verify --device --jobs --digest --overwrite --dry-run",
    }
    for verb, names in options.items():
        text = run(verb, "--help").out
        assert all(name in text for name in [*names.split(), "--json", "--quiet"]), verb
