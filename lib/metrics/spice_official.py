"""SPICE by its authors' scorer (``spice-1.0.jar`` of ``pycocoevalcap``), also on Java 17 and later: packages of the Java
library are opened to its cache; a JavaScript engine, which left Java with version 15, is put on its class path; Stanford
CoreNLP 3.6.0, its parser, is fetched by ``python -m lib.metrics fetch-spice``."""

import json
import math
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pooch

from lib.base import ROOT, UserError
from lib.metrics.java import JARS, OPTIONS, Missing, find_java

FOLDER = ROOT / "data" / "models" / "hub" / "corenlp"
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
ARCHIVE = "stanford-corenlp-full-2015-12-09"
URL = f"https://nlp.stanford.edu/software/{ARCHIVE}.zip"  # the address that pycocoevalcap uses
SHA1 = "55c9d653eb30ace7d5a60eb3138e424f9442e539"  # as other projects publish it; the source publishes none
ENGINES = ("rhino*.jar", "js.jar", "js-1.7*.jar", "nashorn-core*.jar")  # as releases and Linux distributions name them
SYSTEM_JARS = Path("/usr/share/java")
OPENED = ("lang", "math", "util", "util.concurrent", "net", "text")


def missing() -> str | None:
    """Return what the scorer lacks here and how to get it; None if nothing."""
    folder = FOLDER.relative_to(ROOT)
    if absent := [jar for jar in CORENLP if not (FOLDER / jar).is_file()]:
        return (f"official SPICE needs {' and '.join(absent)}: run `python -m lib.metrics fetch-spice` on a connected "
                f"machine, or put them in {folder}")
    if _engine() is None:
        return (f"official SPICE needs a JavaScript engine: put Rhino's jar with its script engine in {folder}, or "
                "install your system's package (librhino-java)")
    return None


def scores(pairs: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
    """Return the scorer's F in [0, 1] of each (caption, references) of PTB tokens, one process for all; Missing if it
    fails or leaves no readable output. Parses are kept beside the jars."""
    (FOLDER / "cache").mkdir(parents=True, exist_ok=True)
    library = JARS / "spice"
    jars = [library / "spice-1.0.jar", *(library / "lib").glob("*.jar"), *(FOLDER / jar for jar in CORENLP), _engine()]
    # from the environment, since Java 8 knows neither the variable nor the option
    opened = " ".join(f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in OPENED)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.json", Path(folder) / "out.json"
        entries = [{"image_id": row, "test": caption, "refs": list(refs)} for row, (caption, refs) in enumerate(pairs)]
        source.write_text(json.dumps(entries), encoding="utf-8")
        command = [find_java(), *OPTIONS, "-Xmx8G", "-cp", os.pathsep.join(map(str, jars)), "edu.anu.spice.SpiceScorer",
                   source, "-cache", FOLDER / "cache", "-out", target, "-subset", "-silent"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              env=os.environ | {"JDK_JAVA_OPTIONS": opened})
        if done.returncode or not target.is_file():
            said = [line.strip() for line in done.stderr.splitlines() if "rror" in line or "xception" in line]
            raise Missing(": ".join([f"official SPICE ended with status {done.returncode}", *said[:1]]))
        return read_scores(target.read_text(encoding="utf-8"), len(pairs))


def read_scores(output: str, rows: int) -> list[float]:
    """Return F by row from the scorer's output; a caption without any tuple has no F there and gets 0."""
    try:
        found = {int(one["image_id"]): one["scores"]["All"]["f"] for one in json.loads(output)}
        values = [found[row] for row in range(rows)]
    except (ValueError, KeyError, TypeError) as error:
        raise Missing(f"official SPICE left an unreadable or incomplete output ({error!r})") from error
    return [0.0 if value is None or math.isnan(value) else float(value) for value in values]


def fetch() -> list[Path]:
    """Return the paths of CoreNLP's two jars, fetched and checked by the archive's hash where they are absent."""
    targets = [FOLDER / jar for jar in CORENLP]
    if not all(target.is_file() for target in targets):
        try:
            archive = Path(pooch.retrieve(URL, f"sha1:{SHA1}", f"{ARCHIVE}.zip", FOLDER, progressbar=True))
        except ValueError as error:
            raise UserError(f"{URL}: {error}") from error
        with zipfile.ZipFile(archive) as packed, tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            for target in targets:
                Path(packed.extract(f"{ARCHIVE}/{target.name}", folder)).replace(target)
        archive.unlink()
    return targets


def _engine() -> Path | None:
    """Return a jar with a JavaScript engine (some distributions split it from Rhino), in our folder or the system's."""
    jars = [jar for place in (FOLDER, SYSTEM_JARS) for pattern in ENGINES for jar in sorted(place.glob(pattern))]
    factory = "META-INF/services/javax.script.ScriptEngineFactory"
    return next((jar for jar in jars if zipfile.is_zipfile(jar) and factory in zipfile.ZipFile(jar).namelist()), None)
