"""Everything that a run needs and this machine lacks: told with its size, then fetched.

``./run_all.sh --fetch`` calls :func:`fetch_ahead`; every other run first calls :func:`prepare`,
which for the preset ``mini`` finds in a moment that nothing is needed. What is fetched stays, so a
second call fetches nothing; what was cut off goes on where it stopped. ``HF_HUB_OFFLINE=1`` forbids
every access to the network.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.dataset_fetch import UNAVAILABLE, drawn_unavailable, missing_parts
from lib.datasets import LAYOUTS
from lib.download import Part, Say, in_words, offline, stated_size
from lib.errors import UserError
from lib.presets import REPO_ROOT, Preset

NOTHING = "--preset mini needs nothing"


@dataclass(frozen=True)
class Request:
    """What a run will use: a preset by the name it was asked for, datasets, sources, seed."""

    preset: Preset
    asked: str
    datasets: tuple[str, ...]
    n: int
    seed: int

    @property
    def command(self) -> str:
        """The command that fetches it ahead."""
        names = f" --dataset {self.datasets[0]}" if self.datasets != self.preset.datasets else ""
        size = f" --n {self.n}" if self.n != self.preset.n_sources else ""
        seed = f" --seed {self.seed}" if self.seed != self.preset.seed else ""
        return f"./run_all.sh --fetch --preset {self.asked}{names}{size}{seed}"


def fetch_ahead(request: Request, say: Say = print) -> None:
    """Fetch what is missing, after telling each part's size and the total.

    Raises UserError in one line where something that is needed cannot be had.
    """
    remote = _needs_remote_models(request.preset)
    parts = [*_missing_data(request), *(_missing_models(request.preset) if remote else [])]
    optional = _spice_parser(say) if (remote or parts) and not offline() else []
    if not parts and not optional:
        say(f"nothing to fetch: all that preset {request.preset.name} needs for "
            f"{' and '.join(request.datasets)} is here")
    _tell([*parts, *optional], say)
    if parts:
        _fetch(request, parts, say)
    for part in optional:
        try:
            part.fetch(say)
        except UserError as error:
            say(f"not fetched: {part.name}: {error}")
    _report_unavailable(request, say)
    if remote:
        _lock_models(request.preset, again=True)


def prepare(request: Request, plays: Callable[[], bool], say: Say = print) -> None:
    """Before a run: fetch what is missing, or raise one line that says what and how.

    plays: whether models will run, asked only where one may be missing. Missing pictures do not
    stop a run as long as one that it draws is there: they are counted as missing.
    """
    parts = _missing_data(request)
    loads = _needs_remote_models(request.preset) and (any(part.needed for part in parts) or plays())
    if loads:
        parts += _missing_models(request.preset)
    _tell(parts, say)
    needed = [part for part in parts if part.needed]
    if needed:
        _fetch(request, needed, say)
    rest = [part for part in parts if not part.needed]
    if rest:
        try:
            _fetch(request, rest, say)
        except UserError as error:
            say(f"going on with the pictures that are there; {error}")
    _report_unavailable(request, say)
    if loads:
        _lock_models(request.preset)
        _tell_device(say)


def _tell_device(say: Say) -> None:
    """Say so where models of the size of a fetch would run on the CPU: perhaps nobody wants that."""
    from lib.hardware import pick_device  # imports torch: only where models will run
    if pick_device().type == "cpu" and not os.environ.get("COMPENDIUM_DEVICE"):
        hint = ", though nvidia-smi is here: check the driver and that this torch was built for CUDA"
        say("no graphics card that torch can use" + (hint if shutil.which("nvidia-smi") else "")
            + "; these models will run on the CPU, where a picture of 512 px and 50 steps takes minutes")


def _needs_remote_models(preset: Preset) -> bool:
    """Whether any model of a preset is not simply a folder that is there."""
    specs = (preset.captioner, preset.generator, preset.encoder, preset.judge)
    ids = [spec.id for spec in specs if spec is not None]
    if preset.generator.lora is not None:
        ids.append(preset.generator.lora)
    return not all((REPO_ROOT / Path(name).expanduser()).is_dir() for name in ids)


def _missing_data(request: Request) -> list[Part]:
    """What the datasets lack."""
    return [part for name in request.datasets for part in missing_parts(name, request.n, request.seed)]


def _missing_models(preset: Preset) -> list[Part]:
    """What the models lack."""
    from lib.model_fetch import missing_models  # imports torch: only where a model may be missing
    return missing_models(preset)


def _lock_models(preset: Preset, again: bool = False) -> None:
    """Lock the commits of models that were here already: a run is known by its models' commits."""
    from lib.model_fetch import lock_models
    lock_models(preset, again)


def _report_unavailable(request: Request, say: Say) -> None:
    """Say how many pictures of a draw are missing because no address had them."""
    for name in request.datasets:
        gone = drawn_unavailable(name, request.n, request.seed)
        if gone:
            say(f"{name}: {len(gone)} of the drawn pictures are unavailable and count as missing, such as "
                f"{gone[0]}; reasons in {LAYOUTS[name].root() / UNAVAILABLE} (what is taken out there is "
                "tried again)")


def _spice_parser(say: Say) -> list[Part]:
    """The parser of the official SPICE, if it is missing and would be of use here."""
    from lib.scoring import java, spice_official

    folder = spice_official.FOLDER
    if all((folder / jar).is_file() for jar in spice_official.JARS):
        return []
    try:
        found = java.find_java()
    except UserError:
        return []
    modern = found.major > spice_official.LAST_JAVA_WITH_ENGINE
    if modern and spice_official.javascript_engine(folder) is None:
        say(f"optional, left out: official SPICE also needs a JavaScript engine in {found} (put Rhino's jar "
            f"in {folder}, or install librhino-java)")
        return []
    return [Part("optional: parser of the official SPICE", stated_size(spice_official.URL),
                 lambda say: spice_official.fetch(folder))]


def _tell(parts: Sequence[Part], say: Say) -> None:
    """Say each part with its size, the total, and what room there is."""
    if not parts:
        return
    say("to fetch:")
    for part in parts:
        say(f"  {part.name}: {part.amount}")
    room = f"{in_words(shutil.disk_usage(REPO_ROOT).free)} are free beside this project"
    if any(part.name.startswith("model ") for part in parts):
        from huggingface_hub.constants import HF_HUB_CACHE
        cache = next(p for p in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if p.is_dir())
        room += f", {in_words(shutil.disk_usage(cache).free)} where models go ({HF_HUB_CACHE}, or set HF_HOME)"
    say(f"  in all {_total(parts)}; {room}")


def _total(parts: Sequence[Part]) -> str:
    """The sum of the known sizes, in words."""
    known = [part.size for part in parts if part.size is not None]
    unknown = len(parts) - len(known)
    about = "about " if unknown or any(part.about for part in parts) else ""
    rest = f" and {unknown} of unknown size" if unknown else ""
    return f"{about}{in_words(sum(known))}{rest}" if known else "of unknown size"


def _list(parts: Sequence[Part]) -> str:
    """Parts and sizes in one line."""
    return ", ".join(f"{part.name} ({part.amount})" for part in parts)


def _fetch(request: Request, parts: Sequence[Part], say: Say) -> None:
    """Fetch parts in their order, one process at a time; UserError says what is missing and how to
    get it."""
    left = list(parts)
    try:
        if offline():
            raise UserError("HF_HUB_OFFLINE is set")
        from lib.leases import run_lock  # the models' and rows' own packages: not needed for mini
        with run_lock(REPO_ROOT / "data" / "cache" / "fetch", "fetching"):
            while left:
                say(f"fetching {left[0].name}")
                left[0].fetch(say)
                left.pop(0)
    except UserError as error:
        raise UserError(f"missing: {_list(left)}, in all {_total(left)}; not fetched: {error}; on a "
                        f"connected machine {request.command} fetches ahead; {NOTHING}") from error
    say("fetched: all that was missing is here")
