"""The references of a dataset, made ready once: tokens, document frequencies, scene graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lib.base import UserError
from lib.metrics import spice_spacy
from lib.metrics.cider import Frequencies
from lib.metrics.java import tokenize
from lib.metrics.scene_graph import Fact, merge

Tokens = tuple[str, ...]


@dataclass
class References:
    """PTB tokens of reference captions by image, with what CIDEr and SPICE make of them; see :meth:`build`."""

    tokens: dict[str, Tokens]
    dropped: list[str]  # "image 7: '...'" of each reference without a word
    borrowed: Frequencies | None = None
    _scenes: dict[Tokens, list[Fact]] = field(default_factory=dict)

    @classmethod
    def build(
        cls, references: Mapping[str, Sequence[str]], frequencies: Frequencies | None = None
    ) -> References:  # fmt: skip
        """Return the references of {image id: captions}, those without a word dropped and listed in ``dropped``.

        Document frequencies are those of all images given here that have a reference, or another dataset's
        (``frequencies=other.frequencies``: for a few images of your own). Raises UserError without any image or Java.
        """
        if not references:
            raise UserError("references: there is no image; give {id: [captions]}")
        for item, captions in references.items():
            if isinstance(captions, str):
                raise UserError(f"references of {item!r}: expected a list of captions, not one text")
        tokens = tokenize(caption for captions in references.values() for caption in captions)
        dropped = [f"image {item}: {c!r}" for item, captions in references.items() for c in captions if not tokens[c]]
        known = {str(item): tuple(tokens[c] for c in captions if tokens[c]) for item, captions in references.items()}
        return cls(known, dropped, frequencies)

    @cached_property
    def frequencies(self) -> Frequencies:
        """In how many images each n-gram stands."""
        return self.borrowed or Frequencies.count(filter(None, self.tokens.values()))

    def scenes(self, groups: Iterable[Tokens], graphs: Mapping[str, object]) -> Mapping[Tokens, list[Fact]]:
        """Return the merged scene graph of each group of references; ``graphs`` has those of the new groups."""
        for group in set(groups) - self._scenes.keys():
            self._scenes[group] = merge(graphs[caption] for caption in group if graphs[caption] is not None)
        return self._scenes

    def new_captions(self, groups: Iterable[Tokens]) -> set[str]:
        """Return the reference captions whose scene graphs are still needed for these groups."""
        return {caption for group in set(groups) - self._scenes.keys() for caption in group}
