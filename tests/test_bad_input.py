"""Bad input gets a message with the value, the rule and the remedy, before anything is compiled, and leaves nothing half-written."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from longlive_jax.checkpoint import save_bundle
from longlive_jax.config import TINY, ConfigError, replace
from longlive_jax.streaming.bundles import load, open_model, random_bundle
from longlive_jax.streaming.session import Session, advance
from longlive_jax.streaming.writer import probe
from longlive_jax.tree import flat_params
from tests import run_folder

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAR = "A red star bounces in a meadow."

# Runs many command lines of experiments/stream.py in one process: exit code, last words, what was compiled, what was left behind.
CHILD = """
import json, pathlib, sys
from absl.testing import flagsaver
from experiments import stream
from longlive_jax.streaming.programs import advance, decode_chunk, embed_prompts
out = {}
for name, words in json.loads(sys.argv[1]).items():
    sys.argv = ["stream.py", *words]
    before = sorted(map(str, pathlib.Path().rglob("*")))
    with flagsaver.flagsaver():
        try:
            stream.run()
            code = None
        except SystemExit as end:
            code = end.code
    compiled = advance._cache_size() + decode_chunk._cache_size() + embed_prompts._cache_size()
    out[name] = [code, compiled, sorted(map(str, pathlib.Path().rglob("*"))) == before]
print(json.dumps(out))
"""

# name: (options of the script, what the message holds). The folder they run in is made by ``ended``.
CASES = {
    "missing prompt folder": (["--prompts=nowhere"], ["prompts 'nowhere' do not exist; give a text file with one shot a line, or a folder"]),
    "empty prompt folder": (["--prompts=empty"], ["empty holds no storyboard; it needs sub-folders with 0.json, 1.json"]),
    "empty prompt file": (["--prompts=empty.txt"], ["empty.txt holds no prompt; write at least one"]),
    "malformed JSON": (["--prompts=torn"], ["torn/1.json, line 1: not valid JSON", "correct it, or write the prompts as a text file"]),
    "durations": (["--prompts=long"], ["shot_durations.txt holds 3 durations for 2 shots; write one number for each <number>.json"]),
    "too short for the shots": (["--prompts=pair", "--seconds=0.2"], ["2 prompts need at least 2 chunks, but chunks=1; use chunks=2 or more"]),
    "word that the model does not know": (["--prompts=dragon.txt"], ["unknown word 'dragon'", "knows"]),
    "unknown config key": (["--config.sampler.stepz=4"], ["unknown config key 'config.sampler.stepz'; did you mean config.sampler.steps?"]),
    "unknown config group": (["--config.zzz=4"], ["unknown config key 'config.zzz'; known: batch, decoder, mesh.data, mesh.seq, model"]),
    "value of another type": (["--config.sampler.steps=four"], ["--config.sampler.steps=four: invalid literal for int"]),
    "unknown option": (["--prompt=story"], ["Unknown command line flag 'prompt'. Did you mean: prompts"]),
    "unknown preset": (["--config=CONFIG:tinny"], ["unknown preset 'tinny'; did you mean 'tiny'?"]),
    "sink": (["--config.stream.sink=3"], ["stream.sink=3 is not a multiple of chunk=2", "use sink=0 or sink=4"]),
    "window": (["--config.stream.window=4"], ["window=4 cannot hold sink=2 with shot sinks on, which needs sink + 2 chunks; use window=6"]),
    "heads": (["--config.mesh.seq=3"], ["transformer.heads=8 does not divide by mesh.seq=3; use seq in [1, 2]"]),
    "devices": (["--config.mesh.seq=2"], ["mesh data=1 x seq=2 needs 2 devices and 1 are there; lower mesh.data or mesh.seq"]),
    "missing model": (["--config.model=nowhere"], ["no model 'nowhere': It is neither a bundled model", "nor a folder with a bundle"]),
    "unfinished model": (["--config.model=empty"], ["config.json' is missing, so 'empty' is not a finished bundle"]),
    "output below a file": (["--out=empty.txt/out"], ["output folder", "cannot be written", "give another folder"]),
    "seconds": (["--seconds=-1"], ["--seconds=-1.0 must be positive"]),
    "endless": (["--seconds=inf"], ["--seconds=inf must be positive and less than 1e7"]),
    "more chunks than a list holds": (["--prompts=huge.txt"], ["huge.txt, line 1: 99999999999 chunks are more than 10000000"]),
    "more samples than names": (["--samples=1000000000000"], ["samples=1000000000000 of a prompt are more than 1000000"]),
    "guidance": (["--config.sampler.guidance=nan"], ["sampler.guidance=nan must be finite"]),
    "shift": (["--config.sampler.shift=inf"], ["sampler.shift=inf must be positive and finite"]),
    "shot offset": (["--config.stream.shot_offset=nan"], ["stream.shot_offset=nan must be finite"]),
    "window beyond the device": (["--config.stream.window=1000000000"], ["window=1000000000 takes ", "beside the weights; a window of "]),
    "name of nothing": (["--prompts="], ["--prompts= is empty; name a file or folder, or leave it out"]),
    "seed": (["--config.seed=-1"], ["seed=-1 must lie in 0..4294967295"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How every one of ``CASES`` ended: ``{name: [exit code or message, programs compiled, folder unchanged]}``."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("# nothing\n")
    (folder / "huge.txt").write_text(f"[99999999999] {STAR}\n")
    (folder / "dragon.txt").write_text("[2] A red dragon.\n")
    for name in ("torn", "long", "pair"):
        (folder / name).mkdir()
        for i in range(2):
            (folder / name / f"{i}.json").write_text(json.dumps({"caption": STAR}))
    (folder / "torn/1.json").write_text('{"caption": ')
    (folder / "long/shot_durations.txt").write_text("2 2 2")
    config = str(ROOT / "configs/stream.py")
    lines = {name: [f"--config={config}:tiny", *words] for name, (words, _) in CASES.items()}
    lines["unknown preset"] = [f"--config={config}:tinny"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **run_folder.PLAIN}
    child = [sys.executable, "-c", CHILD, json.dumps(lines)]
    done = subprocess.run(child, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_script_refuses(ended, name):
    code, compiled, untouched = ended[name]
    assert isinstance(code, str) and code.startswith("error: "), code  # sys.exit(text): printed, exit code 1
    for part in CASES[name][1]:
        assert part in code
    assert compiled == 0 and untouched


def test_error_is_one_line_on_the_console(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "experiments/stream.py"), "--prompts=nowhere", f"--config={ROOT / 'configs/stream.py'}:tiny"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert (
        done.stderr == "error: prompts 'nowhere' do not exist; give a text file with one shot a line, or a folder of <number>.json captions\n"
    )


def test_full_disk_keeps_what_plays(tmp_path):
    """A file size limit stands for the disk. Random pictures: a second is some 20 kB. The cache that cannot be made is done without."""
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **run_folder.PLAIN}
    words = [sys.executable, str(ROOT / "experiments/stream.py"), f"--config={ROOT / 'configs/stream.py'}:tiny", "--cache=file/inside"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run([*words, "--seconds=60", "--out=out"], preexec_fn=limit, **options)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: video 'out/film.mp4': File too large after ") and message.endswith("free space or give another folder")
    kept = probe(tmp_path / "out/film.mp4").frames
    assert f"kept the first {kept} frames" in message and kept >= 24
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["film.json", "film.mp4"]
    assert json.loads((tmp_path / "out/film.json").read_text())["ending"] == "unfinished"


# ---- checkpoints ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    """Part -> dotted path -> array of an untrained TINY model."""
    bundle = random_bundle(TINY)
    return {part: flat_params(getattr(bundle, part)) for part in ("transformer", "vae", "text")}


@pytest.fixture
def folder(weights, tmp_path):
    save_bundle(tmp_path / "model", TINY, weights, {"note": "untrained"})
    return tmp_path / "model"


def test_saved_bundle_opens(folder, weights):
    bundle = open_model(str(folder))
    assert bundle.experiment == TINY
    for path, x in flat_params(bundle.transformer).items():
        np.testing.assert_allclose(x, weights["transformer"][path], rtol=1e-2)


def test_missing_checkpoint(tmp_path):
    for name in ("toyy", str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match=r"no model .*: .*neither a bundled model .* nor a folder with a bundle"):
            load(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json' is missing, so .* is not a finished bundle"):
        load(str(tmp_path / "empty"))


def test_truncated_checkpoint(folder):
    path = next(folder.glob("weights-*.safetensors"))
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"weights-.*' is damaged or truncated .*; copy the bundle again"):
            load(str(folder))
    path.unlink()
    with pytest.raises(ConfigError, match=r"holds no weights-\*\.safetensors; copy the bundle again"):
        load(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json' is damaged"):
        load(str(folder))


def test_checkpoint_of_another_size_names_every_difference(folder, weights):
    """One error for a wider feed-forward, a third layer and a part that is missing."""
    config = replace(TINY, transformer=replace(TINY.transformer, ffn_dim=128, layers=3))
    save_bundle(folder, config, {k: weights[k] for k in ("transformer", "vae")}, {})
    with pytest.raises(ConfigError, match="does not fit") as error:
        load(str(folder))
    text, wide = str(error.value), [p for p, x in weights["transformer"].items() if 96 in x.shape]
    assert len(wide) >= 6
    for path in wide:
        assert f"transformer.{path} has shape" in text
    assert all(f"missing transformer.{p.replace('blocks.0', 'blocks.2')} " in text for p in weights["transformer"] if p.startswith("blocks.0."))
    assert all(f"missing text.{p} " in text for p in weights["text"])


# ---- from code -----------------------------------------------------------------------------------------------------------------------------


def test_frames_that_are_no_whole_chunks(weights):
    session, before = Session(random_bundle(TINY)), advance._cache_size()
    noise = np.zeros((1, 5, *TINY.grid, TINY.transformer.channels), np.float32)
    with pytest.raises(ConfigError, match=r"frames=5 does not split into chunks of 2; use a multiple of 2, e\.g\. frames=4"):
        session.stream([STAR] * 2, noise=noise)
    assert advance._cache_size() == before
