"""experiments/gate.py: what it plants, what it compares and when it passes."""

import json

import numpy as np
import pytest

from experiments import gate
from longlive_jax.checkpoint import save_bundle
from longlive_jax.config import TINY, ConfigError
from longlive_jax.data.toyfigures import Row
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.streaming.session import Session
from longlive_jax.tree import flat_params


@pytest.fixture(scope="module")
def bundle():
    return random_bundle(TINY, seed=0)


def test_planted_outliers_change_no_bit(bundle):
    model = gate.planted(bundle.transformer)
    before, after = flat_params(bundle.transformer), flat_params(model)
    changed = {path.split(".", 2)[2] for path, x in after.items() if not np.array_equal(x, before[path])}
    assert {f"self_attn.{name}" for name in ("norm_k.weight", "norm_q.weight", "v.weight", "o.weight")} <= changed
    assert changed <= {f"self_attn.{name}" for name in ("norm_k.weight", "norm_q.weight", "v.weight", "v.bias", "o.weight")}
    gains = [after[path] / before[path] for path in after if path.endswith("self_attn.norm_k.weight")]
    assert all(set(np.unique(gain)) == {1, gate.FACTOR} and (gain == gate.FACTOR).sum() == gate.OUTLIERS for gain in gains)
    first = lambda m: np.asarray(next(Session(bundle._replace(transformer=m), steps=2).stream_latents(["A red star."], seed=3))[1])
    np.testing.assert_array_equal(first(model), first(bundle.transformer))


@pytest.mark.slow
def test_errors_are_those_of_the_memory_alone(bundle):
    """One history for both: FP8 shows a few per cent in every chunk, and does not run away."""
    found = gate.errors(bundle, "fp8", "float32", chunks=2, batch=1, seed=0)
    assert list(found) == ["fp8 memory"] and len(found["fp8 memory"]) == 2
    assert all(1e-4 < error < 0.2 for error in found["fp8 memory"]), found


def test_growth_compares_thirds_of_the_chunks_with_a_full_window():
    assert gate.growth([9, 9, 1, 1, 1, 2, 2, 2, 3, 3, 3], 2) == 3
    assert np.isnan(gate.growth([1.0, 1.0], 4))


@pytest.mark.parametrize(
    "errors, high, passed", [([1, 1, 1, 1], 0.9, True), ([1, 1, 1, 1], 1.1, False), ([1, 1, 1, 2], 0.9, False), ([1], 0.9, True)]
)
def test_the_verdict(errors, high, passed):
    rows = [Row("fp8 memory", "four, loss", 0.1, "points", high=high, n=4, readings=8)]
    said, ok = gate.verdict({"error": {"as it is, fp8 memory": errors, "as it is, float32": [5, 1]}}, rows, full=0 if len(errors) > 1 else 2)
    assert ok is passed and len(said) == 2


@pytest.mark.slow
def test_the_script(bundle, tmp_path, capsys):
    folder = tmp_path / "model"
    parts = {name: flat_params(part) for name, part in zip(("transformer", "vae", "text"), bundle[1:])}
    save_bundle(folder, bundle.experiment, parts, {"what": "a test"})
    record = gate.main([f"--model={folder}", f"--out={tmp_path / 'out'}", "--parts=error", "--chunks=2", "--batch=1"])
    saved = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert saved["error"] == record["error"] and set(saved["error"]) == {"as it is, fp8 memory", "with outliers, fp8 memory"}
    assert saved["passed"] is True and "passed" in capsys.readouterr().out
    assert (tmp_path / "out" / "gate.png").stat().st_size > 1000


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match=r"--parts=speed has unknown names; known: error, adherence"):
        gate.main(["--parts=speed"])
    with pytest.raises(ConfigError, match=r"--n=0 must be positive"):
        gate.main(["--n=0"])
    with pytest.raises(ConfigError, match="nowhere"):
        gate.main([f"--model={tmp_path / 'nowhere'}"])
