"""experiments/doctor.py: one screen of facts, and sizes that agree with arrays."""

import pytest

from experiments import doctor
from longlive_jax.config import TINY, WAN_5B, ConfigError
from longlive_jax.tree import count
from tests.programs import shell


def test_one_screen_without_a_gpu(capsys):
    assert doctor.main(["--models=tiny"]) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and all(len(line) <= 200 for line in lines)
    text = "\n".join(lines)
    assert "(cpu)" in text and "attention by xla: cuDNN needs an NVIDIA GPU" in text and "bundled: " in text and "libx264" in text
    assert "fp8 product    emulated, same numbers and no faster: native needs an Ada, Hopper or later GPU" in text


def test_sizes_are_those_of_the_arrays():
    lines = "\n".join(doctor.fits("wan_5b", 80e9))
    assert f"weights    bf16 {2 * count(shell(WAN_5B.transformer, 'bfloat16')) / doctor.GIB:.2f}, FP8" in lines
    assert "0.302 a latent frame, 9.67 for the window of 32" in lines  # 30 layers, keys and values of 880 tokens x 3072 in two bytes
    assert "bf16       fits with: transformer alone window 128; with the decoder on the same device window 128" in lines
    assert "carry 3.00; weights, carry and one step about 10.2" in lines  # compiled for an H100: 9.95, and the encoder's weights of 0.28


def test_what_does_not_fit_is_said():
    assert "transformer alone does not fit" in "\n".join(doctor.fits("tiny", 1e6))
    assert not doctor.possible(TINY.stream, 3) and doctor.possible(TINY.stream, 16)


def test_bad_options():
    with pytest.raises(ConfigError, match="must be positive"):
        doctor.main(["--bytes=-1"])
    with pytest.raises(ConfigError, match="unknown preset 'wan'"):
        list(doctor.report(["wan"]))
