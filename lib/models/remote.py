"""Captioners and generators behind an HTTP interface, by a small class of your own.

A preset names the class as its adapter and the service in ``options`` (see ``data/presets/remote.toml``):
``url``; ``key_env``, the environment variable that holds the key, which is never stored; ``price``, your
estimate for one call, and ``cap``, above which no call is made; ``request``, fields of the request to change
("" leaves one out). Every answer is kept under ``data/cache/api``, keyed by the whole request: a repeated
run costs nothing and gives the same rows, although such services repeat nothing themselves. For another
service, subclass ``ChatCaptioner`` or ``ImagesGenerator`` and write ``request`` and ``parse``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import requests
from filelock import FileLock
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from lib.base import ROOT, UserError, write_atomic
from lib.models.types import Caption, Images, as_pil
from lib.presets import CaptionerSettings, Decoding, GeneratorSettings

CACHE = ROOT / "data" / "cache" / "api"
TIMEOUT = 120  # seconds
# A busy service is asked again, after the pause that it names or after 2, 4, 8 ... seconds.
BUSY = Retry(total=5, connect=0, read=0, status_forcelist=(429, 503, 529), allowed_methods=None, backoff_factor=1,
             raise_on_status=False)
# What services call a request that their rules forbid; it gives no answer however often it is sent.
REFUSALS = ("content_policy_violation", "moderation_blocked", "content_filter")


class PaidCalls:
    """Sends requests at a price: answers from the cache are free, the cap is never passed.

    The ledger (``spent.json`` beside the answers) counts over runs and processes, and before a call is sent.
    """

    def __init__(self, options: Mapping[str, Any], model_id: str) -> None:
        if missing := [name for name in ("url", "key_env", "price", "cap") if name not in options]:
            raise UserError(f"model {model_id}: its preset's options lack {', '.join(missing)}")
        self.url, self.key_env = str(options["url"]), str(options["key_env"])
        self.price, self.cap = float(options["price"]), float(options["cap"])
        self.changes = options.get("request", {})
        if not isinstance(self.changes, Mapping):
            raise UserError(f"model {model_id}: options.request = {self.changes!r} must be a table of fields")
        self.folder = CACHE / hashlib.sha256(f"{self.url}\x1f{model_id}".encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder  # of the last answer

    @property
    def spent(self) -> float:
        """What all calls so far cost."""
        ledger = self.folder / "spent.json"
        return json.loads(ledger.read_text(encoding="utf-8"))["spent"] if ledger.is_file() else 0.0

    def answer(self, request: Mapping[str, Any], variant: str = "") -> bytes:
        """Return the answer to a JSON request; ``variant`` tells apart calls with equal requests."""
        left_out = {name for name, value in self.changes.items() if value == ""}
        request = {name: value for name, value in {**request, **self.changes}.items() if name not in left_out}
        text = json.dumps(request, sort_keys=True, separators=(",", ":"))
        self.file = self.folder / hashlib.sha256(f"{variant}\x1f{text}".encode()).hexdigest()
        if self.file.is_file():
            return self.file.read_bytes()
        key = os.environ.get(self.key_env, "")
        if not key or not key.isascii() or not key.isprintable():  # the error of the header would show it whole
            raise UserError(f"environment variable {self.key_env} {'holds a line end or the like' if key else 'is not set'}"
                            f": it must hold the key for {self.url}")
        with FileLock(self.folder / ".lock"):
            total = self.spent + self.price
            if total > self.cap + 1e-12:
                raise UserError(f"cost cap reached: {self.spent:.4g} of {self.cap:.4g} spent at {self.url}: raise cap "
                                "in the preset's options to go on")
            write_atomic(self.folder / "spent.json", json.dumps({"spent": total}))
        answer = self._send(request, key).replace(key.encode(), b"***")  # some services repeat it; it is never kept
        write_atomic(self.file, answer)
        return answer

    def _send(self, request: Mapping[str, Any], key: str) -> bytes:
        """POST a request with the key as bearer token; that its rules forbid a request is an answer too."""
        try:
            with requests.Session() as session:
                session.mount("http://", HTTPAdapter(max_retries=BUSY))
                session.mount("https://", HTTPAdapter(max_retries=BUSY))
                answer = session.post(self.url, json=request, headers={"Authorization": f"Bearer {key}"},
                                      timeout=TIMEOUT, allow_redirects=False)  # a key follows no redirect
            if answer.status_code == 200 or refused(answer.content):
                return answer.content
            said = f"HTTP {answer.status_code}: {answer.text[:200]}"
        except requests.RequestException as error:
            said = str(error)
        raise UserError(f"{self.url} did not answer: {' '.join(said.replace(key, '***').split())[:300]}; rows already "
                        "written stay, run again to go on")


def refused(answer: bytes) -> bool:
    """Return whether an answer says that the service's rules forbid the request."""
    try:
        error = json.loads(answer)["error"]
        return error.get("code") in REFUSALS or error.get("type") in REFUSALS
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


class Remote:
    """What a remote captioner and a remote generator share; nothing of them lies on this machine."""

    device, dtype, folder = "remote", "unknown", None

    def __init__(self, settings: CaptionerSettings | GeneratorSettings, device: str | None = None) -> None:
        self.settings = settings
        self.calls = PaidCalls(settings.options, settings.id)

    def parse(self, answer: bytes) -> Any:
        """Read one answer."""
        raise NotImplementedError

    def ask(self, request: Mapping[str, Any], seed: int) -> Any:
        """Return the parsed answer to a request; the seed tells calls apart, whatever the service does with it."""
        answer = self.calls.answer(request, str(seed))
        try:
            return self.parse(answer)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
            if refused(answer):
                raise UserError(f"{self.calls.url} forbids an image or a text by its rules ({answer[:120]!r}): leave "
                                "it out of the dataset, or choose another model") from error
            raise UserError(f"{self.calls.url} gave an answer that {type(self).__name__} cannot read: "
                            f"{answer[:120]!r}; delete {self.calls.file} to ask again") from error


class ChatCaptioner(Remote):
    """The chat-completions interface that many services offer, with log-probabilities if given."""

    def caption(self, images: Sequence[Image.Image | np.ndarray], seeds: Sequence[Sequence[int]],
                decoding: Decoding | None = None) -> list[list[Caption]]:
        """As a local captioner's ``caption``."""
        decoding = self.settings.sender if decoding is None else decoding
        if decoding.strategy not in ("nucleus", "greedy"):
            raise UserError(f"captioner {self.settings.id}: a remote model can sample (nucleus) or be greedy, not "
                            f"{decoding.strategy}: change the strategy in the preset")
        return [[self.ask(self.request(image, seed, decoding), seed)
                 for seed in ([0] * len(row) if decoding.deterministic else row)]
                for image, row in zip(images, seeds, strict=True)]

    def request(self, image: Image.Image | np.ndarray, seed: int, decoding: Decoding) -> dict[str, Any]:
        """Return the JSON body that asks for one caption."""
        as_pil(image).save(buffer := io.BytesIO(), format="PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        content = [{"type": "text", "text": decoding.prompt or "Describe this picture in one short sentence."},
                   {"type": "image_url", "image_url": {"url": url}}]
        sampling = {"temperature": 0.0} if decoding.deterministic else {
            "temperature": decoding.temperature, "top_p": decoding.p, "seed": seed % 2**31}
        return {"model": self.settings.id, "messages": [{"role": "user", "content": content}],
                "max_tokens": decoding.max_tokens, "logprobs": True, **sampling}

    def parse(self, answer: bytes) -> Caption:
        """Return the caption of an answer."""
        choice = json.loads(answer)["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        text = " ".join(choice["message"]["content"].split())
        if not tokens:  # the service tells none: unknown, not zero
            return Caption(text, math.nan, len(text.split()))
        return Caption(text, float(sum(token["logprob"] for token in tokens)), len(tokens))


class ImagesGenerator(Remote):
    """The image-generations interface (DALL-E and others) with base64 answers."""

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Images:
        """As a local generator's ``generate``; where ``parse`` gives None the service refused: flagged."""
        size = (self.settings.output_size,) * 2
        made = [self.ask(self.request(text, seed), seed) for text, seed in zip(texts, seeds, strict=True)]
        pixels = [np.zeros((*size, 3), np.uint8) if image is None else np.asarray(
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in made]
        flagged = np.array([image is None for image in made], dtype=bool)
        return Images(np.array(pixels, np.uint8).reshape(-1, *size, 3), flagged, np.zeros(len(made), bool))

    def request(self, text: str, seed: int) -> dict[str, Any]:
        """Return the JSON body that asks for one image."""
        size = f"{self.settings.size}x{self.settings.size}"
        return {"model": self.settings.id, "prompt": text, "n": 1, "size": size, "response_format": "b64_json"}

    def parse(self, answer: bytes) -> Image.Image | None:
        """Return the image of an answer, None where the service refused."""
        if refused(answer):
            return None
        data = json.loads(answer)["data"][0]
        if "b64_json" not in data and (data.get("refused") or data.get("content_filtered")):
            return None
        return Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB")
