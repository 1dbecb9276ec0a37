import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from maehpc import keys
from maehpc.explain.noise import NoiseKey, philox, uniform

KEY = NoiseKey(7, "retinamnist")
WORD = st.integers(0, 2**32 - 1)


def naive_philox(counter, key):
    """Philox4x32-10, one counter at a time, in Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def torch_philox(counter, key):
    return [int(word) for word in philox(tuple(torch.tensor([word]) for word in counter), key)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    assert torch_philox(counter, key) == list(expected)
    assert naive_philox(counter, key) == list(expected)


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_equals_python_integers(counter, key):
    assert torch_philox(counter, key) == naive_philox(counter, key)


def test_every_element_is_its_own_counter():
    index, sample, radius = 2**33 + 5, 3, 0.02
    noise = uniform(KEY, torch.tensor([0, index]), sample, (3, 5, 3), radius, "cpu")[1].flatten()
    derived = keys.derive(KEY.seed, "explanation noise", KEY.dataset)
    key = (derived % 2**32, derived // 2**32)
    for element in range(45):
        word = naive_philox((element // 4, sample, index % 2**32, index // 2**32), key)[element % 4]
        centred = np.float32((word // 2**8 - 2**23) / 2**23)
        assert noise[element].item() == centred * np.float32(radius)


def test_an_image_has_its_noise_whatever_stands_beside_it():
    indices = torch.tensor([9, 0, 4])
    together = uniform(KEY, indices, 1, (3, 8, 8), 0.1, "cpu")
    assert together.shape == (3, 3, 8, 8)
    assert together.dtype == torch.float32
    for row, index in enumerate(indices):
        assert torch.equal(together[row], uniform(KEY, index[None], 1, (3, 8, 8), 0.1, "cpu")[0])


@pytest.mark.parametrize(
    ("key", "index", "sample"),
    [
        (NoiseKey(8, "retinamnist"), 4, 1),
        (NoiseKey(7, "breastmnist"), 4, 1),
        (KEY, 5, 1),
        (KEY, 4 + 2**32, 1),
        (KEY, 4, 2),
        (KEY, 1, 4),
    ],
)
def test_any_part_of_the_name_changes_the_draw(key, index, sample):
    shape = (1, 40, 40)
    one = uniform(KEY, torch.tensor([4]), 1, shape, 1.0, "cpu").flatten().numpy()
    other = uniform(key, torch.tensor([index]), sample, shape, 1.0, "cpu").flatten().numpy()
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
    assert np.mean(one == other) < 0.01


@given(radius=st.floats(2**-60, 2**60, width=32), seed=st.integers(0, 2**63 - 1))
def test_stays_in_the_half_open_ball(radius, seed):
    noise = uniform(NoiseKey(seed, "digits"), torch.arange(3), 0, (1, 9, 9), radius, "cpu")
    assert noise.min().item() >= -radius
    assert noise.max().item() < radius


def test_is_uniform_and_neighbours_are_independent():
    noise = uniform(KEY, torch.arange(20), 0, (3, 60, 60), 0.02, "cpu").flatten(1).numpy() / 0.02
    assert stats.kstest(noise.flatten(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    for first, second in [(noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:]), (noise[:, :-4], noise[:, 4:])]:
        table = np.histogram2d(first.flatten(), second.flatten(), bins=16)[0]
        assert stats.chisquare(table.flatten()).pvalue > 1e-3
