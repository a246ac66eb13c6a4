"""METEOR 1.5 (Denkowski and Lavie, 2014) by the jar of ``pycocoevalcap``.

The jar loads its paraphrase table for seconds, so one process stays open. It answers line by line: a caption that it
cannot take is known and costs no other's score.
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

from lib.metrics.java import JARS, OPTIONS, Missing, find_java


class Meteor:
    """A running METEOR, with the options of pycocoevalcap: English, normalised text, standard input."""

    def __init__(self) -> None:
        command = [find_java(), *OPTIONS, "-Xmx2G", "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        self.complaints = tempfile.TemporaryFile()
        self.lock = threading.Lock()  # one conversation at a time
        self.process = subprocess.Popen(command, cwd=JARS / "meteor", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.complaints)  # fmt: skip
        atexit.register(self.close)

    def statistics(self, caption: str, references: Sequence[str]) -> str:
        """Return the sufficient statistics of a caption, both of PTB tokens; Missing if METEOR cannot take it."""
        plain = [text.replace("|||", " ").replace("  ", " ") for text in (*references, caption)]
        return self._ask(" ||| ".join(["SCORE", *plain]), answers=1)[0]

    def score(self, statistics: Sequence[str]) -> float:
        """Return the score in [0, 1] of one caption, or of a corpus from its captions' statistics (not their mean)."""
        return float(self._ask(" ||| ".join(["EVAL", *statistics]), answers=len(statistics) + 1)[-1])

    def close(self) -> None:
        """End the process; harmless when it has ended already."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.complaints):
            with contextlib.suppress(BrokenPipeError):  # closing flushes, and nobody reads
                pipe.close()
        atexit.unregister(self.close)

    def _ask(self, line: str, answers: int) -> list[str]:
        """Return the answers to one line. A conversation that breaks off (an interrupt, say) ends the process: its
        late answers would be taken for those to the next line."""
        with self.lock:
            try:
                with contextlib.suppress(BrokenPipeError):  # then the missing answer is told
                    self.process.stdin.write(line.encode("utf-8", "replace") + b"\n")
                    self.process.stdin.flush()
                got = [self.process.stdout.readline().decode().strip() for _ in range(answers)]
                if all(got):
                    return got
                self.complaints.seek(0)
                said = [line.strip() for line in self.complaints.read().decode().splitlines() if "rror" in line]
                raise Missing(": ".join([f"METEOR ended with status {self.process.wait()}", *said[:1]]))
            except BaseException:
                self.close()
                raise


_shared: dict[int, Meteor] = {}  # by Python process: a fork has none yet


def shared_meteor() -> Meteor:
    """Return the METEOR of this Python process, started at the first call and anew if it ended."""
    meteor = _shared.get(os.getpid())
    if meteor is None or meteor.process.poll() is not None:
        meteor = _shared[os.getpid()] = Meteor()
    return meteor
