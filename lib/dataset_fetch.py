"""The named datasets: what is missing here, how large it is, and where it is fetched from.

Fetched are the annotation file and the single pictures that a run draws, never the archives of all
pictures. Addresses, sizes and hashes are facts from public sources:

- COCO: the bucket behind images.cocodataset.org, by the address that has a valid certificate (that
  host's own has none; mlcommons/inference, pull request 2572). Sizes and SHA-256 of the archives:
  tensorflow/datasets, url_checksums/coco_captions.txt. The MD5 of captions_val2014.json is the one
  that public loaders ask for. A picture's size is that of its archive by the number in it.
- NoCaps: the address that public loaders use (LAVIS, for one); the makers' page names a file in
  Google Drive by now, which no program can fetch, so where the address fails that page is told. No
  hash is published: the SHA-256 of the first fetch is locked. Its pictures are validation pictures
  of Open Images, whose public bucket has 41,620 of them in 12 GB; the addresses in the NoCaps file
  are the last resort.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote

from lib import captions
from lib.datasets import LAYOUTS, draw, file_finder, read_entries, split_ids
from lib.download import (
    NotThere,
    Part,
    Say,
    check_hash,
    download,
    file_hash,
    in_words,
    read,
    stated_size,
    write_whole,
)
from lib.errors import UserError
from lib.images import decode_image

AT_ONCE = 16  # pictures fetched at the same time
GIVE_UP_AFTER = 16  # pictures in a row without one success: no connection, so the rest is not tried
UNAVAILABLE = "unavailable.json"  # beside the annotations: pictures that no address has, and why


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from.

    url: the annotation file, or the archive that has it as ``member``; size: bytes of url; sha256:
    of url, None where it is locked at the first fetch; md5: of the member; listed: pictures in the
    annotation file; picture_size: bytes of one on average; pictures: addresses to try in order,
    with {file} and {stem} of its name; link: the key of a last address in the annotation file;
    page: where a person finds the annotation file if the address fails, None for a lasting one.
    """

    url: str
    size: int | None
    listed: int
    picture_size: int
    pictures: tuple[str, ...]
    link: str
    sha256: str | None = None
    member: str | None = None
    md5: str | None = None
    page: str | None = None


_COCO = "https://s3.amazonaws.com/images.cocodataset.org"
_VAL2014 = Source(
    url=f"{_COCO}/annotations/annotations_trainval2014.zip", size=252_872_794,
    sha256="031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
    member="annotations/captions_val2014.json", md5="41a3e90178948b2ba004175080277e35",
    listed=40_504, picture_size=6_645_013_297 // 40_504,
    pictures=(f"{_COCO}/val2014/{{file}}",), link="flickr_url",
)
SOURCES: dict[str, Source] = {
    "coco": _VAL2014,
    "coco-val2014": _VAL2014,
    "coco-val2017": Source(
        url=f"{_COCO}/annotations/annotations_trainval2017.zip", size=252_907_541,
        sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        member="annotations/captions_val2017.json", listed=5_000, picture_size=815_585_330 // 5_000,
        pictures=(f"{_COCO}/val2017/{{file}}",), link="flickr_url",
    ),
    "nocaps": Source(
        url="https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json", size=None,
        listed=4_500, picture_size=12_000_000_000 // 41_620,
        pictures=("https://open-images-dataset.s3.amazonaws.com/validation/{stem}.jpg",
                  "https://s3.amazonaws.com/open-images-dataset/validation/{stem}.jpg"),
        link="coco_url", page="https://nocaps.org/download",
    ),
}


def missing_parts(name: str, n: int, seed: int) -> list[Part]:
    """What a dataset lacks for a run of n sources: its annotation file, pictures, both or nothing.

    Embedded datasets and those of the user's own lack nothing that could be fetched.
    """
    if name not in SOURCES:
        return []
    source, layout = SOURCES[name], LAYOUTS[name]
    parts, wanted, present = [], 0, 0
    if layout.annotation_file() is None:
        size = source.size or stated_size(source.url)
        parts.append(Part(f"captions of {name}", size, partial(fetch_annotation, name)))
        split = split_ids(name)
        wanted = min(n, source.listed if split is None else len(split))
    else:
        drawn = drawn_entries(name, n, seed)
        is_there = file_finder(layout.image_folder())
        present = sum(is_there(entry.file_name) for entry in drawn)
        wanted = len(missing_pictures(name, drawn))
    if wanted:
        count = f"{wanted:,} picture{'s' if wanted > 1 else ''}"
        parts.append(Part(f"{count} of {name}", wanted * source.picture_size,
                          partial(fetch_pictures, name, n, seed), about=True, needed=not present))
    return parts


def drawn_entries(name: str, n: int, seed: int) -> list[captions.Entry]:
    """The pictures that a run of n sources draws, whether they are there or not."""
    annotation = LAYOUTS[name].annotation_file()
    if annotation is None:
        raise UserError(f"dataset {name}: its annotation file is absent: fetch it first")
    entries = read_entries(annotation, split_ids(name))
    kept = draw((entry.id for entry in entries), name, n, seed)
    return [entry for entry in entries if entry.id in kept]


def missing_pictures(name: str, drawn: Sequence[captions.Entry]) -> list[captions.Entry]:
    """Those that are not there and not known to be unavailable."""
    is_there = file_finder(LAYOUTS[name].image_folder())
    known = unavailable(name)
    return [entry for entry in drawn if entry.file_name not in known and not is_there(entry.file_name)]


def drawn_unavailable(name: str, n: int, seed: int) -> list[str]:
    """File names of drawn pictures that are absent and known to be unavailable."""
    if name not in SOURCES or not unavailable(name):
        return []
    is_there, known = file_finder(LAYOUTS[name].image_folder()), unavailable(name)
    return [entry.file_name for entry in drawn_entries(name, n, seed)
            if entry.file_name in known and not is_there(entry.file_name)]


def unavailable(name: str) -> dict[str, str]:
    """File name -> why no address had it when it was fetched."""
    file = LAYOUTS[name].root() / UNAVAILABLE
    if not file.is_file():
        return {}
    data = captions.read_json(file)
    if not isinstance(data, dict):
        raise UserError(f"{file} is damaged: delete it, the pictures in it are then tried again")
    return {str(key): str(value) for key, value in data.items()}


# --- annotations --------------------------------------------------------------------------------


def fetch_annotation(name: str, say: Say = print) -> Path:
    """Fetch a dataset's annotation file; UserError in one line if it cannot be had or is not it."""
    from lib.model_fetch import lock  # imports torch: only where something is fetched
    from lib.weights import locked_revision

    source, layout = SOURCES[name], LAYOUTS[name]
    there = layout.annotation_file()
    if there is not None:
        return there
    target, folder = layout.root() / layout.annotation[0], layout.root() / ".fetch"
    fetched = folder / source.url.rpartition("/")[2]
    try:
        download(source.url, fetched, sha256=source.sha256 or locked_revision(source.url), say=say)
    except UserError as error:
        if source.page is None:
            raise
        raise UserError(f"{error}; or put the captions of {source.page} by hand at {target}") from error
    content = fetched if source.member is None else folder / Path(source.member).name
    try:
        digest = file_hash(fetched)
        if source.member is not None:
            _unpack(fetched, source, content)
        _check_listing(content, source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(content, target)
        lock(source.url, digest)
    finally:
        for file in (fetched, content):
            file.unlink(missing_ok=True)
        if not any(folder.iterdir()):  # another archive may have been cut off there
            folder.rmdir()
    return target


def _unpack(archive: Path, source: Source, target: Path) -> None:
    """Take the annotation file out of its archive, checked by its hash."""
    try:
        with zipfile.ZipFile(archive) as packed, packed.open(source.member or "") as stream, \
                target.open("wb") as file:
            shutil.copyfileobj(stream, file)
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise UserError(f"{source.url} is no whole archive with {source.member} ({error}): it is deleted, "
                        "run again") from error
    check_hash(target, source.md5, None)


def _check_listing(content: Path, source: Source) -> None:
    """UserError unless a file is an annotation file that lists as many pictures as it should."""
    try:
        found = len(captions.read_coco(content))
    except UserError as error:
        raise UserError(f"{source.url} sent something else than captions, deleted ({error})") from error
    if found != source.listed:
        raise UserError(f"{source.url} lists {found:,} pictures, expected {source.listed:,}: it is not the "
                        "file that this project knows and is deleted")


# --- pictures -----------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What became of the pictures so far."""

    bytes: int = 0
    fetched: int = 0
    gone: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    failed_in_a_row: int = 0

    def count(self, name: str, outcome: Future[tuple[int, str]]) -> None:
        """Add the outcome of one picture."""
        try:
            size, why = outcome.result()
        except OSError as error:
            self.failed.append(f"{name}: {error}")
            self.failed_in_a_row += 1
            return
        self.failed_in_a_row = 0
        self.bytes += size
        self.fetched += 1 if size else 0
        if not size:
            self.gone[name] = why


def fetch_pictures(name: str, n: int, seed: int, say: Say = print) -> None:
    """Fetch the drawn pictures that are missing, several at once.

    What no address has is written to ``unavailable.json`` with the reasons, counted and told; it
    is not tried again until it is taken out of that file. Raises UserError if servers cannot be
    reached or the folder cannot be written; what is there is kept.
    """
    source, folder = SOURCES[name], LAYOUTS[name].image_folder()
    wanted = missing_pictures(name, drawn_entries(name, n, seed))
    if not wanted:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written ({error.strerror}): make it writable, or set "
                        "HF_HUB_OFFLINE=1 to play with the pictures that are there") from error
    tally = _fetch_all(wanted, lambda entry: fetch_picture(entry, source, folder), name, say)
    if len(tally.gone) >= 10 and not tally.fetched:  # a portal or proxy answers for the servers
        first = next(iter(tally.gone.values()))
        raise UserError(f"dataset {name}: not one of {len(tally.gone)} pictures could be had ({first}): "
                        "check what stands between this machine and the network")
    if tally.gone:
        file = LAYOUTS[name].root() / UNAVAILABLE
        record = dict(sorted((unavailable(name) | tally.gone).items()))
        write_whole(file, (json.dumps(record, indent=1) + "\n").encode())
        say(f"{name}: {len(tally.gone)} of {len(wanted):,} pictures are at none of their addresses")
    if tally.failed:
        left = len(wanted) - tally.fetched - len(tally.gone)
        raise UserError(f"dataset {name}: {left:,} of {len(wanted):,} pictures are not fetched "
                        f"({tally.failed[0]}): check connection and disk and run again, the others are kept")


def _fetch_all(wanted: Sequence[captions.Entry], get: Callable[[captions.Entry], tuple[int, str]],
               name: str, say: Say) -> _Tally:
    """Fetch pictures with several threads; stops early where none can be reached."""
    tally, told = _Tally(), 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        names: Mapping[Future, str] = {pool.submit(get, entry): entry.file_name for entry in wanted}
        try:
            for done, outcome in enumerate(as_completed(names), start=1):
                tally.count(names[outcome], outcome)
                if tally.failed_in_a_row >= GIVE_UP_AFTER:
                    break
                if done * 10 // len(wanted) > told or done == len(wanted):
                    told = done * 10 // len(wanted)
                    say(f"{name}: {done:,} of {len(wanted):,} pictures, {in_words(tally.bytes)}")
        finally:  # also on Ctrl-C: what has not begun is dropped, what is under way ends whole
            pool.shutdown(cancel_futures=True)
    return tally


def addresses(entry: captions.Entry, source: Source) -> list[str]:
    """Where a picture may be had, best first; only encrypted addresses."""
    file = entry.file_name
    urls = [url.format(file=quote(file), stem=quote(Path(file).stem)) for url in source.pictures]
    link = entry.links.get(source.link, "").replace("http://", "https://", 1)
    return [*urls, *([link] if link.startswith("https://") and link not in urls else [])]


def fetch_picture(entry: captions.Entry, source: Source, folder: Path) -> tuple[int, str]:
    """Fetch one picture from the first address that has it, checked by decoding it.

    Returns its bytes, or 0 and why no address has it. Raises OSError if one cannot be reached and
    no other has it.
    """
    reasons: list[str] = []
    trouble: OSError | None = None
    for position, url in enumerate(addresses(entry, source)):
        try:
            content = read(url)
            _check_picture(content, entry, url, foreign=position >= len(source.pictures))
        except UserError as error:
            reasons.append(str(error))
        except OSError as error:
            trouble = trouble or error
        else:
            write_whole(folder / entry.file_name, content)
            return len(content), ""
    if trouble is not None:
        raise trouble
    return 0, "; ".join(reasons)


def _check_picture(content: bytes, entry: captions.Entry, url: str, foreign: bool) -> None:
    """UserError unless the bytes are a picture; from a foreign host also of the listed size.

    Picture hosts answer with a picture of their own for what they no longer have.
    """
    picture = decode_image(io.BytesIO(content), url)
    if foreign and entry.size is not None and sorted(picture.size) != sorted(entry.size):
        raise NotThere(f"{url} is {picture.width} x {picture.height} pixels, listed are "
                       f"{entry.size[0]} x {entry.size[1]}: another picture")
