"""Claims about durability: whatever ends a writer, the old bytes or the new ones are there, never half of either."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit import files
from qlora_kit.errors import DiskError, LockedError

OLD, NEW = b"old" * 20_000, b"new" * 20_000

# Runs `action` again and again, each time in a process that SIGKILL ends one executed line later than the time before,
# so that every point between two lines of files.py, of what it calls, and of its caller is tried.
KILLED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from qlora_kit import files

OLD, NEW = b"old" * 20_000, b"new" * 20_000
where = Path(sys.argv[1])


def write_file():
    with files.atomic_file(where / "target") as file:
        for start in range(0, len(NEW), 9_000):
            file.write(NEW[start : start + 9_000])


def write_folder():
    with files.atomic_folder(where / "target") as aside:
        (aside / "a").write_bytes(NEW)
        (aside / "b").write_bytes(NEW)


def remove():
    files.remove_folder(where / "target")


def killed(action, lines):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == signal.SIGKILL

    def trace(frame, event, argument):
        nonlocal lines
        lines -= event == "line"
        if lines == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    action()
    os._exit(0)


def contents():
    target = where / "target"
    if target.is_dir():
        return sorted((path.name, path.read_bytes() == NEW) for path in target.iterdir())
    if not target.exists():
        return "nothing"
    return {OLD: "old", NEW: "new"}.get(target.read_bytes(), "torn")


def cases(action, reset):
    lines = 1
    while True:
        reset()
        more = killed(action, lines)
        seen = contents()
        files.sweep(where)
        yield seen, sorted(path.name for path in where.iterdir() if path.name != "target")
        if not more:
            return
        lines += 1
"""
KILLED_EVERYWHERE_END = "\nimport json\nprint(json.dumps(list(cases({action}, lambda: {reset}))))"
REMOVED = "__import__('shutil').rmtree(where / 'target', ignore_errors=True)"


def python(code: str, *arguments: str | Path, timeout: float = 60) -> str:
    """Stdout of a fresh interpreter that ran `code` to its end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def states_after_kills(where: Path, action: str, reset: str) -> list:
    """What a killed writer left, for each point at which it was killed; nothing but the target survives a sweep."""
    code = KILLED_EVERYWHERE + KILLED_EVERYWHERE_END.format(action=action, reset=reset)
    cases = json.loads(python(code, where))
    assert len(cases) > 5
    assert all(leftover == [] for _, leftover in cases)
    return [state for state, _ in cases]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ one file


def test_a_failure_inside_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "f", OLD)
    with pytest.raises(ZeroDivisionError), files.atomic_file(tmp_path / "f") as file:
        file.write(NEW)
        raise ZeroDivisionError
    assert (tmp_path / "f").read_bytes() == OLD
    assert names(tmp_path) == ["f"]


def test_the_new_file_is_not_seen_before_the_block_ends(tmp_path: Path) -> None:
    with files.atomic_file(tmp_path / "deep" / "f") as file:
        file.write(NEW)
        assert not (tmp_path / "deep" / "f").exists()
    assert (tmp_path / "deep" / "f").read_bytes() == NEW
    assert names(tmp_path / "deep") == ["f"]


def test_a_writer_killed_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    states = states_after_kills(tmp_path, "write_file", "(where / 'target').write_bytes(OLD)")
    turn = states.index("new")
    assert set(states[:turn]) == {"old"}
    assert set(states[turn:]) == {"new"}


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(kind(number)), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("rename"), replace(old, new)))
    files.write_bytes(tmp_path / "f", NEW)
    assert done == ["file", "rename", "folder"]


def kind(descriptor: int) -> str:
    return "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_refusing_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    files.write_bytes(tmp_path / "f", OLD)

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(DiskError, match=rf"/f: cannot write: {os.strerror(number)}"):
        files.write_bytes(tmp_path / "f", NEW)
    assert (tmp_path / "f").read_bytes() == OLD
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("name", ["file/below", "x" * 300, "folder"])
def test_a_path_that_cannot_be_is_a_disk_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError, match="cannot write: "):
        files.write_bytes(tmp_path / name, NEW)
    assert names(tmp_path) == ["file", "folder"]


def test_a_disk_that_fills_up_gives_a_disk_error_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
import os, resource, sys
from pathlib import Path
from qlora_kit import errors, files
where = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (files.write_bytes, lambda path, data: files.write_json(path, data.decode())):
    try:
        write(where / "f", b"x" * 65536)
    except errors.DiskError as error:
        print(error)
with open(where / "log", "a") as log:
    try:
        for _ in range(100):
            files.append_line(log, {"text": "x" * 100})
    except errors.DiskError as error:
        print(error, flush=True)
        os._exit(0)  # closing the log would try once more
"""
    said = python(code, tmp_path).splitlines()
    assert said[:2] == [f"{tmp_path}/f: cannot write: File too large"] * 2
    assert said[2] == f"{tmp_path}/log: cannot write: File too large"
    assert names(tmp_path) == ["log"]


def test_a_scratch_file_has_no_name_and_holds_what_is_written(tmp_path: Path) -> None:
    with files.scratch_file(tmp_path / "run") as file:
        file.write(NEW)
        assert os.pread(file.fileno(), len(NEW), 0) == NEW
        assert names(tmp_path / "run") == []


def test_what_a_killed_process_left_of_a_scratch_file_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile._O_TMPFILE_WORKS", False)  # a file system where it has a name for a moment
    monkeypatch.setattr(os, "unlink", lambda path: None)
    files.scratch_file(tmp_path).close()
    monkeypatch.undo()
    assert len(names(tmp_path)) == 1
    files.sweep(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_mode_honours_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "f", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_that_others_refuse_is_not_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "f.json", {"x": value})
    assert names(tmp_path) == []


def test_a_log_holds_whole_lines(tmp_path: Path) -> None:
    with open(tmp_path / "log", "a", encoding="utf-8") as log:
        for step in range(3):
            files.append_line(log, {"step": step})
            assert json.loads((tmp_path / "log").read_text().splitlines()[-1]) == {"step": step}


def test_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    import hashlib

    data = os.urandom((1 << 22) + 5)  # more than one piece
    (tmp_path / "f").write_bytes(data)
    assert files.sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_a_safetensors_header_is_read_by_safetensors_itself() -> None:
    from safetensors import deserialize

    head = files.safetensors_header([("a", "F32", (2, 3), 24), ("b", "BF16", (4,), 8)], {"format": "pt"})
    assert len(head) % 8 == 0
    read = dict(deserialize(head + bytes(32)))
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in read.items()} == {
        "a": ("F32", [2, 3]),
        "b": ("BF16", [4]),
    }


# ------------------------------------------------------------------------------------------------ a folder


def test_a_folder_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    with files.atomic_folder(tmp_path / "run" / "out") as aside:
        files.write_bytes(aside / "f", NEW)
        assert not (tmp_path / "run" / "out").exists()
    assert names(tmp_path / "run") == ["out"]
    assert (tmp_path / "run" / "out" / "f").read_bytes() == NEW


def test_a_folder_does_not_appear_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "out") as aside:
        files.write_bytes(aside / "f", NEW)
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_folder_that_exists_is_never_written_into(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="already exists"), files.atomic_folder(tmp_path):
        raise AssertionError("the block ran")
    assert names(tmp_path) == []


def test_a_folder_name_that_cannot_be_is_a_disk_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match="cannot write: File name too long"),
        files.atomic_folder(tmp_path / ("x" * 300)),
    ):
        pass


def test_a_writer_killed_at_any_line_leaves_the_whole_folder_or_none(tmp_path: Path) -> None:
    states = states_after_kills(tmp_path, "write_folder", REMOVED)
    whole = [["a", True], ["b", True]]
    turn = states.index(whole)
    assert states == ["nothing"] * turn + [whole] * (len(states) - turn)


def test_a_folder_removed_under_kills_is_whole_or_gone(tmp_path: Path) -> None:
    states = states_after_kills(tmp_path, "remove", f"({REMOVED}, write_folder())")
    assert {json.dumps(state) for state in states} == {'[["a", true], ["b", true]]', '"nothing"'}


def test_removing_what_is_not_there_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot remove: No such file"):
        files.remove_folder(tmp_path / "gone")


def test_sweep_removes_what_killed_writers_left_and_nothing_else(tmp_path: Path) -> None:
    users = [".draft.partial", "run.partial", ".a.12.partial.txt", "step-000001", ".partial", ".7.partial"]
    for name in users:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".recipe.yaml.4711.partial").write_text("half")
    (tmp_path / ".step-000002.4711.partial" / "below").mkdir(parents=True)
    files.sweep(tmp_path)
    assert names(tmp_path) == sorted(users)


# ------------------------------------------------------------------------------------------------ space and locks


def test_too_little_space_is_refused_with_both_figures_and_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"the merged model needs 1024.0 TiB, .* is free; nothing was written"):
        files.require_free_space(tmp_path / "not" / "yet", 2**50, "the merged model")
    assert names(tmp_path) == []


def test_enough_space_is_no_error_even_for_a_relative_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files.require_free_space(Path("not/yet"), 1, "a test")


HOLD = """
import sys, time
from pathlib import Path
from qlora_kit import files
with files.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_told_who_holds_the_folder_and_kill_9_frees_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"locked by process {holder.pid}; "), files.lock(tmp_path):
            raise AssertionError("two processes hold it")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with files.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_lock_is_freed_when_the_block_ends_badly(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.lock(tmp_path / "run"):
        raise ZeroDivisionError
    with files.lock(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_not_called_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.raises(DiskError, match="cannot lock: No locks available"), files.lock(tmp_path):
        pass


def test_a_run_folder_that_cannot_be_made_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="cannot write"), files.lock(tmp_path / "file"):
        pass


PIECE = 8192


def stream(path: Path, data: bytes, step: int) -> list[tuple[int, bool]]:
    """Write `data` by `step` bytes past the cache; size of every write, and whether it was a direct one."""
    written, real = [], os.write

    def write(descriptor: int, part: memoryview) -> int:
        written.append((len(part), bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return real(descriptor, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        with files.atomic_file(path) as file, files.past_cache(file, PIECE) as put:
            for start in range(0, len(data), step):
                put(data[start : start + step])
    return written


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("size_bytes", [0, 1, PIECE, 2 * PIECE, 5 * PIECE + 77])
def test_a_file_written_past_the_cache_holds_what_it_was_given(refused, size_bytes, tmp_path, monkeypatch):
    if refused:
        monkeypatch.setattr(files, "_set_direct", lambda descriptor, wanted: False)
    with open(tmp_path / "probe", "wb") as probe:
        direct_writes = files._set_direct(probe.fileno(), True)
    data = os.urandom(size_bytes)
    for step in (1000, 3 * PIECE + 5):
        written = stream(tmp_path / "target", data, step)
        assert (tmp_path / "target").read_bytes() == data
        rest = [(size_bytes % PIECE, False)] if size_bytes % PIECE else []
        assert written == [(PIECE, direct_writes)] * (size_bytes // PIECE) + rest


def test_a_file_system_that_takes_the_flag_and_refuses_the_write_gets_the_file_through_the_cache(tmp_path, monkeypatch):
    write = os.write

    def refuse(descriptor, part):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(descriptor, part)

    monkeypatch.setattr(os, "write", refuse)
    data = os.urandom(3 * PIECE + 5)
    with files.atomic_file(tmp_path / "target") as file, files.past_cache(file, PIECE) as put:
        put(data)
    assert (tmp_path / "target").read_bytes() == data


def test_a_full_disk_past_the_cache_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, part):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    target = tmp_path / "target"
    with (
        pytest.raises(DiskError, match="No space left"),
        files.atomic_file(target) as file,
        files.past_cache(file, PIECE) as put,
    ):
        put(bytes(3 * PIECE))
    assert not list(tmp_path.iterdir())
