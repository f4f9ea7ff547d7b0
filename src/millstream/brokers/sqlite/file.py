"""The database file: found, recognised as ours or refused, created whole, and opened.

A file is created complete under another name and then renamed, so that nobody ever sees a half of it, and a process that
is killed while creating it leaves nothing that the next one would stumble over.

What is not ours is refused before anything is written beside it. To look at it we open it through SQLite as immutable: a
plain `open()` would, on closing, drop the locks that another connection of this process has on the same file.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing, suppress
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

from millstream.errors import BrokerDown, BrokerError, BrokerFull, BrokerRefused

try:
    import fcntl
except ImportError:  # Windows: without the turnstile, SQLite's own lock decides who writes next
    fcntl = None  # type: ignore[assignment]

Synchronous: TypeAlias = Literal["full", "normal"]

MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100  # https://www.sqlite.org/fileformat.html#the_database_header
APPLICATION_ID = 0x4D696C6C  # "Mill": tells our files from other programs' SQLite databases
SCHEMA_VERSION = 5
SCHEMAS = (  # what each version adds to the one before it
    *("schema.sql", "schema_2.sql", "schema_3.sql"),
    *("schema_4.sql", "schema_5.sql"),
)
BUSY_MS = 10_000  # only strangers (a shell, a backup) hold SQLite's lock without the turnstile; they are soon done
WAL_KEPT_BYTES = 4_194_304  # never cut below this: on a full disk, what was taken can still be settled
CACHE_KIB = 16_384
ROOM_BYTES = 65_536  # with less than this left, an I/O error is the full disk's

_OK, _PERM, _BUSY, _LOCKED, _READONLY, _IOERR, _CORRUPT, _FULL, _CANTOPEN, _NOTADB = 0, 3, 5, 6, 8, 10, 11, 13, 14, 26

_give_way = getattr(os, "sched_yield", lambda: None)


class InDoubt(BrokerDown):
    """A write was under way when the file failed or the time ran out: it may or may not be stored."""


class Turnstile:
    """Lets writers in one after the other: SQLite's own lock lets the lucky one in again and again.

    The kernel opens it when its holder dies. A holder that is stopped keeps it shut, as it would keep SQLite's lock.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> None:
        if fcntl is not None:
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if fcntl is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            _give_way()  # to whom we have just let in; else we would be back before it has woken up

    def touch(self) -> None:
        """Wake those who wait, in all processes: see `touches.py`. Where that fails they look for themselves, later."""
        with suppress(OSError):
            os.utime(self._fd)

    def close(self) -> None:
        """Give it up. Nobody may be inside."""
        os.close(self._fd)


class File:
    """One database file, by its absolute path."""

    def __init__(self, path: str, synchronous: Synchronous) -> None:
        self.path = os.path.realpath(path)
        self.turnstile_path = f"{self.path}-turn"
        self.synchronous = synchronous
        self._identity: tuple[int, int] | None = None

    def open(self) -> None:
        """Recognise the file, or create it. Raises `BrokerRefused`, `BrokerFull` or `BrokerDown`; what it refuses it
        leaves untouched.
        """
        if not os.path.isdir(directory := os.path.dirname(self.path)):
            raise BrokerRefused(f"{self.path}: {directory} is no directory: create it, or name another path")
        try:
            if self._is_new():
                with closing(turnstile := self.turnstile()), turnstile:
                    if self._is_new():  # another process may have been faster
                        self._create()
            if self._recognise() < SCHEMA_VERSION:
                with closing(turnstile := self.turnstile()), turnstile:
                    self._upgrade()
            self._identity = self._find()
        except sqlite3.Error as error:
            raise self.explain(error) from error
        except OSError as error:
            raise BrokerRefused(f"{self.path} cannot be used: {error.strerror}") from error

    def turnstile(self) -> Turnstile:
        """The file's turnstile, opened anew. Raises `BrokerRefused` where nobody may write."""
        try:
            return Turnstile(self.turnstile_path)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise BrokerFull(f"{self.path}: the disk is full, make room") from error
            raise BrokerRefused(
                f"{self.path}: cannot write beside it ({error.strerror}): check path and permissions"
            ) from error

    def connect(self, *, reader: bool = False) -> sqlite3.Connection:
        """A connection in autocommit mode, for one thread at a time. Raises `sqlite3.Error`."""
        uri = f"{Path(self.path).as_uri()}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        try:
            connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise sqlite3.OperationalError(f"its file system does not support write-ahead logging ({mode})")
            connection.execute(f"PRAGMA synchronous = {self.synchronous}")
            connection.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            connection.execute("PRAGMA temp_store = MEMORY")
            if reader:
                connection.execute("PRAGMA query_only = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def check_place(self) -> None:
        """Raise `BrokerRefused` when the file was moved, deleted or replaced: what we write would go nowhere.

        There is no healing from this: a second file under the same name would share its log's name with the first.
        """
        if self._find() != self._identity:
            raise BrokerRefused(
                f"{self.path} was moved, deleted or replaced while in use: stop every process that uses it, put it "
                "back if it is still needed, start again"
            )

    def wal_bytes(self) -> int:
        """The size of the write-ahead log; 0 when there is none."""
        return _size(f"{self.path}-wal")

    def explain(self, error: sqlite3.Error, *, in_doubt: bool = False) -> BrokerError:
        """What an error of SQLite means to a user of this file."""
        code = getattr(error, "sqlite_errorcode", _OK) & 0xFF
        if code == _FULL or (code in (_IOERR, _CANTOPEN) and self._is_full()):
            return BrokerFull(f"{self.path}: the disk is full; nothing is lost, make room and it goes on by itself")
        if code == _IOERR:
            state = "; what was being written may or may not be stored" if in_doubt else ""
            return (InDoubt if in_doubt else BrokerDown)(f"{self.path}: {error}{state}")
        if code in (_BUSY, _LOCKED):
            return BrokerDown(f"{self.path} is locked by another program (a shell, a backup?): {error}")
        if code in (_READONLY, _PERM, _CANTOPEN):
            return BrokerRefused(f"{self.path} cannot be opened for writing ({error}): check path and permissions")
        if code in (_CORRUPT, _NOTADB):
            return BrokerRefused(
                f"{self.path} is no intact SQLite database ({error}): name another path, or restore it"
            )
        return BrokerRefused(f"{self.path}: {error}")

    def _is_new(self) -> bool:
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise BrokerRefused(f"{self.path} is no regular file: name another path")
        if _size(self.path):
            return False
        if self.wal_bytes():
            raise BrokerRefused(
                f"{self.path} is missing, but {self.path}-wal holds events of it: put the file back, or delete the -wal"
            )
        return True

    def _create(self) -> None:
        draft = f"{self.path}-new"
        # What is there is of a process that was killed here: inside the turnstile we are alone.
        for rest in ("", "-journal", "-wal", "-shm"):
            Path(draft + rest).unlink(missing_ok=True)
        with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
            connection.executescript(_schema(0))
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute("PRAGMA journal_mode = WAL")
        os.replace(draft, self.path)
        _sync_directory(os.path.dirname(self.path))

    def _upgrade(self) -> None:
        """Bring a file of an earlier version up to ours: all of it, or nothing."""
        with closing(self.connect()) as connection:
            # Not from the header: another process may have been faster, and its upgrade may lie in the log only.
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            self._check_version(version)
            if version < SCHEMA_VERSION:
                connection.executescript(_schema(version))
                connection.execute("PRAGMA wal_checkpoint")  # for processes of an earlier version, which ask the header

    def _recognise(self) -> int:
        # From its header and not through SQLite, which would write beside a file that may not be ours; and which takes a
        # file for broken whose checkpoint was cut off, as long as it may not look into the log.
        with open(self.path, "rb") as file:
            header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
            raise BrokerRefused(f"{self.path} is no SQLite database: name another path")
        version, application = int.from_bytes(header[60:64]), int.from_bytes(header[68:72])
        if application != APPLICATION_ID:
            raise BrokerRefused(f"{self.path} is not a Millstream database, but another program's: name another path")
        self._check_version(version)
        return version

    def _check_version(self, version: int) -> None:
        if version > SCHEMA_VERSION:
            raise BrokerRefused(
                f"{self.path} was written by a newer Millstream (schema {version}, this one knows {SCHEMA_VERSION}): "
                "upgrade this installation, or name another path"
            )

    def _find(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _is_full(self) -> bool:
        try:
            disk = os.statvfs(os.path.dirname(self.path))
        except (OSError, AttributeError):
            return False
        return disk.f_blocks > 0 and disk.f_bavail * disk.f_frsize < ROOM_BYTES


def _schema(version: int) -> str:
    """What makes a file of this version one of ours, in one transaction; 0 stands for an empty one."""
    steps = [(files(__package__) / name).read_text("utf-8") for name in SCHEMAS[version:]]
    return "\n".join(["BEGIN IMMEDIATE;", *steps, f"PRAGMA user_version = {SCHEMA_VERSION};", "COMMIT;"])


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _sync_directory(path: str) -> None:
    """Make the file's name as durable as its content."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
