"""Every preset builds, TOML presets override, and bad ones say what is wrong in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lib.base import ROOT, UserError, stable_seed
from lib.presets import PRESETS, load_preset, row_settings

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))


def write(path, text, base="mini"):
    """An own preset file."""
    path.write_text(f'base = "{base}"\n{text}\n', encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_and_serialises(name):
    preset = load_preset(name)
    assert preset.name == name and preset.n_candidates == 10
    assert json.loads(json.dumps(row_settings(preset)))["captioner"]["sender"]["strategy"] == "nucleus"


def test_paper_states_what_is_assumed_and_official_differs():
    paper, official = load_preset("paper"), load_preset("official")
    assert any("512" in line for line in paper.assumed["generator"])
    assert (paper.captioner.sender.min_tokens, paper.captioner.sender.max_tokens) == (10, 30)
    assert (official.captioner.sender.min_tokens, official.captioner.sender.max_tokens) == (5, 20)
    assert official.captioner.sender.repetition_penalty == 1.1
    assert not official.encoder.projected and paper.encoder.projected
    assert paper.encoder.prompt == "A photo depicts"  # CLIPScore's
    assert row_settings(paper) != row_settings(official)


def test_published_models_are_pinned_to_a_commit():
    paper, fast, lcm = (load_preset(name) for name in ("paper", "fast", "lcm"))
    for settings in (paper.generator, paper.encoder, paper.second_encoder, fast.captioner, fast.generator):
        assert len(settings.revision) == 40
    assert lcm.generator.revision is None  # another model does not inherit the base's commit


def test_a_file_overrides_single_fields(tmp_path):
    path = write(tmp_path / "own.toml", 'n_sources = 7\ndatasets = ["folder:photos"]\nsecond_encoder = false\n'
                                        "[captioner.sender]\np = 0.8\n[generator]\nguidance = 3")
    own, mini = load_preset(path), load_preset("mini")
    assert own.name == "own" and own.n_sources == 7 and own.datasets == ["folder:photos"]
    assert own.captioner.sender.p == 0.8 and own.generator.guidance == 3.0 and own.second_encoder is None
    assert own.captioner.sender.max_tokens == mini.captioner.sender.max_tokens
    child = load_preset(write(tmp_path / "child.toml", '[second_encoder]\nid = "some/encoder"', base="own.toml"))
    assert child.second_encoder.id == "some/encoder" and child.captioner.sender.p == 0.8


def test_what_a_file_changes_is_no_longer_said_to_be_assumed(tmp_path):
    paper = load_preset("paper")
    for text, gone in (("[generator]\nsteps = 4", ["generator"]), ('[second_encoder]\nid = "b/a"', ["second_encoder"])):
        own = load_preset(write(tmp_path / "own.toml", text, base="paper"))
        assert own.assumed == {part: lines for part, lines in paper.assumed.items() if part not in gone}
    own = load_preset(write(tmp_path / "own.toml", '[assumed]\ngenerator = ["all"]', base="paper"))
    assert own.assumed["generator"] == ["all"]


@pytest.mark.parametrize(("text", "culprit"), [
    ('base = "mini"\nsourcs = 3', "sourcs"),
    ('base = "mini"\nn_sources = 0', "n_sources"),
    ('base = "mini"\n[captioner.sender]\nstrategy = "magic"', "strategy"),
    ('base = "mini"\n[captioner.sender]\np = 1.5', "captioner.sender.p"),
    ('base = "mini"\n[captioner.sender]\nmin_tokens = 30', "min_tokens = 30 exceeds max_tokens = 18"),
    ('base = "mini"\n[captioner.sender]\ntemperature = inf', "finite"),
    ('base = "mini"\n[captioner.receiver]\nprompt = "of' + " a" * 20 + '"', "need 40 tokens, data/models/mini/captioner"),
    ('base = "mini"\ngenerator = 3', "generator"),
    ('base = "mini"\n[generator]\ndtype = "float8"', "float8"),
    ('base = "mini"\n[generator]\nsize = 100', "generator.size"),
    ('base = "mini"\n[generator]\nscheduler = "UNet2DModel"', "generator.scheduler"),
    ('base = "mini"\nname = "../../elsewhere"', "name"),
    ('base = "bad.toml"', "its own base"),
    ('base = "nobody"', "nobody"),
    ("n_sources = 3", "base"),
    ("base = ", "cannot be read"),
    ('base = "mini"\n[captioner.options]\napi_key = "HUSH"', "holds a key"),
    ('base = "mini"\n[captioner.options]\nurl = "https://me:HUSH@host/v1"', "holds a key"),
    ('base = "mini"\n[captioner.options]\nrequest = { more = [{ Authorization = "HUSH" }] }', "holds a key"),
    ('base = "mini"\n[captioner.options]\nurl = "https://host/v1?v=1&key=HUSH"', "holds a key"),
    ('base = "mini"\nx = ' + "[" * 3000, "cannot be read"),
    ('base = "mini"\nn_sources = ' + "9" * 5000, "cannot be read"),
])
def test_a_bad_file_is_one_line_that_names_the_culprit(tmp_path, text, culprit):
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_preset(path)
    said = str(caught.value)
    assert culprit in said and "\n" not in said and "HUSH" not in said and len(said) < 500


def test_options_of_an_own_adapter_are_no_secrets(tmp_path):
    own = load_preset(write(tmp_path / "own.toml", '[captioner]\nadapter = "mine:Mine"\n[captioner.options]\n'
                            'eos_token = "x"\nsort_key = "y"\nkey_env = "MY_KEY"\nurl = "https://host/v1?page=2"'))
    assert own.captioner.options["eos_token"] == "x" and own.captioner.options["key_env"] == "MY_KEY"


def test_unknown_preset_and_missing_file(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="choose one of .*mini"):
        load_preset("gigantic")
    with pytest.raises(UserError, match="nowhere.toml cannot be read"):
        load_preset("nowhere.toml")
    write(tmp_path / "mine.toml", "n_sources = 5")
    monkeypatch.setenv("COMPENDIUM_CALLER", str(tmp_path))
    assert load_preset("mine.toml").n_sources == 5  # relative to where the command was started


def test_settings_of_a_row_leave_out_what_cannot_change_it(tmp_path):
    mini = load_preset("mini")
    idle = write(tmp_path / "x.toml", "n_sources = 3\nseed = 4\n[generator]\nbatch_size = 1\ncompile = true\n"
                                      "[captioner.options]\nprice = 2.0")
    assert row_settings(load_preset(idle)) == row_settings(mini)
    for text in ("[generator]\nsteps = 13", "[captioner.receiver]\nmax_tokens = 9", "[encoder]\nprompt = 'x'",
                 "[generator]\nlora = 'a/b'", "second_encoder = false"):
        assert row_settings(load_preset(write(tmp_path / "x.toml", text))) != row_settings(mini)


def test_reading_presets_is_quick():
    code = ("import sys, lib.models; from lib.presets import load_preset; load_preset('mini'); "
            "print([name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_stable_seed_is_fixed_for_ever():
    assert stable_seed(0, "noise", "coco", "42") == stable_seed("0", "noise", "coco", 42)
    assert stable_seed("a", "b") != stable_seed("ab") and stable_seed("a", "b") < 2**63
    assert stable_seed() == 0xE3B0C44298FC1C14 & (2**63 - 1)
