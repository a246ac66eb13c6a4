"""Remote models, against a small server of our own: cache, cap, key, refusals, unreadable answers."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from lib.base import UserError
from lib.models import describe, load_captioner, load_generator, remote, weights_fingerprint
from lib.presets import CaptionerSettings, Decoding, GeneratorSettings

SECRET = "fake-key-5f2c9b17e4"
RED = Image.new("RGB", (8, 8), "red")


class Service(BaseHTTPRequestHandler):
    """Answers captions that name the call's number, and grey squares; repeats the key, as some services do."""

    seen: list[tuple[str, dict]] = []
    trouble: list[tuple[int, str, dict[str, str]]] = []  # answered first

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.headers["Authorization"], body))
        n = len(self.seen)
        code, words, headers = self.trouble.pop(0) if self.trouble else (200, None, {})
        if words is None and self.path == "/chat":
            logprobs = {"content": [{"logprob": -0.5}] * 3} if n % 2 else None
            words = {"choices": [{"message": {"content": f"a  cat {n}\n"}, "logprobs": logprobs}]}
        elif words is None:
            Image.new("RGB", (64, 64), (n, n, n)).save(buffer := io.BytesIO(), "PNG")
            words = {"data": [{"content_filtered": True} if "refuse" in body["prompt"] else
                              {"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        words = words if isinstance(words, str) else json.dumps(words | {"account": self.headers["Authorization"]})
        self.wfile.write(words.encode())

    def log_message(self, *arguments):
        """Stay quiet."""


@pytest.fixture
def service(tmp_path, monkeypatch):
    Service.seen.clear()
    Service.trouble.clear()
    monkeypatch.setattr(remote, "BUSY", remote.BUSY.new(total=2, backoff_factor=0))
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("TEST_KEY", SECRET)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def options(url, cap=1.0, **more):
    return {"url": url, "key_env": "TEST_KEY", "price": 0.25, "cap": cap, **more}


def captioner(url, cap=1.0, **more):
    return load_captioner(CaptionerSettings(id="remote", adapter="lib.models.remote:ChatCaptioner",
                                            options=options(url, cap, **more)))


def generator(url, **more):
    return load_generator(GeneratorSettings(id="remote", adapter="lib.models.remote:ImagesGenerator", size=64,
                                            output_size=16, options=options(url, **more)))


def spent(folder):
    return sum(json.loads(file.read_text())["spent"] for file in folder.rglob("spent.json"))


def test_captions_are_cached_and_parsed_and_the_key_is_kept_nowhere(service, tmp_path):
    model = captioner(service + "/chat")
    rows = model.caption([RED], [[1, 2]])
    assert [c.text for c in rows[0]] == ["a cat 1", "a cat 2"]
    assert rows[0][0].logprob == pytest.approx(-1.5) and rows[0][0].n_tokens == 3
    assert math.isnan(rows[0][1].logprob)  # unknown is not zero
    again = captioner(service + "/chat").caption([np.asarray(RED)], [[2]])
    assert again[0][0].text == "a cat 2" and len(Service.seen) == 2
    assert spent(tmp_path) == pytest.approx(0.5)
    assert Service.seen[0][0] == f"Bearer {SECRET}" and Service.seen[0][1]["top_p"] == 0.9
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3 and all(SECRET.encode() not in path.read_bytes() for path in files)
    assert describe(model)["device"] == "remote" and weights_fingerprint(model.settings) == "remote"
    greedy = model.caption([RED], [[5, 6]], Decoding(strategy="greedy"))
    assert greedy[0][0].text == greedy[0][1].text and len(Service.seen) == 3


def test_the_cap_holds_and_what_is_paid_stays(service):
    model = captioner(service + "/chat", cap=0.5)
    with pytest.raises(UserError, match="cost cap reached: 0.5 of 0.5 spent"):
        model.caption([RED], [[1, 2, 3]])
    assert len(Service.seen) == 2
    assert len(model.caption([RED], [[1, 2]])[0]) == 2 and len(Service.seen) == 2


def test_an_empty_caption_is_sent_as_it_is_and_fields_can_be_changed(service):
    generator(service, request={"n": 2, "response_format": ""}).generate([""], [1])
    sent = Service.seen[0][1]
    assert sent["prompt"] == "" and sent["n"] == 2 and "response_format" not in sent and sent["size"] == "64x64"
    with pytest.raises(UserError, match="options.request = 'x' must be a table"):
        captioner(service, request="x")


def test_refused_texts_are_flagged_and_the_run_goes_on(service):
    made = generator(service).generate(["a cat", "refuse this"], [1, 2])
    assert made.pixels.shape == (2, 16, 16, 3) and made.flagged.tolist() == [False, True]
    assert np.all(made.pixels[0] == 1)
    Service.trouble = [(400, json.dumps({"error": {"code": "content_policy_violation"}}), {})]
    for _ in range(2):  # the second time from the cache
        assert generator(service).generate(["a forbidden cat"], [1]).flagged.tolist() == [True]
    assert len(Service.seen) == 3
    Service.trouble = [(400, json.dumps({"error": {"code": "content_filter"}}), {})]
    with pytest.raises(UserError, match="cannot read: .*content_filter.* leave out of the dataset what the service forbids"):
        captioner(service + "/chat").caption([RED], [[1]])


def test_a_busy_service_is_asked_again_and_paid_once(service, tmp_path):
    model = captioner(service + "/chat")
    Service.trouble = [(429, "{}", {"Retry-After": "0"}), (503, "busy", {})]
    assert model.caption([RED], [[1]])[0][0].text == "a cat 3"
    assert len(Service.seen) == 3 and spent(tmp_path) == pytest.approx(0.25)
    Service.trouble = [(429, "slow down", {})] * 3
    with pytest.raises(UserError, match=r"did not answer: HTTP 429: slow down; rows already"):
        model.caption([RED], [[2]])


@pytest.mark.parametrize(("path", "answer", "said"), [
    ("/chat", (400, f"bad\n{SECRET} model", {}), "did not answer: HTTP 400: bad"),
    ("/moved", (302, "", {"Location": "/chat"}), "HTTP 302"),  # a key follows no redirect
    ("/chat", (200, f"no JSON for {SECRET}", {}), "cannot read: b'no JSON for .*'; delete .* to ask again"),
    ("/chat", (200, '{"choices": [{"message": {"content": null}}]}', {}), "cannot read"),
])
def test_errors_are_one_line_without_the_key(service, tmp_path, path, answer, said):
    Service.trouble = [answer]
    model = captioner(service + path)
    with pytest.raises(UserError, match=said) as caught:
        model.caption([RED], [[1]])
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value) and len(Service.seen) == 1
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_what_is_missing_is_told(service, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="lack price, cap"):
        load_captioner(CaptionerSettings(id="remote", adapter="lib.models.remote:ChatCaptioner",
                                         options={"url": "x", "key_env": "y"}))
    with pytest.raises(UserError, match="greedy, not beam"):
        captioner(service + "/chat").caption([RED], [[1]], Decoding(strategy="beam"))
    monkeypatch.setenv("TEST_KEY", SECRET + "\r")  # a line end from a file: the library's error would repeat the key
    with pytest.raises(UserError, match="TEST_KEY holds a line end") as caught:
        captioner(service + "/fresh").caption([RED], [[1]])
    assert SECRET not in str(caught.value)
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(UserError, match="TEST_KEY is not set"):
        captioner(service + "/fresh").caption([RED], [[1]])
    assert spent(tmp_path) == 0 and not Service.seen
    monkeypatch.setenv("TEST_KEY", SECRET)
    with pytest.raises(UserError, match="did not answer"):
        captioner("http://127.0.0.1:9/nobody").caption([RED], [[1]])
