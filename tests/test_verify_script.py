"""experiments/verify.py on an untrained model: what the report holds, and what it finds wrong."""

import json
import sys

import numpy as np
import pytest

from experiments import random_checkpoint, verify
from experiments.convert import convert
from longlive_jax.config import TINY, ConfigError
from longlive_jax.convert.writers import write_safetensors
from longlive_jax.streaming.writer import probe


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    random_checkpoint.write("wan", folder / "wan", TINY)
    convert([str(folder / "wan")], folder / "b", model="tiny")
    return folder


def test_statistics():
    x = np.array([[1.0, -3.0, 0.0], [np.nan, np.inf, 4.0]], np.float32)
    found = verify.statistics(x)
    assert (found["nonfinite"], found["zeros"], found["min"], found["max"], found["mean"]) == (2, 1, -3.0, 4.0, 0.5)
    assert found["std"] == pytest.approx(np.std([1, -3, 0, 4])) and found["shape"] == [2, 3] and len(found["sha256"]) == 64
    assert "mean" not in verify.statistics(np.full(3, np.nan, np.float32)) and verify.statistics(np.zeros((0, 2)))["nonfinite"] == 0


def test_the_whole_report(bundle, tmp_path, capsys):
    assert verify.main([str(bundle / "b"), f"--out={tmp_path}", "--chunks=2", "--steps=2", "--sources", str(bundle / "wan")]) == 0
    report = json.loads((tmp_path / "verify.json").read_text())
    assert len(report["tensors"]) == 69 + 144 + 12 and report["wrong"] == [] and len(report["sources"]) == 3
    assert report["record"]["parts"]["vae"]["layout"] == "original" and report["experiment"]["dtype"] == "float32"
    sample = report["sample"]
    assert (
        sample["first_chunk"]["shape"] == [1, 2, 2, 4, 4] and sample["first_chunk"]["nonfinite"] == 0 and len(sample["channels"]["mean"]) == 4
    )
    assert len(sample["video"]) == 2 and probe(tmp_path / "video.mp4").frames == 13 and (tmp_path / "video.png").stat().st_size > 1000
    assert "send back" in capsys.readouterr().out
    again = verify.sample(str(bundle / "b"), tmp_path, verify.PROMPTS["words"], 1, 2)
    assert again["first_chunk"] == sample["first_chunk"]  # the same noise everywhere


def test_a_transformer_alone_is_sampled_from_embeddings(bundle, tmp_path):
    convert([str(next((bundle / "wan").glob("*.safetensors")))], tmp_path / "t", model="tiny")
    report = verify.verify(str(tmp_path / "t"), tmp_path / "out", chunks=1, steps=2)
    assert report["sample"]["prompt"] is None and "video" not in report["sample"] and report["sample"]["first_chunk"]["nonfinite"] == 0


def test_what_is_wrong_is_said(bundle, tmp_path, capsys, monkeypatch):
    tensors = {n: np.asarray(x) for n, x in random_checkpoint.part_of(TINY, "transformer", "original", np.float32).items()}
    tensors["blocks.0.ffn.0.weight"][3, 3] = np.nan
    tensors["blocks.1.cross_attn.v.weight"][:] = 0.5
    write_safetensors(tmp_path / "t.safetensors", tensors)
    convert([str(tmp_path / "t.safetensors")], tmp_path / "t", model="tiny")
    write_safetensors(tmp_path / "t.safetensors", tensors | {"head.head.bias": np.ones(4, np.float32)})
    assert verify.main([str(tmp_path / "t"), f"--out={tmp_path / 'out'}", "--weights-only", "--sources", str(tmp_path / "t.safetensors")]) == 1
    wrong = json.loads((tmp_path / "out" / "verify.json").read_text())["wrong"]
    for line in (
        "transformer.blocks.0.ffn.up.weight has 1 entries that are not finite",
        "transformer.blocks.1.cross_attn.v.weight is constant",
        "t.safetensors is another file now than when it was converted",
    ):
        assert line in wrong
    assert len(wrong) == 3 and "wrong: " in capsys.readouterr().out
    record = {"parts": {"vae": {"files": [{"name": "Wan2.2_VAE.pth", "bytes": 7, "sha256": ""}]}}}
    assert verify.files(record, [], verify.PUBLISHED) == ([], ["Wan2.2_VAE.pth has 7 bytes, the published file 2818839170"])
    with pytest.raises(ConfigError, match="--chunks=0 must be positive"):
        verify.verify(str(tmp_path / "t"), tmp_path / "out", chunks=0)
    monkeypatch.setattr(sys, "argv", ["verify.py", "nowhere"])
    with pytest.raises(SystemExit, match="error: no model 'nowhere'"):
        verify.run()


def test_the_bundled_model_s_weights(tmp_path):
    report = verify.verify("toy", tmp_path, weights_only=True)
    assert report["wrong"] == [] and {x["dtype"] for x in report["tensors"].values()} == {"bfloat16"}
