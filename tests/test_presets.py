"""Every preset builds, TOML presets override, and bad ones say what is wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lib.errors import UserError
from lib.presets import PRESETS, get_preset, preset_hash, preset_to_dict
from lib.seeds import stable_seed


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_and_serialises(name):
    preset = get_preset(name)
    assert preset.name == name
    assert json.loads(json.dumps(preset_to_dict(preset)))["n_candidates"] == 10
    assert len(preset_hash(preset)) == 64


def test_paper_states_what_is_assumed_and_official_differs():
    paper, official = get_preset("paper"), get_preset("official")
    assert any("512" in line for line in paper.assumed)
    assert (paper.captioner.sender.min_tokens, paper.captioner.sender.max_tokens) == (10, 30)
    assert (official.captioner.sender.min_tokens, official.captioner.sender.max_tokens) == (5, 20)
    assert official.captioner.sender.repetition_penalty == 1.1
    assert not official.encoder.projected and paper.encoder.projected
    assert preset_hash(paper) != preset_hash(official)


def test_what_a_file_changes_is_no_longer_said_to_be_assumed(tmp_path):
    paper, path = get_preset("paper"), tmp_path / "own.toml"
    for text, gone in (("[generator]\nbatch_size = 1", ()), ("[generator]\nsteps = 4", ("generator",)),
                       ('[captioner.receiver]\nstrategy = "beam"', ("captioner", "receiver")),
                       ('[judge]\nid = "another"', ("judge",)), ('assumed = ["all"]', paper.assumed)):
        path.write_text(f'base = "paper"\n{text}\n', encoding="utf-8")
        kept = [line for line in paper.assumed if not line.startswith(tuple(gone))]
        assert list(get_preset(path).assumed) == (kept or ["all"])


def test_toml_preset_overrides_nested_fields(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('base = "mini"\nn_sources = 7\ndatasets = ["folder:photos"]\njudge = false\n'
                    "[captioner.sender]\np = 0.8\n[generator]\nguidance = 3\n", encoding="utf-8")
    own, mini = get_preset(path), get_preset("mini")
    assert own.name == "own" and own.n_sources == 7 and own.datasets == ("folder:photos",)
    assert own.captioner.sender.p == 0.8 and own.generator.guidance == 3.0 and own.judge is None
    assert own.captioner.sender.max_tokens == mini.captioner.sender.max_tokens
    child = tmp_path / "child.toml"
    child.write_text('base = "own.toml"\n[judge]\nid = "some/encoder"\n', encoding="utf-8")
    assert get_preset(str(child)).judge.id == "some/encoder"
    assert get_preset(str(child)).captioner.sender.p == 0.8


@pytest.mark.parametrize(("text", "culprit"), [
    ("n_sources = 3", "base"),
    ('base = "mini"\nsourcs = 3', "sourcs"),
    ('base = "mini"\nn_sources = 0', "n_sources"),
    ('base = "mini"\nn_sources = "many"', "n_sources"),
    ('base = "mini"\n[captioner.sender]\nstrategy = "magic"', "strategy"),
    ('base = "mini"\n[captioner.sender]\np = 1.5', "p = 1.5"),
    ('base = "mini"\ngenerator = 3', "generator"),
    ('base = "mini"\n[generator]\ndtype = "float8"', "float8"),
    ('base = "nobody"', "nobody"),
    ("base = ", "TOML"),
    ('base = "bad.toml"', "its own base"),
    ('base = "mini"\nname = "../../elsewhere"', "without slashes"),
    ('base = "mini"\nname = ".."', "without slashes"),
    ('base = "mini"\n[captioner.sender]\ntemperature = inf', "finite"),
    ('base = "mini"\n[captioner.options]\nsince = [1979-05-27]', "no date"),
    ('base = "mini"\n[captioner.options]\napi_key = "HUSH"', "holds a key"),
    ('base = "mini"\n[captioner.options]\nurl = "https://me:HUSH@host/v1"', "holds a key"),
    ('base = "mini"\n[captioner.options]\nrequest = { x-api-key = "HUSH" }', "holds a key"),
    ('base = "mini"\n[captioner.options]\nrequest = { more = [{ Authorization = "HUSH" }] }', "holds a key"),
    ('base = "mini"\n[captioner.options]\nurl = "https://host/v1?v=1&key=HUSH"', "holds a key"),
    ('base = "mini"\nx = ' + "[" * 3000, "TOML"),
    ('base = "mini"\nn_sources = ' + "9" * 5000, "TOML"),
])
def test_bad_toml_is_one_line_that_names_the_culprit(tmp_path, text, culprit):
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        get_preset(path)
    assert culprit in str(caught.value) and "\n" not in str(caught.value) and "HUSH" not in str(caught.value)


def test_unknown_preset_and_missing_file():
    with pytest.raises(UserError, match="choose one of mini"):
        get_preset("gigantic")
    with pytest.raises(UserError, match="does not exist"):
        get_preset("nowhere.toml")


def test_hash_ignores_what_cannot_change_a_row():
    mini = get_preset("mini")
    other_batches = dataclasses.replace(
        mini, name="x", n_sources=3,
        generator=dataclasses.replace(mini.generator, batch_size=1, compile=True))
    assert preset_hash(other_batches) == preset_hash(mini)
    other_steps = dataclasses.replace(
        mini, generator=dataclasses.replace(mini.generator, steps=13))
    assert preset_hash(other_steps) != preset_hash(mini)


def test_stable_seed_is_fixed_for_ever():
    assert stable_seed(0, "noise", "coco", "42") == stable_seed("0", "noise", "coco", 42)
    assert stable_seed("a", "b") != stable_seed("ab") and stable_seed("a", "b") < 2**63
    assert stable_seed() == 0xE3B0C44298FC1C14 & (2**63 - 1)
