"""Run by an interpreter that has xllamacpp: log-probabilities that llama.cpp computes with adapter directories.

    python llamacpp_reads.py LLAMA_CPP BASE SCRATCH TOKENS DIRECTORY...

LLAMA_CPP is a folder with llama.cpp's converters (from llama-cpp-python's sdist); TOKENS are numbers with commas.
Prints JSON: "base" and each directory's name to the log-probabilities of the next token, or to `{"error": text}`.
The base gets a vocabulary of made-up words: only numbers are ever given to it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

WRITE_BASE = r"""
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

def vocabulary(self):
    n = self.hparams["vocab_size"]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, n)])
    self.gguf_writer.add_token_scores([0.0] * n)
    self.gguf_writer.add_token_types([2, 3, 3] + [1] * (n - 3))
    for name, number in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(self.gguf_writer, f"add_{name}_token_id")(number)

base = Path(sys.argv[2])
hparams = ModelBase.load_hparams(base, False)
cls = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
cls.set_vocab = vocabulary
cls(base, gguf.LlamaFileType.ALL_F32, Path(sys.argv[3]), hparams=hparams).write()
"""


def run(*command: str) -> str | None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env={**os.environ})
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:300]


def logprobs(model: Path, adapter: Path | None, tokens: list[int]) -> list[float]:
    import xllamacpp as x

    p = x.CommonParams()
    p.model.path = str(model)
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.n_ctx, p.n_parallel, p.warmup, p.n_gpu_layers = 64, 1, False, 0
    if adapter is not None:
        p.lora_adapters = [x.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = x.Server(p)
    wish = {"prompt": tokens, "n_predict": 1, "n_probs": 96, "temperature": 0.0, "cache_prompt": False}
    answer = server.handle_completions(wish)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    text = json.dumps(answer)
    found = {int(i): float(v) for i, v in re.findall(r'"id": (\d+), "token": .*?"logprob": (-?[\d.e+-]+)', text)}
    return [found[i] for i in sorted(found)]


def main() -> None:
    source, base, scratch, numbers, *directories = sys.argv[1:]
    tokens, place = [int(n) for n in numbers.split(",")], Path(scratch)
    model = place / "base.gguf"
    failed = run("-c", WRITE_BASE, source, base, str(model))
    if failed:
        raise SystemExit(failed)
    said: dict[str, object] = {}
    for directory in [None, *map(Path, directories)]:
        name = "base" if directory is None else directory.name
        adapter = None if directory is None else place / f"{name}.gguf"
        failed = None
        if directory is not None:
            script = f"{source}/convert_lora_to_gguf.py"
            failed = run(script, str(directory), "--base", base, "--outfile", str(adapter), "--outtype", "f32")
        try:
            said[name] = {"error": failed} if failed else logprobs(model, adapter, tokens)
        except Exception as e:
            said[name] = {"error": str(e)[:300]}
    Path(scratch, "said.json").write_text(json.dumps(said))


main()
