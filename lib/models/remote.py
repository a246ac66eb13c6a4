"""Captioners and generators behind an HTTP interface, by a small class of your own: README.md has the options."""

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
from lib.models import Caption, Images, as_pil
from lib.presets import CaptionerSettings, Decoding, GeneratorSettings

CACHE = ROOT / "data" / "cache" / "api"
# A busy service is asked again, after the pause that it names or after 2, 4, 8 ... seconds.
BUSY = Retry(total=5, connect=0, read=0, status_forcelist=(429, 503, 529), allowed_methods=None, backoff_factor=1,
             raise_on_status=False)
# What services call a request that their rules forbid; it gives no answer however often it is sent.
REFUSALS = (b"content_policy_violation", b"moderation_blocked", b"content_filter")


class Remote:
    """What a remote captioner and a remote generator share: paid requests, whose answers are kept.

    The ledger (``spent.json`` beside the answers) counts over runs and processes, and before a call is sent.
    """

    device = "remote"

    def __init__(self, settings: CaptionerSettings | GeneratorSettings, device: str | None = None) -> None:
        options = settings.options
        if missing := [name for name in ("url", "key_env", "price", "cap") if name not in options]:
            raise UserError(f"model {settings.id}: its preset's options lack {', '.join(missing)}")
        if not isinstance(options.get("request", {}), Mapping):
            raise UserError(f"model {settings.id}: options.request = {options['request']!r} must be a table of fields")
        self.settings, self.url = settings, str(options["url"])
        self.cache = CACHE / hashlib.sha256(f"{self.url}\x1f{settings.id}".encode()).hexdigest()[:16]

    def ask(self, request: Mapping[str, Any], seed: int) -> Any:
        """Return the answer to a JSON request as ``parse`` reads it; the seed tells equal requests apart."""
        changes = self.settings.options.get("request", {})
        request = {name: value for name, value in {**request, **changes}.items() if changes.get(name) != ""}
        text = json.dumps(request, sort_keys=True, separators=(",", ":"))
        file = self.cache / hashlib.sha256(f"{seed}\x1f{text}".encode()).hexdigest()
        if not file.is_file():
            write_atomic(file, self._send(request))
        answer = file.read_bytes()
        try:
            return self.parse(answer)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{self.url} gave an answer that {type(self).__name__} cannot read: {answer[:120]!r}; delete "
                            f"{file} to ask again, or leave out of the dataset what the service forbids") from error

    def _send(self, request: Mapping[str, Any]) -> bytes:
        """Pay for and POST a request, the key as bearer token; that its rules forbid a request is an answer too."""
        name = self.settings.options["key_env"]
        key = os.environ.get(name, "")
        if not key or not key.isascii() or not key.isprintable():  # the error of the header would show it whole
            raise UserError(f"environment variable {name} {'holds a line end or the like' if key else 'is not set'}: it "
                            f"must hold the key for {self.url}")
        self._pay()
        try:
            with requests.Session() as session:
                session.mount(self.url, HTTPAdapter(max_retries=BUSY))
                answer = session.post(self.url, json=request, headers={"Authorization": f"Bearer {key}"},
                                      timeout=120, allow_redirects=False)  # a key follows no redirect
            if answer.status_code == 200 or refused(answer.content):
                return answer.content.replace(key.encode(), b"***")  # some services repeat it; it is never kept
            said = f"HTTP {answer.status_code}: {answer.text[:200]}"
        except requests.RequestException as error:
            said = str(error)
        raise UserError(f"{self.url} did not answer: {' '.join(said.replace(key, '***').split())[:300]}; rows already "
                        "written stay, run again to go on")

    def _pay(self) -> None:
        """Enter one call into the ledger. Raises UserError where that would pass the cap."""
        price, cap = (float(self.settings.options[name]) for name in ("price", "cap"))
        ledger = self.cache / "spent.json"
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache / ".lock"):
            spent = json.loads(ledger.read_text(encoding="utf-8"))["spent"] if ledger.is_file() else 0.0
            if spent + price > cap + 1e-12:
                raise UserError(f"cost cap reached: {spent:.4g} of {cap:.4g} spent at {self.url}: raise cap in the "
                                "preset's options to go on")
            write_atomic(ledger, json.dumps({"spent": spent + price}))


def refused(answer: bytes) -> bool:
    """Return whether an answer is the error that the service's rules forbid the request."""
    return b'"error"' in answer and any(name in answer for name in REFUSALS)


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
        tokens = (choice.get("logprobs") or {}).get("content")
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
        pixels = [np.zeros((*size, 3), np.uint8) if image is None else
                  np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in made]
        return Images(np.stack(pixels), np.array([image is None for image in made]), np.zeros(len(made), bool))

    def request(self, text: str, seed: int) -> dict[str, Any]:
        """Return the JSON body that asks for one image."""
        size = f"{self.settings.size}x{self.settings.size}"
        return {"model": self.settings.id, "prompt": text, "n": 1, "size": size, "response_format": "b64_json"}

    def parse(self, answer: bytes) -> Image.Image | None:
        """Return the image of an answer (RGB), None where the service refused."""
        if refused(answer):
            return None
        data = json.loads(answer)["data"][0]
        if data.get("content_filtered"):
            return None
        return Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB")
