"""`adapter_model.bin`, read only on `--allow-pickle`: tensors, never objects.

The one module that may call `torch.load`, always with `weights_only=True`, in a child process with
bounded memory and time: whatever a hostile file does to the loader, it does there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from adapterpack.errors import InvalidFile
from adapterpack.io import safetensors
from adapterpack.io.files import OpenFile
from adapterpack.tensor import Memory, Tensor

_SECONDS = 600
_CHILD = """
import resource, sys
source, target, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
import torch
from safetensors.torch import save_file
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
state = torch.load(source, map_location="cpu", weights_only=True)
if not isinstance(state, dict) or not all(
    isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
):
    raise SystemExit("it is no mapping of names to tensors")
save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, target, metadata={"format": "pt"})
"""


def read(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a `torch.save`d state dict, in memory.

    Raises:
        InvalidFile: it holds anything else than tensors, or cannot be read.
    """
    with OpenFile(path) as file:
        size = file.size
    with tempfile.TemporaryDirectory(prefix="adapterpack-") as scratch:
        target = Path(scratch) / "tensors.safetensors"
        limit = (8 << 30) + 6 * size
        call = [sys.executable, "-I", "-c", _CHILD, str(path.resolve()), str(target), str(limit)]
        try:
            done = subprocess.run(call, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired as e:
            raise InvalidFile(f"{path} did not load within {_SECONDS} seconds") from e
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["the loader was killed"])[-1]
            raise InvalidFile(f"{path} is not a state dict of tensors: {last:.200}")
        with OpenFile(target) as out:
            header = safetensors.read(out)
            return {name: Tensor(t.dtype, t.shape, Memory(t.bytes())) for name, t in header.tensors.items()}
