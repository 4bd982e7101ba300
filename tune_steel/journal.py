"""The study's journal: Optuna's own file format and lock, with many lines written at once."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState


@contextmanager
def together(study: optuna.Study, *, durable: bool) -> Iterator[None]:
    """Writes all that is done to a study inside with one write, at the end.

    Other processes that write to the journal wait until then, so what is done inside should be
    short. A study that has no such journal is written to as ever. Blocks do not nest, and one
    thread has them all; what other threads write meanwhile goes with the block.

    Args:
        study: The study.
        durable: Whether a power cut after the block must not undo it. A process that is killed
            loses nothing that was written, durable or not.

    Raises:
        OSError: The journal cannot be written.
    """
    storage = study._storage
    if isinstance(storage, Storage):
        with storage.journal.together(durable=durable):
            yield
    else:
        yield


class Journal(BaseJournalBackend):
    """A journal in a file that Optuna's JournalFileBackend reads and writes as well, meanwhile.

    Optuna's calls one lock after the other: its storage's thread lock, then `_mutex`, then the
    lock of the file. The thread lock is never asked for while one of the others is waited for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = JournalFileSymlinkLock(str(path))
        self._mutex = threading.Lock()
        self._pending: list[bytes] | None = None  # the lines of a block that is not yet written
        self._before = 0  # lines in the file when it began
        self._place = 0, 0  # some number of lines, and how many bytes they are
        self._failed: OSError | None = None
        path.open("ab").close()

    def __reduce__(self) -> tuple[type[Journal], tuple[Path]]:
        """Tune pickles its searcher, though it goes on with the original."""
        return Journal, (self._path,)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The lines from that number on, those of an open block at the end."""
        # Both at once: in between, a block could move its lines from one to the other.
        with self._mutex:
            size = self._path.stat().st_size
            pending = (self._pending or [])[max(log_number_from - self._before, 0) :]
        number, offset = self._place
        if number > log_number_from:  # it was read, but not all of it was used
            number, offset = 0, 0
        if offset < size:
            with self._path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    offset += len(line)
                    if offset > size or not line.endswith(b"\n"):
                        break  # another process is writing it
                    number += 1
                    self._place = number, offset
                    if number > log_number_from:
                        yield json.loads(line)
        for line in pending:
            yield json.loads(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes lines, durably; in a block, keeps them for its end."""
        lines = [json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs]
        with self._mutex:
            if self._pending is not None:
                self._pending += lines
                return
            self._lock.acquire()
            try:
                self._write(lines, durable=True)
            finally:
                self._lock.release()

    @contextmanager
    def together(self, *, durable: bool) -> Iterator[None]:
        """As the function of this name; what was done before an exception is written too."""
        with self._mutex:
            assert self._pending is None
            self._lock.acquire()
            try:
                self._before, self._pending = self._count(), []
            except BaseException:
                self._lock.release()
                raise
        try:
            yield
        finally:
            with self._mutex:
                lines, self._pending = self._pending, None
                try:
                    if lines:
                        self._write(lines, durable=durable)
                finally:
                    self._lock.release()

    def _count(self) -> int:
        """How many lines the file has, while nobody else may write."""
        number, offset = self._place
        if self._path.stat().st_size <= offset:
            return number
        with self._path.open("rb") as file:
            file.seek(offset)
            return number + sum(line.endswith(b"\n") for line in file)

    def _write(self, lines: list[bytes], *, durable: bool) -> None:
        # The last line may have been cut, and nothing may follow it, whichever thread comes next.
        if self._failed is not None:
            raise self._failed
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            self._failed = error
            raise


class Storage(JournalStorage):
    """Optuna's storage in a journal; it finds waiting trials without a look at all others.

    Optuna asks for them before every trial, and a look at 10 000 takes longer than sampling.

    Attributes:
        journal: Where it writes.
    """

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self._queues: dict[int, tuple[int, list[int]]] = {}
        super().__init__(self.journal)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """As Optuna's own."""
        if states != (TrialState.WAITING,):
            return super().get_all_trials(study_id, deepcopy, states)
        trials = super().get_all_trials(study_id, deepcopy=False)
        seen, numbers = self._queues.get(study_id, (0, []))
        # A trial may leave the queue, but none comes into it later.
        numbers = [*numbers, *range(seen, len(trials))]
        numbers = [n for n in numbers if trials[n].state == TrialState.WAITING]
        self._queues[study_id] = len(trials), numbers
        found = [trials[n] for n in numbers]
        return copy.deepcopy(found) if deepcopy else found
