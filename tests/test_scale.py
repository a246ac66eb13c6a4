"""What grows with the number of sources, by counting: files opened, rows read, tables written, what is
remembered. Times and bytes of real size are measured by tests/benchmarks/scale.py."""

from __future__ import annotations

import collections
import gc
import weakref

import numpy as np
import pytest

from lib import results, roundtrip
from lib.datasets import Dataset, Item
from lib.players import Models
from lib.presets import get_preset
from lib.scoring.corpus import GRAPHS_TOGETHER, Corpus
from tests.benchmarks import scale
from tests.standins import Drawn, stand_ins, without_weights

MINI = without_weights(get_preset("mini"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight hundred names for forty pictures."""
    return scale.picture_folder(tmp_path_factory.mktemp("scale") / "pictures", 800)


def dataset(pictures, n: int) -> Dataset:
    items = tuple(Item(path.name, path) for path in sorted(pictures.iterdir())[:n])
    return Dataset("pictures", items, {})


def count(monkeypatch) -> collections.Counter:
    """Counts the tables read and written from here on, and their rows."""
    found = collections.Counter()
    read, writer = results.read_table, results.table_writer

    def counted_read(path, schema, owner):
        table = read(path, schema, owner)
        found["tables read"] += 1
        found["rows read"] += table.num_rows
        found["rows held"] = max(found["rows held"], table.num_rows)
        return table

    def counted_writer(*arguments, **facts):
        found["tables written"] += 1
        return writer(*arguments, **facts)

    monkeypatch.setattr(results, "read_table", counted_read)
    monkeypatch.setattr(results, "table_writer", counted_writer)
    return found


def simulated(pictures, n: int, root, monkeypatch) -> dict[str, collections.Counter]:
    """The bookkeeping of a run of n sources with half of its shards played: what each part counts."""
    plan = roundtrip.plan_run(MINI, dataset(pictures, n), "image", n, scale.CANDIDATES, 0, root)
    roundtrip.begin(plan)
    sample, half = plan.jobs[0].play(stand_ins()), len(plan.jobs) // 2
    for folder in ("shards", "baselines"):
        (plan.run.path / folder).mkdir()
    scale.simulate(plan.jobs[:half], sample.rows, sample.baselines)
    found = {}
    for part in ("resume", "merge", "open"):
        with monkeypatch.context() as patch:
            found[part] = count(patch)
            if part == "resume":
                waiting = roundtrip.pending(plan)
                assert [job.index for job in waiting] == list(range(half, len(plan.jobs)))
            elif part == "merge":
                scale.simulate(waiting, sample.rows, sample.baselines)
                found[part].clear()
                roundtrip.finish(plan)
            else:
                nobody = Models(None, None, None)
                assert roundtrip.play(MINI, plan.dataset, "image", n, scale.CANDIDATES, 0, models=nobody,
                                      root=root, progress=False) == plan.run
    assert plan.run.info()["counts"]["rows"] == n * scale.CANDIDATES
    return found


def test_bookkeeping_reads_each_row_once_and_grows_with_the_sources(pictures, tmp_path, monkeypatch):
    few = simulated(pictures, 200, tmp_path / "few", monkeypatch)
    many = simulated(pictures, 800, tmp_path / "many", monkeypatch)
    for n, found in ((200, few), (800, many)):
        shards = -(-n // roundtrip.SHARD_SIZE)
        half = shards // 2 * roundtrip.SHARD_SIZE
        each = scale.CANDIDATES + 1  # rows and the baseline of a source
        assert found["resume"]["tables read"] == 2 * (shards // 2)
        assert found["resume"]["rows read"] == half * each
        assert found["merge"]["tables read"] == 2 * shards and found["merge"]["rows read"] == n * each
        assert found["merge"]["tables written"] == 2
        assert found["open"]["rows read"] == 0  # a finished run is opened without reading it
    assert many["merge"]["rows held"] == few["merge"]["rows held"] == roundtrip.SHARD_SIZE * scale.CANDIDATES


class Watched(scale.Painter):
    """Counts, whenever it is asked, how many of its earlier batches are still held."""

    def __init__(self) -> None:
        self.batches, self.held = [], []

    def generate(self, texts, seeds):
        gc.collect()
        self.held.append(sum(batch() is not None for batch in self.batches))
        pixels = np.zeros((len(texts), 8, 8, 3), np.uint8)
        self.batches.append(weakref.ref(pixels))
        return Drawn(pixels, np.zeros(len(texts), bool), np.zeros(len(texts), bool))


def test_pictures_are_let_go(frozen, pictures, tmp_path):
    """While a shard is played, at most the one before is held, however many there were."""
    painter = Watched()
    models = Models(scale.Talker(), painter, scale.Looker(), scale.Looker())
    roundtrip.play(MINI, dataset(pictures, 16), "image", 16, 2, 0, models=models, root=tmp_path,
                   progress=False, shard_size=2)
    assert len(painter.held) == 8 and max(painter.held) == 1


# --- references -------------------------------------------------------------------------------


def graph_files(folder) -> set[str]:
    return {path.name for path in folder.glob("graphs-*")}


def test_a_corpus_forgets_candidates_and_keeps_its_references(tmp_path):
    corpus = Corpus.build({"1": ["a red boat"], "2": ["a blue owl", "an owl in a tree"]}, tmp_path)
    own = dict(corpus.tokens)
    first = corpus.scenes(["1", "2"])["2"]
    said = corpus.tokenize(["a green hat.", "a red boat"])
    corpus.parse(said)
    corpus.meteor_statistics["1", said[0]] = "statistics"
    assert len(corpus.tokens) == len(own) + 1
    corpus.forget()
    assert corpus.tokens == own
    assert not corpus.graphs and not corpus.meteor_statistics
    assert corpus.tokenize(["a green hat."]) == said[:1] and corpus.scenes(["2"])["2"] == first


def test_graphs_of_references_lie_in_files_of_a_thousand_items(tmp_path):
    """Reading and writing them stays linear: a part touches the files of its own items only."""
    names = ("a red boat", "a blue owl", "a tree")
    references = {f"{i:05d}": [names[i // GRAPHS_TOGETHER]] for i in range(2 * GRAPHS_TOGETHER + 1)}
    corpus = Corpus.build(references, tmp_path)
    ids = list(references)
    corpus.scenes(ids[:10])
    first = graph_files(tmp_path)
    corpus.forget()
    corpus.scenes(ids[10:GRAPHS_TOGETHER])
    assert len(first) == 1 and graph_files(tmp_path) == first
    corpus.forget()
    corpus.scenes(ids[GRAPHS_TOGETHER:])
    assert len(graph_files(tmp_path)) == 3
