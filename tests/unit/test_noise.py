import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd_scale.diffusion.noise import Noise, Stream, philox
from vmd_scale.errors import UserError


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    words = philox(np.array(counter, dtype=np.uint64)[:, None], key)
    assert words[:, 0].tolist() == list(expected)


def test_counters_are_independent_of_their_neighbours():
    counters = np.random.default_rng(0).integers(0, 2**32, (4, 50), dtype=np.uint64)
    together = philox(counters, (1, 2))
    apart = np.concatenate([philox(counters[:, i : i + 1], (1, 2)) for i in range(50)], axis=1)
    assert np.array_equal(together, apart)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.integers(0, 2**63 - 1),
    st.sampled_from(Stream),
    st.integers(0, 2**56 - 1),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8),
    st.integers(1, 7),
    st.sampled_from(["uniform", "normal"]),
)
def test_a_row_has_its_noise_whatever_it_is_batched_with(seed, stream, step, rows, width, kind):
    draw = getattr(Noise(seed), kind)
    together = draw(stream, step, torch.tensor(rows), (2, width))
    assert together.shape == (len(rows), 2, width)
    assert together.dtype == (torch.float64 if kind == "uniform" else torch.float32)
    for i, row in enumerate(rows):
        assert torch.equal(together[i], draw(stream, step, np.array([row]), (2, width))[0])
    backwards = draw(stream, step, torch.tensor(rows[::-1]), (2, width))
    assert torch.equal(together, backwards.flip(0))
    if kind == "uniform":
        assert bool(((together > 0) & (together < 1)).all())


def test_everything_in_the_name_of_a_number_matters():
    """Seeds, streams, steps and rows, each where only its low or only its high bits differ."""
    base = {"seed": 5, "stream": Stream.PATH, "step": 3, "row": 2}
    others = [{"seed": s} for s in (4, 5 + 2**32, 5 + 2**62)]
    others += [{"stream": s} for s in Stream if s != Stream.PATH]
    others += [{"step": s} for s in (2, 3 + 2**31, 3 + 2**32, 3 + 2**33, 3 + 2**40, 3 + 2**55)]
    others += [{"row": r} for r in (3, 2 + 2**16, 2 + 2**31)]
    values = []
    for other in [{}, *others]:
        name = {**base, **other}
        u = Noise(name["seed"]).uniform(name["stream"], name["step"], np.array([name["row"]]), (64,))
        values += u.flatten().tolist()
    assert len(set(values)) == 64 * (1 + len(others))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_pieces_and_threads_change_no_bit(monkeypatch, kind, threads):
    """Much noise is drawn in pieces, by several threads: each row is as if it were drawn alone."""
    monkeypatch.setattr("vmd_scale.diffusion.noise.PIECE", 40)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    rows = torch.tensor([5, 3, 2**31, 7, 0, 11, 12])
    for shape in ((4, 4), (4, 41), (0,)):
        together = getattr(Noise(9), kind)(Stream.LATENT, 1, rows, shape)
        assert together.is_contiguous()
        alone = [getattr(Noise(9), kind)(Stream.LATENT, 1, np.array([row]), shape) for row in rows]
        assert torch.equal(together, torch.cat(alone))


def test_the_noise_of_a_seed_is_that_of_every_version():
    """Or a run that was begun with another version could not go on: integers are exact, the rest is Box-Muller."""
    u = Noise(2**40 + 3).uniform(Stream.LATENT, 2**33 + 7, torch.arange(3, 40, 7), (65, 3))
    assert hashlib.sha256(u.numpy().astype("<f8").tobytes()).hexdigest()[:16] == "907de825766dbe52"
    x = Noise(2**40 + 3).normal(Stream.LATENT, 2**33 + 7, torch.arange(3, 40, 7), (65, 3))
    pairs = Noise(2**40 + 3).uniform(Stream.LATENT, 2**33 + 7, torch.arange(3, 40, 7), (98, 2)).numpy()
    radius, angle = np.sqrt(-2 * np.log(pairs[..., 0])), 2 * np.pi * pairs[..., 1]
    both = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).reshape(6, -1)[:, : 65 * 3]
    np.testing.assert_allclose(x.numpy().reshape(6, -1), both, rtol=1e-6, atol=1e-7)


def test_uniform_is_uniform_and_uncorrelated():
    n = 200_000
    u = Noise(11).uniform(Stream.SAMPLE_TOKEN, 9, torch.arange(n // 8), (8,))
    flat = u.flatten()
    for power in (1, 2, 3, 4):
        sigma = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / n)
        assert abs(flat.pow(power).mean().item() - 1 / (power + 1)) < 4 * sigma
    cells = torch.histc(flat, 64, 0, 1)
    chi2 = ((cells - n / 64) ** 2 / (n / 64)).sum().item()
    assert abs(chi2 - 63) < 4 * math.sqrt(2 * 63)
    correlation = torch.corrcoef(u.T) - torch.eye(8)  # between the elements of a row
    assert correlation.abs().max().item() < 4.5 / math.sqrt(n // 8)
    between_rows = torch.corrcoef(torch.stack((u[:-1].flatten(), u[1:].flatten())))[0, 1].item()
    assert abs(between_rows) < 4 / math.sqrt(n)
    # the low bits carry randomness too: 52 of them, not 32
    low = (flat * 2**32) % 1
    assert abs(low.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / n)


def test_uniform_stays_inside_for_the_extreme_words(monkeypatch):
    for word, expected in ((0, 2.0**-53), (0xFFFFFFFF, 1 - 2.0**-53)):
        monkeypatch.setattr("vmd_scale.diffusion.noise.philox", lambda c, k, w=word: np.full_like(c, w))
        assert Noise(0).uniform(Stream.TIME, 0, np.array([0]), (1,)).item() == expected
        assert bool(Noise(0).normal(Stream.TIME, 0, np.array([0]), (2,)).isfinite().all())


def test_normal_is_normal():
    n = 200_000
    x = Noise(12).normal(Stream.LATENT, 1, torch.arange(n // 5), (5,)).double()
    flat = x.flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(flat.pow(power).mean().item() - moment) < 4 * math.sqrt(variance / n)
    correlation = torch.corrcoef(x.T) - torch.eye(5)
    assert correlation.abs().max().item() < 4.5 / math.sqrt(n // 5)
    squares = torch.corrcoef(x.T.square()) - torch.eye(5)  # Box-Muller pairs share a radius and are independent still
    assert squares.abs().max().item() < 4.5 / math.sqrt(n // 5)


def test_integer_is_one_of_the_stream():
    values = [Noise(s).integer(Stream.SAMPLE_TOKEN, step, row) for s in (0, 1) for step in (0, 1) for row in (0, 1)]
    assert len(set(values)) == 8
    assert all(isinstance(v, int) and 0 <= v < 2**52 for v in values)
    u = Noise(1).uniform(Stream.SAMPLE_TOKEN, 1, np.array([1]), (1,)).item()
    assert abs(values[-1] / 2**52 - u) < 2**-51


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(UserError, match=f"seed {seed}: allowed"):
        Noise(seed)
