"""Loading weights quietly, and the checks for what would give nonsense without an error."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lib.base import UserError
from lib.models.device import is_out_of_memory


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and warnings of the two libraries."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    before = [(of, of.get_verbosity(), of.is_progress_bar_enabled()) for of in (of_diffusers, of_transformers)]
    for library, _, _ in before:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bar in before:
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


@contextlib.contextmanager
def loading(model_id: str) -> Iterator[None]:
    """Load quietly; whatever goes wrong is one UserError."""
    try:
        with quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # OSError, KeyError, RuntimeError, SafetensorError ...
        said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]
        remedy = "check its files and the preset's adapter"
        if is_out_of_memory(error):
            remedy = "out of memory, set a half-precision dtype or choose another device with COMPENDIUM_DEVICE"
        elif "tiktoken" in str(error) or "sentencepiece" in str(error).lower():
            remedy = "its tokenizer needs the package sentencepiece: pip install sentencepiece"
        raise UserError(f"model {model_id} cannot be loaded ({said}): {remedy}") from error


def load_transformer(model_class: Any, model: Any) -> Any:
    """Return the weights in ``model.folder`` as a transformers class, for inference.

    Raises UserError for an architecture that is not among ``model.model_types``, and for missing weights.
    """
    settings, folder = model.settings, model.folder
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model.model_types and found not in model.model_types:
        raise UserError(f"model {settings.id} is of type {found!r}, its adapter needs "
                        f"{' or '.join(model.model_types)}: change the adapter or the id in the preset")
    extra = {} if settings.attention == "auto" else {"attn_implementation": settings.attention}
    loaded, info = model_class.from_pretrained(
        folder, dtype=model.dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False,
        output_loading_info=True, **extra)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model {settings.id} lacks {len(missing)} weights of {model_class.__name__} (such as "
                        f"{missing[0]}): wrong or damaged checkpoint")
    return loaded.to(model.device).eval().requires_grad_(False)


def load_processor(processor_class: Any, folder: Path) -> Any:
    """Return a processor or image processor; the PIL backend gives the same pixels on every machine."""
    return processor_class.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)


def check_tokenizer(tokenizer: Any, n_embeddings: int, model_id: str) -> None:
    """Raise UserError where a tokenizer has no words, cannot reach them, or has ids that the model lacks."""
    vocabulary = tokenizer.get_vocab()
    if len(set(vocabulary.values()) - set(tokenizer.all_special_ids)) < 2:
        raise UserError(f"model {model_id} has a tokenizer without a vocabulary, every text would be the same to it: "
                        "add its tokenizer.json (or vocab.json and merges.txt)")
    token, highest = max(vocabulary.items(), key=lambda pair: pair[1])
    if highest >= n_embeddings:
        raise UserError(f"model {model_id} embeds {n_embeddings} tokens, its tokenizer has {token!r} as number "
                        f"{highest}: it belongs to another model, use the model's own tokenizer files")
    # At least one of many whole words must come back as its own token.
    whole = (match for token in vocabulary if (match := re.fullmatch(r"([▁Ġ]?)([a-z]{3,})(</w>)?", token)))
    tried = list(itertools.islice(whole, 500))
    if tried and not any(tokenizer.tokenize((" " if m[1] == "Ġ" else "") + m[2]) == [m[0]] for m in tried):
        raise UserError(f"model {model_id} has a tokenizer that never uses the words of its vocabulary: add its "
                        "merges.txt or tokenizer.json")


def check_end_token(used: int | None, tokenizer: Any, model_id: str, name: str = "eos_token_id") -> None:
    """Raise UserError where a model's end token is not its tokenizer's."""
    if used != getattr(tokenizer, name):
        raise UserError(f"model {model_id} takes token {used} for the end of a text, its tokenizer's is "
                        f"{getattr(tokenizer, name)}: set {name} in its config.json, or use the model's own tokenizer")


def check_clip_text(config: Any, tokenizer: Any, model_id: str) -> None:
    """Raise UserError where a CLIP text tower and its tokenizer do not fit."""
    check_tokenizer(tokenizer, config.vocab_size, model_id)
    # Where old configurations state 2, transformers takes the token with the highest number in a text.
    old = config.eos_token_id == 2
    check_end_token(max(tokenizer.get_vocab().values()) if old else config.eos_token_id, tokenizer, model_id)


def finite(values: Any, what: str, remedy: str) -> None:
    """Raise UserError where a model overflowed: it must not pass for one that works badly."""
    if not bool(torch.isfinite(torch.as_tensor(values)).all()):
        raise UserError(f"{what} gave numbers that are not finite: {remedy}")
