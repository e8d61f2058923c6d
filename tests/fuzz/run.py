"""Coverage-guided fuzzing of every reader, with atheris: `make fuzz`.

`python tests/fuzz/run.py` fuzzes all targets for FUZZ_SECONDS each (30), as many at once as there are cores;
`python tests/fuzz/run.py TARGET [FILE or libFuzzer option ...]` one of them, or only the inputs named.
Inputs that fail are kept in fuzz-failures/; a fixed one becomes a case of formats/*/invalid or of a test.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FAILURES = Path("fuzz-failures")
_MEGABYTES, _SECONDS_PER_INPUT = 512, 1


def fuzz(name: str, options: list[str]) -> None:
    """Fuzz one target in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["adapterpack"]):
        import targets

    targets.keep_patterns_short()
    target = targets.TARGETS[name]

    def one(data: bytes) -> None:
        targets.judge(target, data)

    # Whatever is imported late and made once is so now: it is not the input that takes that time.
    for data in target.seeds() if name not in ("outer", "manifest", "pack") else ():
        one(data)
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def _run(name: str, seconds: int) -> tuple[str, int, str]:
    with tempfile.TemporaryDirectory() as scratch:
        corpus, seeds = Path(scratch) / "corpus", Path(scratch) / "seeds"
        corpus.mkdir()
        seeds.mkdir()
        # Another process: what making packs takes is not to be counted.
        subprocess.run([sys.executable, __file__, "--seeds", name, str(seeds)], check=True)
        done = subprocess.run(
            [
                *(sys.executable, __file__, name, str(corpus), str(seeds)),
                *(f"-max_total_time={seconds}", f"-rss_limit_mb={_MEGABYTES}", f"-timeout={_SECONDS_PER_INPUT}"),
                *(f"-artifact_prefix={FAILURES}/{name}-", "-print_final_stats=1", "-max_len=65536"),
            ],
            capture_output=True,
            text=True,
            check=False,
            errors="replace",
        )
    return name, done.returncode, done.stderr + done.stdout


def write_seeds(name: str, directory: Path) -> None:
    """Each seed of a target as a file."""
    import targets

    for data in targets.TARGETS[name].seeds():
        (directory / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> int:
    """Fuzz all targets; the number of those that failed."""
    import targets

    seconds = int(os.environ.get("FUZZ_SECONDS", "30"))
    FAILURES.mkdir(exist_ok=True)
    failed, began = 0, time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, code, log in pool.map(lambda name: _run(name, seconds), targets.TARGETS):
            stats = dict(line.split(": ")[0:2] for line in log.splitlines() if line.startswith("stat::"))
            runs = stats.get("stat::number_of_executed_units", "?").strip()
            memory = stats.get("stat::peak_rss_mb", "?").strip()
            print(f"{name:12} {'ok' if code == 0 else 'FAILED':7} {runs:>9} runs, {memory:>4} MB", flush=True)
            if code:
                failed += 1
                print("\n".join(log.splitlines()[-60:]), flush=True)
    print(f"{len(targets.TARGETS)} targets, {failed} failed, {time.monotonic() - began:.0f} s")
    if not any(FAILURES.iterdir()):
        FAILURES.rmdir()
    return failed


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    match sys.argv[1:]:
        case []:
            sys.exit(min(main(), 1))
        case ["--seeds", name, directory]:
            write_seeds(name, Path(directory))
        case [name, *options]:
            fuzz(name, options)
