"""Files on disk that belong together, replaced as one: whoever looks, and whatever interrupts, finds old or new.

New files are written into a directory beside the old ones (``.saving-*``). Renaming that directory to ``.saved`` is
the moment at which the new ones count. Then they move to their places, and the file that readers open first (a
config) is taken away before the first of them moves and comes back last, so that nobody who knows nothing of this
reads a mixture: between the two, he finds no config. A process that dies in between leaves ``.saved`` behind, which
``reading`` looks into and the next ``replacing`` completes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_STAGED, _COMMITTED = ".saving-", ".saved"
_OPENED_FIRST = ("adapter_config.json", "config.json")
"""Files without which PEFT or transformers read nothing else of a directory."""


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new directory to write files into, which at the end of the block replace those of ``directory``, all or none.

    ``directory`` is created if needed; its other files stay. Only files that lie directly in the new directory count.
    They get the permissions that the umask gives. After an error everything is as before. What killed processes left
    is removed.

    Raises:
        OSError: a file cannot be written or put in its place, safetensors' own error for this included.
    """
    from safetensors import SafetensorError  # only who has files needs the package

    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory, shared=False) as alone:
        _publish(directory)
        if alone:
            for leftover in directory.glob(f"{_STAGED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        staged = directory / f"{_STAGED}{uuid.uuid4().hex[:12]}"
        staged.mkdir()
        try:
            mode = _file_mode(staged)
            try:
                yield staged
            except SafetensorError as error:
                raise _os_error(error) from error
            files = [file for file in staged.iterdir() if file.is_file()]
            for file in files:
                _settle(file, mode, directory / file.name)
            if len(files) == 1:
                os.replace(files[0], directory / files[0].name)
            elif files:
                _sync_directory(staged)
                os.rename(staged, directory / _COMMITTED)
                _sync_directory(directory)
                _publish_in_any_case(directory)
            _sync_directory(directory)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[Callable[[str], Path]]:
    """A function that says where the file of a name is to be read, while nobody replaces it."""
    with _locked(directory, shared=True):
        pending = _pending(directory)
        yield lambda name: pending.get(name, directory / name)


def _publish_in_any_case(directory: Path) -> None:
    try:
        _publish(directory)
    except BaseException:  # Ctrl-C, for one: the new files count already, so what is left to do is done
        with contextlib.suppress(OSError):
            _publish(directory)
        raise


def _publish(directory: Path) -> None:
    """Moves committed files to their places, be it those that a killed process did not come to."""
    files = sorted(_pending(directory).values(), key=lambda file: file.name in _OPENED_FIRST)
    for file in files:
        if file.name in _OPENED_FIRST:
            (directory / file.name).unlink(missing_ok=True)
    for file in files:
        os.replace(file, directory / file.name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory / _COMMITTED)


def _pending(directory: Path) -> dict[str, Path]:
    """Committed files by name; none if somebody else, PEFT for one, has saved into ``directory`` since."""
    committed = directory / _COMMITTED
    files = {file.name: file for file in committed.iterdir() if file.is_file()} if committed.is_dir() else {}
    for name in files.keys() & set(_OPENED_FIRST):
        place = directory / name
        if place.exists() and place.stat().st_mtime_ns > files[name].stat().st_mtime_ns:
            return {}
    return files


@contextlib.contextmanager
def _locked(directory: Path, *, shared: bool) -> Iterator[bool]:
    """Holds the lock of ``directory``, or nothing where that cannot be had (no such directory, some network drives)."""
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # not on Windows

            descriptor = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            held = True
        yield held


def _file_mode(directory: Path) -> int:
    """The permissions that a new file in ``directory`` gets; asking the umask itself would change it for a moment."""
    probe = directory / "mode"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()


def _settle(file: Path, mode: int, target: Path) -> None:
    """Whatever could still fail for this file, before the first of its set is moved."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot put a file in the place of a directory", str(target))
    if file.stat().st_mode & 0o777 != mode:
        file.chmod(mode)
    _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        _sync(path)


def _os_error(error: Exception) -> OSError:
    """What the operating system told safetensors, which has an error of its own for that."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code) if number else str(error))
