"""Remote models, against a small server of our own: cache, cap, key, unreadable answers."""

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

from lib import api_models
from lib.errors import UserError
from lib.models import describe, load_captioner, load_generator
from lib.presets import CaptionerSpec, Decoding, GeneratorSpec, get_preset


class Service(BaseHTTPRequestHandler):
    """Answers captions that name the call's number, and grey squares."""

    seen: list[tuple[str, dict]] = []
    trouble: list[tuple[int, str, dict[str, str]]] = []  # answered first

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.headers["Authorization"], body))
        n = len(self.seen)
        if self.trouble:
            code, words, headers = self.trouble.pop(0)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(words.encode())
            return
        if self.path == "/chat":
            logprobs = {"content": [{"logprob": -0.5}] * 3} if n % 2 else None
            answer = {"choices": [{"message": {"content": f"a  cat {n}\n"}, "logprobs": logprobs}]}
        elif "refuse" in body.get("prompt", ""):
            answer = {"data": [{"content_filtered": True}]}
        elif self.path == "/images":
            buffer = io.BytesIO()
            Image.new("RGB", (64, 64), (n, n, n)).save(buffer, "PNG")
            answer = {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}
        else:
            answer = {"surprise": True}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        """Stay quiet."""


@pytest.fixture
def service(tmp_path, monkeypatch):
    Service.seen.clear()
    Service.trouble.clear()
    monkeypatch.setattr(api_models, "PAUSES", (0.01, 0.01))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(api_models, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("TEST_KEY", "secret")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def options(url, cap=1.0):
    return {"url": url, "key_env": "TEST_KEY", "price": 0.25, "cap": cap}


def captioner(url, cap=1.0):
    return load_captioner(CaptionerSpec("remote", adapter="lib.api_models:ChatCaptioner",
                                        options=options(url, cap)))


def test_captions_are_cached_and_parsed(service):
    image = Image.new("RGB", (8, 8), "red")
    model = captioner(service + "/chat")
    rows = model.caption([image], [[1, 2]])
    assert [c.text for c in rows[0]] == ["a cat 1", "a cat 2"]
    assert rows[0][0].logprob == pytest.approx(-1.5) and rows[0][0].n_tokens == 3
    assert math.isnan(rows[0][1].logprob)  # unknown is not zero
    again = captioner(service + "/chat").caption([image], [[2]])
    assert again[0][0].text == "a cat 2" and len(Service.seen) == 2
    assert model.calls.spent == pytest.approx(0.5)
    assert Service.seen[0][0] == "Bearer secret" and Service.seen[0][1]["top_p"] == 0.9
    assert "secret" not in "".join(p.read_text() for p in model.calls.folder.iterdir())
    assert describe(model)["device"] == "remote"
    greedy = model.caption([image], [[5, 6]], Decoding("greedy"))
    assert greedy[0][0].text == greedy[0][1].text and len(Service.seen) == 3


def test_the_cap_holds_and_what_is_paid_stays(service):
    model = captioner(service + "/chat", cap=0.5)
    image = Image.new("RGB", (8, 8))
    with pytest.raises(UserError, match="cost cap reached"):
        model.caption([image], [[1, 2, 3]])
    assert len(Service.seen) == 2
    assert len(model.caption([image], [[1, 2]])[0]) == 2 and len(Service.seen) == 2


def test_generator_resizes_and_flags_refusals(service):
    spec = GeneratorSpec("remote", adapter="lib.api_models:ImagesGenerator", size=64, output_size=16,
                         options=options(service + "/images"))
    made = load_generator(spec).generate(["a cat", "refuse this"], [1, 2])
    assert made.pixels.shape == (2, 16, 16, 3) and made.flagged.tolist() == [False, True]
    assert np.all(made.pixels[0] == 1)


def test_a_forbidden_text_is_flagged_and_the_run_goes_on(service):
    spec = GeneratorSpec("remote", adapter="lib.api_models:ImagesGenerator", size=64, output_size=16,
                         options=options(service + "/images"))
    Service.trouble = [(400, json.dumps({"error": {"code": "content_policy_violation"}}), {})]
    for _ in range(2):  # the second time from the cache
        made = load_generator(spec).generate(["a forbidden cat", "a cat"], [1, 2])
        assert made.flagged.tolist() == [True, False] and made.pixels[0].max() == 0
    assert len(Service.seen) == 2
    Service.trouble = [(400, json.dumps({"error": {"code": "content_filter"}}), {})]
    with pytest.raises(UserError, match="forbids a picture or a text by its rules .*leave it out of the dataset"):
        captioner(service + "/chat").caption([Image.new("RGB", (8, 8))], [[1]])


def test_fields_of_the_request_can_be_changed_by_the_preset(service):
    wanted = options(service + "/chat") | {"request": {"max_tokens": "", "max_completion_tokens": 99}}
    model = load_captioner(CaptionerSpec("remote", adapter="lib.api_models:ChatCaptioner", options=wanted))
    model.caption([Image.new("RGB", (8, 8))], [[1]])
    sent = Service.seen[0][1]
    assert sent["max_completion_tokens"] == 99 and "max_tokens" not in sent and sent["logprobs"] is True
    with pytest.raises(UserError, match="options.request = 'x' must be a table"):
        load_captioner(CaptionerSpec("remote", adapter="lib.api_models:ChatCaptioner",
                                     options=wanted | {"request": "x"}))


def test_a_busy_service_is_asked_again_and_paid_once(service, caplog):
    image, model = Image.new("RGB", (8, 8)), captioner(service + "/chat")
    Service.trouble = [(429, "{}", {"Retry-After": "0.01"}), (503, "busy", {"Retry-After": "Mon, 1 Jan"})]
    assert model.caption([image], [[1]])[0][0].text == "a cat 3"
    assert len(Service.seen) == 3 and model.calls.spent == pytest.approx(0.25)
    assert caplog.text.count("is busy") == 2
    Service.trouble = [(429, "slow down", {"Retry-After": "-1"})] * 3
    with pytest.raises(UserError, match=r"did not answer: HTTP Error 429.*slow down; rows already"):
        model.caption([image], [[2]])
    assert len(Service.seen) == 6
    for words in ('{"error": {"code": "insufficient_quota"}}', "bad\nsecret model"):
        Service.trouble = [(429 if "quota" in words else 400, words, {})]
        with pytest.raises(UserError, match=r"did not answer: HTTP Error 4") as caught:
            model.caption([image], [[3]])
        assert not Service.trouble and "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(Service.seen) == 8


def test_an_answer_that_cannot_be_read_is_one_line_with_the_file_to_delete(service):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    cut = base64.b64encode(buffer.getvalue()[:2000]).decode()
    painter = load_generator(GeneratorSpec("remote", adapter="lib.api_models:ImagesGenerator",
                                           options=options(service + "/images")))
    model = captioner(service + "/chat")
    for calls, ask, words in (
            (model.calls, lambda: model.caption([Image.new("RGB", (8, 8))], [[1]]),
             '{"choices": [{"message": {"content": null}}]}'),
            (painter.calls, lambda: painter.generate(["a cat"], [1]), json.dumps({"data": [{"b64_json": cut}]})),
            (painter.calls, lambda: painter.generate(["a cow"], [1]), '{"data": ["x"]}')):
        Service.trouble = [(200, words, {})]
        for _ in range(2):  # the second time from the cache
            with pytest.raises(UserError, match="cannot read: b'.*; delete .* to ask again"):
                ask()
        calls.file.unlink()
        ask()


def test_the_key_follows_no_redirect(service):
    Service.trouble = [(302, "", {"Location": service + "/chat"})]
    with pytest.raises(UserError, match="302"):
        captioner(service + "/moved").caption([Image.new("RGB", (8, 8))], [[1]])
    assert len(Service.seen) == 1


def test_errors_are_one_line(service, monkeypatch):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(UserError, match="cannot read"):
        captioner(service + "/other").caption([image], [[1]])
    with pytest.raises(UserError, match="did not answer"):
        captioner("http://127.0.0.1:9/nobody").caption([image], [[1]])
    with pytest.raises(UserError, match="lack price, cap"):
        load_captioner(CaptionerSpec("remote", adapter="lib.api_models:ChatCaptioner",
                                     options={"url": "x", "key_env": "y"}))
    with pytest.raises(UserError, match="greedy, not beam"):
        captioner(service + "/chat").caption([image], [[1]], Decoding("beam"))
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(UserError, match="TEST_KEY is not set"):
        captioner(service + "/fresh").caption([image], [[1]])
    assert captioner(service + "/fresh").calls.spent == 0


def test_a_preset_file_alone_plugs_it_in(tmp_path):
    path = tmp_path / "remote.toml"
    path.write_text('base = "mini"\n[captioner]\nid = "remote"\n'
                    'adapter = "lib.api_models:ChatCaptioner"\n[captioner.options]\n'
                    'url = "http://x"\nkey_env = "K"\nprice = 0.1\ncap = 2\n', encoding="utf-8")
    assert get_preset(path).captioner.options["cap"] == 2
