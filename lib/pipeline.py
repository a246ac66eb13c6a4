"""Runs the notebooks in the order of ``notebooks/manifest.txt``: what ``./run_all.sh`` calls.

Finished rows are reused, and a notebook whose source, parameters, code and input rows are those of
its last run is not run again. Only the standard library is imported until a notebook has to run,
so that ``--help`` and wrong flags are answered at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lib import notebooks
from lib.errors import UserError, writing_failed
from lib.presets import REPO_ROOT, Preset, get_preset

if TYPE_CHECKING:
    from lib.fetch import Request
    from lib.study import Study

EXAMPLES = """\
examples:
  ./run_all.sh                       the embedded picture book: every figure and table
  ./run_all.sh --n 20                the same, small
  ./run_all.sh --only 03             one figure again, from finished rows
  ./run_all.sh --preset mine.toml    your own models or decoding
  ./run_all.sh --verify              do the finished rows repeat?
  ./run_all.sh --explore             a page to play on, in your browser
  ./run_all.sh --preset paper --dataset coco --n 50     real models and photographs, on a GPU; what
                                     is missing is told with its size and fetched first
  ./run_all.sh --fetch --preset paper                   the same fetched ahead; runs then need no
                                     network (HF_HUB_OFFLINE=1 forbids it)
"""


# --- the command line ------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Wrong flags are bad input like any other: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; ./run_all.sh --help lists the flags")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, not {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags; UserError for a wrong one."""
    parser = Parser(
        prog="./run_all.sh", epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Plays the game in both directions and draws every figure and table. Sets up "
                    "the environment\nfirst where needed, and reuses finished rows.")
    parser.add_argument("--preset", default="mini", metavar="P",
                        help="models, decoding and sizes: a name or a .toml file (default: mini)")
    parser.add_argument("--dataset", default="all", metavar="D",
                        help="one dataset, or 'all' of the preset's (default)")
    parser.add_argument("--n", type=positive, metavar="N",
                        help="sources per dataset (default: the preset's)")
    parser.add_argument("--candidates", type=positive, metavar="K",
                        help="candidates per source (default: the preset's)")
    parser.add_argument("--seed", type=not_negative, metavar="S",
                        help="changes every draw (default: the preset's)")
    parser.add_argument("--only", metavar="LIST",
                        help="notebooks by number or name, such as 03,05")
    parser.add_argument("--param", action="append", default=[], metavar="NAME=VALUE",
                        help="any other parameter of the chosen notebooks; may be repeated")
    parser.add_argument("--force", action="store_true",
                        help="run every notebook, also those that are up to date")
    parser.add_argument("--fetch", action="store_true",
                        help="run no notebook; tell and fetch what preset, dataset, N and seed need")
    parser.add_argument("--explore", action="store_true",
                        help="serve a page to play on, on this machine only, until Ctrl-C")
    parser.add_argument("--verify", action="store_true",
                        help="run no notebook; play a sample of the finished rows again and compare")
    flags = parser.parse_args(arguments)
    if flags.preset.endswith(".toml"):
        flags.preset = from_caller(flags.preset)
    kind, colon, place = flags.dataset.partition(":")
    if place:
        flags.dataset = kind + colon + from_caller(place)
    return flags


def check_dataset(name: str) -> None:
    """Raise UserError for a dataset that no notebook could load, before one is started."""
    from lib.datasets import LAYOUTS, NAMES
    kind, colon, place = name.partition(":")
    own = kind in ("folder", "texts") and colon and place
    if name not in ("all", *LAYOUTS) and not own:
        raise UserError(f"unknown dataset {name!r}: choose all or one of {', '.join(NAMES)}")


def from_caller(text: str) -> str:
    """A path that the user gave, seen from where ./run_all.sh was called (it changes folder)."""
    caller = os.environ.get("COMPENDIUM_CALLER")
    return text if caller in (None, str(REPO_ROOT)) else str(Path(caller) / Path(text).expanduser())


def notebook_parameters(flags: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """The parameters that every notebook gets; 0 stands for the preset's own count."""
    return {
        "PRESET": flags.preset,
        "DATASET": flags.dataset,
        "N_SOURCES": flags.n or 0,
        "N_CANDIDATES": flags.candidates or 0,
        "SEED": preset.seed if flags.seed is None else flags.seed,
    }


def extra_parameters(texts: Iterable[str], chosen: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Give each ``NAME=VALUE`` to the chosen notebooks that declare NAME; UserError if none does."""
    extras: dict[Path, dict[str, Any]] = {path: {} for path in chosen}
    declared = {path: notebooks.declared_parameters(path) for path in chosen}
    for text in texts:
        name, equals, value = text.partition("=")
        takers = [path for path in chosen if name in declared[path]]
        if not equals or not takers:
            raise UserError(f"--param {text!r}: " + (
                "no chosen notebook has this parameter" if equals else "write NAME=VALUE"))
        for path in takers:
            extras[path][name] = convert(value, declared[path][name], text)
    return extras


def convert(value: str, default: Any, text: str) -> Any:
    """Read a parameter's value as the type of its default."""
    if isinstance(default, str):
        return value
    try:
        read = json.loads(value.lower() if isinstance(default, bool) else value)
    except ValueError as error:
        raise UserError(f"--param {text!r}: not of type {type(default).__name__}") from error
    return float(read) if isinstance(default, float) and type(read) is int else read


# --- what is up to date ----------------------------------------------------------------------

@dataclass(frozen=True)
class Place:
    """Where a preset's figures and executed notebooks go."""

    figures: Path

    @property
    def executed(self) -> Path:
        """The folder of executed notebooks, which is not in git."""
        return self.figures / "notebooks"

    def stamp(self, notebook: Path) -> Path:
        """The file that remembers what a notebook was last run on."""
        return self.executed / f"{notebook.stem}.stamp.json"


def program_digest(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """Hash what is run: the notebook, its parameters, the code, the pins, an own preset."""
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode("utf-8"))
    code = sorted((REPO_ROOT / "lib").rglob("*.py"))
    for path in [notebook, *code, REPO_ROOT / "requirements.lock", *preset_files(parameters)]:
        digest.update(str(path).encode("utf-8") + b"\0" + path.read_bytes())
    return digest.hexdigest()


def data_digest() -> str:
    """Hash what is read: rows, embedded data and weights, by path, size and time of change.

    As ``make`` does it: hashing the contents of a large run would take longer than drawing it.
    """
    from lib.results import runs_root
    data, digest = REPO_ROOT / "data", hashlib.sha256()
    inputs = [*runs_root().glob("*/*.parquet"), *(data / "models").glob("mini/**/*"),
              *(data / "picturebook").rglob("*.json")]
    for path in sorted((path for path in inputs if path.is_file()), key=str):
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def preset_files(parameters: Mapping[str, Any]) -> list[Path]:
    """The TOML file of an own preset, if it is one."""
    preset = str(parameters["PRESET"])
    return [Path(preset)] if preset.endswith(".toml") else []


def is_fresh(notebook: Path, parameters: Mapping[str, Any], place: Place) -> bool:
    """Whether a notebook's last run had the same inputs and all that it wrote is still there."""
    try:
        stamp = json.loads(place.stamp(notebook).read_text(encoding="utf-8"))
        written = [Path(name) for name in stamp["wrote"]]
        known = (stamp["program"], stamp["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # no stamp, or one cut off while it was written: run it
    return (all(path.exists() for path in written)
            and known == (program_digest(notebook, parameters), data_digest()))


def written_since(folder: Path, start_ns: int) -> list[Path]:
    """The files below a folder that changed at or after a time, stamps left out."""
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and not path.name.endswith(".stamp.json")
                  and path.stat().st_mtime_ns >= start_ns)


# --- running ---------------------------------------------------------------------------------

def run_one(notebook: Path, parameters: Mapping[str, Any], place: Place, headline: str) -> list[Path]:
    """Execute one notebook with its HTML copy, tell the time, return the figure files it wrote."""
    print(headline, end="", flush=True)
    start, start_ns = time.monotonic(), time.time_ns()
    stream = notebooks.Indented(sys.stdout)
    target = place.executed / notebook.name
    try:
        notebooks.execute(notebook, target, parameters, stream)
        notebooks.export_html(target)
    except BaseException:
        print(flush=True)  # ends the headline, so that the error starts a line of its own
        raise
    print(f"{'      done in' if stream.used else ' '} {duration(time.monotonic() - start)}", flush=True)
    return written_since(place.figures, start_ns)


def record_time(figures: Path, notebook: str, seconds: float) -> None:
    """Keep in ``times.json`` how long a notebook took when it last ran, on how many cores."""
    from lib.results import read_json, write_json
    path = figures / "times.json"
    known = read_json(path) or {}
    known[notebook] = {"seconds": round(seconds, 1), "cores": os.cpu_count()}
    write_json(path, dict(sorted(known.items())))


def duration(seconds: float) -> str:
    """A time as people say it: 4.2 s, 3 min 07 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


@dataclass(frozen=True)
class Outcome:
    """What a call has done: for each notebook that ran, the figure files that it wrote."""

    preset: Preset
    place: Place
    wrote: Mapping[Path, Sequence[Path]]
    seconds: float


def run_all(flags: argparse.Namespace, folder: Path = notebooks.NOTEBOOKS) -> Outcome:
    """Run what the flags ask for; raises UserError or NotebookFailure at the first that fails."""
    preset = get_preset(flags.preset)
    check_dataset(flags.dataset)
    chosen = notebooks.select(notebooks.read_manifest(folder), flags.only)
    common, extras = notebook_parameters(flags, preset), extra_parameters(flags.param, chosen)
    parameters = {path: {**common, **extras[path]} for path in chosen}
    for path in chosen:
        notebooks.check_parameters(path, parameters[path])
    # Imports of more than the standard library come after the checks.
    from lib import fetch
    from lib.figures import folder as figures_folder
    fetch.prepare(request(flags, preset), lambda: not finished(flags, chosen))
    place = Place(figures_folder(preset))
    start = time.monotonic()
    wrote: dict[Path, list[Path]] = {}
    programs = {path: program_digest(path, parameters[path]) for path in chosen}
    try:
        for number, path in enumerate(chosen, start=1):
            headline = f"[{number}/{len(chosen)}] {path.stem}"
            if not flags.force and is_fresh(path, parameters[path], place):
                print(f"{headline}  up to date", flush=True)
            else:
                place.stamp(path).unlink(missing_ok=True)
                began = time.monotonic()
                wrote[path] = run_one(path, parameters[path], place, headline)
                record_time(place.figures, path.stem, time.monotonic() - began)
    finally:
        # At the end, because the rows that the later notebooks read come from the earlier ones.
        for path, files in wrote.items():
            stamp = {"program": programs[path], "data": data_digest(), "wrote": list(map(str, files))}
            place.stamp(path).write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    return Outcome(preset, place, wrote, time.monotonic() - start)


def request(flags: argparse.Namespace, preset: Preset) -> Request:
    """What the flags need from outside."""
    from lib.fetch import Request
    common = notebook_parameters(flags, preset)
    datasets = preset.datasets if flags.dataset == "all" else (flags.dataset,)
    return Request(preset, flags.preset, datasets, flags.n or preset.n_sources, common["SEED"])


def finished(flags: argparse.Namespace, chosen: Sequence[Path]) -> bool:
    """Whether the chosen notebooks find all their runs finished, so that no model is needed.

    Only the notebooks that declare ENGINE play, each the task that its name tells.
    """
    playing = [path.stem for path in chosen if "ENGINE" in notebooks.declared_parameters(path)]
    study = open_rows(flags)
    try:
        for task in ("image", "text"):
            for dataset in study.datasets if any(f"_{task}_" in stem for stem in playing) else ():
                study.run(dataset, task)
    except UserError:
        return False
    return True


def explore(flags: argparse.Namespace) -> None:
    """Serve the explorer's page with the same presets, datasets, counts and seed.

    What cannot be fetched does not stop it: finished runs and other presets can still be looked at.
    """
    preset = get_preset(flags.preset)
    check_dataset(flags.dataset)
    from lib import fetch
    from lib.serve import serve
    try:
        fetch.prepare(request(flags, preset), lambda: True)
    except UserError as error:
        print(f"going on with what is here; {error}", flush=True)
    serve(notebook_parameters(flags, preset))


def fetch_ahead(flags: argparse.Namespace) -> None:
    """Tell and fetch what the flags need."""
    preset = get_preset(flags.preset)
    check_dataset(flags.dataset)
    from lib import fetch
    fetch.fetch_ahead(request(flags, preset))


def open_rows(flags: argparse.Namespace) -> Study:
    """The runs that the flags stand for."""
    preset = get_preset(flags.preset)
    check_dataset(flags.dataset)
    from lib.study import open_study
    return open_study(*notebook_parameters(flags, preset).values())


def verify(flags: argparse.Namespace) -> bool:
    """Play a sample of the finished rows again; whether they repeat."""
    from lib.verify import fetch_for, verify_rows
    study = open_rows(flags)
    fetch_for(study, flags.preset)
    return verify_rows(study)


def compare(flags: argparse.Namespace) -> None:
    """Say whether the averages are the committed ones, where some are committed for these flags.

    It is a finding, not a failure: another machine may round differently. Of somebody's own
    pictures or texts nothing is expected.
    """
    if ":" not in flags.dataset:
        from lib import expected
        expected.report(open_rows(flags))


def write_report(outcome: Outcome) -> Path | None:
    """Make the report from all figures there are; None as long as there is none."""
    if not any(outcome.place.figures.glob("*.svg")):
        return None
    from lib.report import build_report
    return build_report(outcome.preset)


def summarise(outcome: Outcome, report: Path | None) -> None:
    """End by naming what was written and where to look first."""
    from lib.results import runs_root
    place, count = outcome.place, len(outcome.wrote)
    files = sorted({path for paths in outcome.wrote.values() for path in paths})
    figures = [path for path in files if path.parent == place.figures]
    print(f"\n{count} notebook{'' if count == 1 else 's'} run in {duration(outcome.seconds)}")
    for path in figures:
        if path.suffix in (".pdf", ".csv", ".tex"):
            print(f"  wrote {shorten(path)}")
    print(f"  figures and tables: {shorten(place.figures)}")
    print(f"  executed notebooks: {shorten(place.executed)} (.ipynb and .html)")
    print(f"  rows: {shorten(runs_root())}")
    if report is not None:
        print(f"  report, to read first: {shorten(report)}")


def shorten(path: Path) -> str:
    """A path relative to the repository where it lies inside."""
    return str(path.relative_to(REPO_ROOT) if path.is_relative_to(REPO_ROOT) else path)


def _stop(signum: int, frame: object) -> NoReturn:
    """SIGTERM ends a run as Ctrl-C does, so that the kernel is shut down too."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 (a notebook failed, rows do not repeat), 2 (bad
    input), 130 (stopped)."""
    try:
        flags = parse(arguments)
        if flags.explore:
            explore(flags)
        elif flags.fetch:
            fetch_ahead(flags)
        elif flags.verify:
            return 0 if verify(flags) else 1
        else:
            outcome = run_all(flags)
            summarise(outcome, write_report(outcome))
            compare(flags)
    except (UserError, OSError) as error:
        told = error if isinstance(error, UserError) else writing_failed(Path(str(error.filename or "figures")), error)
        if not isinstance(told, UserError):
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    except notebooks.NotebookFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # The kernel's end is noted by a task that nobody waits for any more.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        print("stopped: finished rows are kept, the same command goes on from them", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
