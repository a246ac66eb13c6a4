"""SPICE by its authors' scorer (``spice-1.0.jar`` of ``pycocoevalcap``), on any Java from 8 on.

``pycocoevalcap``'s own call fails on Java 17 and later. Three things are different here:

- the scorer's cache needs packages of the Java library opened to it;
- writing its output needs a JavaScript engine, which left Java with version 15: Rhino's jar goes on
  the class path, so the scorer's class is called by name instead of by ``-jar``;
- Stanford CoreNLP 3.6.0, its parser, is not part of ``pycocoevalcap``. ``python -m lib.metrics
  fetch-spice`` fetches it on a connected machine.

Where a part is absent the metric is missing, with a reason that says how to get it. The whole chain
has not been run in this repository: no machine of its makers could fetch CoreNLP. What is tested
is the command, the reading of the output on real output, and every way to fail.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

import lib
from lib.errors import UserError
from lib.scoring.java import Java, JavaFailed
from lib.scoring.tokens import library_folder

FOLDER = Path(lib.__file__).parent.parent / "data" / "models" / "hub" / "corenlp"
JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
ARCHIVE = "stanford-corenlp-full-2015-12-09"
URL = f"https://nlp.stanford.edu/software/{ARCHIVE}.zip"  # the address pycocoevalcap uses
#: As other projects publish it; the source itself publishes none.
ARCHIVE_SHA1 = "55c9d653eb30ace7d5a60eb3138e424f9442e539"
#: Where Rhino may lie, by the names of its own releases and of Linux distributions.
ENGINE_PATTERNS = ("rhino*.jar", "js.jar", "js-1.7*.jar", "nashorn-core*.jar")
SYSTEM_JARS = Path("/usr/share/java")
LAST_JAVA_WITH_ENGINE = 14
OPENED = ("lang", "math", "util", "util.concurrent", "net", "text")
ENTRY = "edu.anu.spice.SpiceScorer"


class NotFetched(RuntimeError):
    """A part of the official scorer is absent; the message says which and how to get it."""


def class_path(java: Java, folder: Path = FOLDER) -> list[Path]:
    """Every jar that the scorer needs.

    Raises:
        NotFetched: CoreNLP's jars or a JavaScript engine are absent.
    """
    library = library_folder("spice")
    found = [
        next((place / jar for place in (folder, library / "lib") if (place / jar).is_file()), None)
        for jar in JARS
    ]
    absent = [jar for jar, path in zip(JARS, found, strict=False) if path is None]
    if absent:
        raise NotFetched(
            f"official SPICE needs {' and '.join(absent)}: run `python -m lib.metrics fetch-spice` "
            f"on a connected machine, or put them in {_relative(folder)}"
        )
    engine = javascript_engine(folder)
    if engine is None and java.major > LAST_JAVA_WITH_ENGINE:
        raise NotFetched(
            f"official SPICE in {java} needs a JavaScript engine: put Rhino's jar with its script "
            f"engine in {_relative(folder)}, or install your system's package of it (librhino-java)"
        )
    jars = [library / "spice-1.0.jar", *sorted((library / "lib").glob("*.jar"))]
    jars += [path for path in found if path is not None and path not in jars]
    return [*jars, *([engine] if engine is not None else [])]


def javascript_engine(folder: Path = FOLDER) -> Path | None:
    """A jar with a JavaScript engine: in our folder, else the system's."""
    for place in (folder, SYSTEM_JARS):
        for pattern in ENGINE_PATTERNS:
            jars = sorted(path for path in place.glob(pattern) if _has_engine(path))
            if jars:
                return jars[-1]
    return None


def command(java: Java, jars: Sequence[Path], source: Path, target: Path, cache: Path) -> list[str]:
    """The command line of one run of the scorer."""
    opened: list[str] = []
    if java.major >= 9:  # Java 8 has no modules and does not know the option
        for package in OPENED:
            opened += ["--add-opens", f"java.base/java.{package}=ALL-UNNAMED"]
    return java.command(
        *opened, "-Xmx8G", "-cp", os.pathsep.join(map(str, jars)), ENTRY, str(source),
        "-cache", str(cache), "-out", str(target), "-subset", "-silent",
    )


def scores(
    pairs: Sequence[tuple[str, Sequence[str]]], java: Java, cache: Path, folder: Path = FOLDER
) -> list[float]:
    """The scorer's F of each (candidate, references), all PTB tokens; in [0, 1].

    Raises:
        NotFetched: a part is absent.
        JavaFailed: the scorer failed or left no readable output.
    """
    jars = class_path(java, folder)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "in.json", Path(name) / "out.json"
        asked = [
            {"image_id": row, "test": candidate, "refs": list(references)}
            for row, (candidate, references) in enumerate(pairs)
        ]
        source.write_text(json.dumps(asked), encoding="utf-8")
        done = subprocess.run(
            command(java, jars, source, target, cache),
            capture_output=True, text=True, errors="replace", check=False,
        )
        if done.returncode != 0 or not target.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            why = f": {said[0]}" if said else ""
            raise JavaFailed(f"official SPICE in {java} ended with status {done.returncode}{why}")
        return read_scores(target.read_text(encoding="utf-8"), len(pairs))


def read_scores(output: str, rows: int) -> list[float]:
    """F by row from the scorer's output; a caption without any tuple has no F there and gets 0."""
    try:
        found = {int(one["image_id"]): one["scores"]["All"]["f"] for one in json.loads(output)}
    except (ValueError, KeyError, TypeError) as error:
        raise JavaFailed(f"official SPICE left an unreadable output ({error})") from error
    absent = [row for row in range(rows) if row not in found]
    if absent:
        raise JavaFailed(f"official SPICE left out {len(absent)} of {rows} captions")
    values = [found[row] for row in range(rows)]
    return [0.0 if value is None or math.isnan(float(value)) else float(value) for value in values]


def fetch(folder: Path = FOLDER, url: str = URL, sha1: str = ARCHIVE_SHA1) -> list[Path]:
    """Fetch CoreNLP's two jars, checked by the archive's hash; what is there already is kept.

    Raises:
        UserError: no connection, or the archive is not the expected one.
    """
    targets = [folder / jar for jar in JARS]
    if all(target.is_file() for target in targets):
        return targets
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{ARCHIVE}.zip.part"
    try:
        found = _download(url, archive)
        if found != sha1:
            raise UserError(f"{url}: SHA-1 is {found}, expected {sha1}; not used, try again")
        with zipfile.ZipFile(archive) as packed:
            for target in targets:
                part = target.with_name(f"{target.name}.part")
                with packed.open(f"{ARCHIVE}/{target.name}") as source, open(part, "wb") as file:
                    while block := source.read(1 << 20):
                        file.write(block)
                os.replace(part, target)
    except OSError as error:
        raise UserError(f"{url} cannot be fetched ({error}); connect, or bring the jars") from error
    finally:
        archive.unlink(missing_ok=True)
    return targets


def _download(url: str, target: Path) -> str:
    """Write the file, return its SHA-1."""
    digest = hashlib.sha1(usedforsecurity=False)
    with urlopen(url, timeout=60) as answer, open(target, "wb") as file:
        while block := answer.read(1 << 20):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _has_engine(jar: Path) -> bool:
    """Whether a jar offers a script engine (some distributions split it from Rhino itself)."""
    try:
        with zipfile.ZipFile(jar) as packed:
            return "META-INF/services/javax.script.ScriptEngineFactory" in packed.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _relative(path: Path) -> str:
    """A path for people: from the repository's root where it lies inside."""
    root = Path(lib.__file__).parent.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
