"""Commercial captioners and generators behind an HTTP interface, by a small class of your own.

A preset names the class as its adapter and the service in ``options``::

    base = "paper"
    [captioner]
    adapter = "lib.api_models:ChatCaptioner"
    id = "name-of-the-remote-model"
    [captioner.options]
    url = "https://service.example/v1/chat/completions"
    key_env = "SERVICE_KEY"         # the key is read from this environment variable, never stored
    price = 0.002                   # your estimate for one call, in the unit of the cap
    cap = 5.0                       # no call is made that would lift the total spent above it
    request = { logprobs = "" }     # if needed: fields of the request to change; "" leaves one out

Every answer is kept under ``data/cache/api``, keyed by the whole request: a repeated run costs
nothing and gives the same rows, although such services repeat nothing themselves. To speak to
another service, subclass ``ApiCaptioner`` or ``ApiGenerator`` and write ``request`` and ``parse``.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import http.client
import io
import json
import logging
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.captioners import Caption
from lib.encoders import rgb_picture
from lib.errors import UserError
from lib.generators import GeneratedImages
from lib.presets import REPO_ROOT, CaptionerSpec, Decoding, GeneratorSpec, canonical_json

log = logging.getLogger(__name__)
CACHE = REPO_ROOT / "data" / "cache" / "api"
TIMEOUT_SECONDS = 120
BUSY = (429, 503, 529)  # not served, so asked again, after these seconds or those that the service names
PAUSES = (2.0, 5.0, 10.0, 30.0, 60.0)
LONGEST_PAUSE = 120.0
# What services call a request that their rules forbid; it gives no answer however often it is sent.
REFUSALS = ("content_policy_violation", "moderation_blocked", "content_filter")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the key along to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        """Nothing, which makes the redirect an error."""


class PaidCalls:
    """Sends requests at a price: answers from the cache are free, the cap is never passed.

    The ledger (``spent.json`` beside the answers) counts over runs and over workers of one machine;
    it is written before a call is sent, so that a call that breaks half-way counts as paid.
    """

    def __init__(self, options: Mapping[str, Any], model_id: str, cache: Path | None = None) -> None:
        missing = [name for name in ("url", "key_env", "price", "cap") if name not in options]
        if missing:
            raise UserError(f"model {model_id}: its preset's options lack {', '.join(missing)}")
        self.url, self.key_env = str(options["url"]), str(options["key_env"])
        self.price, self.cap = float(options["price"]), float(options["cap"])
        self.changes = options.get("request", {})
        if not isinstance(self.changes, Mapping):
            raise UserError(f"model {model_id}: options.request = {self.changes!r} must be a table of fields")
        if self.price < 0 or self.cap < 0:
            raise UserError(f"model {model_id}: price and cap must not be negative")
        name = hashlib.sha256(f"{self.url}\x1f{model_id}".encode()).hexdigest()[:16]
        self.folder = (CACHE if cache is None else cache) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file: Path | None = None  # of the last answer

    @property
    def spent(self) -> float:
        """What all calls so far cost."""
        ledger = self.folder / "spent.json"
        if not ledger.is_file():
            return 0.0
        try:
            return float(json.loads(ledger.read_text(encoding="utf-8"))["spent"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"ledger {ledger} is damaged: correct the amount spent in it") from error

    def answer(self, request: Mapping[str, Any], variant: str = "") -> bytes:
        """The answer to a JSON request; ``variant`` tells apart calls with equal requests."""
        request = {name: value for name, value in {**request, **self.changes}.items() if value != ""}
        key = hashlib.sha256(f"{variant}\x1f{canonical_json(request)}".encode()).hexdigest()
        self.file = file = self.folder / key
        if file.is_file():
            return file.read_bytes()
        secret = self._key()
        self._pay()
        answer = self._send(json.dumps(request).encode("utf-8"), secret)
        answer = answer.replace(secret.encode(), b"***")  # some services repeat it; it is never kept
        _write(file, answer)
        return answer

    def _pay(self) -> None:
        """Add one call to the ledger, or refuse."""
        with (self.folder / ".lock").open("w") as lock:  # two workers must not read the same sum
            fcntl.flock(lock, fcntl.LOCK_EX)
            total = self.spent + self.price
            if total > self.cap + 1e-12:
                raise UserError(f"cost cap reached: {self.spent:.4g} of {self.cap:.4g} spent at "
                                f"{self.url}: raise cap in the preset's options to go on")
            _write(self.folder / "spent.json", json.dumps({"spent": total}).encode("utf-8"))

    def _key(self) -> str:
        """The key, from the environment."""
        key = os.environ.get(self.key_env)
        if not key:
            raise UserError(f"environment variable {self.key_env} is not set: it must hold the key "
                            f"for {self.url}")
        if not key.isascii() or not key.isprintable():  # the error of the header would show it whole
            raise UserError(f"environment variable {self.key_env} holds a line end or another "
                            f"character that no header can carry: set the key for {self.url} again")
        return key

    def _send(self, body: bytes, key: str) -> bytes:
        """POST a JSON body with the key as bearer token; a refusal is an answer too."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        for pause in (*PAUSES, None):
            try:
                with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_SECONDS) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                answer = error.read(1 << 16)
                if refused(answer):
                    return answer
                said = " ".join(answer.decode("utf-8", "replace").replace(key, "***").split())
                trouble = f"{error}{': ' if said else ''}{said[:200]}"
                if pause is None or error.code not in BUSY or "insufficient_quota" in said:
                    break
                wait = _asked_pause(error.headers.get("Retry-After"), pause)
                log.warning("%s is busy (%d), asking again in %.0f s", self.url, error.code, wait)
                time.sleep(wait)
            except (OSError, http.client.HTTPException) as error:
                trouble = str(error)
                break
        raise UserError(f"{self.url} did not answer: {trouble}; rows already written stay, run again to go on")


def _asked_pause(stated: str | None, usual: float) -> float:
    """Seconds to wait before a service is asked again: what it states, within reason."""
    try:
        asked = float(stated or usual)
    except ValueError:  # a date
        return usual
    return min(asked, LONGEST_PAUSE) if asked >= 0 else usual


def refused(answer: bytes) -> bool:
    """Whether an answer says that the service's rules forbid the request."""
    try:
        error = json.loads(answer).get("error") or {}
    except (ValueError, AttributeError):
        return False
    return isinstance(error, dict) and any(error.get(key) in REFUSALS for key in ("code", "type"))


def _write(file: Path, content: bytes) -> None:
    """Write to a temporary name, then replace."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)


def _png(image: Image.Image | np.ndarray) -> str:
    """A picture as a base64 PNG."""
    buffer = io.BytesIO()
    rgb_picture(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class ApiModel:
    """What ``run.json`` records of a remote model; there is no local device or folder."""

    def __init__(self, spec: CaptionerSpec | GeneratorSpec,
                 device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.calls = PaidCalls(spec.options, spec.id)
        self.device, self.dtype, self.folder = "remote", "unknown", self.calls.folder

    def parse(self, answer: bytes) -> Any:
        """Read one answer."""
        raise NotImplementedError

    def _parsed(self, answer: bytes) -> Any:
        """Read one answer, or say what came instead."""
        try:
            return self.parse(answer)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
            if refused(answer):
                raise UserError(f"{self.calls.url} forbids a picture or a text by its rules ({answer[:120]!r}): "
                                "leave it out of the dataset, or choose another model") from error
            raise UserError(f"{self.calls.url} gave an answer that {type(self).__name__} cannot "
                            f"read: {answer[:120]!r}; delete {self.calls.file} to ask again") from error


class ApiCaptioner(ApiModel):
    """Base class: write ``request`` (a picture to JSON) and ``parse`` (an answer to a Caption)."""

    spec: CaptionerSpec

    def caption(self, images: Sequence[Image.Image | np.ndarray],
                seeds: Sequence[Sequence[int]], decoding: Decoding | None = None) -> list[list[Caption]]:
        """As ``Captioner.caption``; the seed tells the calls apart, whatever the service does."""
        decoding = self.spec.sender if decoding is None else decoding
        if decoding.strategy not in ("nucleus", "greedy"):
            raise UserError(f"captioner {self.spec.id}: a remote model can sample (nucleus) or be "
                            f"greedy, not {decoding.strategy}: change the strategy in the preset")
        result = []
        for image, row in zip(images, seeds, strict=True):
            row = [0] * len(row) if decoding.deterministic else row
            result.append([self._parsed(self.calls.answer(
                self.request(image, seed, decoding), str(seed))) for seed in row])
        return result

    def request(self, image: Image.Image, seed: int, decoding: Decoding) -> dict[str, Any]:
        """The JSON body that asks for one caption."""
        raise NotImplementedError


class ApiGenerator(ApiModel):
    """Base class: write ``request`` (a text to JSON) and ``parse`` (an answer to a PIL image)."""

    spec: GeneratorSpec

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> GeneratedImages:
        """As ``Generator.generate``; an answer of ``None`` from ``parse`` means: refused, flagged."""
        size = self.spec.output_size
        pixels = np.zeros((len(texts), size, size, 3), np.uint8)
        flagged = np.zeros(len(texts), bool)
        for i, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
            image = self._parsed(self.calls.answer(self.request(text, seed), str(seed)))
            flagged[i] = image is None
            if image is not None:
                pixels[i] = np.asarray(image.convert("RGB").resize(
                    (size, size), Image.Resampling.BICUBIC))
        return GeneratedImages(pixels, flagged, np.zeros(len(texts), bool))

    def request(self, text: str, seed: int) -> dict[str, Any]:
        """The JSON body that asks for one image."""
        raise NotImplementedError


class ChatCaptioner(ApiCaptioner):
    """The chat-completions interface that many services offer, with log-probabilities if given."""

    def request(self, image: Image.Image, seed: int, decoding: Decoding) -> dict[str, Any]:
        ask = decoding.prompt or "Describe this picture in one short sentence."
        content = [{"type": "text", "text": ask},
                   {"type": "image_url", "image_url": {"url": "data:image/png;base64," + _png(image)}}]
        sampling = {"temperature": 0.0} if decoding.deterministic else {
            "temperature": decoding.temperature, "top_p": decoding.p, "seed": seed % 2**31}
        return {"model": self.spec.id, "messages": [{"role": "user", "content": content}],
                "max_tokens": decoding.max_tokens, "logprobs": True, **sampling}

    def parse(self, answer: bytes) -> Caption:
        choice = json.loads(answer)["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        text = " ".join(choice["message"]["content"].split())
        if not tokens:  # the service tells none: unknown, not zero
            return Caption(text, math.nan, len(text.split()))
        return Caption(text, float(sum(token["logprob"] for token in tokens)), len(tokens))


class ImagesGenerator(ApiGenerator):
    """The image-generations interface (DALL-E and others) with base64 answers."""

    def request(self, text: str, seed: int) -> dict[str, Any]:
        size = f"{self.spec.size}x{self.spec.size}"
        return {"model": self.spec.id, "prompt": text, "n": 1, "size": size,
                "response_format": "b64_json"}

    def parse(self, answer: bytes) -> Image.Image | None:
        if refused(answer):
            return None
        data = json.loads(answer)["data"][0]
        if "b64_json" not in data:
            if data.get("refused") or data.get("content_filtered"):
                return None
            raise KeyError("b64_json")
        return Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB")
