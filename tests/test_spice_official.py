"""The official SPICE: its command, its output, its fetching, and every way to be without it."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from pathlib import Path

import pytest

import lib
from lib.errors import UserError
from lib.scoring.java import Java, JavaFailed, find_java
from lib.scoring.spice_official import (
    ARCHIVE,
    ENTRY,
    JARS,
    NotFetched,
    class_path,
    command,
    fetch,
    read_scores,
    scores,
)

OFFICIAL = Path(lib.__file__).parent.parent.parent / "shared" / "data" / "spice" / "spice_scores.json"
OLD = Java("java", "1.8.0", 8, "PATH")
NEW = Java("java", "25", 25, "PATH")


def jar(path: Path, *members: str) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for member in ("META-INF/MANIFEST.MF", *members):
            packed.writestr(member, "")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with empty jars of the right names and a jar that offers a script engine."""
    for name in JARS:
        jar(tmp_path / name)
    jar(tmp_path / "rhino-all.jar", "META-INF/services/javax.script.ScriptEngineFactory")
    return tmp_path


def test_without_the_parser_the_reason_names_it_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(NotFetched, match="stanford-corenlp-3.6.0.jar and .*fetch-spice"):
        class_path(NEW, tmp_path)


def test_without_an_engine_the_reason_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.scoring.spice_official.SYSTEM_JARS", folder / "none")
    (folder / "rhino-all.jar").unlink()
    jar(folder / "rhino-runtime.jar")  # Rhino without its script engine does not do
    with pytest.raises(NotFetched, match="needs a JavaScript engine"):
        class_path(NEW, folder)
    assert class_path(OLD, folder)  # Java 8 has an engine of its own


def test_the_command_opens_packages_only_where_there_are_modules(folder: Path) -> None:
    jars = class_path(NEW, folder)
    assert {path.name for path in jars} >= {*JARS, "spice-1.0.jar", "rhino-all.jar"}
    new = command(NEW, jars, Path("in.json"), Path("out.json"), Path("cache"))
    assert new.count("--add-opens") == 6 and "java.base/java.util.concurrent=ALL-UNNAMED" in new
    assert "-jar" not in new and new[new.index(ENTRY) + 1] == "in.json"
    assert "--add-opens" not in command(OLD, jars, Path("in"), Path("out"), Path("cache"))


def test_a_scorer_that_fails_says_why(folder: Path, tmp_path: Path) -> None:
    # the real scorer starts, and misses the classes that the empty jars do not hold
    with pytest.raises(JavaFailed, match="NoClassDefFoundError: edu/stanford/nlp"):
        scores([("a cat", ["a dog"])], find_java(), tmp_path / "cache", folder)


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="needs ../shared/data/spice/spice_scores.json")
def test_real_output_is_read() -> None:
    entries = json.loads(OFFICIAL.read_text(encoding="utf-8"))
    numbered = [{**entry, "image_id": row} for row, entry in enumerate(entries)]
    found = read_scores(json.dumps(numbered[::-1]), len(entries))
    assert found == [entry["scores"]["All"]["f"] or 0.0 for entry in entries]
    assert math.isclose(sum(found) / len(found), 0.1991, abs_tol=5e-5)


@pytest.mark.parametrize("output", ["", "[{]", "{}", "[]", '[{"image_id": 0}]'])
def test_unreadable_output_is_told(output: str) -> None:
    with pytest.raises(JavaFailed, match="official SPICE left"):
        read_scores(output, 1)


def test_fetching_checks_the_hash_and_keeps_what_is_there(tmp_path: Path) -> None:
    source = tmp_path / "source.zip"
    with zipfile.ZipFile(source, "w") as packed:
        for name in JARS:
            packed.writestr(f"{ARCHIVE}/{name}", name * 10)
    sha1 = hashlib.sha1(source.read_bytes(), usedforsecurity=False).hexdigest()
    target = tmp_path / "jars"
    with pytest.raises(UserError, match="expected 0000"):
        fetch(target, source.as_uri(), "0000")
    assert list(target.iterdir()) == []
    assert [path.name for path in fetch(target, source.as_uri(), sha1)] == list(JARS)
    assert sorted(path.name for path in target.iterdir()) == sorted(JARS)
    source.unlink()
    assert fetch(target, source.as_uri(), sha1)  # nothing is fetched twice
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch(tmp_path / "other", source.as_uri(), sha1)
