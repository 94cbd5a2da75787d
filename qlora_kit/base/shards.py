"""safetensors files, tensor by tensor: read trusting nothing in them, written durably.

Why our own: safetensors' reader maps the file (its pages then count as the process' memory), accepts duplicate names
and leaves the file's name out of its errors; transformers follows a `weight_map` out of the folder.
How: the header is parsed and checked here (bounds, dtype, shape against bytes, no overlap); data is read by `preadv`
straight into the tensor that is returned. Writing goes through `files`, one tensor in memory at a time.
Imported by: base.loader, adapters.store, training.checkpoint, export.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.errors import ModelError, QLoRAKitError
from qlora_kit.files import atomic_file, safetensors_header

HEADER_BYTES_LIMIT = 100_000_000  # of the format
READ_BYTES = 8 << 20
DIRECT_BYTES = 4 << 20  # of one read past the page cache
PART_BYTES, READERS = 64 << 20, min(4, os.cpu_count() or 1)  # a larger tensor is read in parts, by several threads

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_reused = threading.local()
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    size_bytes: int


class Shards:
    """The tensors of one or several safetensors files, by name.

    Args:
        paths: the files; a name may stand in one of them only.
        error: what to raise, so that a damaged adapter or checkpoint is reported as what it is.
    Attributes:
        past_cache: `read_bytes` reads past the page cache where the system can: for files that are read over and over
            and do not fit in it. Reading these through it costs more, in copies and in making room, and has no use.
    """

    def __init__(self, paths: list[Path], error: type[QLoRAKitError] = ModelError) -> None:
        self.error = error
        self.past_cache = False
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            for name, entry in self._read_header(path):
                if name in self.entries:
                    raise error(f"{path}: tensor {name!r} also stands in {self.entries[name].path.name}")
                self.entries[name] = entry

    def read(self, name: str) -> Tensor:
        """The tensor, newly allocated on the host.

        Raises: the class given to `Shards`: no such tensor, or the file ends early.
        """
        entry = self.entry(name)
        buffer = torch.empty(entry.size_bytes, dtype=torch.uint8)
        self.read_bytes(entry, bytes_of(buffer))
        return (
            buffer.view(entry.dtype).view(entry.shape)
            if entry.size_bytes
            else torch.empty(entry.shape, dtype=entry.dtype)
        )

    def entry(self, name: str) -> Entry:
        """Where a tensor lies. Raises: the class given to `Shards`: there is no such tensor."""
        if name not in self.entries:
            raise self.error(f"{self._folder()}: tensor {name!r} is missing")
        return self.entries[name]

    def read_bytes(self, entry: Entry, target: memoryview) -> None:
        """Fill `target` with the tensor's bytes, in large sequential reads."""
        if self.past_cache and entry.size_bytes >= DIRECT_BYTES and self._fill_past_cache(entry, target):
            return
        target = target[: entry.size_bytes]
        with self._opened(entry) as file:
            if len(target) <= PART_BYTES:
                self._fill(file, entry, 0, target)
                return

            def fill_part(start: int) -> None:
                self._fill(file, entry, start, target[start : start + PART_BYTES])

            with ThreadPoolExecutor(READERS) as readers:
                list(readers.map(fill_part, range(0, len(target), PART_BYTES)))

    def read_rows(self, entry: Entry, rows: Sequence[int], target: memoryview) -> None:
        """Fill `target` with the bytes of some rows (first dimension) of the tensor, one read for each."""
        row_bytes = entry.size_bytes // entry.shape[0]
        with self._opened(entry) as file:
            for position, row in enumerate(rows):
                self._fill(file, entry, row * row_bytes, target[position * row_bytes : (position + 1) * row_bytes])

    def read_range(self, entry: Entry, start: int, target: memoryview) -> None:
        """Fill `target` with the tensor's bytes from byte `start` on."""
        with self._opened(entry) as file:
            self._fill(file, entry, start, target)

    def rows(self, name: str) -> Callable[[int, int], Tensor]:
        """A function (start, stop) that gives these rows, [stop - start, the rest], and may be called in any thread.

        A tensor that is not `as_stored` is read whole, now; any other by the rows that are asked for.
        """
        entry = self.entry(name)
        height, columns = (entry.shape[0], math.prod(entry.shape[1:])) if entry.shape else (1, 1)
        if not self.as_stored(name):
            whole = self.read(name).reshape(height, columns)
            return lambda start, stop: whole[start:stop]
        row_bytes = columns * entry.dtype.itemsize

        def read(start: int, stop: int) -> Tensor:
            buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
            self.read_range(entry, start * row_bytes, bytes_of(buffer))
            return buffer.view(entry.dtype).view(stop - start, columns)

        return read

    def as_stored(self, name: str) -> bool:
        """Whether a tensor is read as the bytes that its file holds, so that parts of it can be read alone."""
        return True

    @contextlib.contextmanager
    def _opened(self, entry: Entry) -> Iterator[int]:
        """Descriptor of the file that a tensor lies in; what the system refuses is raised as `error`."""
        try:
            with open(entry.path, "rb", buffering=0) as file:
                yield file.fileno()
        except OSError as problem:
            raise self.error(f"{entry.path}: cannot read: {problem.strerror or problem}") from problem

    def _fill(self, file: int, entry: Entry, start: int, target: memoryview) -> None:
        """Fill `target` from byte `start` of the tensor on."""
        done = 0
        while done < len(target):
            where = entry.offset + start + done
            count = os.preadv(file, [target[done : done + READ_BYTES]], where)
            if count == 0:
                raise self.error(f"{entry.path}: ends at byte {where}, in the middle of a tensor")
            done += count

    def _fill_past_cache(self, entry: Entry, target: memoryview) -> bool:
        """Fill `target` by direct reads, which want whole pages in memory and file; False: the system has none here."""
        try:
            file = os.open(entry.path, os.O_RDONLY | os.O_DIRECT)
        except (OSError, AttributeError):  # a file system in memory; not Linux
            return False
        pages, done = _pages(), 0
        try:
            while done < entry.size_bytes:
                where = entry.offset + done
                before = where % mmap.PAGESIZE
                wanted = min(len(pages), -(-(before + entry.size_bytes - done) // mmap.PAGESIZE) * mmap.PAGESIZE)
                count = min(os.preadv(file, [pages[:wanted]], where - before) - before, entry.size_bytes - done)
                if count <= 0:
                    raise self.error(f"{entry.path}: ends at byte {where}, in the middle of a tensor")
                target[done : done + count] = pages[before : before + count]
                done += count
        except OSError as problem:
            raise self.error(f"{entry.path}: cannot read: {problem.strerror or problem}") from problem
        finally:
            os.close(file)
        return True

    def _folder(self) -> Path:
        return next(iter(self.entries.values())).path.parent if self.entries else Path(".")

    def _read_header(self, path: Path) -> Iterator[tuple[str, Entry]]:
        """Check the head of one file and yield its tensors."""
        try:
            size_bytes = path.stat().st_size
            with open(path, "rb") as file:
                start = file.read(8)
                length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_BYTES_LIMIT + 1
                if length > min(HEADER_BYTES_LIMIT, size_bytes - 8):
                    raise self.error(
                        f"{path}: not a safetensors file, or cut off: its header is said to be {length} bytes"
                    )
                text = file.read(length)
        except OSError as problem:
            raise self.error(f"{path}: cannot read: {problem.strerror or problem}") from problem
        try:
            header = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as problem:
            raise self.error(f"{path}: header is not valid JSON: {problem}") from problem
        if not isinstance(header, dict):
            raise self.error(f"{path}: header is a {type(header).__name__}, expected an object")
        self.metadata |= {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
        taken: list[tuple[int, int, str]] = []
        for name, fields in header.items():
            begin, end, entry = self._entry(path, name, fields, 8 + length, size_bytes)
            taken.append((begin, end, name))
            yield name, entry
        taken.sort()
        for (_, end, first), (begin, _, second) in itertools.pairwise(taken):
            if begin < end:
                raise self.error(f"{path}: tensors {first!r} and {second!r} overlap")

    def _entry(self, path: Path, name: str, fields: Any, data_start: int, file_bytes: int) -> tuple[int, int, Entry]:
        try:
            dtype = DTYPES[fields["dtype"]]
            shape = tuple(_size(extent) for extent in fields["shape"])
            begin, end = (_size(offset) for offset in fields["data_offsets"])
        except (KeyError, TypeError, ValueError) as problem:
            raise self.error(f"{path}: tensor {name!r}: malformed entry: {problem!r}") from problem
        if end < begin or math.prod(shape) * dtype.itemsize != end - begin:
            raise self.error(
                f"{path}: tensor {name!r}: {list(shape)} {fields['dtype']} is {math.prod(shape) * dtype.itemsize} "
                f"bytes, its entry spans {end - begin}"
            )
        if data_start + end > file_bytes:
            raise self.error(
                f"{path}: tensor {name!r} ends at byte {data_start + end}, the file has {file_bytes}: it was cut off"
            )
        return begin, end, Entry(path, dtype, shape, data_start + begin, end - begin)


def _pages() -> memoryview:
    """Whole pages for direct reads, reused by each thread."""
    if not hasattr(_reused, "pages"):
        _reused.pages = memoryview(mmap.mmap(-1, DIRECT_BYTES))
    return _reused.pages


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a flat uint8 tensor on the host, not copied."""
    array: Any = tensor.numpy()
    return memoryview(array)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r} is not a size")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise ValueError(f"name {name!r} stands twice")
        names[name] = value
    return names


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whose tensors are produced one after the other.

    Args:
        layout: dtype and shape of each tensor, in the order of writing.
        produce: gives the tensor of a name, on any device; it is dropped once written.
    Raises: DiskError: the disk refuses. ValueError: a tensor is not as `layout` says.
    """
    entries = [
        (name, DTYPE_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize) for name, (dtype, shape) in layout.items()
    ]
    with atomic_file(path) as file:
        file.write(safetensors_header(entries, dict(metadata or {})))
        for name, (dtype, shape) in layout.items():
            value = produce(name)
            if (value.dtype, tuple(value.shape)) != (dtype, shape):
                raise ValueError(f"{name}: {value.dtype} {list(value.shape)} produced, {dtype} {list(shape)} promised")
            file.write(bytes_of(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are all in memory; see `write_tensors`."""
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    write_tensors(path, layout, tensors.__getitem__, metadata)


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of its index, or the only one.

    Raises: ModelError: none, a pickled checkpoint instead, or an index that names a file outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(), object_pairs_hook=_unique)["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise ModelError(f"{index}: not a valid index: {problem!r}") from problem
        return [_shard(folder, index, name) for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise ModelError(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them with transformers' save_pretrained, which writes safetensors"
        )
    raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _shard(folder: Path, index: Path, name: Any) -> Path:
    """Raises: ModelError: the name is not that of a plain file beside the index."""
    if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
        raise ModelError(f"{index}: weight_map: {name!r} leaves the model folder; shard names are plain file names")
    if not (folder / name).is_file():
        raise ModelError(f"{index}: weight_map names {name!r}, which is not in the folder; download the model again")
    return folder / name
