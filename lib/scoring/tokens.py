"""PTB tokens, as every caption metric of the COCO tool kit sees them.

The tokenizer is Stanford's, from the jar inside ``pycocoevalcap``. One process tokenises any
number of captions. Like the COCO tool kit it lower-cases and drops punctuation.
"""

from __future__ import annotations

import subprocess
import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

from lib.errors import UserError
from lib.scoring.java import Java, JavaFailed

_DROPPED = frozenset(PUNCTUATIONS)
#: Control characters, line and paragraph separators and lone surrogates would break the
#: one-caption-a-line protocol or the encoding; each becomes a space.
_BREAKING = frozenset({"Cc", "Zl", "Zp", "Cs"})


def library_folder(part: str = "") -> Path:
    """The folder of ``pycocoevalcap`` (or a part of it), where its jars lie."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("pycocoevalcap is not installed: `pip install -r requirements.txt`")
    return Path(list(spec.submodule_search_locations)[0]) / part


def one_line(caption: str) -> str:
    """The caption on one line, encodable as UTF-8; ordinary captions come back unchanged."""
    if caption.isascii() and caption.isprintable():
        return caption
    return "".join(" " if unicodedata.category(c) in _BREAKING else c for c in caption)


def tokenize(captions: Sequence[str], java: Java) -> list[str]:
    """PTB tokens of each caption, joined by single spaces; empty where nothing is left.

    Raises:
        JavaFailed: the tokenizer ended early or lost a line.
    """
    if not captions:
        return []
    jar = library_folder("tokenizer") / STANFORD_CORENLP_3_4_1_JAR
    command = java.command(
        "-Xmx512m", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines", "-lowerCase", "-encoding", "UTF-8",
        # characters that it does not know (emoji) are dropped in silence, not one warning each
        "-options", "untokenizable=noneDelete",
    )
    text = "\n".join(one_line(caption) for caption in captions) + "\n"
    done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, check=False)
    if done.returncode != 0:
        raise JavaFailed(f"the PTB tokenizer ended with status {done.returncode} in {java}")
    lines = done.stdout.decode("utf-8").split("\n")
    if len(lines) != len(captions) + 1 or lines[-1]:
        raise JavaFailed(
            f"the PTB tokenizer gave {len(lines) - 1} lines for {len(captions)} captions in {java}"
        )
    return [_without_punctuation(line) for line in lines[:-1]]


def _without_punctuation(line: str) -> str:
    """The tokens of one line less the COCO tool kit's list of punctuation marks."""
    # only at spaces: the tokenizer holds fractions ("1 1/2") together by a no-break space
    return " ".join(word for word in line.split(" ") if word and word not in _DROPPED)
