"""Where weights come from: folders, the hub's cache, a hub that lacks them; what identifies them; BLIP's conversion."""

from __future__ import annotations

import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file

from lib.base import ROOT, UserError
from lib.models import describe, load_captioner, load_encoder, load_generator, weights_fingerprint
from lib.models.convert import convert_blip, fetch_blip
from lib.models.hub import fetch_models, missing_models, wanted
from lib.presets import CaptionerSettings, Decoding, EncoderSettings, GeneratorSettings, load_preset
from tests.tiny_models import build_blip, build_clip, build_stable_diffusion


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache, model_id, folder, commit="c0ffee"):
    """Lay a folder into the hub cache as the client would."""
    repository = cache / ("models--" + model_id.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    shutil.copytree(folder, repository / "snapshots" / commit)
    return repository / "snapshots" / commit


def serve(handler, monkeypatch):
    """A server on this machine that stands for the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return server, url


def test_a_cached_model_loads_offline_and_records_its_commit(cache, tmp_path):
    put_in_cache(cache, "somebody/tiny-clip", build_clip(tmp_path / "clip"))
    settings = EncoderSettings(id="somebody/tiny-clip")
    assert describe(load_encoder(settings, "cpu"))["revision"] == "c0ffee"
    assert weights_fingerprint(settings) == "somebody/tiny-clip@c0ffee"
    assert weights_fingerprint(EncoderSettings(id="somebody/gone")) is None  # not on this machine, no pin
    pinned = weights_fingerprint(settings.model_copy(update={"revision": "c0ffee"}))
    assert pinned == "somebody/tiny-clip@c0ffee"  # a pin that names the commit in use changes nothing


def test_a_cut_off_fetch_and_another_variant_are_noticed(cache, tmp_path):
    folder = put_in_cache(cache, "somebody/tiny-sd", build_stable_diffusion(tmp_path / "sd"))
    settings = GeneratorSettings(id="somebody/tiny-sd", steps=1, guidance=0.0, size=32, output_size=32)
    assert load_generator(settings, "cpu").generate(["a cat"], [0]).pixels.std() > 1
    write_tree_cache(str(folder.parents[1]), "c0ffee", {
        file.relative_to(folder).as_posix(): TreeCacheEntry(1, "0" * 40) for file in folder.rglob("*.*")})
    assert weights_fingerprint(settings) == "somebody/tiny-sd@c0ffee"
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert weights_fingerprint(settings) is None
    with pytest.raises(UserError, match="somebody/tiny-sd is missing: the hub cannot be reached, or HF_HUB_OFFLINE"):
        load_generator(settings, "cpu")


class Nothing(BaseHTTPRequestHandler):
    """A hub that has nothing, and says so in the way the real one does."""

    code = "RepoNotFound"

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        """Stay quiet."""


@pytest.mark.parametrize(("code", "revision", "said"), [
    ("RepoNotFound", None, "Repository Not Found .*check the id and revision"),
    ("RevisionNotFound", "0123456789abcdef0123456789abcdef01234567", "Revision Not Found for url.*0123")])
def test_a_hub_id_that_does_not_exist(cache, monkeypatch, code, revision, said):
    monkeypatch.setattr(Nothing, "code", code)
    server, _ = serve(Nothing, monkeypatch)
    with pytest.raises(UserError, match=said) as caught:
        load_encoder(EncoderSettings(id="nobody/nothing", revision=revision), "cpu")
    assert "nobody/nothing" in str(caught.value) and "\n" not in str(caught.value)
    server.shutdown()
    server.server_close()


def test_missing_models_and_their_sizes(cache, monkeypatch):
    fast = load_preset("fast")
    assert [name for name, _ in missing_models(fast)] == [
        "Salesforce/blip-image-captioning-large", "openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32",
        "stabilityai/sdxl-turbo"]
    assert sum(size for _, size in missing_models(fast)) == pytest.approx(11.1e9)
    assert missing_models(load_preset("mini")) == [] and fetch_models(load_preset("mini")) is None
    assert [name for name, _ in missing_models(load_preset("remote"))][:1] == ["openai/clip-vit-large-patch14"]
    absent = fast.model_copy(update={"encoder": EncoderSettings(id="my/own/encoder")})
    with pytest.raises(UserError, match=f"model folder {ROOT}/my/own/encoder is missing"):
        missing_models(absent)
    with pytest.raises(UserError, match="is missing .about 1.9 GB.: .*fetch it ahead with ./run_all.sh --fetch"):
        fetch_models(fast)


@pytest.mark.parametrize(("variant", "ending", "other"), [(None, "", ".fp16"), ("fp16", ".fp16", "")])
def test_only_the_needed_files_are_fetched(variant, ending, other):
    unet = "unet/diffusion_pytorch_model"
    needed = [f"{unet}{ending}.safetensors", f"text_encoder/model{ending}.safetensors",
              f"{unet}-00001-of-00002{ending}.safetensors", "model_index.json", "tokenizer/merges.txt"]
    unneeded = [f"{unet}{other}.safetensors", "v1-5-pruned.safetensors", f"{unet}.bin", "modeling.py",
                f"{unet}-00001-of-00002{other}.safetensors", "text_encoder/flax_model.msgpack"]
    model, = wanted(GeneratorSettings(id="a/b", variant=variant))
    assert sorted(filter_repo_objects(needed + unneeded, allow_patterns=list(model.patterns))) == sorted(needed)
    assert model.skipped == ("safety_checker/*",)
    assert not wanted(GeneratorSettings(id="a/b", safety_checker=True))[0].skipped
    patterns = list(wanted(EncoderSettings(id="a/b"))[0].patterns)
    assert not list(filter_repo_objects(["modeling.py", "pytorch_model.bin"], allow_patterns=patterns))


def test_the_fingerprint_follows_the_content_of_a_folder(tmp_path, monkeypatch):
    folder = build_clip(tmp_path / "clip")
    settings = EncoderSettings(id=str(folder))
    before = weights_fingerprint(settings)
    assert before.startswith("sha256:") and before == weights_fingerprint(settings)
    shutil.copytree(folder, tmp_path / "copy")
    assert weights_fingerprint(EncoderSettings(id=str(tmp_path / "copy"))) == before  # wherever it lies
    (folder / "README.md").write_text("words for humans")
    assert weights_fingerprint(settings) == before
    for name in ("model.safetensors", "tokenizer.json"):
        file = folder / name
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert weights_fingerprint(settings) != before
        file.write_bytes(content)
    with (folder / "model.safetensors").open("r+b") as stream:  # a large file, of which samples are read
        stream.truncate(80 << 20)
        large = weights_fingerprint(settings)
        stream.seek(-1, 2)
        stream.write(b"x")
        stream.flush()
        assert weights_fingerprint(settings) not in (before, large)
    assert weights_fingerprint(EncoderSettings(id=str(tmp_path / "gone"))) is None
    assert weights_fingerprint(load_preset("mini").encoder).startswith("sha256:")  # relative to the repository
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{ROOT}/copy is missing"):  # never to where a command was started
        load_encoder(EncoderSettings(id="./copy/"), "cpu")


# --- BLIP's checkpoint --------------------------------------------------------------------------

# transformers' names -> those of BLIP's authors, written down apart from the code under test
TO_ORIGINAL = {
    r"vision_model\.embeddings\.class_embedding": "visual_encoder.cls_token",
    r"vision_model\.embeddings\.position_embedding": "visual_encoder.pos_embed",
    r"vision_model\.embeddings\.patch_embedding": "visual_encoder.patch_embed.proj",
    r"vision_model\.post_layernorm": "visual_encoder.norm",
    r"vision_model\.encoder\.layers": "visual_encoder.blocks",
    r"self_attn\.projection": "attn.proj", r"self_attn": "attn", r"layer_norm([12])": r"norm\1"}


@pytest.fixture
def original(tmp_path):
    """A tiny BLIP, and its weights as BLIP's authors would have saved them."""
    source = build_blip(tmp_path / "source")
    state = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for pattern, replacement in TO_ORIGINAL.items():
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    head = "text_decoder.cls.predictions"
    state[f"{head}.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(64)[None]
    assert "visual_encoder.blocks.1.attn.qkv.weight" in state
    return source, state


def test_blip_is_fetched_and_converted_and_captions_the_same(original, cache, tmp_path, monkeypatch):
    source, state = original
    put_in_cache(cache, "somebody/words", source)
    (tmp_path / "www").mkdir()
    torch.save({"model": state}, tmp_path / "www" / "caption.pth")
    monkeypatch.chdir(tmp_path / "www")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    server, url = serve(SimpleHTTPRequestHandler, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    target = tmp_path / "models" / "blip"
    fetch_blip(target, f"{url}/caption.pth", ("somebody/words", None))
    server.shutdown()
    server.server_close()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    models = [load_captioner(CaptionerSettings(id=str(folder)), "cpu") for folder in (source, target)]
    first, second = (model.caption([image], [[1, 2, 3]], Decoding(max_tokens=8))[0] for model in models)
    assert [c.text for c in first] == [c.text for c in second]
    assert len(describe(models[1])["revision"]) == 64  # the checkpoint's SHA-256
    assert weights_fingerprint(models[1].settings) != weights_fingerprint(models[0].settings)
    assert [path.name for path in target.parent.iterdir()] == ["blip"]  # no pickle, no half-made folder


def test_other_checkpoints_are_refused(original, tmp_path, capsys):
    source, state = original

    class Harmful:
        def __reduce__(self):
            return print, ("run",)

    cut = {name: tensor for name, tensor in state.items() if name != "visual_encoder.norm.weight"}
    larger = state | {"visual_encoder.cls_token": torch.zeros(1, 1, 7)}
    for content, said in ((cut, "Missing key"), (larger, "no BLIP caption checkpoint of this size"),
                          ({"x": torch.zeros(1)}, "Missing key"), (Harmful(), "is damaged or no BLIP")):
        torch.save({"model": content}, tmp_path / "caption.pth")
        with pytest.raises(UserError, match=said):
            convert_blip(tmp_path / "caption.pth", source, tmp_path / "target")
    assert "run" not in capsys.readouterr().out and not (tmp_path / "target").exists()
