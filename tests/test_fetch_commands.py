"""Commands that fetch first: runs, the page, playing again; what they say without a network."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile

import pytest

from lib import download, fetch, notebooks, pipeline, serve, study, verify
from lib.dataset_fetch import SOURCES
from lib.datasets import load_dataset
from lib.errors import UserError
from lib.presets import REPO_ROOT
from tests.hosts import fetched, request, serving


@pytest.fixture
def site(tmp_path, monkeypatch):
    """See ``hosts.serving``."""
    with serving(tmp_path, monkeypatch) as handler:
        yield handler


# --- without a network --------------------------------------------------------------------------


def test_offline_is_one_line_and_asks_nobody(site, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for act in (lambda: fetch.fetch_ahead(request(seed=3), site.said.append),
                lambda: fetch.prepare(request(seed=3), lambda: True, site.said.append)):
        with pytest.raises(UserError) as caught:
            act()
        message = str(caught.value)
        for part in ("captions of nocaps (size unknown)", "4 pictures of nocaps (about ", "in all about",
                     "HF_HUB_OFFLINE is set", "./run_all.sh --fetch --preset mini --dataset nocaps --n 4 "
                     "--seed 3", "--preset mini needs nothing"):
            assert part in message
        assert "\n" not in message
    assert not site.asked


def test_no_connection_is_one_line(site, monkeypatch):
    monkeypatch.setitem(SOURCES, "nocaps", dataclasses.replace(
        SOURCES["nocaps"], url="http://127.0.0.1:9/nocaps.json", page="https://nocaps.org/download"))
    by_hand = r"by hand at \S+/nocaps/annotations/nocaps_val_4500_captions.json"
    with pytest.raises(UserError, match=f"missing: captions of nocaps .*refused.*nocaps.org/download {by_hand}"
                       ".*needs nothing") as caught:
        fetch.prepare(request(), lambda: False, site.said.append)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_with_the_pictures_that_are_there(site, monkeypatch):
    fetch.fetch_ahead(request(n=2), site.said.append)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch.prepare(request(n=4), lambda: False, site.said.append)
    assert "going on with the pictures that are there; missing: 2 pictures of nocaps" in site.said[-1]
    dataset = load_dataset("nocaps", 4, 0)
    assert len(dataset) == 2 and len(dataset.missing) == 2
    with pytest.raises(UserError, match="2 pictures of nocaps .*HF_HUB_OFFLINE is set"):
        fetch.fetch_ahead(request(n=4), site.said.append)


def test_models_are_asked_for_only_where_they_will_run(site, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    fetch.fetch_ahead(request(), site.said.append)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch.prepare(request(preset="fast"), lambda: False, site.said.append)
    with pytest.raises(UserError, match=r"missing: model Salesforce/blip\S+ \(about 1.0 GB\), .*sdxl-turbo"):
        fetch.prepare(request(preset="fast"), lambda: True, site.said.append)
    assert f"where models go ({tmp_path / 'hub'}, or set HF_HOME)" in site.said[-1]
    fetch.prepare(request(), lambda: pytest.fail("mini's models are here"), site.said.append)


def test_a_run_on_the_cpu_is_told(monkeypatch, tmp_path):
    import torch

    said = []
    monkeypatch.delenv("COMPENDIUM_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    fetch._tell_device(said.append)
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    fetch._tell_device(said.append)
    assert len(said) == 2 and all("will run on the CPU" in line for line in said)
    assert ["check the driver" in line for line in said] == [False, True]
    monkeypatch.setenv("COMPENDIUM_DEVICE", "cpu")  # it is wished
    fetch._tell_device(said.append)
    assert len(said) == 2


def test_the_parser_of_spice_is_offered_where_it_can_run(site, monkeypatch, tmp_path):
    from lib.scoring import spice_official

    monkeypatch.setattr(spice_official, "FOLDER", tmp_path)
    monkeypatch.setattr(spice_official, "URL", f"{site.url}/corenlp.zip")
    site.files["/corenlp.zip"] = b"x" * 2_500_000
    with zipfile.ZipFile(tmp_path / "rhino.jar", "w") as jar:
        jar.writestr("META-INF/services/javax.script.ScriptEngineFactory", "x")
    parts = fetch._spice_parser(site.said.append)
    assert [part.amount for part in parts] == ["2.5 MB"] and not site.said
    for jar in spice_official.JARS:
        (tmp_path / jar).write_bytes(b"jar")
    assert not fetch._spice_parser(site.said.append)
    assert [download.in_words(size) for size in (None, 0, 5, 2_500_000, 10_400_000, 5_500_000_000)] == [
        "size unknown", "0 MB", "0.1 MB", "2.5 MB", "10 MB", "5.5 GB"]


# --- the command --------------------------------------------------------------------------------


def test_mini_needs_nothing_and_loads_no_torch():
    script = ("import sys; from lib import pipeline; status = pipeline.main(['--fetch']); "
              "sys.exit(status or 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nothing to fetch: all that preset mini needs")
    assert len(done.stdout.splitlines()) == 1


def test_a_run_fetches_first(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMPENDIUM_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("COMPENDIUM_RUNS", str(tmp_path / "runs"))
    (tmp_path / "figures" / "mini" / "notebooks").mkdir(parents=True)

    def run_one(notebook, parameters, place, headline):
        """In place of a notebook, which would take seconds to start."""
        print(len(load_dataset(parameters["DATASET"], parameters["N_SOURCES"], parameters["SEED"])), "sources")
        return []

    monkeypatch.setattr(pipeline, "run_one", run_one)
    pipeline.run_all(pipeline.parse(["--dataset", "nocaps", "--n", "3", "--only", "03"]))
    out = capsys.readouterr().out
    order = [out.index(part) for part in ("in all about", "fetched: all that was missing", "3 sources")]
    assert order == sorted(order)


def test_the_page_fetches_first_and_opens_in_any_case(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "serve", lambda parameters: print("the page of", parameters["DATASET"]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pipeline.main(["--explore", "--dataset", "nocaps", "--n", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("going on with what is here; missing: captions of nocaps") and not site.asked
    assert "./run_all.sh --fetch --preset mini --dataset nocaps --n 3" in out[-2]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert pipeline.main(["--explore", "--dataset", "nocaps", "--n", "3"]) == 0
    out = capsys.readouterr().out
    order = [out.index(part) for part in ("in all about", "fetched: all that was missing", "the page of nocaps")]
    assert order == sorted(order) and len(fetched(tmp_path)) == 3


def test_playing_again_fetches_models_only_where_there_are_rows(site, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COMPENDIUM_RUNS", str(tmp_path / "runs"))
    fetch.fetch_ahead(request(n=3), lambda line: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--preset", "fast", "--dataset", "nocaps", "--n", "3"]
    assert pipeline.main(["--verify", *flags]) == verify.main(["rows", *flags]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("01" in line and "missing: model" not in line for line in errors)
    monkeypatch.setattr(study.Study, "run", lambda self, dataset, task: object())  # as if there were rows
    assert pipeline.main(["--verify", *flags]) == 2
    assert "error: missing: model Salesforce/blip" in capsys.readouterr().err


def test_finished_runs_need_no_models(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPENDIUM_RUNS", str(tmp_path))
    flags = pipeline.parse(["--n", "2"])
    readers = notebooks.select(notebooks.read_manifest(notebooks.NOTEBOOKS), "03,05")
    players = notebooks.select(notebooks.read_manifest(notebooks.NOTEBOOKS), "01")
    assert pipeline.finished(flags, readers) and not pipeline.finished(flags, players)
