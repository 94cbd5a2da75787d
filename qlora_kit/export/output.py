"""The merged model's folder: written aside shard by shard, continued after a kill, whole or not there.

    .OUT.merging/           beside the output, locked while somebody writes
        journal.json        digest of the inputs; sha256 of every shard that is done
        model/              becomes OUT by one rename, after the report is in it

Why a journal: a shard counts only when the inputs are the same and its bytes still have their hash, so a run that goes
on gives the bytes of one that was never stopped.
Imported by: merge, choose.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import files
from qlora_kit.adapter_files import has_tokenizer
from qlora_kit.base.companions import GENERATION, TOKENIZER, carry
from qlora_kit.base.quantize_model import SHARD_BYTES, Layout, size_bytes, split, write_index
from qlora_kit.console import note, progress
from qlora_kit.errors import DiskError, ModelError, NonFiniteError
from qlora_kit.export.evidence import evidence
from qlora_kit.export.stream import write_shard

if TYPE_CHECKING:
    from qlora_kit.export.merge import Merge

REPORT = "merge_report.json"
Check = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class MergeReport:
    """What was merged, written as `merge_report.json`.

    Attributes:
        inputs: digest of base, adapter and settings.
        dtype: of the weights; of the quantized ones, where they are.
        evidence: what the merge took from the update of each tensor; see `evidence`.
        proof: what the check found; None: not asked for.
        sha256: of every other file of the folder.
    """

    base: str
    adapter: str
    onto: str
    dtype: str
    merged_tensors: int
    copied_tensors: int
    bytes_written: int
    base_fingerprint: str
    inputs: str
    evidence: dict[str, Any]
    proof: dict[str, Any] | None
    sha256: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_merged(merge: Merge, out: Path, check: Check | None = None) -> MergeReport:
    """Write the merged model to the folder `out`, which may be there if it is empty or an older merge.

    Args:
        check: looks at the whole folder before it gets its name; what it returns becomes the report's `proof`.
    Raises: DiskError: `out` holds something else, or too little space; what was done is kept aside, and the same
        command goes on with it. NonFiniteError: a value is outside the output dtype. What `check` raises. In these two
        cases nothing is left.
    """
    require_apart(out, merge.base.folder, merge.adapter)
    require_replaceable(out)
    if (stored := find_merged(out, merge.digest)) is not None:
        return stored if check is None else _checked(out, stored, check)
    with _work_folder(out) as folder:
        work = _Work(folder, merge.digest)
        try:
            digests = _write_shards(work, merge)
            _write_companions(work.model, merge)
            report = _report(merge, work.model, digests, check(work.model) if check else None)
            files.write_json(work.model / REPORT, report.to_json())
        except (NonFiniteError, ModelError):
            work.clear()
            raise
        work.publish(out)
    return report


def require_apart(out: Path, base: Path, adapter: Path) -> None:
    """Raises: DiskError: `out` is, or lies in, the base's or the adapter's folder, or holds one of them."""
    inside = (out.resolve(), *out.resolve().parents)
    for folder in (base.resolve(), adapter.resolve()):
        if folder in inside or out.resolve() in folder.parents:
            raise DiskError(f"{out}: lies in the base's or the adapter's folder, or around it; choose another --out")


def require_replaceable(out: Path) -> None:
    """Raises: DiskError: `out` is there and neither empty nor a merge that nobody added a file to."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DiskError(f"{out}: is a file; choose another --out")
    found = {path.name for path in out.iterdir()}
    ours = set(_stored_report(out).get("sha256", {})) | {REPORT}
    if found and not (REPORT in found and found <= ours):
        other = min(found - ours, default=min(found))
        raise DiskError(f"{out}: already exists and holds {other!r}, not a merge's; choose another --out, or remove it")


def _stored_report(out: Path) -> dict[str, Any]:
    """The report in a folder; empty if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        stored = json.loads((out / REPORT).read_text())
        if isinstance(stored, dict) and isinstance(stored.get("sha256"), dict):
            return stored
    return {}


def find_merged(out: Path, inputs: str, held_out: str | None = None) -> MergeReport | None:
    """The report of `out` if it is the merge of these inputs and every file still has its hash; nothing is computed.

    Args:
        held_out: digest of the documents that it must have been proved by; None: proved or not.
    Raises: LockedError: another process writes there.
    """
    stored = _stored_report(out)
    proof = stored.get("proof") or {}
    if stored.get("inputs") != inputs or (held_out is not None and proof.get("held_out") != held_out):
        return None
    for name, digest in stored["sha256"].items():
        if not (out / name).is_file() or files.sha256(out / name) != digest:
            return None
    try:
        report = MergeReport(**stored)
    except TypeError:  # of another version
        return None
    with _work_folder(out) as folder:
        shutil.rmtree(folder)  # what a kill after the rename left
    note(f"{out}: this merge is already there, and whole")
    return report


def _checked(out: Path, report: MergeReport, check: Check) -> MergeReport:
    """A merge that is there, proved anew."""
    proved = replace(report, proof=check(out))
    files.write_json(out / REPORT, proved.to_json())
    return proved


# ------------------------------------------------------------------------------------------------ the folder aside


class _Work:
    """The folder beside the output.

    Attributes:
        done: sha256 of every finished shard.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self.model, self._journal = folder, folder / "model", folder / "journal.json"
        self._digest = digest
        self.model.mkdir(exist_ok=True)
        files.sweep(self.folder)
        files.sweep(self.model)
        self.done = self._finished_shards()
        for path in self.model.iterdir():
            if path.name not in self.done:
                path.unlink()

    def _finished_shards(self) -> dict[str, str]:
        try:
            journal = json.loads(self._journal.read_text())
            if journal["inputs"] != self._digest:
                return {}
            shards = dict(journal["shards"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        whole = {name: self.model / name for name in shards if (self.model / name).is_file()}
        return {name: shards[name] for name, path in whole.items() if files.sha256(path) == shards[name]}

    def finish(self, shard: str, digest: str) -> None:
        """Note that a shard is on the disk."""
        self.done[shard] = digest
        files.write_json(self._journal, {"inputs": self._digest, "shards": self.done})

    def publish(self, out: Path) -> None:
        """Give the model its name; an older merge under it goes."""
        files.replace_folder(self.model, out, self.folder / "old")
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """The folder beside `out`, for one process. Raises: LockedError: another has it. DiskError: the disk refuses."""
    folder = out.with_name(f".{out.name}.merging")
    with files.lock(folder):
        yield folder


# ------------------------------------------------------------------------------------------------ its files


def _files_of(merge: Merge) -> dict[str, Layout]:
    """Tensors by output file: the base's own files, or new ones of 5 GB where either's hold 4 bits a weight."""
    if merge.requantized is not None:
        return merge.requantized.by_shard()
    shards, quantized = merge.shards, merge.base.packed is not None
    tensors: dict[str, Layout] = {name: {name: (entry.dtype, entry.shape)} for name, entry in shards.entries.items()}
    if quantized:
        return split(tensors.values(), SHARD_BYTES)
    kept: dict[str, Layout] = {}
    for name, entry in shards.entries.items():
        kept.setdefault(entry.path.name, {}).update(tensors[name])
    return kept


def _write_shards(work: _Work, merge: Merge) -> dict[str, str]:
    """All shards and their index; sha256 of each shard."""
    by_shard = _files_of(merge)
    sizes = {shard: size_bytes(layout) for shard, layout in by_shard.items()}
    missing = [shard for shard in by_shard if shard not in work.done]
    files.require_free_space(work.folder, sum(sizes[shard] for shard in missing), "the merged model")
    if work.done:
        note(f"going on after a stop: {len(work.done)} of {len(by_shard)} files are done")
    with progress("merging", sum(sizes.values())) as advance:
        for shard, layout in by_shard.items():
            if shard in missing:
                work.finish(shard, _write_shard(work.model / shard, merge, layout))
            advance(sizes[shard], shard)
    write_index(work.model, by_shard)
    return {shard: work.done[shard] for shard in by_shard}


def _write_shard(path: Path, merge: Merge, layout: Layout) -> str:
    if merge.requantized is not None:
        return merge.requantized.write_shard(path, layout)
    return write_shard(path, merge.shards, list(layout))


def _write_companions(folder: Path, merge: Merge) -> None:
    """Tokenizer and its kin as they are, the adapter's own if it has one; the config as the new weights are."""
    dropped = ("quantization_config", "torch_dtype")
    kept = {key: value for key, value in merge.base.config.items() if key not in dropped} | merge.layout.config
    packed = merge.requantized.config if merge.requantized else {}
    files.write_json(folder / "config.json", kept | {"dtype": str(merge.dtype).removeprefix("torch.")} | packed)
    carry(merge.base.folder, folder, GENERATION)
    carry(merge.adapter if has_tokenizer(merge.adapter) else merge.base.folder, folder, TOKENIZER)


def _report(merge: Merge, folder: Path, digests: dict[str, str], proof: dict[str, Any] | None) -> MergeReport:
    entries = merge.shards.entries
    merged = sum(merge.update(name) is not None for name in entries)
    others = {path.name: files.sha256(path) for path in folder.iterdir() if path.name not in digests}
    return MergeReport(
        base=str(merge.base.folder),
        adapter=str(merge.adapter),
        onto=merge.onto,
        dtype=merge.quantization.quant_type if merge.requantized else str(merge.dtype).removeprefix("torch."),
        merged_tensors=merged,
        copied_tensors=len(entries) - merged,
        bytes_written=sum(map(size_bytes, _files_of(merge).values())),
        base_fingerprint=merge.fingerprint,
        inputs=merge.digest,
        evidence=evidence(merge),
        proof=proof,
        sha256=dict(sorted((digests | others).items())),
    )
