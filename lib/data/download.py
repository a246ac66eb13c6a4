"""What the named datasets lack here, how large it is, and fetching it: the annotation file and the single images that
a run draws, never the archives of all images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pooch
import requests
from requests.adapters import HTTPAdapter
from tqdm.contrib.concurrent import thread_map
from urllib3.util import Retry

from lib.base import UserError, write_atomic
from lib.data.captions import Entry, read_coco
from lib.data.datasets import draw, examples
from lib.data.images import decode_image
from lib.data.named import NAMED, listed, place

AT_ONCE = 16  # images fetched at the same time
RETRY = Retry(total=3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
AGENT = {"User-Agent": "captioner-generator-compendium"}  # some hosts refuse the libraries' own names


def missing_files(names: Sequence[str], n: int, seed: int) -> list[tuple[str, int]]:
    """Return what the datasets lack for n sources each: (what, bytes, estimated), empty if nothing."""
    missing = []
    for name in names:
        source = NAMED.get(name, {})
        if "url" not in source:
            continue
        if place(name)[1].is_file():
            wanted = len(_missing_images(name, n, seed))
        else:
            missing.append((f"captions of {name}", source["size"]))
            wanted = min(n, source.get("split_size", source["listed"]))
        if wanted:
            missing.append((f"{wanted:,} images of {name}", wanted * source["image_size"]))
    return missing


def fetch(names: Sequence[str], n: int, seed: int) -> bool:
    """Fetch what ``missing_files`` lists; return whether all of it is here now.

    What is there stays, so that an interrupted fetch goes on. UserError in one line where captions cannot be had;
    images that cannot be had are printed and count as missing.
    """
    missing = {name: lacks for name in names if (lacks := missing_files([name], n, seed))}
    for name, lacks in missing.items():
        captions = place(name)[1].is_file()
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
            what = ", ".join(f"{what} (about {size / 1e6:,.1f} MB)" for what, size in lacks)
            line = f"missing: {what}; HF_HUB_OFFLINE is set: fetch on a connected machine with ./run_all.sh --fetch"
            if not captions:
                raise UserError(line)
            print(line)
            continue
        if not captions:
            _fetch_annotation(name)
        _fetch_images(name, _missing_images(name, n, seed))
    return not missing_files([*missing], n, seed)


def _missing_images(name: str, n: int, seed: int) -> list[Entry]:
    """The listed images that a run of n sources draws and that are not there."""
    entries, folder = listed(name), place(name)[2]
    drawn = draw((entry.id for entry in entries), name, n, seed)
    return [entry for entry in entries if entry.id in drawn and not (folder / entry.file_name).is_file()]


def _fetch_annotation(name: str) -> None:
    """Fetch a dataset's annotation file by way of a folder of its own, checked by hash and by what it lists."""
    source, (root, target, _) = NAMED[name], place(name)
    folder, file, member = root / f".fetch-{name}", source["url"].rpartition("/")[2], source.get("member")
    unzip = pooch.Unzip(members=[member], extract_dir=".") if member else None
    server = pooch.create(folder, "", registry={file: source.get("sha256")}, urls={file: source["url"]},
                          retry_if_failed=3)
    try:
        server.fetch(file, unzip, pooch.HTTPDownloader(headers=AGENT, progressbar=True, timeout=60))
        content = folder / (member or file)
        if len(read_coco(content)) != source["listed"]:
            raise UserError(f"{source['url']} does not list {source['listed']:,} images: it is not the known file")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(content, target)
    except (OSError, ValueError, KeyError, UserError) as error:  # of the network, the hash, the archive, the content
        raise UserError(f"captions of {name} cannot be fetched ({error}): run again, or put the file of "
                        f"{source['page']} at {target}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch_images(name: str, wanted: list[Entry]) -> None:
    """Fetch images, several at once; print what no server has, or what keeps the rest from coming."""
    with requests.Session() as session:
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(pool_maxsize=AT_ONCE, max_retries=RETRY))
        session.headers.update(AGENT)
        try:
            gone = list(filter(None, thread_map(partial(_fetch_image, name, session), wanted, max_workers=AT_ONCE,
                                                desc=f"images of {name}", mininterval=5)))
        except OSError as error:  # of requests and of the disk
            print(f"{name}: not all images are fetched ({error}): check connection and disk and run again")
            return
    if gone:
        print(f"{name}: {len(gone)} of {len(wanted):,} images are at none of their URLs: {examples(gone)}")


def _fetch_image(name: str, session: requests.Session, entry: Entry) -> str | None:
    """Fetch one image from the first URL that has it; return why none has it, None if it is there.

    OSError if a server cannot be reached and no other has the image.
    """
    reason, trouble = "", None
    for url in NAMED[name]["image_urls"]:
        url = url.format(file=quote(entry.file_name), stem=quote(Path(entry.file_name).stem))
        try:
            answer = session.get(url, timeout=60)
            if answer.status_code in (403, 404, 410):  # a bucket that may not be listed answers 403 for an absent file
                raise UserError(f"{url}: {answer.status_code} {answer.reason}")
            answer.raise_for_status()
            decode_image(answer.content, url)  # a portal or proxy may answer with a page of its own
            write_atomic(place(name)[2] / entry.file_name, answer.content)
            return None
        except UserError as error:
            reason = reason or str(error)
        except OSError as error:
            trouble = error
    if trouble is not None:
        raise trouble
    return f"{entry.file_name} ({reason})"
