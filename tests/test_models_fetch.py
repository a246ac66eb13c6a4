"""Fetching: resume, hashes, a hub cache that is whole, cut off, or pickled; nothing leaves this machine."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file

from lib import model_fetch, weights
from lib.download import download
from lib.errors import UserError
from lib.models import describe, load_captioner, load_encoder
from lib.presets import CaptionerSpec, EncoderSpec, get_preset
from tests.test_models_convert import original_names
from tests.tiny_models import build_blip, build_clip, build_stable_diffusion

CONTENT = bytes(range(256)) * 5000


class Files(BaseHTTPRequestHandler):
    """Serves one file, with ranges; may cut a transfer off or state a hash."""

    content = CONTENT
    cut_after: int | None = None
    stated: bytes | None = None
    ranges: list[str | None] = []

    def do_GET(self):
        if "absent" in self.path:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked[6:-1]) if asked else 0
        if asked and start >= len(self.content):
            self.send_response(416)
            self.end_headers()
            return
        body = self.content[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        if self.stated is not None:
            code = base64.b64encode(hashlib.md5(self.stated).digest()).decode()
            self.send_header("x-goog-hash", f"crc32c=AAAA,md5={code}")
        self.end_headers()
        self.wfile.write(body if self.cut_after is None else body[:self.cut_after])

    def log_message(self, *arguments):
        """Stay quiet."""


@pytest.fixture
def server():
    handler = type("Handler", (Files,), {"ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, an empty folder for converted models, an empty lock, no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "CONVERTED", tmp_path / "converted")
    for module in (weights, model_fetch):
        monkeypatch.setattr(module, "LOCK_FILE", tmp_path / "lock.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def put_in_cache(hub, model_id, folder, commit="c0ffee"):
    """Lay a folder into the hub cache as the client would."""
    repository = hub / ("models--" + model_id.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    shutil.copytree(folder, repository / "snapshots" / commit)
    return repository / "snapshots" / commit


def test_download_resumes_and_checks(server, tmp_path):
    said, target = [], tmp_path / "weights.pth"
    server.cut_after = 300_000
    with pytest.raises(UserError, match=r"cannot be fetched.*0 MB are kept|cannot be fetched"):
        download(server.url + "/weights.pth", target, say=said.append)
    part = tmp_path / "weights.pth.part"
    assert not target.exists() and part.stat().st_size == 300_000
    server.cut_after = None
    sha = hashlib.sha256(CONTENT).hexdigest()
    download(server.url + "/weights.pth", target, sha256=sha, say=said.append)
    assert target.read_bytes() == CONTENT and server.ranges == [None, "bytes=300000-"]
    assert not part.exists() and said
    assert download(server.url + "/weights.pth", target) == target and len(server.ranges) == 2


def test_download_refuses_damage(server, tmp_path):
    with pytest.raises(UserError, match="md5.*expected 0123"):
        download(server.url + "/x", tmp_path / "x", md5="0123", say=lambda line: None)
    assert not list(tmp_path.iterdir())
    server.stated = b"something else"
    with pytest.raises(UserError, match="damaged on the way"):
        download(server.url + "/x", tmp_path / "x", say=lambda line: None)
    server.stated = CONTENT
    (tmp_path / "x.part").write_bytes(CONTENT)  # whole already, only not renamed
    assert download(server.url + "/x", tmp_path / "x", say=lambda line: None).read_bytes() == CONTENT
    with pytest.raises(UserError, match="404"):
        download(server.url + "/absent", tmp_path / "y", say=lambda line: None)


def test_cached_model_loads_offline_and_records_its_commit(hub, tmp_path):
    put_in_cache(hub, "somebody/tiny-clip", build_clip(tmp_path / "clip"))
    encoder = load_encoder(EncoderSpec("somebody/tiny-clip"), "cpu")
    assert describe(encoder)["revision"] == "c0ffee"
    said = []
    wanted = model_fetch.Wanted("somebody/tiny-clip", None, weights.TRANSFORMERS_FILES)
    model_fetch._fetch(wanted, said.append)
    assert weights.locked_revision("somebody/tiny-clip") == "c0ffee"
    (weights.LOCK_FILE).write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match=r"lock.json is damaged"):
        load_encoder(EncoderSpec("somebody/tiny-clip"), "cpu")


def test_a_cut_off_fetch_is_noticed(hub, tmp_path):
    folder = put_in_cache(hub, "somebody/tiny-sd", build_stable_diffusion(tmp_path / "sd"))
    assert weights.is_complete(folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert not weights.is_complete(folder)
    with pytest.raises(UserError, match="cached in part only and HF_HUB_OFFLINE is set"):
        weights.model_folder("somebody/tiny-sd", None, weights.pipeline_files())
    assert weights.is_complete(folder, skipped=("vae/*",))
    shutil.rmtree(folder / "vae")  # as a cache looks where only the other parts were ever fetched
    assert not weights.is_complete(folder)
    for content in ("[]", "{"):
        (folder / "model_index.json").write_text(content)
        with pytest.raises(UserError, match=r"model_index.json is damaged .*delete its folder and fetch again"):
            weights.model_folder("somebody/tiny-sd", None, weights.pipeline_files())
    clip = build_clip(tmp_path / "clip")
    (clip / "model.safetensors").rename(clip / "model-00001-of-00002.safetensors")
    assert not weights.is_complete(clip, weights.TRANSFORMERS_FILES)
    shutil.copy(clip / "model-00001-of-00002.safetensors", clip / "model-00002-of-00002.safetensors")
    assert weights.is_complete(clip, weights.TRANSFORMERS_FILES)


def test_a_cache_that_holds_another_variant_only_is_noticed(hub, tmp_path):
    folder = put_in_cache(hub, "somebody/tiny-sd", build_stable_diffusion(tmp_path / "sd"))
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    # The index of the other variant's shards is small, so it comes along.
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    asked = {variant: weights.pipeline_files(variant) for variant in (None, "fp16")}
    assert weights.model_folder("somebody/tiny-sd", None, asked["fp16"]) == folder
    with pytest.raises(UserError, match="cached in part only and HF_HUB_OFFLINE is set"):
        weights.model_folder("somebody/tiny-sd", None, asked[None])


def test_repositories_that_lack_the_weights_are_told(hub, tmp_path, monkeypatch):
    """What the hub has is laid out in the cache; the client's answer for it is the cached folder."""
    import huggingface_hub

    pipeline = put_in_cache(hub, "somebody/half", build_stable_diffusion(tmp_path / "sd"))
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    empty = put_in_cache(hub, "somebody/empty", build_clip(tmp_path / "clip"))
    (empty / "model.safetensors").unlink()
    answers = {"somebody/half": pipeline, "somebody/empty": empty}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(answers[repo_id]))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match='lacks .*of some of its parts: set variant .*"fp16"'):
        weights.model_folder("somebody/half", None, weights.pipeline_files())
    with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin"):
        weights.model_folder("somebody/empty")


def test_a_safety_checker_that_is_not_there_is_told_before_the_weights_come(hub, tmp_path, monkeypatch):
    import huggingface_hub

    folder, asked = build_stable_diffusion(tmp_path / "sd"), []  # it has none

    def answer(allow_patterns, **wanted):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    preset = get_preset("paper")
    generator = dataclasses.replace(preset.generator, id="somebody/unchecked")
    wanted = model_fetch.wanted_models(dataclasses.replace(preset, generator=generator))[-1]
    with pytest.raises(UserError, match="unchecked has no safety checker: set safety_checker = false"):
        model_fetch._fetch(wanted, lambda line: None)
    assert asked and all(patterns == ["model_index.json"] for patterns in asked)


def test_a_full_disk_is_told_apart_from_a_missing_network(hub, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def full(local_files_only=False, **wanted):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing cached")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match=r"no space left for model stabilityai/sdxl-turbo \(about 6.9 GB\).*HF_HOME"):
        weights.model_folder("stabilityai/sdxl-turbo")


def test_small_files_that_another_program_did_not_cache_are_fetched(hub, tmp_path, monkeypatch):
    import huggingface_hub

    folder = put_in_cache(hub, "openai/clip-vit-base-patch32", build_clip(tmp_path / "clip"), "cafe")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *names, **wanted: asked.append(
        (*names, wanted["revision"])) if "local_files_only" not in wanted else str(folder))
    model_fetch.lock_models(get_preset("fast"))
    assert not asked  # offline
    monkeypatch.delenv("HF_HUB_OFFLINE")
    model_fetch.lock_models(get_preset("fast"), again=True)  # as ./run_all.sh --fetch does
    assert ("openai/clip-vit-base-patch32", "cafe") in asked
    asked.clear()
    weights.LOCK_FILE.unlink()
    model_fetch.lock_models(get_preset("fast"))
    assert ("openai/clip-vit-base-patch32", "cafe") in asked  # the cached commit, not a newer one
    done = len(asked)
    model_fetch.lock_models(get_preset("fast"))
    assert len(asked) == done  # locked: nobody is asked again


def test_converted_copy_of_a_pickled_repository_is_used(hub, tmp_path):
    from lib.convert import convert_pickle, write_source

    source = build_clip(tmp_path / "clip")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    target = convert_pickle(source, weights.CONVERTED / "somebody--old-clip")
    write_source(target, "somebody/old-clip", "abc123")
    encoder = load_encoder(EncoderSpec("somebody/old-clip"), "cpu")
    assert encoder.folder == target and describe(encoder)["revision"] == "abc123"


def test_blip_is_fetched_converted_and_locked(hub, server, tmp_path):
    source = build_blip(tmp_path / "blip")
    put_in_cache(hub, "somebody/words", source)
    torch.save({"model": original_names(load_file(source / "model.safetensors"))
                | {"text_decoder.cls.predictions.decoder.weight": load_file(
                    source / "model.safetensors")["text_decoder.bert.embeddings.word_embeddings.weight"],
                   "text_decoder.cls.predictions.decoder.bias": load_file(
                    source / "model.safetensors")["text_decoder.cls.predictions.bias"]}},
               tmp_path / "caption.pth")
    server.content = (tmp_path / "caption.pth").read_bytes()
    url = server.url + "/model_large_caption.pth"
    target = tmp_path / "models" / "blip-large-coco"
    model_fetch.fetch_blip(target, lambda line: None, url, "somebody/words", head_width=16)
    captioner = load_captioner(CaptionerSpec(str(target)), "cpu")
    digest = hashlib.sha256(server.content).hexdigest()
    assert describe(captioner)["revision"] == digest == weights.locked_revision(url)
    assert not list(target.parent.glob("*.pth*"))
    server.content = server.content[:-1] + b"!"
    with pytest.raises(UserError, match="sha256"):
        model_fetch.fetch_blip(target, lambda line: None, url, "somebody/words", head_width=16)


@pytest.mark.parametrize(("variant", "wanted", "unwanted"), [
    (None, ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "model_index.json",
            "tokenizer/merges.txt"],
     ["unet/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.safetensors",
      "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
      "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
      "unet/diffusion_pytorch_model.bin", "text_encoder/flax_model.msgpack"]),
    ("fp16", ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors",
              "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
              "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"],
     ["unet/diffusion_pytorch_model.safetensors", "sd_xl_turbo_1.0_fp16.safetensors"]),
])
def test_only_the_needed_files_are_fetched(variant, wanted, unwanted):
    from huggingface_hub.utils import filter_repo_objects

    chosen = filter_repo_objects(wanted + unwanted, allow_patterns=list(weights.pipeline_files(variant)))
    assert sorted(chosen) == sorted(wanted)


def test_what_a_preset_wants():
    ids = [part.id for part in model_fetch.wanted_models(get_preset("paper"))]
    assert ids == ["data/models/hub/blip-large-coco", "openai/clip-vit-large-patch14",
                   "openai/clip-vit-base-patch32", "stable-diffusion-v1-5/stable-diffusion-v1-5"]
    assert model_fetch.wanted_models(get_preset("fast"))[-1].skipped == ("safety_checker/*",)


def test_missing_models_and_their_sizes(hub, tmp_path):
    parts = model_fetch.missing_models(get_preset("fast"))
    assert [part.name for part in parts] == ["model Salesforce/blip-image-captioning-base",
                                             "model openai/clip-vit-large-patch14",
                                             "model openai/clip-vit-base-patch32",
                                             "model stabilityai/sdxl-turbo"]
    assert [part.amount for part in parts] == ["about 1.0 GB", "about 1.7 GB", "about 600 MB", "about 6.9 GB"]
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set.*--fetch --preset PRESET"):
        parts[0].fetch(lambda line: None)
    put_in_cache(hub, "openai/clip-vit-large-patch14", build_clip(tmp_path / "clip"))
    assert len(model_fetch.missing_models(get_preset("fast"))) == 3
    assert not model_fetch.missing_models(get_preset("mini"))


def test_what_is_cached_already_is_locked_too(hub, tmp_path):
    put_in_cache(hub, "openai/clip-vit-base-patch32", build_clip(tmp_path / "clip"), "cafe")
    model_fetch.lock_models(get_preset("fast"))
    assert json.loads(weights.LOCK_FILE.read_text()) == {"openai/clip-vit-base-patch32": "cafe"}


def test_an_absent_local_folder_cannot_be_fetched(hub):
    preset = dataclasses.replace(get_preset("mini"), encoder=EncoderSpec(id="/nowhere/clip"))
    with pytest.raises(UserError, match="model folder /nowhere/clip is missing: check the id"):
        model_fetch.missing_models(preset)


def test_an_adapter_of_your_own_brings_its_own_files(hub):
    own = CaptionerSpec(id="remote-model", adapter="mine:Service")
    wanted = model_fetch.wanted_models(dataclasses.replace(get_preset("fast"), captioner=own))
    assert "remote-model" not in [part.id for part in wanted]
