"""A folder of images or a text file of yours. ``folder:PATH``: images there and in its subfolders, linked ones too; ids are
their paths within it. Captions come from one file a folder (CAPTION_FILES) and from a ``.txt`` of the image's name, one a
line. ``texts:FILE``: one prompt a line, for text reconstruction; ids are line numbers."""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from lib.base import UserError, user_path
from lib.data.captions import CAPTION_FILES, read_folder_captions, read_lines, with_words
from lib.data.datasets import Dataset, Item, build, examples
from lib.data.images import EXTENSIONS

REASONS = {".txt": "no one image has its name", ".md": "no image", ".json": "not named captions",
           ".jsonl": "not named captions", ".csv": "not named captions"}


def load_folder(place: str) -> Dataset:
    """Return the images of a folder with captions, or the captions alone; its note says what matched and was passed over."""
    folder = _given(place)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder of images, or texts:FILE for a file of prompts")
    names, passed = _walk(folder)
    images = [name for name in names if PurePosixPath(name).suffix.lower() in EXTENSIONS]
    known, files = _read_captions(folder, names, images)
    for name in set(names) - {*images, *files}:
        suffix = PurePosixPath(name).suffix.lower()
        reason = REASONS.get(suffix, "not read: convert images to JPEG or PNG")
        passed[f"{suffix or 'without extension'} ({reason})"] += 1
    over = "; passed over: " * bool(passed) + ", ".join(f"{n} {reason}" for reason, n in sorted(passed.items()))
    if not images and not known:
        raise UserError(f"folder {folder} has no images ({', '.join(sorted(EXTENSIONS))}){over}")
    raw: dict[str, list[str]] = {name: [] for name in images or known}
    matched = match_names(known, raw)
    for name, image in matched.items():
        raw[image] += [text for text in known[name] if text not in raw[image]]
    lost = [name for name in known if name not in matched]
    more = f"; captions whose name fits no image: {len(lost):,} ({examples(lost)})" if lost else ""
    items = [Item(name, folder / name if images else None) for name in raw]
    return build(folder.name or "folder", raw, items, more + over)


def load_texts(place: str) -> Dataset:
    """Return the prompts of a text file; blank lines and lines without a letter or digit are skipped."""
    path = _given(place)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give folder:{path} for its images, or one text file of prompts")
    raw = {f"{number:06d}": (line,) for number, line in read_lines(path)}
    items = [Item(key, None) for key, line in raw.items() if with_words(line)]
    if not items:
        raise UserError(f"text file {path} has no text: write one prompt a line")
    return build(path.stem, raw, items)


def match_names(names: Iterable[str], images: Collection[str]) -> dict[str, str]:
    """Return name -> image where both are equal, or the only one of that name in Unicode NFC, extension or not."""
    found = defaultdict(set)
    for image in images:
        found[normalize("NFC", image)].add(image)
        found[str(PurePosixPath(normalize("NFC", image)).with_suffix(""))].add(image)
    fitting = {name: found[normalize("NFC", name)] for name in names}
    fitting = {name: {name} & fits or fits for name, fits in fitting.items()}
    return {name: min(fits) for name, fits in fitting.items() if len(fits) == 1}


def _given(place: str) -> Path:
    path = Path(os.path.normpath(str(user_path(place.strip()))))
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path")
    return path


def _walk(folder: Path) -> tuple[list[str], Counter[str]]:
    """Names of the files below a folder, sorted, and why others are passed over; each real folder is read once."""
    names, passed, seen, starts = [], Counter(), set(), [folder]
    for start in starts:  # it grows by the linked folders: they come after the real ones
        for here, folders, files in os.walk(start, onerror=lambda _: passed.update(["folder that cannot be read"])):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            if os.path.realpath(here) in seen:
                passed["linked folder that was read already"] += 1
                folders[:] = files[:] = []
            seen.add(os.path.realpath(here))
            starts += [path for path in (Path(here, name) for name in folders) if path.is_symlink()]
            for path in (Path(here, name) for name in files):
                if path.name[0] == ".":
                    passed["hidden image"] += path.suffix.lower() in EXTENSIONS
                elif not path.is_file():
                    passed["broken link"] += 1
                else:
                    names.append(path.relative_to(folder).as_posix())
    return sorted(names), +passed


def _read_captions(folder: Path, names: list[str], images: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by path within the folder, from captions files and texts beside images, and the files read."""
    known: dict[str, list[str]] = defaultdict(list)
    files: dict[PurePosixPath, str] = {}
    for name in names:
        parent = PurePosixPath(name).parent
        if PurePosixPath(name).name.lower() in CAPTION_FILES:
            if files.setdefault(parent, name) != name:
                raise UserError(f"folder {folder} has {files[parent]} and {name}: keep one captions file")
            for key, captions in read_folder_captions(folder / name).items():
                known[str(parent / key)] += captions
    texts = {name[:-4]: name for name in names if name.lower().endswith(".txt")}
    beside = match_names(texts, images)
    for name in beside:
        known[name] += [line.strip() for _, line in read_lines(folder / texts[name])]
    return known, [*files.values(), *map(texts.get, beside)]
