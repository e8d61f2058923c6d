"""Packing adapters: sizes beside other compressors and the limit that entropy sets, then errors, speed and memory.

    pip install -r benchmarks/requirements.txt                         # the peers; without them, fewer columns filled
    python benchmarks/pack.py --work DIR                               # 10 minutes on two cores, 2 GB of disk
    python benchmarks/pack.py --work DIR --only speed --rounds 5
    python benchmarks/pack.py --work DIR --quick                       # no Llama2-7B shapes: minutes less

`pack_corpus.py` trains and makes the adapters once; they stay in DIR, and so do the peers' sizes (`peers.json`).
Every pack is unpacked again: "restored" means that each file of the directory came back byte for byte.

Sizes are of the whole directory, as fractions of it. `pack_peers.py` says what form each peer gets. The limit is the
order-0 entropy of sign, exponent and mantissa, counted apart per role and shape, and a container's overhead: names
and small files under zstd -19, 48 bytes a tensor, 2 KB. Sparse values count as a mask and what it leaves. A pack has
to stay within F times the limit: 1.01, for bfloat16 values 1.015, for sparse ones 1.03.

Speed is of whole processes, interpreter start and imports included, until the output is durable: adapterpack fsyncs
what it writes, `sync FILE` follows the others. Page cache warm, outputs removed before, in turns, in the other order
every second round; "x" is how many times as fast as zstd (-3, or -d) in the same round, above 1 faster. CPU is user +
system. Peak is the resident set, no lower than this script's own (some 20 MB). Linux only. Prints Markdown.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pack_corpus as corpus
from merge import Figure, environment, machine, measured, spread, warm

PARTS = ("sizes", "references", "approximate", "speed")
COMMAND = [sys.executable, "-m", "adapterpack"]
FACTORS = dict.fromkeys(corpus.BF16_VALUES, 1.015) | {"lora-sparse": 1.03}
FACTOR = 1.01


# ---- Ours, as a user calls it


def adapterpack(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def packs() -> bool:
    """Whether this adapterpack knows the pack."""
    return adapterpack("unpack", "--help").returncode == 0


def packed(work: Path, name: str, *options: str | Path, ways_back: Sequence[str | Path] = ()) -> int | None:
    """Bytes of the pack `work/ours.apack`, which is unpacked again to `work/ours`; None where either failed."""
    target, back = work / "ours.apack", work / "ours"
    target.unlink(missing_ok=True)
    shutil.rmtree(back, ignore_errors=True)
    for command in (["compress", work / name, target, *options], ["unpack", target, back, *ways_back]):
        done = adapterpack(*command)
        if done.returncode:
            print(f"{shlex.join(map(str, command))}: exit code {done.returncode}\n{done.stderr}", file=sys.stderr)
            return None
    return target.stat().st_size


def restored(work: Path, name: str, size: int | None) -> str:
    """Whether every file came back byte for byte, and no other; of the last pack, if there is one."""
    if size is None:
        return "-"
    left, right = work / name, work / "ours"
    files = [{path.relative_to(side) for path in side.rglob("*") if path.is_file()} for side in (left, right)]
    same = [filecmp.cmp(left / file, right / file, shallow=False) for file in files[0] & files[1]]
    return "yes" if files[0] == files[1] and all(same) else "**no**"


# ---- Cells of a table


def table(*rows: Sequence[str]) -> None:
    """The first row is the head."""
    head, *body = rows
    for row in (head, ["---"] * len(head), *body):
        print(f"| {' | '.join(row)} |")
    print()


def count(size: int | None) -> str:
    return "-" if size is None else f"{size:,}"


def figure(size: int | str | None, raw: int) -> str:
    """A fraction, or why there is none."""
    if isinstance(size, str):
        return size
    return "-" if size is None else f"{size / raw:.4f}"


def within(size: int | None, allowed: float) -> str:
    if size is None:
        return "-"
    return "yes" if size <= allowed else "**no**"


# ---- Sizes


def size_row(work: Path, name: str, ours: bool, cache: dict[str, int | str]) -> list[str]:
    import pack_peers as peers

    adapter = peers.read(work / name)
    raw, limit = adapter.bytes_of_all, peers.limit(adapter)
    theirs = {}
    for peer in peers.PEERS:
        print(f"{name}: {peer}", file=sys.stderr)
        theirs[peer] = peers.peer_size(adapter, peer, cache)
    del adapter
    factor = FACTORS.get(name, FACTOR)
    mine = packed(work, name) if ours else None
    least = min(size for size in theirs.values() if isinstance(size, int))
    return [
        corpus.TITLES[name],
        f"{raw:,}",
        *(figure(size, raw) for size in theirs.values()),
        f"{limit / raw:.4f}",
        f"{factor}",
        figure(mine, raw),
        f"{mine / limit:.4f}" if mine else "-",
        within(mine, factor * limit),
        within(mine, least - 1),
        restored(work, name, mine),
    ]


def sizes(work: Path, names: Sequence[str], ours: bool) -> None:
    import pack_peers as peers

    kept = work / "peers.json"
    cache = json.loads(kept.read_text()) if kept.exists() else {}
    last = ["limit", "F", "ours", "ours / limit", "within F", "smallest", "restored"]
    rows: list[Sequence[str]] = [["adapter", "bytes", *peers.PEERS, *last]]
    for name in names:
        rows.append(size_row(work, name, ours, cache))
        kept.write_text(json.dumps(cache, indent=1, sort_keys=True))
    print("\n### Sizes, lossless\n\nFractions of the directory's bytes; every figure holds the small files too.\n")
    table(*rows)


# ---- References: what need not be stored


def reference_cases(work: Path, names: Sequence[str]) -> list[tuple[str, str, float, str]]:
    """What, in which adapter, bytes allowed, and why so many."""
    import pack_peers as peers

    equal, sparse = peers.read(work / "lora-equal"), peers.read(work / "lora-sparse")
    one_each = FACTOR * peers.limit(equal, unique=True)
    masked = FACTORS["lora-sparse"] * peers.values_entropy(sparse) + peers.overhead(sparse)
    cases = [
        ("VeRA's projections, by recipe", "vera", 103_000, "103 KB"),
        ("LoRA, half of its tensors equal to others", "lora-equal", one_each, "1.01 x limit of the others"),
        ("LoRA, 90 % zeros", "lora-sparse", masked, "1.03 x entropy of mask and values, + overhead"),
    ]
    if "7b-vblora-topk" in names:
        cases.append((corpus.TITLES["7b-vblora-topk"], "7b-vblora-topk", 1_960_000, "1.96 MB"))
    return cases


def embeddings_row(work: Path, ours: bool) -> list[str]:
    """What saved embeddings that equal the base's add to a pack that knows the base."""
    import pack_peers as peers

    saved = peers.read(work / "lora-embeddings").bytes_of_all - peers.read(work / "lora").bytes_of_all
    base = ["--base", corpus.base_dir()]
    alone = packed(work, "lora") if ours else None
    mine = packed(work, "lora-embeddings", *base, ways_back=base) if ours else None
    added = None if mine is None or alone is None else mine - alone
    back = restored(work, "lora-embeddings", mine)
    rule, allowed = "1 % of them", saved * 0.01
    title = "saved embeddings, equal to the base's: added to the pack"
    return [title, f"{saved:,}", rule, f"{allowed:,.0f}", count(added), within(added, allowed), back]


def series_row(work: Path, kind: str, step: int, ours: bool) -> list[str]:
    """A step of a run where the one before it is at hand."""
    import pack_peers as peers

    name, before = kind if step == corpus.RUNS[kind].steps else f"{kind}-{step}", work / f"{kind}-{step - 100}"
    adapter = peers.read(work / name)
    raw, theirs = adapter.bytes_of_all, peers.with_parent(adapter, peers.read(before))
    # Steps grow smaller: the last one is held to a figure, the one before it is shown.
    share = {"lora": 0.79, "vblora": 0.12}[kind] if step == corpus.RUNS[kind].steps else math.inf
    parent = ["--parent", before]
    mine = packed(work, name, *parent, ways_back=parent) if ours else None
    return [
        f"{corpus.TITLES[kind]}, step {step}",
        f"{raw:,}",
        *(figure(size, raw) for size in theirs.values()),
        f"{share}" if share < 1 else "",
        figure(mine, raw),
        within(mine, share * raw) if share < 1 else "",
        restored(work, name, mine),
    ]


def references(work: Path, names: Sequence[str], ours: bool) -> None:
    rows: list[Sequence[str]] = [["what", "bytes", "rule", "allowed", "ours", "within", "restored"]]
    for title, name, allowed, rule in reference_cases(work, names):
        mine = packed(work, name) if ours else None
        raw = sum(path.stat().st_size for path in (work / name).iterdir())
        back = restored(work, name, mine)
        rows.append([title, f"{raw:,}", rule, f"{allowed:,.0f}", count(mine), within(mine, allowed), back])
    rows.append(embeddings_row(work, ours))
    head = ["step, given the one before", "bytes", "zstd -19 --patch-from", "z4ai delta", "allowed", "ours"]
    steps = [series_row(work, kind, step, ours) for kind in ("vblora", "lora") for step in (200, 300)]
    print("\n### What need not be stored\n")
    table(*rows)
    table([*head, "within", "restored"], *steps)


# ---- Approximate


def approximate(work: Path, names: Sequence[str], ours: bool) -> None:
    import pack_peers as peers

    parts = peers.read(work / "lora-r64").parts.values()
    values = sum(math.prod(part.shape) for part in parts)
    cases = [("lora-r64", "6e-3", 8.3), ("lora-r64", "2.4e-2", 6.3), ("lora-r64", "9.6e-2", 4.3)]
    allowed = {(name, error): bits * values / 8 for name, error, bits in cases}
    if "7b-vblora" in names:
        allowed |= {("7b-vblora", "3e-4"): 1_050_000, ("7b-vblora", "1e-2"): 660_000}
    rows: list[Sequence[str]] = [["adapter", "E", "allowed", "ours", "bits a value", "within", "error, worst module"]]
    for (name, error), size in allowed.items():
        mine = packed(work, name, "--max-error", error) if ours else None
        found, bits = "-", "-"
        if mine is not None:
            done = adapterpack("verify", work / name, work / "ours", "--max-error", error, "--json")
            report = json.loads(done.stdout)
            found = f"{report['max_rel_error']:.2e}" + ("" if report["equal"] else " **beyond E**")
            bits = f"{8 * mine / values:.3f}"
        limit = f"{size:,.0f}" + (f" ({8 * size / values:.1f} bits)" if name == "lora-r64" else "")
        shown = bits if name == "lora-r64" else ""
        rows.append([corpus.TITLES[name], error, limit, count(mine), shown, within(mine, size), found])
    print("\n### Approximate\n\nThe error is what `adapterpack verify` measures on what `unpack` gives.\n")
    table(*rows)


# ---- Speed and memory


def python_zstd(way: str, source: str, target: str) -> None:
    """Stands in for the command where that is not installed."""
    import zstandard

    with Path(source).open("rb") as read, Path(target).open("wb") as write:
        if way == "pack":
            zstandard.ZstdCompressor(level=3).copy_stream(read, write)
        else:
            zstandard.ZstdDecompressor().copy_stream(read, write)


def then_sync(command: Sequence[str | Path], output: Path) -> list[str]:
    return ["sh", "-c", f"{shlex.join(map(str, command))} && sync {shlex.quote(str(output))}"]


def commands(work: Path, name: str, ours: bool) -> dict[str, dict[str, tuple[list[str], Path]]]:
    """For both directions: each way's command and what it writes. The first way is what the others are held to."""
    source = work / name / corpus.WEIGHTS
    frame, plain, pack, back = work / "speed.zst", work / "speed.bin", work / "speed.apack", work / "speed"
    stand_in = [sys.executable, __file__, "python-zstd"]
    tool = shutil.which("zstd")
    pack_zstd = [tool, "-3", "-q", source, "-o", frame] if tool else [*stand_in, "pack", source, frame]
    unpack_zstd = [tool, "-d", "-q", frame, "-o", plain] if tool else [*stand_in, "unpack", frame, plain]
    packing = {"zstd -3": (then_sync(pack_zstd, frame), frame)}
    unpacking = {"zstd -d": (then_sync(unpack_zstd, plain), plain)}
    unpacking["cp (the floor)"] = (then_sync(["cp", source, plain], plain), plain)
    if tool:
        frames = work / "speed-all.zst"
        packing["zstd -3 -T0"] = (then_sync([tool, "-3", "-T0", "-q", source, "-o", frames], frames), frames)
    if ours:
        packing["adapterpack compress"] = ([*COMMAND, "compress", str(work / name), str(pack)], pack)
        unpacking["adapterpack unpack"] = ([*COMMAND, "unpack", str(pack), str(back)], back)
    return {"pack": packing, "unpack": unpacking}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def turns(work: Path, name: str, ways: dict[str, tuple[list[str], Path]], rounds: int) -> dict[str, list[Figure]]:
    """One round more than asked: the first is untimed, for memory that the machine has not touched yet is slow."""
    figures: dict[str, list[Figure]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways if number % 2 else reversed(ways):
            command, output = ways[way]
            remove(output)
            os.sync()
            warm(work / name)
            done = measured(command, work / "log")
            print(f"round {number}, {name}, {way}: {done.wall:.2f} s", file=sys.stderr)
            if number:
                figures[way].append(done)
    return figures


def speed_rows(work: Path, name: str, ours: bool, rounds: int) -> list[list[str]]:
    source = work / name / corpus.WEIGHTS
    mega = source.stat().st_size / 1e6
    rows = []
    for ways in commands(work, name, ours).values():
        figures = turns(work, name, ways, rounds)
        reference = next(iter(figures.values()))
        for way, mine in figures.items():
            ratios = [theirs.wall / one.wall for one, theirs in zip(mine, reference, strict=True)]
            output = ways[way][1]
            size = f"{output.stat().st_size:,}" if output.is_file() else ""
            walls = [one.wall for one in mine]
            rows.append(
                [
                    f"{corpus.TITLES[name]}, {mega:.0f} MB",
                    way,
                    spread(walls),
                    f"{mega / statistics.median(walls):.0f}",
                    f"{statistics.median(one.cpu for one in mine):.2f}",
                    f"{max(one.peak for one in mine):.0f}",
                    "1" if mine is reference else spread(ratios),
                    size,
                ]
            )
    return rows


def speed(work: Path, names: Sequence[str], ours: bool, rounds: int) -> None:
    files = [name for name in ("7b-lora-r64", "7b-vblora-slice", "7b-vblora") if name in names]
    if not files:
        print("\n### Speed and memory\n\nNo file is large enough without the Llama2-7B shapes.\n")
        return
    measured([*COMMAND, "--version"], work / "log")  # Byte code is written, and imports are in the page cache.
    start = [measured([*COMMAND, "--version"], work / "log").wall for _ in range(rounds)]
    head = [
        "file",
        "way",
        "wall s, median (min-max)",
        "MB/s",
        "CPU s",
        "peak MB",
        "x zstd, median (min-max)",
        "bytes",
    ]
    rows = [row for name in files for row in speed_rows(work, name, ours, rounds)]
    for path in work.glob("speed*"):
        remove(path)
    print(f"\n### Speed and memory\n\n{rounds} rounds. `adapterpack --version` alone takes {spread(start)} s.\n")
    table(head, *rows)


# ---- All of it

MEASURES: dict[str, Callable[[Path, Sequence[str], bool], None]] = {
    "sizes": sizes,
    "references": references,
    "approximate": approximate,
}


def run_part(part: str, work: str, ours: str, *names: str) -> None:
    """In a process of its own: numpy and torch in this one would lend their memory to what speed measures."""
    MEASURES[part](Path(work), names, ours == "True")


def tools(work: Path) -> str:
    ask = [sys.executable, "-c", "import pack_peers; print(', '.join(pack_peers.versions()))"]
    found = subprocess.run(ask, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
    version = "zstd command not installed"
    if tool := shutil.which("zstd"):
        said = subprocess.run([tool, "--version"], stdout=subprocess.PIPE, text=True, check=True)
        version = "zstd command " + "".join(re.findall(r"v([\d.]+\d)", said.stdout))
    return f"{machine(work, '')}, {found.stdout.strip()}, {version}"


def bench(work: Path, options: argparse.Namespace) -> None:
    corpus.build(work, quick=options.quick)
    names = [name for name in corpus.TITLES if not (options.quick and name in corpus.LARGE)]
    ours = packs()
    print(f"\n## The pack\n\n`python benchmarks/pack.py`: {tools(work)}")
    if not ours:
        print("\nThis adapterpack has no `unpack`: its columns are empty.")
    sys.stdout.flush()
    for part in options.only or PARTS:
        if part == "speed":
            speed(work, names, ours, options.rounds)
        else:
            child = [sys.executable, __file__, "part", part, str(work), str(ours), *names]
            subprocess.run(child, env=environment(), check=True)
        sys.stdout.flush()
        for name in ("ours", "ours.apack", "log"):
            remove(work / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack sizes, errors and speed; the docstring says what is measured.")
    parser.add_argument("--work", metavar="DIR", type=Path, help="made if missing, and kept; default: temporary")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="of speed")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; can be given several times")
    parser.add_argument("--quick", action="store_true", help="no Llama2-7B shapes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench(options.work.resolve() if options.work else Path(scratch), options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        run_part(*sys.argv[2:])
    elif sys.argv[1:2] == ["python-zstd"]:
        python_zstd(*sys.argv[2:])
    else:
        main()
