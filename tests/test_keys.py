"""Keys come from the environment and reach the service, and nothing else: no file of a run, no executed
notebook, no page, no log."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from lib import api_models, pipeline
from lib.errors import UserError
from lib.presets import CaptionerSpec
from tests.test_pipeline import write_notebook

SECRET = "fake-key-5f2c9b17e4"
NAMES = ("COMPENDIUM_TEST_KEY", "HF_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "AWS_SECRET_ACCESS_KEY")


class Parrot(BaseHTTPRequestHandler):
    """Captions any picture; repeats the key in its answers, as some services do."""

    keys: list[str]

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.append(self.headers["Authorization"])
        message = {"message": {"content": "a red thing on a page"}}
        text = json.dumps({"choices": [message], "account": self.headers["Authorization"]})
        if self.path == "/broken":
            text = f"no JSON for {self.headers['Authorization']}"
        self.send_response(401 if self.path == "/refused" else 200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        """Stay quiet."""


@pytest.fixture
def service(monkeypatch):
    Parrot.keys = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name in NAMES:
        monkeypatch.setenv(name, SECRET)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def options(url: str) -> dict:
    return {"url": url, "key_env": NAMES[0], "price": 0.0, "cap": 1.0}


PLAY = """
import dataclasses, json, pathlib
from tests.standins import stand_ins, without_weights
from lib import api_models, roundtrip
from lib.presets import get_preset
place = pathlib.Path({place!r})
api_models.CACHE = place / "cache"
preset = get_preset(PRESET)
remote = api_models.ChatCaptioner(preset.captioner)
models = dataclasses.replace(stand_ins(), captioner=remote)
run = roundtrip.play(dataclasses.replace(without_weights(preset), captioner=preset.captioner),
                     f"folder:{{place / 'pictures'}}", "image", 3, 2, 0, models=models, root=place / "runs")
print(json.dumps(run.info()["preset"]["captioner"]["options"]))
run.rows()
"""


def test_a_run_with_a_key_leaves_it_nowhere(service, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COMPENDIUM_FIGURES", str(tmp_path / "figures"))
    (tmp_path / "pictures").mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (9, 9), colour).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "mine.toml").write_text(
        'base = "mini"\n[captioner]\nadapter = "lib.api_models:ChatCaptioner"\nid = "remote"\n'
        + "[captioner.options]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in options(service).items()))
    (folder := tmp_path / "notebooks").mkdir()
    write_notebook(folder / "01_play.ipynb", PLAY.format(place=str(tmp_path)))
    (folder / "manifest.txt").write_text("01_play\n")
    pipeline.run_all(pipeline.parse(["--preset", str(tmp_path / "mine.toml")]), folder)
    assert set(Parrot.keys) == {f"Bearer {SECRET}"}  # the service got it
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".json", ".parquet", ".png", ".ipynb", ".html"} <= kinds and len(files) > 12
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    said = capfd.readouterr()
    assert NAMES[0] in said.out and SECRET not in said.out + said.err


@pytest.mark.parametrize("path", ["broken", "refused"])
def test_errors_of_the_service_do_not_tell_it(path, service, tmp_path, monkeypatch):
    monkeypatch.setattr(api_models, "CACHE", tmp_path)
    model = api_models.ChatCaptioner(CaptionerSpec("remote", options=options(f"{service}/{path}")))
    with pytest.raises(UserError) as error:
        model.caption([Image.new("RGB", (8, 8))], [[1]])
    assert Parrot.keys and SECRET not in str(error.value)
    assert all(SECRET.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_a_key_that_no_header_can_carry_is_not_shown(service, tmp_path, monkeypatch):
    """A line end from a file, say: the library's own error would repeat the key."""
    monkeypatch.setattr(api_models, "CACHE", tmp_path)
    monkeypatch.setenv(NAMES[0], SECRET + "\r")
    model = api_models.ChatCaptioner(CaptionerSpec("remote", options=options(service)))
    with pytest.raises(UserError, match=f"{NAMES[0]} holds a line end") as error:
        model.caption([Image.new("RGB", (8, 8))], [[1]])
    assert SECRET not in str(error.value) and not Parrot.keys
