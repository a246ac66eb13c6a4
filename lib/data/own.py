"""A folder of images or a text file of yours.

``folder:PATH``: images there and in its subfolders, linked ones too; ids are their paths within it. Captions come
from one file a folder (``lib.data.captions.CAPTION_FILES``) and from a ``.txt`` of the image's name, one a line.
``texts:FILE``: one prompt a line, for text reconstruction; ids are line numbers.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from lib.base import UserError, user_path
from lib.data.captions import CAPTION_FILES, read_folder_captions, read_lines, with_words
from lib.data.datasets import Dataset, Item, examples, words_note
from lib.data.images import EXTENSIONS


def load_folder(place: str) -> Dataset:
    """Return the images of a folder with their captions; its note says what was matched and what passed over.

    Without any image it has the captions only.
    """
    folder = _absolute(place)
    if not folder.is_dir():
        raise UserError(f"dataset folder {folder} does not exist: check the path")
    names, passed = _walk(folder)
    images = [name for name in names if _suffix(name) in EXTENSIONS]
    files = [name for name in names if PurePosixPath(name).name.lower() in CAPTION_FILES]
    known = _read_captions(folder, files)
    texts = [name for name in names if _suffix(name) == ".txt"]
    beside = match_names([name[:-4] for name in texts], images)
    texts = [name for name in texts if name[:-4] in beside]
    passed.update(map(_why_passed_over, sorted(set(names) - {*images, *files, *texts})))
    if not images and not known:
        raise UserError(f"folder {folder} has no images ({', '.join(sorted(EXTENSIONS))}){_passed_over(passed)}")
    matched = match_names(known, images or known)
    raw: dict[str, list[str]] = {name: [] for name in images or known}
    for name, image in matched.items():
        raw[image] += known[name]
    for name in texts:  # a caption that a file has too counts once
        raw[beside[name[:-4]]] += [line for _, line in read_lines(folder / name)
                                   if line.strip() not in raw[beside[name[:-4]]]]
    captions = {name: with_words(lines) for name, lines in raw.items()}
    note = _summary(folder.name, images, captions, [name for name in known if name not in matched])
    return Dataset(folder.name or "folder",
                   tuple(Item(name, folder / name if images else None, captions[name]) for name in raw),
                   {name: lines for name, lines in captions.items() if lines}, f"folder:{folder}",
                   notes=(note + _passed_over(passed), *words_note(raw, captions)))


def load_texts(place: str) -> Dataset:
    """Return the prompts of a text file; blank lines and lines without a letter or digit are skipped."""
    path = _absolute(place)
    if not path.is_file():
        raise UserError(f"text file {path} does not exist: check the path")
    raw = {f"{number:06d}": (line,) for number, line in read_lines(path)}
    prompts = {key: with_words(lines) for key, lines in raw.items()}
    items = tuple(Item(key, None, lines) for key, lines in prompts.items() if lines)
    if not items:
        raise UserError(f"text file {path} has no text: write one prompt a line")
    return Dataset(path.stem, items, {item.id: item.references for item in items}, f"texts:{path}",
                   notes=(f"texts {path.name}: {len(items):,} prompts", *words_note(raw, prompts)))


def match_names(names: Iterable[str], images: Collection[str]) -> dict[str, str]:
    """Return name -> image where both are equal, or the only one of that name in Unicode NFC, extension or not."""
    found = defaultdict(list)
    for image in images:
        for key in {normalize("NFC", image), os.path.splitext(normalize("NFC", image))[0]}:
            found[key].append(image)
    exact = set(images)
    fitting = {name: [name] if name in exact else found[normalize("NFC", name)] for name in names}
    return {name: fits[0] for name, fits in fitting.items() if len(fits) == 1}


def _absolute(place: str) -> Path:
    """A path of the user's, checked for what no table and no line of a message can hold."""
    _check_name(place, "dataset")
    return Path(os.path.abspath(str(user_path(place.strip()))))


def _check_name(name: str, where: str) -> None:
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name):
        raise UserError(f"{where}: file name {name!a} is not UTF-8 or has a control character: rename it")


def _walk(folder: Path) -> tuple[list[str], Counter[str]]:
    """Names of the files below a folder, sorted, and why others are passed over; each real folder is read once."""
    names, passed, seen, queue = [], Counter(), set(), [str(folder)]
    while queue:
        for here, folders, files in os.walk(queue.pop(0), onerror=lambda _: passed.update(["unreadable folder"])):
            real = os.path.realpath(here)
            if real in seen:
                passed["folder linked twice"] += 1
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            queue += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
            for name in files:
                path = Path(here, name)
                if name.startswith("."):
                    passed["hidden"] += _suffix(name) in EXTENSIONS
                elif not path.is_file():
                    passed["broken link"] += 1
                else:
                    names.append(path.relative_to(folder).as_posix())
                    _check_name(names[-1], f"folder {folder}")
    return sorted(names), passed


def _read_captions(folder: Path, files: list[str]) -> dict[str, list[str]]:
    """Captions by path within the folder, from the captions file of each subfolder."""
    known: dict[str, list[str]] = {}
    parents = Counter(PurePosixPath(name).parent for name in files)
    for parent, count in parents.items():
        here = [name for name in files if PurePosixPath(name).parent == parent]
        if count > 1:
            raise UserError(f"folder {folder / parent} has {' and '.join(Path(name).name for name in here)}: "
                            "keep one captions file")
        for name, texts in read_folder_captions(folder / here[0]).items():
            known.setdefault((parent / name).as_posix(), []).extend(texts)
    return known


def _summary(name: str, images: list[str], captions: Mapping[str, tuple[str, ...]], unmatched: list[str]) -> str:
    """One line: images, captions matched, images without captions, captions without image."""
    bare = [key for key in captions if not captions[key]]
    note = f"folder {name}: {len(images):,} images, {len(captions) - len(bare):,} with captions"
    if bare and len(bare) < len(captions):
        note += f"; {len(bare):,} without captions, such as {examples(bare)}"
    if unmatched:
        note += f"; captions of {len(unmatched):,} names fit no image, such as {examples(unmatched)}"
    return note


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _why_passed_over(name: str) -> str:
    """A file's extension and the reason in brackets."""
    suffix = _suffix(name)
    if suffix == ".txt":
        return ".txt (no one image has its name)"
    if suffix in (".json", ".jsonl", ".csv"):
        return f"{suffix} (not named captions or metadata)"
    return f"{suffix or 'without extension'} (not an image format that is read: convert to JPEG or PNG)"


def _passed_over(passed: Counter[str]) -> str:
    """The end of a line that tells how many files were passed over and why."""
    counted = [f"{count} {reason}" for reason, count in sorted(passed.items()) if count]
    return f"; passed over: {', '.join(counted)}" if counted else ""
