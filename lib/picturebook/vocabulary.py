"""The tokenizers of the mini models: every word of the picture book is one token."""

from __future__ import annotations

from itertools import pairwise

from transformers import BertTokenizer, CLIPTokenizer

from lib.picturebook import lexicon

MAX_TOKENS = 32
GLUE = ("a", "an", "the", "there", "is", "are", "and", "with", "of", "picture", "scarf", "scarves", "flag", "flags",
        ",", ".")  # fmt: skip


def words() -> list[str]:
    """Every word that a writer can use, sorted."""
    tables = (lexicon.COLOUR_WORDS, lexicon.SIZE_WORDS, lexicon.COUNT_WORDS, lexicon.SETTING_PHRASES,
              lexicon.RELATION_PHRASES, lexicon.POSTURES)  # fmt: skip
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    for table in (lexicon.NOUNS, lexicon.FAMILY_NOUNS):
        phrases += [form for options in table.values() for forms in options for form in forms]
    return sorted({word for phrase in phrases for word in phrase.split()} | set(GLUE))


def bert_tokenizer() -> BertTokenizer:
    """The captioner's tokenizer; a caption is `[DEC] w1 ... wn [SEP]`, as BLIP wants it."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *words()]
    ids = {token: index for index, token in enumerate(tokens)}
    return BertTokenizer(vocab=ids, bos_token="[DEC]", model_max_length=MAX_TOKENS)


def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the generator's text encoder and of the encoders: byte-pair merges that rebuild each word.

    Merges are added word by word until the pairs known so far leave one symbol; an unknown word falls into letters.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words():
        while len(symbols := _apply_merges(word, ranks)) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
    letters = sorted({letter for word in words() for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokens = list(dict.fromkeys([*tokens, *(left + right for left, right in ranks)]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(ranks), model_max_length=MAX_TOKENS)


def _apply_merges(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    symbols = [*word[:-1], word[-1] + "</w>"]
    while len(symbols) > 1:
        rank, index = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            break
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
    return symbols
