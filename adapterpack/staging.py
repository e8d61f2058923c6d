"""The files of a push, made in a directory of their own: compact, complete, nothing that was not meant for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from adapterpack import card, containers, engines, hub, methods, release
from adapterpack.adapter import Adapter
from adapterpack.checkpoint import Checkpoint
from adapterpack.containers import apack, peft
from adapterpack.conversion import Conversion
from adapterpack.engine_rules import Facts
from adapterpack.errors import AdapterpackError, InvalidFile, Unsupported
from adapterpack.io.files import OpenFile, WholeFile
from adapterpack.limits import CARD_BYTES
from adapterpack.pack import pack
from adapterpack.release import PushedFile, Release
from adapterpack.serving import command
from adapterpack.shrink import shrink
from adapterpack.tensor import digest

if TYPE_CHECKING:
    from adapterpack.adapter import Progress

_GRADES = ("lossless", "equivalent", "approximate")
_PACK_ALONE, _PACK_BESIDE = "adapter.apack", "packed/adapter.apack"
_PUBLIC = (
    *("README.md", "LICENSE*", "NOTICE*", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "*.tiktoken", "*.spm", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
)
"""What is pushed beside config and weights. Notes, logs and arguments that lie there may not be for everybody."""


@dataclass(frozen=True)
class Wish:
    """What was asked for."""

    target: hub.Reference
    base_model: str | None
    license: str | None
    native: bool
    packed: bool
    allow_references: bool
    include: tuple[str, ...]


class Staged:
    """What will be pushed, but for the cards: path in the repository to file."""

    def __init__(self, stage: Path, files: dict[str, Path], card_text: str, found: Release, left: list[str]) -> None:
        self.stage, self.files, self.card_text, self.release, self.left = stage, files, card_text, found, left
        self.notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        place: Path,
        subfolder: str | None,
        allow_pickle: bool,
        wish: Wish,
        stage: Path,
        progress: Progress | None,
    ) -> Staged:
        """Make the files in a directory of their own."""
        with containers.open_checkpoint(place, subfolder=subfolder, allow_pickle=allow_pickle) as c:
            base = release.base_model(c.config, wish.base_model)
            kept = {n: s for n, s in c.files.items() if _is_public(n, wish.include)}
            _refuse_links(c, kept)
            left = sorted({*(n for n in c.files if n not in kept), *c.left})
            config = release.mended_config(c.config, base)
            clean = replace(c, files=kept, state={}, left=())
            if config is not None:
                clean = replace(clean, config=config, config_bytes=None)
            copy = stage / "source"
            containers.write_checkpoint(clean, copy, overwrite=False, sources=())
            conversion = _compact(copy, stage / "native", progress)
            files = {} if not wish.native else _below(stage / "native")
            found = cls._pack(c, place, config is not None, wish, copy, stage, progress) if wish.packed else None
            if found is not None:
                files[_PACK_BESIDE if wish.native else _PACK_ALONE] = found
            text = text_of(kept[card.CARD].read(0, kept[card.CARD].nbytes)) if card.CARD in kept else ""
            # Refused, if it must be, before anybody is asked.
            card.fields(text)
            described = _describe(c, wish, base, conversion, files)
        files.pop(card.CARD, None)
        paths = {_in_repo(wish, name): path for name, path in files.items()}
        staged = cls(stage, paths, text, described, left)
        # Of a copy it says how else to gain something, which is not the question here.
        staged.notes = conversion.notes if wish.native and conversion.grade != "lossless" else ()
        if found == place and left:
            staged.notes = (f"the pack is pushed as it is, and holds this, too: {', '.join(left)}",)
            staged.left = []
        return staged

    @staticmethod
    def _pack(
        c: Checkpoint, place: Path, mended: bool, wish: Wish, copy: Path, stage: Path, progress: Progress | None
    ) -> Path:
        """The pack: the source itself where it is one and nothing of it had to be mended."""
        if c.pack is None or mended or wish.native:
            pack(copy, stage / _PACK_ALONE, progress=progress)
            return stage / _PACK_ALONE
        m = c.pack.manifest
        needs = m.parent.name if m.parent is not None else m.base
        if needs is not None and not wish.allow_references:
            raise Unsupported(
                f"{place} cannot be unpacked without {needs}",
                hint="push it without --pack-only, which gives files that stand alone; or --allow-references",
            )
        return place

    def with_cards(self, there: Mapping[str, str]) -> tuple[dict[str, Path], tuple[str, ...]]:
        """All files, once the cards that are there are known: path to text."""
        top, folder = there.get(card.CARD, ""), self.release.folder
        if folder:
            own = self.card_text or there.get(join(folder, card.CARD), "")
            self._write(join(folder, card.CARD), release.folder_card(own, self.release))
        # What PEFT writes for a card that nobody filled in is no reason to drop one that somebody did.
        elif self.card_text and not (top and "[More Information Needed]" in self.card_text):
            fields = card.fields(self.card_text)
            more = {key: value for key, value in card.fields(top).items() if key not in fields}
            top = card.with_fields(self.card_text, more)
        text, notes = release.top_card(top, self.release)
        self._write(card.CARD, text)
        self._write(join(folder, peft.MANIFEST), release.manifest(self.release))
        return dict(sorted(self.files.items())), (*self.notes, *notes)

    def _write(self, path: str, content: str | bytes) -> None:
        place = self.stage / "texts" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content.encode() if isinstance(content, str) else content)
        self.files[path] = place


def _is_public(name: str, include: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in (*_PUBLIC, *include))


def _refuse_links(c: Checkpoint, kept: Mapping[str, object]) -> None:
    """Raise InvalidFile for a link that leads out of the adapter's directory: what is there was not named."""
    if c.pack is not None:
        return
    directory = Path(c.name)
    # In the Hub's cache all files are links: into the blobs of the repository, or those that repositories share.
    caches = (parent.parent for parent in directory.parents if parent.name.startswith("models--"))
    within = [place.resolve() for place in (directory, *caches)]
    named = [source.path for source in kept.values() if isinstance(source, WholeFile)]
    for path in (*named, directory / peft.CONFIG, directory / peft.WEIGHTS):
        if path.is_symlink() and not any(path.resolve().is_relative_to(w) for w in within):
            raise InvalidFile(f"{path} is a link that leads out of the adapter", hint="put the file itself there")


def _compact(copy: Path, target: Path, progress: Progress | None) -> Conversion:
    """The most compact form that stock PEFT reads; as it is, where the method is not known."""
    try:
        return shrink(
            copy,
            target,
            lossless=False,
            max_error=None,
            base=None,
            device="cpu",
            subfolder=None,
            allow_pickle=False,
            overwrite=False,
            dry_run=False,
            progress=progress,
        )
    except Unsupported as e:
        with containers.open_checkpoint(copy) as c:
            size = containers.write_checkpoint(c, target, overwrite=False, sources=())
            note = f"pushed as it is: {e.message}"
            return Conversion(
                output=str(target),
                method=c.peft_type.lower(),
                encoding=None,
                bytes_in=c.bytes,
                bytes_out=size,
                grade="lossless",
                dropped=(),
                max_rel_error=0.0,
                notes=(note,),
            )


def _describe(
    c: Checkpoint, wish: Wish, base: release.BaseModel, conversion: Conversion, files: Mapping[str, Path]
) -> Release:
    adapter, ranks = _known(c)
    listed = tuple(_pushed(_in_repo(wish, name), path) for name, path in sorted(files.items()) if name != card.CARD)
    task = c.config.get("task_type")
    made = [(conversion.grade, conversion.max_rel_error)] if wish.native else []
    if c.pack is not None:
        # What was lost when the source was packed is lost here, too.
        made.append((c.pack.manifest.grade, float(c.pack.manifest.error or 0)))
    return Release(
        repo=wish.target.repo,
        folder=wish.target.path,
        method=conversion.method,
        encoding=conversion.encoding if wish.native else (adapter.encoding if adapter else None),
        ranks=ranks,
        modules=len(adapter.modules) if adapter else 0,
        bytes_in=c.bytes,
        bytes_out=sum(f.bytes for f in listed if not f.path.endswith(apack.SUFFIX) or not wish.native),
        grade=max((grade for grade, _ in made), key=_GRADES.index, default=_GRADES[0]),
        error=sum(error for _, error in made),
        base=base,
        task=task if isinstance(task, str) else None,
        license=wish.license,
        pack=next((n for n in files if n.endswith(apack.SUFFIX)), None),
        native=wish.native,
        serve=_vllm(Path(conversion.output), wish, base) if wish.native else None,
        files=listed,
    )


def _known(c: Checkpoint) -> tuple[Adapter | None, tuple[int, ...]]:
    try:
        method, adapter = methods.parse(c)
        return adapter, tuple(sorted(set(method.ranks(adapter).values())))
    except AdapterpackError:
        return None, ()


def _vllm(native: Path, wish: Wish, base: release.BaseModel) -> str | None:
    """The command that serves it; None: vLLM would not read it right, or not from a folder of a repository."""
    engine = engines.named("vllm")
    with containers.open_checkpoint(native) as c:
        adapter, _ = _known(c)
        if adapter is None or c.config.get("task_type") != "CAUSAL_LM" or wish.target.path:
            return None
        if any(not f.warning for f in engines.findings(engine, Facts.of(adapter, None))):
            return None
        return command(engine, adapter, Path(wish.target.repo))


def _pushed(path: str, place: Path) -> PushedFile:
    with OpenFile(place) as file:
        return PushedFile(path, file.size, digest(file.whole()))


def pushed(files: Mapping[str, Path]) -> tuple[PushedFile, ...]:
    """What files are, by path in the repository."""
    return tuple(_pushed(path, place) for path, place in files.items())


def _in_repo(wish: Wish, name: str) -> str:
    return join(wish.target.path, name)


def join(folder: str, name: str) -> str:
    """A path in a repository."""
    return f"{folder}/{name}" if folder else name


def _below(directory: Path) -> dict[str, Path]:
    return {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}


def text_of(data: bytes) -> str:
    """A card as text. Raises InvalidFile: it is none, or too long."""
    if len(data) > CARD_BYTES:
        raise InvalidFile(f"{card.CARD} has {len(data):,} bytes; at most {CARD_BYTES:,} are read")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise InvalidFile(f"{card.CARD} is no UTF-8 text", hint="save it as UTF-8") from e
