"""METEOR 1.5 through the jar inside ``pycocoevalcap``, over one process for many captions.

The jar needs some seconds to load its paraphrase table, so one process stays open. Requests are
written by a thread while answers are read: neither pipe can fill up and stall the other, and no
caption waits for the one before it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence

from pycocoevalcap.meteor.meteor import METEOR_JAR

from lib.scoring.java import Java, JavaFailed
from lib.scoring.tokens import library_folder

_BATCH = 500  # captions per EVAL line


class Meteor:
    """A running METEOR. Close it when done; :func:`shared` gives one that needs no closing."""

    def __init__(self, java: Java) -> None:
        # the options are those of pycocoevalcap: English, normalised text, standard input
        command = java.command(
            "-Xmx2G", "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"
        )
        self.java = java
        self.complaints = tempfile.TemporaryFile()
        self.lock = threading.Lock()  # one conversation at a time
        self.process = subprocess.Popen(
            command, cwd=library_folder("meteor"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints,
        )

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def statistics(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
        """METEOR's sufficient statistics, one line for each (candidate, references) of tokens."""
        lines = [
            " ||| ".join(["SCORE", *(_plain(r) for r in references), _plain(candidate)])
            for candidate, references in pairs
        ]
        return self._ask(lines, answers=len(lines))

    def scores(self, statistics: Sequence[str]) -> list[float]:
        """The score of each caption, in [0, 1]."""
        values: list[float] = []
        for start in range(0, len(statistics), _BATCH):
            part = statistics[start : start + _BATCH]
            # the jar answers one line a caption, then the aggregate of the line
            answers = self._ask([" ||| ".join(["EVAL", *part])], answers=len(part) + 1)
            values.extend(float(answer) for answer in answers[:-1])
        return values

    def aggregate(self, statistics: Sequence[str]) -> float:
        """The corpus score: the jar's own, from summed statistics; not a mean of scores."""
        line = " ||| ".join(["EVAL", *statistics])
        return float(self._ask([line], answers=len(statistics) + 1)[-1])

    def close(self) -> None:
        """End the process; harmless when it has ended already."""
        if self.alive():
            self.process.kill()
        self.process.wait()
        self.complaints.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # closing flushes, and nobody reads
                    pipe.close()

    def _ask(self, lines: Sequence[str], answers: int) -> list[str]:
        """Send lines, read so many answers; a process that ends in between is a JavaFailed.

        A conversation that breaks off (an interrupt, say) ends the process: its remaining answers
        would else be taken for those to the next question.
        """
        with self.lock:
            try:
                return self._converse(lines, answers)
            except BaseException:
                self.close()
                raise

    def _converse(self, lines: Sequence[str], answers: int) -> list[str]:
        writer = threading.Thread(target=self._write, args=(lines,), daemon=True)
        writer.start()
        got: list[str] = []
        assert self.process.stdout is not None
        while len(got) < answers:
            line = self.process.stdout.readline()
            if not line:
                raise JavaFailed(self._obituary(len(got), answers))
            got.append(line.decode("utf-8").strip())
        writer.join()
        return got

    def _write(self, lines: Sequence[str]) -> None:
        assert self.process.stdin is not None
        try:
            for line in lines:
                self.process.stdin.write(line.encode("utf-8", "replace") + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return  # the reader sees the end of the answers and says what happened

    def _obituary(self, got: int, wanted: int) -> str:
        status = self.process.wait()
        self.complaints.seek(0)
        said = self.complaints.read().decode("utf-8", "replace").strip().splitlines()
        why = f": {said[-1]}" if said else ""
        return f"METEOR in {self.java} ended with status {status} after {got} of {wanted}{why}"


_shared: dict[tuple[Java, int], Meteor] = {}  # by Java and by process: a fork has none yet


def shared(java: Java) -> Meteor:
    """The METEOR of this Python process, started at the first call and anew if it died.

    It knows no dataset and remembers nothing, so everyone can use the same one; two would take
    twice the seconds to load and twice the gigabyte.
    """
    key = (java, os.getpid())
    if key not in _shared or not _shared[key].alive():
        _shared[key] = meteor = Meteor(java)
        atexit.register(meteor.close)
    return _shared[key]


def _plain(caption: str) -> str:
    """The caption without the protocol's separator."""
    return caption.replace("|||", " ").replace("  ", " ")
