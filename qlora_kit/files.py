"""The one module that makes bytes durable: what the kit writes to keep is written aside, synced and renamed.

Why: a killed process or a full disk must leave the old file or the new one, never half of either
(safetensors' own `save_file` does not sync, and leaves the file with mode 0600). A test forbids writing elsewhere.
Imports no torch: tensors arrive as buffers. Imported by recipe, planning, adapters, training, export and tools.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from qlora_kit.errors import DiskError, LockedError
from qlora_kit.units import format_bytes

_ASIDE = ".partial"
_ASIDE_NAME = re.compile(rf"\..+\.\d+{re.escape(_ASIDE)}", re.DOTALL)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` only when the block ends well.

    Raises: DiskError: the disk is full or the folder is not writable; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{_ASIDE}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise DiskError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def past_cache(file: IO[bytes], piece_bytes: int = 8 << 20) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Have the disk write, past the page cache, what `file` is given while more is made; yields `write(data)`.

    Why: the copy into the cache keeps a CPU core busy, at a fifth of a good disk's rate, for what nobody reads soon.
    How: one of two buffers of whole pages is filled while a thread writes the other. The last piece goes through the
    cache, and so does all where the system writes no other way; then each piece is synced, before they pile up.

    Args:
        piece_bytes: of each buffer, whole pages.
    """
    file.flush()
    descriptor = file.fileno()
    direct = _set_direct(descriptor, True)
    free, filling, filled = [mmap.mmap(-1, piece_bytes) for _ in range(2)], 0, 0
    running: Future[None] | None = None

    def put(piece: mmap.mmap, size_bytes: int) -> None:
        nonlocal direct
        done = 0
        with memoryview(piece) as view:
            while done < size_bytes:
                try:
                    done += os.write(descriptor, view[done:size_bytes])
                except OSError as problem:  # there are file systems that take the flag and then refuse the write
                    if not direct or problem.errno != errno.EINVAL:
                        raise
                    direct = not _set_direct(descriptor, False)
        if not direct:
            os.fdatasync(descriptor)

    with ThreadPoolExecutor(1) as thread:

        def write(data: bytes | memoryview) -> None:
            nonlocal filling, filled, running
            left = memoryview(data)
            while len(left):
                count = min(len(left), piece_bytes - filled)
                free[filling][filled : filled + count] = left[:count]
                left, filled = left[count:], filled + count
                if filled == piece_bytes:
                    if running is not None:
                        running.result()
                    running, filling, filled = thread.submit(put, free[filling], filled), 1 - filling, 0

        yield write
        if running is not None:
            running.result()
    if direct:
        _set_direct(descriptor, False)
    put(free[filling], filled)


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Have writes go past the page cache, or not; False: the system, or this file system, has no such writes."""
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except (OSError, AttributeError):
        return False
    return True


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` durably; see `atomic_file`."""
    with atomic_file(Path(path)) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text durably."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON durably; NaN and infinity are refused, since other readers refuse them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_line(file: IO[str], value: dict[str, Any]) -> None:
    """Append one JSON object to an open log; a cut can lose the last line but never tear an older one.

    Raises: DiskError: the disk refuses.
    """
    try:
        file.write(json.dumps(value, allow_nan=False) + "\n")
        file.flush()
    except OSError as error:
        raise DiskError(f"{file.name}: cannot write: {error.strerror or error}") from error


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def safetensors_header(
    entries: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str] | None = None
) -> bytes:
    """The head of a safetensors file: length and JSON, padded to 8 bytes.

    Args:
        entries: name, safetensors dtype ("BF16"), shape, bytes; in the order in which the data will follow.
        metadata: free strings.
    Source: the safetensors format; data of one tensor begins where that of the one before ends.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape, size_bytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def scratch_file(folder: Path) -> IO[bytes]:
    """A file in `folder` without a name, never synced: gone when it is closed or its process ends.

    Raises: DiskError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)  # where a file needs a name for a moment, `sweep` knows it
        return tempfile.TemporaryFile(dir=folder, prefix=".scratch.", suffix=f".{os.getpid()}{_ASIDE}", buffering=0)
    except OSError as error:
        raise DiskError(f"{folder}: cannot write: {error.strerror or error}") from error


def require_new(target: Path) -> None:
    """Raises: DiskError: `target` exists."""
    if target.exists():
        raise DiskError(f"{target}: already exists; choose another folder or remove it")


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder that appears as `target` only when the block ends well; files inside are already durable.

    Raises: DiskError: `target` exists, or the disk refuses.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}{_ASIDE}")
    try:
        require_new(target)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        sync_folder(aside)
        os.rename(aside, target)
        sync_folder(target.parent)
    except OSError as error:
        raise DiskError(f"{target}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`: only names that this module gives, so never a user's file."""
    for path in folder.glob(f".*{_ASIDE}"):
        if _ASIDE_NAME.fullmatch(path.name) is None:
            continue
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder in two steps, so that a cut never leaves half of it under its own name.

    Raises: DiskError: the disk refuses.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}{_ASIDE}")
    try:
        os.rename(folder, aside)
    except OSError as error:
        raise DiskError(f"{folder}: cannot remove: {error.strerror or error}") from error
    shutil.rmtree(aside, ignore_errors=True)


def replace_folder(folder: Path, target: Path, aside: Path) -> None:
    """Give `folder` the name `target`; what has it goes to `aside` first. A cut leaves the old, none or the new.

    Raises: DiskError: the disk refuses.
    """
    try:
        sync_folder(folder)
        shutil.rmtree(aside, ignore_errors=True)
        if target.exists():
            os.rename(target, aside)
        os.rename(folder, target)
        sync_folder(target.parent)
    except OSError as error:
        raise DiskError(f"{target}: cannot write: {error.strerror or error}") from error


def require_free_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises: DiskError: the disk of `folder` has less than `needed_bytes` free."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise DiskError(
            f"{folder}: {purpose} needs {format_bytes(needed_bytes)}, {format_bytes(free_bytes)} is free; "
            f"nothing was written. Free {format_bytes(needed_bytes - free_bytes)} or choose another folder"
        )


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for one process; the kernel frees it even after kill -9.

    Raises: LockedError: another process holds it. DiskError: the folder cannot be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115 - held until the block ends
    except OSError as error:
        raise DiskError(f"{folder}: cannot write: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LockedError(f"{folder}: locked by process {holder}; wait for it or choose another output") from None
        except OSError as error:  # some network file systems have no locks
            raise DiskError(f"{folder}: cannot lock: {error.strerror or error}; choose another output") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
