"""Ownership of a database: one runtime at a time, by a lock on a file beside it.

The lock is `flock` on `<database>.lock`, never on the database itself: opening and closing a file
that SQLite has open drops SQLite's own locks on it. The file stays when its owner ends, because it
also says which store was last open here. A database that is not that store, or is older than it,
was restored.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shlex
import stat
from pathlib import Path

import msgspec

from amends_runtime.errors import StoreInUse, StoreUnusable

__all__ = ["LockNote", "Ownership", "filesystem_of", "usable_path"]

# SQLite's write-ahead log is shared memory between processes; over a network two hosts would each
# have their own, and byte locks are often not real there.
NETWORK_FILESYSTEMS = frozenset(("afs", "cifs", "fuse.sshfs", "nfs", "nfs4", "smb3", "smbfs"))

MOUNTS = Path("/proc/self/mountinfo")  # Linux; elsewhere the kind of file system stays unknown
MAX_NOTE_BYTES = 4096  # a note is about 150 bytes; whatever is larger is none of ours


class LockNote(msgspec.Struct, frozen=True):
    """What the owner writes into the lock file.

    `epoch` is that of its opening; `seq` a position up to which turns are on the disk. A database
    that has not got them is an earlier copy, also one of the same epoch.
    """

    pid: int
    store_id: str
    incarnation: str
    epoch: int
    seq: int = 0


class Ownership:
    """The held lock.

    `before` is the note of the last owner, if there was one and it can be read.
    """

    def __init__(
        self, path: Path, descriptor: int, before: LockNote | None, *, created: bool
    ) -> None:
        self.path = path
        self.before = before
        self._descriptor = descriptor
        self._created = created

    @classmethod
    def take(cls, database: Path) -> Ownership:
        """Locks `<database>.lock`, which is made if it does not exist.

        Raises StoreInUse, naming the process that holds it, or StoreUnusable where it cannot be
        made.
        """
        path = database.with_name(database.name + ".lock")
        while True:
            descriptor, created = _open(path, database)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                note = _read(descriptor)
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    owner = f"process {note.pid}" if note else "another process"
                    raise StoreInUse(
                        f"{database} is in use: {owner} holds {path};"
                        " stop that runtime first, or give another database"
                    ) from None
                raise StoreUnusable(f"{path} cannot be locked: {error.strerror}") from error
            if _is_at(descriptor, path):
                return cls(path, descriptor, _read(descriptor), created=created)
            os.close(
                descriptor
            )  # it was removed between opening and locking: lock the one that is there

    def write(self, note: LockNote) -> None:
        """Says, durably, who owns the store now."""
        data = msgspec.json.encode(note) + b"\n"
        try:
            os.pwrite(self._descriptor, data, 0)
            os.ftruncate(self._descriptor, len(data))
            os.fsync(self._descriptor)
        except OSError as error:
            raise StoreUnusable(f"{self.path} cannot be written: {error.strerror}") from error
        self._created = False  # from here on it says something that must not be lost

    def release(self) -> None:
        """Lets another runtime have the store. The file stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def abandon(self) -> None:
        """Releases after a refused opening, leaving no file that was not there and says nothing."""
        if self._created and self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()  # while locked, so that it is still ours
        self.release()


def usable_path(path: str | os.PathLike[str]) -> Path:
    """The database's real path, so that one file has one lock whatever name it is opened by.

    Raises StoreUnusable where no database can be: a missing folder, a folder or device in its
    place, a file with a second name, or a network file system.
    """
    given = Path(path)
    try:
        database = given.resolve()
        parent = database.parent
        if not stat.S_ISDIR(parent.stat().st_mode):
            raise StoreUnusable(f"{given} cannot be a database: {parent} is not a folder")
    except (FileNotFoundError, NotADirectoryError):
        raise StoreUnusable(
            f"{given} cannot be opened: its folder {given.parent} does not exist;"
            " make it first, or give another path"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a NUL in the name
        raise StoreUnusable(f"{given} cannot be opened: {error}") from error
    with contextlib.suppress(FileNotFoundError):
        found = database.stat()
        if stat.S_ISDIR(found.st_mode):
            raise StoreUnusable(f"{given} is a folder: give the path of a file inside it")
        if not stat.S_ISREG(found.st_mode):
            raise StoreUnusable(f"{given} is not a file: give the path of a file")
        if found.st_nlink > 1:
            raise StoreUnusable(
                f"{given} has {found.st_nlink} names (hard links), and each would have its own"
                " lock and its own write-ahead log: copy it instead, or remove the other name"
                f" (find DIR -samefile {shlex.quote(str(database))} shows it)"
            )
    kind = filesystem_of(database, _mounts())
    if kind in NETWORK_FILESYSTEMS:
        raise StoreUnusable(
            f"{given} lies on a network file system ({kind}), where SQLite loses data:"
            " use a local disk"
        )
    return database


def filesystem_of(path: Path, mountinfo: str) -> str:
    """The kind of file system that a path lies on, by Linux's table of mounts; or nothing."""
    kind, depth = "", -1
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        mounted_at = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4]))
        # A later mount on the same place hides the earlier one.
        if path.is_relative_to(mounted_at) and len(mounted_at.parts) >= depth:
            kind, depth = right.split(" ")[0], len(mounted_at.parts)
    return kind


_OCTAL = re.compile(r"\\([0-7]{3})")


def _mounts() -> str:
    try:
        return MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _open(path: Path, database: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        try:
            return os.open(path, flags), False
        except FileNotFoundError:
            try:
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
            except FileExistsError:  # another process was quicker: the lock decides
                return os.open(path, flags), False
    except OSError as error:
        raise StoreUnusable(
            f"{database} cannot be opened: its lock file {path.name} cannot be written"
            f" ({error.strerror}); the folder must be writable"
        ) from error


def _read(descriptor: int) -> LockNote | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, MAX_NOTE_BYTES, 0), type=LockNote)
    except (OSError, msgspec.MsgspecError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
