"""Decoding: exact distributions, filters on hand-worked cases, rows that never depend on others."""

from __future__ import annotations

import math

import pytest
import torch

from lib.models.sampling import RowSampler, gumbel_noise, keep_nucleus, keep_top_k
from lib.presets import Decoding

CPU = torch.device("cpu")


def draw(probabilities, decoding, n=20000):
    """Draw one token n times, each with its own seed; return the frequencies."""
    logits = torch.log(torch.tensor(probabilities)).expand(n, -1).clone()
    sampler = RowSampler(decoding, [7919 * i + 3 for i in range(n)], [99], CPU)
    scores = sampler(torch.zeros(n, 0, dtype=torch.long), logits)
    chosen = scores.argmax(-1)
    assert torch.isfinite(scores).sum(-1).eq(1).all()  # one possible token is left
    return torch.bincount(chosen, minlength=len(probabilities)) / n, sampler, chosen


def test_gumbel_noise_has_the_gumbel_distribution():
    noise = gumbel_noise(torch.arange(400), step=3, n_tokens=500).flatten()
    assert abs(noise.mean().item() - 0.5772) < 0.01  # Euler's constant
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02
    quantiles = torch.quantile(torch.exp(-torch.exp(-noise))[:100000],
                               torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert torch.allclose(quantiles, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), atol=0.01)
    # close seeds, steps and tokens give unrelated numbers
    grid = gumbel_noise(torch.arange(300), 0, 300)
    assert abs(torch.corrcoef(torch.stack([grid[0], grid[1]]))[0, 1]) < 0.2
    assert abs(torch.corrcoef(torch.stack([grid[0], gumbel_noise(torch.arange(1), 1, 300)[0]]))[0, 1]) < 0.2


def test_noise_depends_on_seed_step_and_token_alone():
    seeds = torch.tensor([5, 2**62 + 11, 5])
    noise = gumbel_noise(seeds, 4, 50)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1], gumbel_noise(seeds[1:2], 4, 50)[0])
    assert torch.equal(noise[0, :20], gumbel_noise(seeds[:1], 4, 20)[0])


def test_nucleus_keeps_the_smallest_sufficient_set():
    logprobs = torch.log(torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.97, 0.01, 0.01, 0.01]]))
    kept = torch.isfinite(keep_nucleus(logprobs, 0.7))
    assert kept.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert torch.isfinite(keep_nucleus(logprobs, 0.8)).tolist()[0] == [False, True, True, True]
    assert torch.isfinite(keep_nucleus(logprobs, 1e-9)).sum().item() == 2  # the best always stays
    assert torch.isfinite(keep_nucleus(logprobs, 1.0)).all()


def test_top_k_keeps_exactly_k():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert torch.isfinite(keep_top_k(scores, 1)).tolist() == [[False, True, False, False]]
    assert torch.isfinite(keep_top_k(scores, 3)).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(("decoding", "expected"), [
    (Decoding(strategy="nucleus", p=0.7), [0, 2 / 3, 1 / 3, 0]),
    (Decoding(strategy="nucleus", p=1.0), [0.1, 0.5, 0.25, 0.15]),
    (Decoding(strategy="top_k", k=3), [0, 5 / 9, 2.5 / 9, 1.5 / 9]),
    (Decoding(strategy="nucleus", p=1.0, temperature=0.5), [1 / 34.5, 25 / 34.5, 6.25 / 34.5, 2.25 / 34.5]),
])
def test_sampling_draws_the_filtered_distribution(decoding, expected):
    frequencies, sampler, chosen = draw([0.1, 0.5, 0.25, 0.15], decoding)
    assert torch.allclose(frequencies, torch.tensor(expected), atol=0.015)
    # the log-probability is that of the full distribution, whatever the filter did
    full = torch.log(torch.tensor([0.1, 0.5, 0.25, 0.15]))[chosen]
    assert torch.allclose(sampler.logprob, full, atol=1e-5)


def test_repetition_penalty_by_hand():
    sampler = RowSampler(Decoding(strategy="greedy", repetition_penalty=2), [0, 0], [99], CPU)
    scores = torch.tensor([[2.0, -1.0, 1.5], [-1.0, -1.5, -1.6]])
    assert sampler(torch.tensor([[0, 1, 0], [0, 0, 0]]), scores).argmax(1).tolist() == [2, 1]  # halved, doubled below 0


def test_end_token_stops_the_count_and_waits_for_the_minimum():
    end, decoding = 2, Decoding(strategy="greedy", min_tokens=1, max_tokens=5)
    sampler = RowSampler(decoding, [0], [end], CPU)
    logits = torch.log(torch.tensor([[0.1, 0.3, 0.6]]))
    ids = torch.zeros(1, 0, dtype=torch.long)
    assert sampler(ids, logits).argmax().item() == 1  # the end is not allowed yet
    assert sampler(ids, logits).argmax().item() == end
    sampler(ids, logits)  # a finished row adds nothing
    assert sampler.n_tokens.tolist() == [1]
    assert sampler.logprob.item() == pytest.approx(math.log(0.3) + math.log(0.6), abs=1e-5)
