"""Decoding that keeps the repeatability contract: every row draws its own noise.

Top-p (or top-k) filtering, then Gumbel noise and an arg max, is an exact sample from the filtered distribution (the
Gumbel-max trick), and the noise is a pure function of (row seed, step, token). So a caption depends on batch, order
and device no more than the model's own logits do.
"""

import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from lib.presets import Decoding

# SplitMix64 (Steele, Lea and Flood, 2014): its increment 0x9E3779B97F4A7C15 and its two multipliers, as the signed
# numbers that torch computes with, modulo 2**64.
_INCREMENT = -7046029254386353131
_MULTIPLIERS = -4658895280553007687, -7723592293110705685


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit numbers that scatters close inputs."""
    for bits, multiplier in zip((30, 27, 31), (*_MULTIPLIERS, 1), strict=True):
        shifted = (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: torch's own copies the sign bit
        x = (x ^ shifted) * multiplier
    return x


def gumbel_noise(seeds: torch.Tensor, step: int, n_tokens: int) -> torch.Tensor:
    """Return standard Gumbel noise, float64 (B, n_tokens), that depends on (row seed, step, token) alone.

    seeds: int64 (B,), each in [0, 2**63). Counter-based, unlike ``torch.Generator``: the same numbers on
    every device, and no host loop over rows at every step.
    """
    counts = torch.arange(1, max(n_tokens, step + 1) + 1, device=seeds.device)
    keys = _mix(seeds + _INCREMENT * counts[step])  # (B,)
    bits = (_mix(keys[:, None] + _INCREMENT * counts[:n_tokens]) >> 12) & ((1 << 52) - 1)  # (B, V), 52 random bits
    # The half keeps u strictly inside (0, 1): with 52 bits both ends are exact in float64.
    return -torch.log(-torch.log((bits.double() + 0.5) * 2.0**-52))


def keep_nucleus(logprobs: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches p; -inf elsewhere.

    logprobs (B, V), normalised. The most likely token always stays (Holtzman et al. 2020).
    """
    ordered, order = torch.sort(logprobs, dim=-1, descending=True, stable=True)
    probabilities = ordered.exp()
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens
    dropped = torch.zeros_like(logprobs, dtype=torch.bool).scatter(1, order, before >= p)
    return logprobs.masked_fill(dropped.scatter(1, order[:, :1], False), -math.inf)


def keep_top_k(logprobs: torch.Tensor, k: int) -> torch.Tensor:
    """Keep exactly the k most likely tokens of (B, V) (ties: the lower id); -inf elsewhere."""
    order = torch.sort(logprobs, dim=-1, descending=True, stable=True).indices
    return logprobs.scatter(1, order[:, k:], -math.inf)


class RowSampler(LogitsProcessor):
    """Chooses each row's next token and leaves it the only possible one, inside ``generate`` without beams.

    It adds up the log-probability of the chosen tokens (the end token included) under the model's full
    distribution: before repetition penalty, minimum length, temperature and filtering.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int], end_tokens: Sequence[int], device: torch.device) -> None:
        self.decoding, self._step = decoding, 0
        noise_device = torch.device("cpu") if device.type == "mps" else device  # Apple's MPS lacks float64
        self._seeds = torch.tensor(list(seeds), dtype=torch.int64, device=noise_device)
        self._end = torch.tensor(list(end_tokens), dtype=torch.int64, device=device)
        self._done = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        self.logprob = torch.zeros(len(seeds), dtype=torch.float32, device=device)
        self.n_tokens = torch.zeros(len(seeds), dtype=torch.int64, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids (B, L), scores (B, V) raw logits -> (B, V): 0 at the choice, -inf elsewhere."""
        full = torch.log_softmax(scores.float(), dim=-1)
        chosen = self._choose(input_ids, scores.float())  # (B, 1)
        alive = ~self._done
        self.logprob += torch.where(alive, full.gather(1, chosen).squeeze(1), 0.0)
        ended = torch.isin(chosen.squeeze(1), self._end)
        self.n_tokens += alive & ~ended
        self._done |= ended
        self._step += 1
        return torch.full_like(scores, -math.inf).scatter(1, chosen, 0.0)

    def _choose(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The next token of every row, (B, 1)."""
        decoding = self.decoding
        if decoding.repetition_penalty != 1.0 and input_ids.shape[1] > 0:
            scores = RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty)(input_ids, scores)  # paper 3.2
        if self._step < decoding.min_tokens:
            scores = scores.index_fill(1, self._end, -math.inf)
        if decoding.strategy == "greedy":
            return scores.argmax(-1, keepdim=True)
        logprobs = torch.log_softmax(scores / decoding.temperature, dim=-1)
        if decoding.strategy == "top_k":
            logprobs = keep_top_k(logprobs, min(decoding.k, logprobs.shape[1]))
        else:
            logprobs = keep_nucleus(logprobs, decoding.p)
        noise = gumbel_noise(self._seeds, self._step, logprobs.shape[1]).to(logprobs.device)
        return (logprobs.to(noise.dtype) + noise).argmax(-1, keepdim=True)
