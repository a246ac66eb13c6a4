"""What the named datasets lack here, how large it is, and fetching it.

Fetched are the annotation file and the single images that a run draws, never the archives of all images.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import quote

import pooch
import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from lib.base import UserError, write_atomic
from lib.data.captions import Entry, read_coco
from lib.data.datasets import draw, examples
from lib.data.images import decode_image
from lib.data.named import NAMED, listed, split_ids

AT_ONCE = 16  # images fetched at the same time
GIVE_UP_AFTER = 16  # images that no server answered for: no connection, so the rest is not tried
RETRY = Retry(total=3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
AGENT = {"User-Agent": "captioner-generator-compendium"}  # some hosts refuse the libraries' own names


def missing_files(names: Sequence[str], n: int, seed: int) -> list[tuple[str, int]]:
    """Return what the datasets lack for n sources each: (what, bytes, estimated), empty if nothing."""
    missing = []
    for name in [name for name in names if name in NAMED and NAMED[name].url]:
        if NAMED[name].annotation_file.is_file():
            wanted = len(_missing_images(name, n, seed))
        else:
            missing.append((f"captions of {name}", NAMED[name].size))
            wanted = min(n, NAMED[name].split_size or NAMED[name].listed)
        if wanted:
            missing.append((f"{wanted:,} images of {name}", wanted * NAMED[name].image_size))
    return missing


def fetch(names: Sequence[str], n: int, seed: int) -> None:
    """Fetch what ``missing_files`` lists; what is there stays, so that an interrupted fetch goes on.

    UserError in one line where a server cannot be reached, or a file is not the known one. Images that no server
    has are printed; they count as missing.
    """
    missing = missing_files(names, n, seed)
    if missing and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        what = ", ".join(f"{part} (about {size / 1e6:,.1f} MB)" for part, size in missing)
        raise UserError(f"missing: {what}; HF_HUB_OFFLINE is set: fetch ahead on a connected machine with ./run_all.sh --fetch")
    for name in [name for name in names if name in NAMED and NAMED[name].url]:
        if not NAMED[name].annotation_file.is_file():
            _fetch_annotation(name)
        if wanted := _missing_images(name, n, seed):
            _fetch_images(name, wanted)


def image_urls(name: str, entry: Entry) -> list[str]:
    """Return where an image may be had, best first; only encrypted URLs. The last may be a foreign host's."""
    urls = [url.format(file=quote(entry.file_name), stem=quote(Path(entry.file_name).stem))
            for url in NAMED[name].image_urls]
    link = (entry.coco_url if name == "nocaps" else entry.flickr_url) or ""
    link = link.replace("http://", "https://", 1)
    return [*urls, link] if link.startswith("https://") and link not in urls else urls


def _missing_images(name: str, n: int, seed: int) -> list[Entry]:
    """The listed images that a run of n sources draws and that are not there."""
    entries, folder = listed(name), NAMED[name].image_folder
    drawn = draw((entry.id for entry in entries), name, n, seed)
    return [entry for entry in entries if entry.id in drawn and not (folder / entry.file_name).is_file()]


def _fetch_annotation(name: str) -> None:
    """Fetch a dataset's annotation file by way of a folder of its own, checked by hash and by what it lists."""
    source = NAMED[name]
    target, folder, file = source.annotation_file, source.root / f".fetch-{name}", source.url.rpartition("/")[2]
    unzip = pooch.Unzip(members=[source.member], extract_dir=".") if source.member else None
    server = pooch.create(folder, "", registry={file: source.sha256}, urls={file: source.url}, retry_if_failed=3)
    try:
        server.fetch(file, processor=unzip, downloader=pooch.HTTPDownloader(headers=AGENT, progressbar=True, timeout=60))
        content = folder / (source.member or file)
        if len(read_coco(content)) != source.listed:
            raise UserError(f"{source.url} does not list {source.listed:,} images: it is not the known file")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(content, target)
    except (OSError, ValueError, KeyError, UserError) as error:  # of the network, the hash, the archive, the content
        raise UserError(f"captions of {name} cannot be fetched ({error}): run again, or put the file of {source.page} "
                        f"at {target}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch_images(name: str, wanted: list[Entry]) -> None:
    """Fetch images with several threads. Stops early where no server can be reached."""
    gone: list[str] = []
    unreached: list[OSError] = []
    with ThreadPoolExecutor(AT_ONCE) as pool, requests.Session() as session:
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(pool_maxsize=AT_ONCE, max_retries=RETRY))
        session.headers.update(AGENT)
        tasks = [pool.submit(_fetch_image, name, entry, session) for entry in wanted]
        try:
            for task in tqdm(as_completed(tasks), f"images of {name}", len(tasks), mininterval=5):
                try:
                    gone += filter(None, [task.result()])
                except OSError as error:  # of requests and of the disk
                    unreached.append(error)
                if len(unreached) >= GIVE_UP_AFTER:
                    break
        finally:  # also on Ctrl-C: what has not begun is dropped, what is under way ends whole
            pool.shutdown(cancel_futures=True)
    if unreached:
        raise UserError(f"dataset {name}: images are not fetched ({unreached[0]}): check connection and disk and run "
                        "again, the others are kept")
    if len(gone) == len(wanted) >= 10:  # a portal or proxy answers for the servers
        raise UserError(f"dataset {name}: not one of {len(gone)} images could be had ({gone[0]}): check what stands "
                        "between this machine and the network")
    if gone:
        print(f"{name}: {len(gone)} of {len(wanted):,} images are at none of their URLs, missing: {examples(gone)}")


def _fetch_image(name: str, entry: Entry, session: requests.Session) -> str | None:
    """Fetch one image from the first URL that has it; return why none has it, None if it is there.

    OSError if a server cannot be reached and no other has the image. A foreign host must send the listed size: image
    hosts answer with an image of their own for what they no longer have.
    """
    reason, trouble = "", None
    for position, url in enumerate(image_urls(name, entry)):
        try:
            answer = session.get(url, timeout=60)
            if answer.status_code not in (403, 404, 410):  # a bucket answers 403 for an absent file
                answer.raise_for_status()
                size = decode_image(answer.content, url).size
                if position < len(NAMED[name].image_urls) or sorted(size) == sorted((entry.width, entry.height)):
                    write_atomic(NAMED[name].image_folder / entry.file_name, answer.content)
                    return None
            reason = reason or f"{url}: {answer.status_code} {answer.reason}, or an image of another size"
        except UserError as error:
            reason = reason or str(error)
        except OSError as error:
            trouble = trouble or error
    if trouble is not None:
        raise trouble
    return f"{entry.file_name} ({reason})"
