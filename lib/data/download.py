"""What the named datasets lack here, how large it is, and fetching it.

Fetched are the annotation file and the single images that a run draws, never the archives of all images. URLs,
sizes and hashes are facts from public sources:

- COCO: the bucket behind images.cocodataset.org, by the address that has a valid certificate (that host's own has
  none; mlcommons/inference, pull request 2572). Sizes and SHA-256 of the archives: tensorflow/datasets,
  url_checksums/coco_captions.txt. An image's size is that of its archive divided by the number in it.
- NoCaps: the URL that public loaders use (LAVIS, for one); the makers' page names a file that no program can fetch,
  so where the URL fails that page is told. No hash is published. Its images are validation images of Open Images,
  whose public bucket has 41,620 of them in 12 GB; the URLs in the NoCaps file are the last resort.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pooch
import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from lib.base import UserError, write_atomic
from lib.data.captions import Entry, read_coco
from lib.data.datasets import KARPATHY_SPLIT, LAYOUTS, draw, examples, listed
from lib.data.images import decode_image

AT_ONCE = 16  # images fetched at the same time
GIVE_UP_AFTER = 16  # images that no server answered for: no connection, so the rest is not tried
RETRY = Retry(total=3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
AGENT = {"User-Agent": "captioner-generator-compendium"}  # some hosts refuse the libraries' own names


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from.

    url: the annotation file, or the archive that has it as ``member``; size: its bytes; sha256: of url; listed:
    images in the annotation file; image_size: bytes of one on average; images: URLs to try in order, with {file}
    and {stem} of its name; link: the key of a last URL in the annotation file; page: where a person finds it.
    """

    url: str
    size: int
    sha256: str | None
    member: str | None
    listed: int
    image_size: int
    images: tuple[str, ...]
    link: str
    page: str


_COCO = "https://s3.amazonaws.com/images.cocodataset.org"
_VAL2014 = Source(
    f"{_COCO}/annotations/annotations_trainval2014.zip", 252_872_794,
    "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009", "annotations/captions_val2014.json",
    40_504, 6_645_013_297 // 40_504, (f"{_COCO}/val2014/{{file}}",), "flickr_url", "https://cocodataset.org/#download")
SOURCES: dict[str, Source] = {
    "coco": _VAL2014,
    "coco-val2014": _VAL2014,
    "coco-val2017": Source(
        f"{_COCO}/annotations/annotations_trainval2017.zip", 252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268", "annotations/captions_val2017.json",
        5_000, 815_585_330 // 5_000, (f"{_COCO}/val2017/{{file}}",), "flickr_url", "https://cocodataset.org/#download"),
    "nocaps": Source(
        "https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json", 7_000_000, None, None,
        4_500, 12_000_000_000 // 41_620,
        ("https://open-images-dataset.s3.amazonaws.com/validation/{stem}.jpg",
         "https://s3.amazonaws.com/open-images-dataset/validation/{stem}.jpg"), "coco_url", "https://nocaps.org/download"),
}


def missing_files(names: Sequence[str], n: int, seed: int) -> list[tuple[str, int]]:
    """Return what the datasets lack for n sources each: (what, bytes, estimated), empty if nothing."""
    missing = []
    for name in [name for name in names if name in SOURCES]:
        source = SOURCES[name]
        if LAYOUTS[name].annotation_file() is None:
            missing.append((f"captions of {name}", source.size))
            wanted = min(n, len(json.loads(KARPATHY_SPLIT.read_text())["ids"]) if name == "coco" else source.listed)
        else:
            wanted = len(_missing_images(name, n, seed))
        if wanted:
            missing.append((f"{wanted:,} images of {name}", wanted * source.image_size))
    return missing


def fetch(names: Sequence[str], n: int, seed: int) -> None:
    """Fetch what ``missing_files`` lists; what is there stays, so that an interrupted fetch goes on.

    UserError in one line where a server cannot be reached, or a file is not the known one. Images that no server
    has are printed; they count as missing.
    """
    missing = missing_files(names, n, seed)
    if missing and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        what = ", ".join(f"{part} (about {size / 1e6:,.0f} MB)" for part, size in missing)
        raise UserError(f"missing: {what}; HF_HUB_OFFLINE is set: fetch on a connected machine with ./run_all.sh --fetch")
    for name in [name for name in names if name in SOURCES]:
        if LAYOUTS[name].annotation_file() is None:
            _fetch_annotation(name)
        if wanted := _missing_images(name, n, seed):
            _fetch_images(name, wanted)


def image_urls(entry: Entry, source: Source) -> list[str]:
    """Return where an image may be had, best first; only encrypted URLs."""
    urls = [url.format(file=quote(entry.file_name), stem=quote(Path(entry.file_name).stem)) for url in source.images]
    link = entry.links.get(source.link, "").replace("http://", "https://", 1)
    return [*urls, link] if link.startswith("https://") and link not in urls else urls


def _missing_images(name: str, n: int, seed: int) -> list[Entry]:
    """The listed images that a run of n sources draws and that are not there."""
    entries, folder = listed(name), LAYOUTS[name].image_folder()
    drawn = draw((entry.id for entry in entries), name, n, seed)
    return [entry for entry in entries if entry.id in drawn and not (folder / entry.file_name).is_file()]


def _fetch_annotation(name: str) -> None:
    """Fetch a dataset's annotation file by way of a folder of its own, checked by hash and by what it lists."""
    source, root = SOURCES[name], LAYOUTS[name].root()
    target, folder = root / LAYOUTS[name].annotations[0], root / ".fetch"
    unzip = pooch.Unzip(members=[source.member], extract_dir=".") if source.member else None
    file = source.url.rpartition("/")[2]
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
    unreached: list[str] = []
    with ThreadPoolExecutor(AT_ONCE) as pool, requests.Session() as session:
        session.mount("https://", HTTPAdapter(pool_maxsize=AT_ONCE, max_retries=RETRY))
        session.headers.update(AGENT)
        tasks = [pool.submit(_fetch_image, entry, name, session) for entry in wanted]
        try:
            for task in tqdm(as_completed(tasks), f"images of {name}", len(tasks), mininterval=5):
                try:
                    gone += filter(None, [task.result()])
                except OSError as error:
                    unreached.append(str(error))
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
        print(f"{name}: {len(gone)} of {len(wanted):,} images are at none of their URLs and count as missing: "
              f"{examples(gone)}")


def _fetch_image(entry: Entry, name: str, session: requests.Session) -> str | None:
    """Fetch one image from the first URL that has it; return why none has it, None if it is there.

    OSError if a server cannot be reached and no other has the image. A host other than the dataset's must send the
    listed size: image hosts answer with an image of their own for what they no longer have.
    """
    reason, trouble = "", None
    for position, url in enumerate(image_urls(entry, SOURCES[name])):
        try:
            answer = session.get(url, timeout=60)
            if answer.status_code in (403, 404, 410):  # a bucket that may not be listed answers 403 for an absent file
                reason = reason or f"{url}: {answer.status_code} {answer.reason}"
                continue
            answer.raise_for_status()
            size = decode_image(answer.content, url).size
            if position >= len(SOURCES[name].images) and None not in entry.size and sorted(size) != sorted(entry.size):
                raise UserError(f"{url} is {size[0]} x {size[1]} pixels, listed are {entry.size}: another image")
            write_atomic(LAYOUTS[name].image_folder() / entry.file_name, answer.content)
            return None
        except UserError as error:
            reason = reason or str(error)
        except OSError as error:  # of requests and of the disk
            trouble = trouble or error
    if trouble is not None:
        raise trouble
    return f"{entry.file_name} ({reason})"
