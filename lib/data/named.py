"""The datasets whose place is known: ``data/datasets.toml`` says where they lie and where they come from. Fetched are the
annotation file and the single images that a run draws, never the archives of all images."""

import os
import re
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pooch
import requests
from requests.adapters import HTTPAdapter
from tqdm.contrib.concurrent import thread_map
from urllib3.util import Retry

from lib.base import ROOT, UserError, folder_setting, write_atomic
from lib.data.captions import Entry, read_coco, read_text, validated
from lib.data.datasets import Dataset, Item, build, draw, examples
from lib.data.images import decode_image

_TABLES = tomllib.loads((ROOT / "data" / "datasets.toml").read_text(encoding="utf-8"))
NAMED: dict[str, dict[str, Any]] = {name: _TABLES.get(table.get("base"), {}) | table for name, table in _TABLES.items()}
RETRY = Retry(total=3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
AGENT = {"User-Agent": "captioner-generator-compendium"}  # some hosts refuse the libraries' own names


def place(name: str) -> tuple[Path, Path, Path]:
    """Return a dataset's folder, annotation file and image folder: the first that exists, else where a fetch puts it."""
    table = NAMED[name]
    root = Path(folder_setting(table.get("variable", ""), ROOT / table["folder"]))
    annotation, images = (next((root / one for one in table[key] if (root / one).exists()), root / table[key][0])
                          for key in ("annotations", "images"))
    return root, annotation, images


def listed(name: str) -> list[Entry]:
    """Return the images that a dataset lists, there or not; UserError if its annotation file is absent or wrong."""
    table, annotation = NAMED[name], place(name)[1]
    if not annotation.is_file():
        raise UserError(f"dataset {name}: {annotation} is absent: {table['remedy']}")
    entries = read_coco(annotation)
    if "split" in table:
        lines = (ROOT / table["split"]).read_text(encoding="utf-8")
        ids = set(re.sub("(?m)^#.*$", "", lines).split())
        entries = [entry for entry in entries if entry.id in ids]
    if not entries:
        raise UserError(f"{annotation}: none of the ids in {table['split']} is in it: wrong file?")
    return entries


def load_named(name: str) -> Dataset:
    """Return one of these datasets; where no image is there, it has captions only."""
    entries, (root, _, folder) = listed(name), place(name)
    truth = root / "scenes.json"
    scenes = validated(dict[str, dict], read_text(truth), str(truth)) if truth.is_file() else {}
    absent = {entry.id: entry.file_name for entry in entries if not (folder / entry.file_name).is_file()}
    none = len(absent) == len(entries)
    items = [Item(entry.id, None if none else folder / entry.file_name, (), entry.domain, scenes.get(entry.id))
             for entry in entries if none or entry.id not in absent]
    more = f"; listed images that are not in {folder}: {len(absent):,} ({examples(absent.values())})" if absent else ""
    captions = {entry.id: entry.captions for entry in entries}
    return build(name, captions, items, more, absent=absent, remedy=NAMED[name]["remedy"])


def missing_files(names: Sequence[str], n: int, seed: int) -> list[tuple[str, int]]:
    """Return what the datasets lack for n sources each: (what, bytes, estimated), empty if nothing."""
    missing = []
    for name in (name for name in names if "url" in NAMED.get(name, {})):
        source = NAMED[name]
        if place(name)[1].is_file():
            wanted = len(_missing_images(name, n, seed))
        else:
            missing.append((f"captions of {name}", source["size"]))
            wanted = min(n, source.get("split_size", source["listed"]))
        if wanted:
            missing.append((f"{wanted:,} images of {name}", wanted * source["image_size"]))
    return missing


def fetch(names: Sequence[str], n: int, seed: int) -> None:
    """Fetch what ``missing_files`` lists, nothing where HF_HUB_OFFLINE is set. UserError where captions cannot be had;
    images that cannot be had are printed and count as missing."""
    lacking = [name for name in names if missing_files([name], n, seed)]
    if lacking and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        print("HF_HUB_OFFLINE is set: nothing is fetched here; on a connected machine ./run_all.sh --fetch does it")
        return
    for name in lacking:
        if not place(name)[1].is_file():
            _fetch_annotation(name)
        _fetch_images(name, _missing_images(name, n, seed))


def _missing_images(name: str, n: int, seed: int) -> list[Entry]:
    """The listed images that a run of n sources draws and that are not there."""
    entries, folder = listed(name), place(name)[2]
    drawn = draw((entry.id for entry in entries), name, n, seed)
    return [entry for entry in entries if entry.id in drawn and not (folder / entry.file_name).is_file()]


def _fetch_annotation(name: str) -> None:
    """Fetch a dataset's annotation file by way of a folder of its own, checked by hash and by what it lists."""
    source, (root, target, _) = NAMED[name], place(name)
    url, member = source["url"], source.get("member")
    unzip = pooch.Unzip(members=[member], extract_dir=".") if member else None
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            server = pooch.create(folder, "", registry={"file": source.get("sha256")}, urls={"file": url}, retry_if_failed=3)
            server.fetch("file", unzip, pooch.HTTPDownloader(headers=AGENT, progressbar=True, timeout=60))
            content = Path(folder, member or "file")
            if len(read_coco(content)) != source["listed"]:
                raise UserError(f"{url} does not list {source['listed']:,} images: it is not the known file")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(content, target)
    except (OSError, ValueError, KeyError, UserError) as error:  # of the network, the hash, the archive, the content
        raise UserError(f"captions of {name} cannot be fetched ({error}): run again, or put the file of "
                        f"{source['page']} at {target}") from error


def _fetch_images(name: str, wanted: list[Entry]) -> None:
    """Fetch images, several at once; print what no server has, or what keeps the rest from coming."""
    def fetch_one(entry: Entry) -> str | None:  # why none of its URLs has it; OSError if a server cannot be reached
        reasons = []
        for url in NAMED[name]["image_urls"]:
            url = url.format(file=quote(entry.file_name), stem=quote(Path(entry.file_name).stem))
            try:
                answer = session.get(url, timeout=60)
                answer.raise_for_status()
                decode_image(answer.content, url)  # a portal or proxy may answer with a page of its own
                return write_atomic(place(name)[2] / entry.file_name, answer.content)
            except (UserError, requests.HTTPError) as error:
                reasons.append(f"{entry.file_name} ({error})")
        return reasons[0]

    with requests.Session() as session:
        session.adapters = dict.fromkeys(session.adapters, HTTPAdapter(pool_maxsize=16, max_retries=RETRY))
        session.headers.update(AGENT)
        try:
            found = thread_map(fetch_one, wanted, max_workers=16, desc=f"images of {name}", mininterval=5)
        except OSError as error:  # of requests and of the disk
            print(f"{name}: not all images are fetched ({error}): check connection and disk and run again")
            return
    if gone := list(filter(None, found)):
        print(f"{name}: {len(gone)} of {len(wanted):,} images are at none of their URLs: {examples(gone)}")
