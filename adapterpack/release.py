"""What is said of an adapter in its repository: the card, for people and the Hub, and the manifest, for `pull`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterpack import card, hub
from adapterpack.errors import InvalidFile, UsageError
from adapterpack.io import json as strict_json
from adapterpack.version import __version__

SCHEMA = "adapterpack.manifest/1"
_PIPELINES = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
_OURS = {"peft", "adapterpack"}
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_LEGACY_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class PushedFile:
    """A file of a push.

    Attributes:
        path: In the repository.
        bytes: Its size.
        sha256: Its digest.
    """

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BaseModel:
    """The base that a pushed adapter names.

    Attributes:
        name: On the Hub.
        revision: What the config pins it to; None: nothing.
        commit: The commit that was at hand here, for the card; None: not known.
    """

    name: str
    revision: str | None
    commit: str | None

    @property
    def pinned(self) -> str | None:
        return self.revision or self.commit


@dataclass(frozen=True)
class Release:
    """What is known of an adapter that is pushed.

    Attributes:
        repo: The repository.
        folder: In it; empty: the top.
        method, encoding, ranks, modules: As `inspect` says.
        bytes_in, bytes_out: Of the source, and of what PEFT or `unpack` reads.
        grade, error: What was lost.
        base: Its base.
        task: `task_type` of the config.
        license: As the user named it; None: not named.
        pack: Path of the pack in the folder; None: there is none.
        native: Are there files that PEFT reads?
        serve: The command for vLLM; None: vLLM does not read it, or not from there.
        files: Without the card.
    """

    repo: str
    folder: str
    method: str
    encoding: str | None
    ranks: tuple[int, ...]
    modules: int
    bytes_in: int
    bytes_out: int
    grade: str
    error: float
    base: BaseModel
    task: str | None
    license: str | None
    pack: str | None
    native: bool
    serve: str | None
    files: tuple[PushedFile, ...]


def base_model(config: Mapping[str, Any], named: str | None) -> BaseModel:
    """The base as the Hub knows it: what the user named, else what the config names.

    Raises:
        UsageError: it is a local path, or nothing at all.
    """
    said = config.get("base_model_name_or_path")
    own = said if isinstance(said, str) else ""
    pinned = config.get("revision") if named is None else None
    if named is not None:
        reference = hub.parse(named) if "/" in named else None
        if reference is not None and reference.path:
            raise UsageError(f"--base-model {named}: a folder in a repository is no base model")
        name = named if reference is None else reference.repo
        pinned = None if reference is None else reference.revision
    else:
        name = own
    if not name or not _is_id(name):
        known = _CACHED.search(own)
        wish = f"{known[1]}/{known[2]}" if known else "org/name"
        what = f"{name!r:.200} is no model on the Hub, but a path" if name else "the config does not name its base"
        raise UsageError(
            f"{what}: nobody else could load the adapter", hint=f"--base-model {wish} mends config and card"
        )
    revision = pinned if isinstance(pinned, str) and pinned else None
    return BaseModel(name, revision, _commit_at_hand(name, own))


def _is_id(name: str) -> bool:
    if Path(name).expanduser().exists():
        return False
    return hub.is_repo(name) or _LEGACY_ID.fullmatch(name) is not None


def _commit_at_hand(name: str, own: str) -> str | None:
    """The commit of the base in the cache, which is the one that it was trained on if nobody moved it since."""
    path = Path(own) if "snapshots" in own else hub.cached_model(name)
    last = "" if path is None else path.name
    return last if re.fullmatch(r"[0-9a-f]{40}", last) else None


def mended_config(config: Mapping[str, Any], base: BaseModel) -> dict[str, Any] | None:
    """The config with the base's name on the Hub; None: it has it already."""
    mended = {**config, "base_model_name_or_path": base.name}
    if base.revision is not None:
        mended["revision"] = base.revision
    return None if mended == config else mended


def manifest(release: Release) -> bytes:
    """What `pull` holds the files to."""
    start = f"{release.folder}/" if release.folder else ""
    files = {f.path.removeprefix(start): {"size": f.bytes, "sha256": f.sha256} for f in release.files}
    return strict_json.dump(
        {
            "schema": SCHEMA,
            "adapterpack": __version__,
            "method": release.method,
            "encoding": release.encoding,
            "grade": release.grade,
            "error": release.error,
            "source_bytes": release.bytes_in,
            "base_model": release.base.name,
            "base_revision": release.base.pinned,
            "files": files,
        }
    )


def read_manifest(data: bytes, where: str) -> dict[str, tuple[int, str]]:
    """Name of each file to its size and SHA-256. Raises InvalidFile."""
    record = strict_json.parse(data, where)
    files = record.get("files")
    if record.get("schema") != SCHEMA or not isinstance(files, dict):
        raise InvalidFile(f"{where} is no {SCHEMA}", hint="pull it with the adapterpack that pushed it, or later")
    found: dict[str, tuple[int, str]] = {}
    for name, facts in files.items():
        size, sha256 = (facts.get("size"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        if type(size) is not int or not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise InvalidFile(f"{where} is malformed at {name!r:.100}")
        found[name] = (size, sha256)
    return found


# -- the card ----------------------------------------------------------------------------------------------


def top_card(text: str, release: Release) -> tuple[str, tuple[str, ...]]:
    """The card at the top of the repository: made, or mended, and notes on what was left to the user."""
    if not text.strip():
        text = f"# {_plain(release.repo.rpartition('/')[2])}\n"
    changes, notes = _fields(card.fields(text), release)
    text = card.with_fields(text, changes)
    if release.folder:
        return card.with_section(text, _index(card.section(text), release)), notes
    return card.with_section(text, _section(release)), notes


def folder_card(text: str, release: Release) -> str:
    """The card beside an adapter that is one of several. The Hub reads none of its fields."""
    return card.with_section(text or f"# {_plain(release.folder)}\n", _section(release))


def _fields(old: Mapping[str, Any], r: Release) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields that are to be set: what the user wrote stays, unless it is wrong."""
    new: dict[str, Any] = {}
    notes: list[str] = []
    library = "peft" if r.native else "adapterpack"
    if old.get("library_name") in (None, "", *_OURS) and not (r.folder and old.get("library_name")):
        new["library_name"] = library
    elif old["library_name"] != library:
        notes.append(
            f"the card says library_name: {old['library_name']}; PEFT's downloads are counted with {library}"
        )
    bases = [b for b in _listed(old.get("base_model")) if _is_id(b)]
    if r.base.name not in bases:
        if bases and not r.folder:
            notes.append(f"the card named the base {', '.join(bases)}; the adapter names {r.base.name}")
        bases = [*bases, r.base.name] if r.folder else [r.base.name]
    new["base_model"] = bases[0] if len(bases) == 1 else bases
    new["base_model_relation"] = "adapter"
    tags = _listed(old.get("tags"))
    wanted = ["peft", _plain(r.method), "adapterpack", *(f"base_model:adapter:{b}" for b in bases)]
    stale = {t for t in tags if t.startswith("base_model:adapter:")} - set(wanted)
    new["tags"] = [*(t for t in tags if t not in stale), *(t for t in wanted if t not in tags)]
    if r.license is not None:
        new["license"] = r.license
    elif not old.get("license"):
        notes.append("the card names no license: --license apache-2.0, or whatever it is")
    pipeline = _PIPELINES.get(r.task or "", (None, ""))[0]
    if pipeline is not None and not old.get("pipeline_tag"):
        new["pipeline_tag"] = pipeline
    return new, tuple(notes)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [v for v in value or [] if isinstance(v, str)] if value else []


def _section(r: Release) -> str:
    ranks = f", rank {', '.join(map(str, r.ranks))}" if r.ranks else ""
    lost = "nothing: every tensor bit for bit" if r.grade == "lossless" else f"the change of W within {r.error:.2g}"
    at = f" at commit `{r.base.pinned}`" if r.base.pinned else ""
    rows = [
        ("method", f"{_plain(r.method)}{ranks}, {r.modules} modules"),
        ("encoding", _plain(r.encoding or "as it was saved")),
        ("base", f"[{r.base.name}](https://huggingface.co/{r.base.name}){at}"),
        ("bytes", f"{r.bytes_out:,} of {r.bytes_in:,} before"),
        ("lost", f"{lost} ({r.grade})"),
    ]
    parts = ["## Adapter", _table(("", ""), rows), *_how_to_load(r)]
    files = [(f"`{_plain(f.path)}`", f"{f.bytes:,}", f"`{f.sha256}`") for f in r.files]
    parts.append(_table(("file", "bytes", "SHA-256"), files))
    return "\n\n".join(parts)


def _how_to_load(r: Release) -> list[str]:
    place = f"{r.repo}/{r.folder}".rstrip("/")
    parts = []
    if r.native:
        model = _PIPELINES.get(r.task or "", (None, "AutoModel"))[1]
        at = f', revision="{r.base.revision}"' if r.base.revision else ""
        sub = f', subfolder="{r.folder}"' if r.folder else ""
        parts += [
            "With PEFT:",
            _code(
                "python",
                "from peft import PeftModel",
                f"from transformers import {model}",
                "",
                f'base = {model}.from_pretrained("{r.base.name}"{at})',
                f'model = PeftModel.from_pretrained(base, "{r.repo}"{sub})',
            ),
        ]
    if r.serve is not None:
        parts += ["With vLLM:", _code("sh", r.serve)]
    if r.native:
        parts += ["With each file proven by its digest:", _code("sh", f"adapterpack pull {place} adapter")]
    if r.pack is not None:
        pack = shlex.quote(f"{place}/{r.pack}" if r.native else place)
        what = "As it was before it was pushed, byte for byte:" if r.native else "A pack, which PEFT does not read:"
        more = [] if r.native else ["", '# then, in Python: PeftModel.from_pretrained(base, "adapter")']
        parts += [what, _code("sh", f"adapterpack pull {pack} adapter", *more)]
    return parts


def _index(before: str, r: Release) -> str:
    """The list of adapters of a repository with this one in it."""
    link = f"| [{_plain(r.folder)}]({r.folder}) |"
    row = f"{link} {_plain(r.method)} | {r.base.name} | {r.bytes_out:,} |"
    rows = [line for line in before.splitlines() if line.startswith("| [") and not line.startswith(link)]
    head = "| adapter | method | base | bytes |\n|---|---|---|---|"
    how = f'`PeftModel.from_pretrained(base, "{r.repo}", subfolder=...)` loads one of them.'
    return "\n".join(["## Adapters", "", head, *sorted([*rows, row]), "", how])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _plain(text: str) -> str:
    """Text from a file, without what Markdown or YAML would take for something else."""
    return re.sub(r"[^\w ./+-]", "", text)[:100]
