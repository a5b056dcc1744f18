"""Noise is a fixed stream per seed: these numbers are a promise to every picture ever made."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.sampling.noise import sample_noise

# First and last values of numpy.random.Generator(Philox(seed)).standard_normal((4, 2, 2), dtype=float32).
STREAM = {
    0: ("-0x1.fc5f920000000p-3", "-0x1.b68d000000000p-6", "-0x1.f1c5440000000p+0", "0x1.0c957c0000000p-1"),
    1: ("0x1.c4d1e60000000p-2", "-0x1.115d780000000p-3", "-0x1.0ebbce0000000p-2", "-0x1.8142c80000000p-3"),
    12345: ("-0x1.ec39720000000p-1", "0x1.beb1580000000p-1", "-0x1.50cf6a0000000p-2", "0x1.5d11ac0000000p+0"),
    2**63 - 1: ("0x1.c0d04e0000000p-3", "-0x1.9f0b160000000p-5", "-0x1.70f0920000000p+0", "0x1.49ca140000000p+0"),
}


@pytest.mark.parametrize("seed", list(STREAM))
def test_the_stream_of_a_seed(seed: int) -> None:
    noise = sample_noise([seed], (4, 2, 2))
    assert noise.dtype == np.float32
    assert noise.shape == (1, 4, 2, 2)
    assert [float(value).hex() for value in noise.ravel()[:4]] == list(STREAM[seed])


def test_a_stream_is_the_same_in_every_batch_and_place() -> None:
    alone = {seed: sample_noise([seed], (4, 8, 8))[0] for seed in (3, 4, 5)}
    for seeds in ([3, 4, 5], [5, 3], [4, 4]):
        for found, seed in zip(sample_noise(seeds, (4, 8, 8)), seeds, strict=True):
            np.testing.assert_array_equal(found, alone[seed])


def test_seeds_differ_and_are_standard_normal() -> None:
    noise = sample_noise(range(64), (4, 16, 16))
    correlation = np.corrcoef(noise.reshape(64, -1))
    assert np.abs(correlation - np.eye(64)).max() < 0.2
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)
