"""One source at a time, in plain functions: what the explorer's page and the cells of notebook 00 call.

Candidates are a DataFrame, a row each: seed, caption, logprob, image (PIL, None: not yet), flagged, truncated,
similarity (by the preset's choice, NaN: not yet), second (cosine of the second encoder), dot and norms (product of
the encoder's embeddings e of the source and e′ of the reconstruction, and of their norms), then scores. In image
reconstruction the caption is the candidate and the image its reconstruction, in text reconstruction the reverse.
Seeds and similarities are those of ``lib.roundtrip``: a source of a dataset has the same rows here as in a run.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lib import ranking
from lib.base import UserError
from lib.data import Item, decode_image, load_dataset
from lib.metrics import References, score_captions, score_semantics
from lib.models import Images, Models, load_captioner, load_encoder, load_generator, unknown_words
from lib.presets import ModelSettings, Preset
from lib.roundtrip.run import Run, runs_root
from lib.roundtrip.steps import candidate_seeds, caption_candidates, clip_scores, noise_seeds, similarities, source_text

OWN = "own"  # the dataset that own images and texts belong to, in seeds
NEW = {"seed": 0, "caption": "", "logprob": np.nan, "image": None, "flagged": False, "truncated": False,
       "similarity": np.nan, "second": np.nan, "dot": np.nan, "norms": np.nan}  # a candidate of which nothing is known yet
QUICK_SCORES = ("bleu4", "cider", "rouge_l")  # METEOR and SPICE take seconds: runs have them
dataset = lru_cache(maxsize=6)(load_dataset)


@dataclass(frozen=True)
class Given(Item):
    """A source that lies in no dataset: an image in memory or a typed text."""

    pixels: Image.Image | None = field(default=None, compare=False)

    def image(self) -> Image.Image:
        """Return the image in RGB."""
        return self.pixels


def uploaded(content: bytes, name: str, captions: Sequence[str] = ()) -> Given:
    """Return an image file's bytes as a source; UserError if they are no image. Its id is their hash."""
    return Given(hashlib.sha256(content).hexdigest()[:12], None, tuple(captions), pixels=decode_image(content, name))


def typed(text: str) -> Given:
    """Return a typed text as a source; UserError if it is empty."""
    words = " ".join(text.split())
    if not words:
        raise UserError("the text is empty: type one first")
    return Given(hashlib.sha256(words.encode()).hexdigest()[:12], None, (words,))


def is_here(name: str) -> bool:
    """Return whether a dataset is on this machine."""
    with suppress(UserError):
        return bool(dataset(name).items)
    return False


@lru_cache(maxsize=8)
def _model(load: Callable[[Any], Any], kind: type[ModelSettings], settings: str) -> Any:
    return load(kind.model_validate_json(settings))


def models_for(preset: Preset) -> Models:
    """Return a preset's models; those with equal settings are loaded once, however they decode."""
    parts = ((load_captioner, preset.captioner), (load_generator, preset.generator), (load_encoder, preset.encoder),
             (load_encoder, preset.second_encoder))
    return Models(*(part and _model(load, type(part), part.model_dump_json(exclude={"sender", "receiver"}))
                    for load, part in parts))


@dataclass(frozen=True)
class Trip:
    """One source, one direction ("image" or "text"), and all else that decides what comes out."""

    source: Item
    task: str
    preset: Preset
    dataset: str = OWN
    n_candidates: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task == "image" and self.image is None:
            raise UserError("this source is a text: choose text reconstruction")
        if self.task == "text" and not self.source.references:
            raise UserError("this image has no caption to start from: choose image reconstruction, or type a text")

    @property
    def text(self) -> str:
        """The text that text reconstruction starts from; empty in image reconstruction."""
        return source_text(self.source, self.dataset, self.seed) if self.task == "text" else ""

    @property
    def image(self) -> Image.Image | None:
        """The source's image, if it has one."""
        return self.source.image() if self.source.path or getattr(self.source, "pixels", None) else None


def reconstruct(trip: Trip, models: Models) -> Iterator[pd.DataFrame]:
    """Yield the candidates each time one more is finished; before the first, all as far as they are known."""
    _check_words(trip.text, models)
    size, sender = (trip.dataset, [trip.source], trip.n_candidates, trip.seed), trip.preset.captioner.sender
    if trip.task == "image":
        seeds, noise = candidate_seeds("caption", *size), noise_seeds(trip.preset, *size)[0]
        captions = caption_candidates(models.captioner, [trip.image], seeds, sender)
        made = [NEW | {"seed": seed, "caption": caption.text, "logprob": caption.logprob}
                for seed, caption in zip(seeds[0], captions.itertuples(), strict=True)]
    else:
        noise = candidate_seeds("noise", *size)[0]
        made = [NEW | {"seed": seed} for seed in noise]
    yield pd.DataFrame(made)
    for k, one in enumerate(made):
        one |= _drawn(one["caption"] or trip.text, noise[k], models)
        if trip.task == "text":
            seed = candidate_seeds("receiver", *size)[0][k]
            caption = caption_candidates(models.captioner, [one["image"]], [[seed]], trip.preset.captioner.receiver)
            one |= {"caption": caption["text"][0], "logprob": caption["logprob"][0]}
        one |= _compared(trip, one, models)
        yield pd.DataFrame(made)


def _check_words(text: str, models: Models) -> None:
    """Raise UserError that names the words of a text which a model with a small vocabulary does not know."""
    words = dict.fromkeys(unknown_words(models.generator, text) + unknown_words(models.encoder, text))
    if words:
        raise UserError(f"these models do not know: {', '.join(words)}. Use other words, or one of the examples")


def _drawn(text: str, noise: int, models: Models) -> dict[str, Any]:
    """What the generator makes of a text."""
    images = Images.of(models.generator.generate([text], [noise]))
    return {"image": Image.fromarray(images.pixels[0]), "flagged": bool(images.flagged[0]),
            "truncated": bool(images.truncated[0])}


def _embeddings(trip: Trip, candidate: Any, encoder: Any) -> tuple[np.ndarray, np.ndarray]:
    """Raw embeddings, each (1, d), of the source and of a candidate's reconstruction."""
    if trip.task == "image":
        return encoder.embed_images([trip.image]), encoder.embed_images([candidate["image"]])
    return encoder.embed_texts([trip.text]), encoder.embed_texts([candidate["caption"]])


def _compared(trip: Trip, candidate: Any, models: Models) -> dict[str, float]:
    """A candidate's similarities; an image that the safety checker withheld has none."""
    if candidate["flagged"]:
        return {}
    second = models.second_encoder if getattr(models.second_encoder, f"reads_{trip.task}s", True) else None
    pair = _embeddings(trip, candidate, models.encoder)
    found = similarities(trip.preset, *pair, second and _embeddings(trip, candidate, second))
    return {"similarity": found["similarity"][0], "second": np.ravel(found["similarity_second"])[0],
            "dot": np.vdot(*pair), "norms": np.linalg.norm(pair[0]) * np.linalg.norm(pair[1])}


def own_caption(trip: Trip, text: str, models: Models) -> pd.DataFrame:
    """Return what a caption by hand leads to, one row, from the noise of the first candidate."""
    if trip.task != "image":
        raise UserError("a caption of your own needs a source image: choose image reconstruction")
    words = typed(text).references[0]
    _check_words(words, models)
    noise = noise_seeds(trip.preset, trip.dataset, [trip.source], 1, trip.seed)[0][0]
    one = NEW | {"seed": noise, "caption": words} | _drawn(words, noise, models)
    return pd.DataFrame([one | _compared(trip, one, models)])


def ranked(made: pd.DataFrame) -> pd.DataFrame:
    """Return candidates from the most to the least similar; those without similarity come last."""
    return made.sort_values("similarity", ascending=False, kind="stable", na_position="last")


def chain(trip: Trip, rounds: int, models: Models) -> Iterator[pd.DataFrame]:
    """Yield the rounds so far, a row each: the selected candidate, which is the next round's source.

    Column first: its similarity to the first source. Ends early where the safety checker withheld all images.
    """
    first, found = trip, []
    for number in range(1, rounds + 1):
        *_, made = reconstruct(trip, models)
        best = ranked(scored(first, made, models, None)).iloc[0]
        if best["flagged"]:
            return
        found.append(best.to_dict() | {"first": _compared(first, best, models)["similarity"]})
        yield pd.DataFrame(found)
        source = ({"references": (best["caption"],)} if trip.task == "text" else {"pixels": best["image"]})
        trip = replace(trip, source=Given(f"{first.source.id}~{number}", None, **source))


def scored(trip: Trip, made: pd.DataFrame, models: Models, home: str | None) -> pd.DataFrame:
    """Return candidates with scores of their captions, or of their images in text reconstruction, as far as can be.

    home: the dataset whose document frequencies count, an own image borrows them; None: no scores by references.
    """
    usable, scores, encoder = made[~made["flagged"]], {}, models.encoder
    captions = usable["caption"].tolist()
    if trip.image is None or usable.empty or not getattr(encoder, "reads_images", True):
        return made
    image = np.repeat(encoder.embed_images([trip.image]), len(usable), axis=0)
    if trip.task == "text":
        scores["clip_score"] = ranking.cosine(image, encoder.embed_images(usable["image"].tolist()))
    else:
        if trip.source.references and home:
            references = References.build({**dataset(home).references, trip.source.id: trip.source.references})
            scores |= score_captions([trip.source.id] * len(captions), captions, references, QUICK_SCORES).items()
        scores |= clip_scores(encoder, trip.preset.encoder.prompt, image[:1], captions, [0] * len(captions), [trip.source])
    if trip.source.scene:
        scores["sem_f"] = score_semantics(captions, [trip.source.scene] * len(captions))["sem_f"]
    table = pd.DataFrame({name: np.asarray(values) for name, values in scores.items()}, index=usable.index)
    return made.join(table.dropna(axis=1, how="all"))


def finished_runs(names: Sequence[str]) -> dict[str, Run]:
    """Return the finished runs over datasets of those names, by the runs' names, newest first."""
    homes, found = {dataset(name).name: dataset(name) for name in names}, {}
    for path in sorted(runs_root().glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        info = json.loads(path.read_text(encoding="utf-8"))
        if "counts" in info and info["dataset"]["name"] in homes:
            found[path.parent.name] = Run(Preset.model_validate(info["preset"]), homes[info["dataset"]["name"]],
                                          info["task"], info["n_candidates"], info["seed"], path.parent)
    return found


def stored(run: Run, rows: pd.DataFrame) -> tuple[Trip, pd.DataFrame]:
    """Return a source of a finished run and its candidates, from the run's rows of that source and its images."""
    first = rows.iloc[0]
    trip = Trip(run.dataset.by_id()[first["item"]], run.task, run.preset, run.dataset.name, len(rows), run.seed)
    caption, image = ("message", "reconstruction") if run.task == "image" else ("reconstruction", "message")
    made = rows.assign(caption=rows[caption], image=[run.image(name) for name in rows[image]],
                       second=rows["similarity_second"])
    return trip, made.reset_index(drop=True)
