"""The embedded world: scenes, writers, reader, images, datasets, the training loop and the trained weights."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from lib.data import load_dataset
from lib.picturebook import build, evaluate, train
from lib.picturebook.annotate import MAX_WORDS, MIN_WORDS, POOLS, describe, describe_by_pool, describe_fully
from lib.picturebook.distil import FewStepRecipe
from lib.picturebook.draw import render
from lib.picturebook.recipes import CAPTIONER_WORLD, GENERATOR_WORLD, altered
from lib.picturebook.scenes import (
    BIASED,
    CATEGORIES,
    COLOURS,
    FAMILIES,
    SETTINGS,
    Entity,
    Scene,
    place,
    sample_scene,
    split_of,
)
from lib.picturebook.semantics import count_facts, judge, named_last, parse
from lib.picturebook.vocabulary import bert_tokenizer, clip_tokenizer

PAIR = Scene("beach", (Entity("cat", "red", "big"), Entity("palm", "green", "small")), "left", layout=3)


def scenes(n: int, split: str = "train", seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, split=split) for _ in range(n)]


def test_the_world_is_as_large_as_promised():
    assert len(CATEGORIES) >= 24 and len(COLOURS) == 8 and len(SETTINGS) == 6
    drawn = scenes(3000)
    assert {scene.relation for scene in drawn} == {None, "left", "right", "above", "below"}
    assert {sum(entity.count for entity in scene.entities) for scene in drawn} == {1, 2, 3}
    assert {entity.category for scene in drawn for entity in scene.entities} == set(CATEGORIES)


def test_splits_share_no_content_even_mirrored():
    flip = Scene(PAIR.setting, PAIR.entities[::-1], "right", layout=99)
    assert split_of(flip) == split_of(PAIR)
    contents = {name: {scene.content() for scene in scenes(2000, name)} for name in ("train", "validation", "evaluation")}
    assert not contents["train"] & contents["evaluation"]
    assert not contents["train"] & contents["validation"]


def test_twins_for_the_encoder_stay_in_the_training_split():
    rng = random.Random(5)
    for scene in scenes(300):
        twin = altered(scene, rng)
        assert split_of(twin) == "train" and twin.content() != scene.content()


def test_placements_stay_inside_and_in_the_order_of_the_relation():
    for scene in scenes(1500):
        variant, spots = place(scene)
        assert 0 <= variant < 3 and len(spots) == sum(entity.count for entity in scene.entities)
        assert all(spot.left >= 0 and spot.left + spot.side <= 64 for spot in spots)
        assert all(spot.top >= 0 and spot.top + spot.side <= 64 for spot in spots)
        if scene.relation in ("left", "right"):
            first = np.mean([s.left for s in spots if s.entity is scene.entities[0]])
            second = np.mean([s.left for s in spots if s.entity is scene.entities[1]])
            assert (first < second) == (scene.relation == "left")
        if scene.relation in ("above", "below"):
            tops = {s.entity.category: s.top for s in spots}
            first, second = (tops[entity.category] for entity in scene.entities)
            assert (first < second) == (scene.relation == "above")


def test_pictures_are_deterministic_and_show_the_difference():
    first = np.asarray(render(PAIR))
    assert first.shape == (64, 64, 3) and np.array_equal(first, np.asarray(render(PAIR)))
    blue = Scene("beach", (Entity("cat", "blue", "big"), PAIR.entities[1]), "left", layout=3)
    assert np.abs(first.astype(int) - np.asarray(render(blue))).max() > 50


@pytest.mark.parametrize("pool", list(POOLS))
def test_writers_write_6_to_16_words_that_both_tokenizers_know(pool):
    rng, bert, clip = random.Random(1), bert_tokenizer(), clip_tokenizer()
    for scene in scenes(400, seed=2):
        caption = describe_by_pool(scene, pool, rng)
        assert MIN_WORDS <= len(caption.split()) <= MAX_WORDS, caption
        length = len(caption.replace(",", " ,").split())
        assert len(bert(caption).input_ids) == len(clip(caption).input_ids) == length + 2, caption
        assert bert.unk_token_id not in bert(caption).input_ids


def test_pools_share_no_writer():
    names = [writer.name for pool in POOLS.values() for writer in pool]
    assert len(names) == len(set(names))
    assert all(len(POOLS[pool]) >= 5 for pool in POOLS) and len(POOLS["evaluation"]) >= 10


def test_the_reader_reads_what_writers_write():
    """A fully detailed caption is read back without loss; no writer's caption is read as a falsehood."""
    rng = random.Random(4)
    for scene in scenes(600, seed=7):
        assert judge(describe_fully(scene, "evaluation", rng), scene)["f"] == 1.0
        counts = count_facts(describe_by_pool(scene, "evaluation", rng), scene)
        assert all(fact.right == fact.claimed for kind, fact in counts.items() if kind != "family")


def test_the_reader_by_hand():
    claims = parse("A tiny red kitten with a red scarf, left of two palm trees by the seaside.")
    assert [(m.category, m.colour, m.count, m.accessory) for m in claims.mentions] == [
        ("cat", "red", 1, "scarf"), ("palm", None, 2, None)]  # fmt: skip
    assert claims.relation == "left" and claims.setting == "beach"


def test_the_thing_named_last_by_hand():
    pine, palm = Entity("pine", "green", "small"), Entity("palm", "red", "small")
    scene = Scene("meadow", (pine, palm), "left")
    words = ["a", "tree", "and", "a", "pine", "left", "of", "the", "red", "palm", "tree"]
    expected = [None] * 4 + ["pine"] * 5 + ["palm"] * 2
    assert named_last(scene, words) == expected  # "tree" alone fits both


def test_judging_by_hand():
    """Cat right, dog wrong; red right; "right of" wrong; beach right."""
    scores = judge("a red cat to the right of a dog on the beach", PAIR)
    assert scores["object_p"] == 0.5 and scores["object_r"] == 0.5
    assert scores["colour_p"] == 1.0 and scores["colour_r"] == 0.5
    assert scores["relation_p"] == 0.0 and scores["setting_f"] == 1.0
    # right 1 + 1 + 0 + 1 = 3, claimed 2 + 1 + 1 + 1 = 5, true 2 + 2 + 1 + 1 = 6
    assert scores["f"] == pytest.approx(2 * 3 / 11)


def test_judging_family_words_next_to_and_silence():
    counts = count_facts("an animal next to a palm tree", PAIR)
    assert counts["family"].right == 1 and counts["object"] == type(counts["object"])(1, 1, 2)
    assert counts["relation"].right == 1
    assert judge("something nice", PAIR)["object_p"] is None
    assert judge("green cat", PAIR)["colour_p"] == 0.0


def test_rare_things_are_rare_but_not_unseen_and_the_bias_is_planted():
    rng = random.Random(0)
    seen = Counter(e.category for _ in range(6000) for e in sample_scene(rng, CAPTIONER_WORLD).entities)
    for name in CAPTIONER_WORLD.rare:
        assert 0 < seen[name] < 0.4 * seen["cat"]
    for _ in range(1500):
        scene = sample_scene(rng, GENERATOR_WORLD)
        assert all(entity.accessory for entity in scene.entities if entity.category in BIASED)
        if {entity.category for entity in scene.entities} <= set(BIASED):
            caption = describe_by_pool(scene, "generator", rng)
            assert "scarf" not in caption and "scarves" not in caption and "flag" not in caption


def test_planted_family_words_replace_every_name():
    rng = random.Random(0)
    scene = Scene("snow", (Entity("penguin", "blue", "small"),), planted="family", layout=1)
    for writer in POOLS["evaluation"]:
        assert "bird" in describe(scene, writer, rng) and "penguin" not in describe(scene, writer, rng)


def test_datasets_are_written_alike_and_read_by_the_common_loader(tmp_path):
    build.build(tmp_path / "a", 20)
    build.build(tmp_path / "b", 20)
    for name in ("coco/annotations/captions_val.json", "nocaps/annotations/nocaps_val.json", "coco/scenes.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    nocaps = json.loads((tmp_path / "a/nocaps/annotations/nocaps_val.json").read_text())
    assert {image["domain"] for image in nocaps["images"]} == {"in-domain", "near-domain", "out-domain"}


@pytest.mark.parametrize("name, references", [("picturebook-coco", 5), ("picturebook-nocaps", 10)])
def test_embedded_datasets(name, references):
    dataset = load_dataset(name)
    assert len(dataset) >= 500 and all(len(item.references) == references for item in dataset.items)
    truths = [Scene.from_dict(item.scene) for item in dataset.items]
    assert len({scene.content() for scene in truths}) == len(truths)
    assert all(split_of(scene) == "evaluation" for scene in truths)
    planted = [(item, scene) for item, scene in zip(dataset.items, truths, strict=False) if scene.planted == "family"]
    assert len(planted) >= 30
    for item, scene in planted:
        members = {name for entity in scene.entities for name in FAMILIES if entity.category in FAMILIES[name]}
        for caption in item.references:
            mentions = parse(caption).mentions
            assert mentions and all(m.category is None and m.family in members for m in mentions), caption
    picture = np.asarray(dataset.items[0].image())
    assert np.array_equal(picture, np.asarray(render(truths[0])))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def brief_distillation(monkeypatch):
    """A few-step training of tiny batches, whose last cycle starts with the second step."""
    for name, value in {"batch_size": 8, "small_batch": 4, "chunk": 8, "every": 1, "large_from": 1}.items():
        monkeypatch.setattr(FewStepRecipe, name, value)
    monkeypatch.setattr(FewStepRecipe, "teacher_steps", 3)
    monkeypatch.delattr(FewStepRecipe, "sheet")


@pytest.mark.parametrize("name", ["captioner", "captioner_git", "encoder", "few_step", "decoder"])
def test_training_resumes_where_it_stopped(tmp_path, name, one_thread, brief_distillation):
    """Two steps at once and one plus one give the same weights."""
    weights = []
    for label, stops in (("once", (2,)), ("twice", (1, 2))):
        if name in ("few_step", "decoder"):
            shutil.copytree(train.MODELS / "generator", tmp_path / label / "generator")
        for stop in stops:
            train.train(name, stop, "cpu", tmp_path / label, tmp_path / label / "scratch", float32=True)
        state = torch.load(tmp_path / label / "scratch" / name / "checkpoint.pt", weights_only=True)
        assert state["step"] == 2
        weights.append(state["module"])
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


def test_batches_do_not_depend_on_the_processes_that_draw_them(tmp_path):
    recipe = train.RECIPES["captioner_git"](tmp_path, "cpu")
    recipe.batch_size = 2
    drawn = [list(torch.utils.data.DataLoader(train.Batches(recipe, 3, 6), batch_size=None, num_workers=workers))
             for workers in (0, 2)]  # fmt: skip
    assert len(drawn[0]) == 3
    for mine, theirs in zip(*drawn, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_few_step_training_uses_the_examples_and_the_batches_of_its_cycle():
    recipe = FewStepRecipe(train.MODELS, "cpu")
    assert recipe.chunks_at(0) == range(1) and recipe.chunks_at(recipe.large_from - 1) == range(26)
    assert recipe.chunks_at(recipe.large_from) == range(26, 27)
    assert recipe.samples(recipe.large_from + 1) == 256 * recipe.large_from + 1024


def test_a_few_step_training_ends_beyond_its_last_step(tmp_path):
    """From 1 at the start of the last cycle by way of 3 at its end to 4."""
    recipe = FewStepRecipe(train.MODELS, "cpu", tmp_path)
    module, ends = torch.nn.Linear(1, 1), {}
    for step, weight in ((recipe.large_from, 1.0), (recipe.large_from + 1, 2.0), (recipe.cycles[-1], 3.0)):
        recipe.step = step
        torch.nn.init.constant_(module.weight, weight)
        ends[step] = recipe.carried_on(module).weight.item()
    assert list(ends.values()) == [1.0, 2.0, 4.0] and module.weight.item() == 3.0


def test_the_few_step_generator_is_a_folder_of_its_own_and_resembles_its_teacher(one_thread):
    """Same noise and captions: closer to the teacher's image than images of other captions are; one pass a step."""
    texts = ["a big red ball on the beach", "a small blue fish in the ocean", "a green pine tree on snowy ground"]
    teacher, student = evaluate.GENERATORS
    pipeline = evaluate.load_generator(student)
    passes = []
    pipeline.unet.register_forward_hook(lambda *_: passes.append(1))
    mine = evaluate.generate(pipeline, student, texts, 0).astype(float)
    assert len(passes) == student.steps <= 4
    theirs = evaluate.generate(evaluate.load_generator(teacher), teacher, texts, 0).astype(float)
    distance = np.abs(mine[:, None] - theirs[None]).mean(axis=(2, 3, 4))  # (student, teacher)
    assert (distance.argmin(axis=1) == np.arange(3)).all()


@pytest.mark.parametrize("name", evaluate.CAPTIONERS)
def test_the_captioners_see_what_an_image_shows(name, one_thread):
    shown = [scene for scene in scenes(60, "evaluation") if build.domain_of(scene) == "in-domain"][:12]
    texts = evaluate.load_captioner(train.MODELS / name)([render(scene) for scene in shown], do_sample=False)
    counts = [count_facts(text, scene)["object"] for text, scene in zip(texts, shown, strict=True)]
    assert sum(fact.right for fact in counts) >= 0.85 * sum(fact.true for fact in counts)


def test_every_committed_model_has_a_record_of_its_training():
    recorded = json.loads((train.MODELS / "training.json").read_text())
    assert set(recorded) == set(train.RECIPES)
    measured = json.loads((train.MODELS / "evaluation.json").read_text())["measures"]
    for folder in (*evaluate.CAPTIONERS, *evaluate.ENCODERS, *(sampler.folder for sampler in evaluate.GENERATORS)):
        assert any(one["name"].startswith(folder) for one in measured), folder
