"""experiments/quantize.py: bundles of low-precision weights, adapters merged first, packed files, what quantising costs, and bad input."""

import dataclasses
import functools
import json
import pathlib
import runpy
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import longlive_jax
from experiments import quantize as script
from longlive_jax.checkpoint import load_bundle, save_bundle, save_large_bundle
from longlive_jax.config import TINY, ConfigError, replace
from longlive_jax.convert.adapters import write_peft
from longlive_jax.convert.packed import is_packed
from longlive_jax.convert.table import ConversionError
from longlive_jax.convert.tensors import open_tensors
from longlive_jax.convert.wan import TRANSFORMER_TABLE
from longlive_jax.data import toypaired, toyprobe
from longlive_jax.data.toyeval import prompts
from longlive_jax.ops.matmul import matmul
from longlive_jax.quant.leaves import FP8, NVFP4, Int8, LoRA, dense
from longlive_jax.quant.lora import add_lora
from longlive_jax.streaming.bundles import Bundle, random_bundle
from longlive_jax.streaming.charts import grid_picture
from longlive_jax.streaming.writer import OutputError
from longlive_jax.tree import cast, flat_params, with_params
from tests.shared import golden, shared
from tests.test_toyeval import SMALL, ideal_seen, small_model

KEY, PATH = jax.random.key(0), "blocks.1.ffn.up.weight"
LINEARS = 10 * TINY.transformer.layers


def save(folder, bundle):
    parts = {name: flat_params(part) for name, part in zip(("transformer", "vae", "text"), bundle[1:])}
    save_bundle(folder, bundle.experiment, parts, {"what": "a test"})
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of an untrained TINY bundle."""
    return save(tmp_path_factory.mktemp("model"), random_bundle(TINY))


@pytest.fixture(scope="module")
def weights(model):
    return flat_params(longlive_jax.load(model).transformer)


@pytest.fixture
def run(model, tmp_path):
    """Options -> the bundle that the script made in ``tmp_path/out``, and its layers."""

    def made(*options):
        layers = script.main([f"--model={model}", f"--out={tmp_path / 'out'}", *options])
        return flat_params(longlive_jax.load(str(tmp_path / "out")).transformer), layers

    return made


# ---- bundles -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules, kind, bits", [("fp8", FP8, 8), ("int8", Int8, 8), ("w4a16", NVFP4, 4.5)])
def test_a_bundle_of_quantised_weights(run, weights, tmp_path, capsys, rules, kind, bits):
    params, layers = run(f"--rules={rules}", "--dense=cross_attn,last_block")
    quantised = {path for path, x in params.items() if isinstance(x, kind)}
    left = {path for path, x in weights.items() if path.startswith(("blocks.0.self_attn", "blocks.0.ffn")) and x.ndim == 2}
    assert quantised == {x.path for x in layers} == left
    for layer in layers:  # what the report says is what is in the file
        before, after = np.asarray(weights[layer.path], np.float64), np.asarray(dense(params[layer.path]), np.float64)
        assert layer.error == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-3)
        assert layer.before == 2 * before.size and layer.after == pytest.approx(bits / 8 * before.size, rel=0.07)
    for path in set(params) - quantised:
        assert np.array_equal(params[path], weights[path]), path
    told = capsys.readouterr().out
    assert f"{rules}" in told and all(x.path in told for x in layers) and "MiB" in told
    report = json.loads((tmp_path / "out/layers.json").read_text())
    assert [x["path"] for x in report["layers"]] == [x.path for x in layers]
    assert Image.open(tmp_path / "out/layers.png").width > 500
    record = json.loads((tmp_path / "out/record.json").read_text())
    assert record["quantised"] == {"rules": rules, "dense": ["cross_attn", "last_block"], "lora": [], "lora_scale": [1.0]}
    assert record["made_from"]["record"] == {"what": "a test"} and len(record["made_from"]["sha256"]) == 64


def test_a_converted_bundle_keeps_its_form(weights, tmp_path):
    """Weights in an Orbax directory, no VAE and no text encoder, and a tokenizer beside them."""
    save_large_bundle(tmp_path / "large", TINY, {f"transformer.{p}": x for p, x in weights.items()}, {}, {"what": "a test"})
    (tmp_path / "large/tokenizer").mkdir()
    (tmp_path / "large/tokenizer/tokenizer.json").write_text("{}")
    script.main([f"--model={tmp_path / 'large'}", f"--out={tmp_path / 'out'}", "--rules=fp8", "--dense=first_block"])
    assert (tmp_path / "out/arrays").is_dir() and (tmp_path / "out/tokenizer/tokenizer.json").is_file()
    _, transformer, vae, text = load_bundle(tmp_path / "out")
    expected, found = FP8.encode(weights[PATH].astype(jnp.bfloat16)), flat_params(transformer)[PATH]
    assert np.array_equal(found.values, expected.values) and np.array_equal(found.scale, expected.scale) and vae is None and text is None


def test_a_run_is_given_by_its_own_folder(model, tmp_path):
    (tmp_path / "bundle").symlink_to(model)
    assert script.source(str(tmp_path)) == tmp_path / "bundle" and str(script.source(model)) == model


def test_a_dry_run_makes_nothing(model, tmp_path, capsys):
    assert script.main([f"--model={model}", f"--out={tmp_path / 'a/b'}", "--dry-run"]) == []
    assert f"{LINEARS} weights" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


# ---- adapters ------------------------------------------------------------------------------------------------------------------------------


def adapter_file(path, params, seed):
    """A peft file over two layers, and what it adds to them."""
    adapted = add_lora(params, [PATH, "blocks.0.self_attn.q.weight"], rank=4, key=jax.random.fold_in(KEY, seed))
    draw = np.random.default_rng(seed).normal
    adapted = {p: replace(x, b=jnp.asarray(draw(0, 0.1, x.b.shape), jnp.float32)) if isinstance(x, LoRA) else x for p, x in adapted.items()}
    save_file(write_peft(adapted), path)
    return {p: np.asarray(x.delta()) for p, x in adapted.items() if isinstance(x, LoRA)}


def test_adapters_are_merged_first_in_float32(run, weights, tmp_path):
    deltas = [adapter_file(tmp_path / f"{i}.safetensors", weights, i) for i in range(2)]
    files = ",".join(str(tmp_path / f"{i}.safetensors") for i in range(2))
    params, _ = run("--rules=fp8", f"--lora={files}", "--lora_scale=1,0.5")
    merged = (weights[PATH] + deltas[0][PATH] + 0.5 * deltas[1][PATH]).astype(jnp.bfloat16)
    assert np.array_equal(params[PATH].values, FP8.encode(merged).values) and not np.array_equal(merged, weights[PATH].astype(jnp.bfloat16))
    record = json.loads((tmp_path / "out/record.json").read_text())["quantised"]
    assert (record["lora"], record["lora_scale"]) == (["0.safetensors", "1.safetensors"], [1.0, 0.5])


def test_an_adapter_that_torch_wrote_is_merged_as_the_public_source_does():
    base, wanted = golden("pt/generator.npz"), golden("pt/lora_merged_float32.npz")
    path_of = lambda name: next((p for row in TRANSFORMER_TABLE if (p := row.path(name)) is not None), None)
    params = {path_of(name): jnp.asarray(x) for name, x in base.items() if name.startswith("blocks.") and x.ndim == 2}
    merged = script.merged(params, [str(shared("golden", "pt", "lora.pt"))], [2.0])  # alpha 8, rank 4
    assert sum(not np.array_equal(merged[p], params[p]) for p in params) == 10 * len({p.split(".")[1] for p in params})
    for name, x in wanted.items():
        if path_of(name) in merged:
            np.testing.assert_allclose(merged[path_of(name)], x, atol=1e-6)


# ---- packed files --------------------------------------------------------------------------------------------------------------------------


def test_packed_files_go_out_and_come_back(run, model, tmp_path):
    file = tmp_path / "packed.safetensors"
    params, layers = run("--rules=w4a4", f"--export={file}")
    assert is_packed(open_tensors(file)) and len(layers) == LINEARS
    again = script.main([f"--model={model}", f"--out={tmp_path / 'again'}", f"--packed={file}"])
    assert [x.path for x in again] == [x.path for x in layers] and all(x.error is None for x in again)
    found = flat_params(longlive_jax.load(str(tmp_path / "again")).transformer)
    for path, x in params.items():
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(found[path]), strict=True)), path
    with pytest.raises(ConfigError, match="holds no packed layers"):
        script.main([f"--model={model}", f"--out={tmp_path / 'c'}", f"--packed={next(pathlib.Path(model).glob('*.safetensors'))}"])


# ---- bad input -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rules=w4a5"], "unknown rules 'w4a5'; known: fp8, int8, w4a4"),
        (["--sensitivity", "--kinds=fp8,int4"], "unknown rules 'int4'"),
        (["--dense=blocks.9.*"], "the rule 'blocks.9.*' matches no weight; near it are"),
        (["--dense=blocks.["], "neither a group .* nor a regular expression"),
        (["--lora=nowhere.safetensors"], "--lora=nowhere.safetensors: nowhere.safetensors does not exist"),
        (["--lora=a", "--lora_scale=1,2"], "2 values of --lora_scale for 1 adapters"),
        (["--lora_scale=much"], "--lora_scale=much is not a number a file"),
        (["--lora_scale=nan"], r"--lora_scale=\[nan\] must be finite"),
        (["--sensitivity", "--lora=a"], "--sensitivity measures --kinds: leave --lora, --packed, --dense and --export out"),
        (["--packed=a", "--lora=b"], "leave --lora and --dense out"),
        (["--rules=fp8", "--export=a.safetensors"], "--export holds NVFP4 weights alone, and --rules=fp8"),
        (["--export=a.pt"], "must end in .safetensors"),
        (["--dense=.*"], "--dense leaves no weight to quantise"),
        (["--packed=a", "--rules=fp8"], "leave --rules=fp8 out"),
        (["--sensitivity", "--kinds="], "--kinds= must name some"),
        (["--sensitivity", "--seed=-1"], "--seed=-1 must not be negative"),
        (["--n=0"], "--n=0 must be at least 1"),
        (["--model=tou"], "did you mean 'toy'"),
        (["--out=DIR"], "is there already; give another folder"),
        (["--out=DIR/file/x"], "cannot be written"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(model, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    options = [option.replace("DIR", str(tmp_path)) for option in options]
    with pytest.raises((ConfigError, OutputError), match=message):
        script.main([f"--model={model}", f"--out={tmp_path / 'out'}", *options])
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_weights_that_cannot_be_quantised_are_named(tmp_path, weights):
    out, bundle = f"--out={tmp_path / 'out'}", random_bundle(TINY)
    broken = weights | {PATH: weights[PATH].at[3, 5].set(jnp.nan)}
    folder = save(tmp_path / "nan", Bundle(TINY, with_params(bundle.transformer, broken), *bundle[2:]))
    with pytest.raises(ConfigError, match=rf"weight {PATH} .* holds 1 NaN and 0 inf"):
        script.main([f"--model={folder}", out])
    odd = replace(TINY, transformer=dataclasses.replace(TINY.transformer, ffn_dim=40))
    folder = save(tmp_path / "odd", random_bundle(odd))
    with pytest.raises(ConfigError, match=r"blocks.0.ffn.down.weight has 40 along 'in'.*multiple of 16"):
        script.main([f"--model={folder}", out])
    adapter_file(tmp_path / "other.safetensors", flat_params(random_bundle(odd).transformer), 0)
    with pytest.raises(ConversionError, match=r"sizes of another base \(1\):\n.*rank 4: A \(4, 64\), B \(40, 4\)"):
        script.main([f"--model={tmp_path / 'nan'}", out, f"--lora={tmp_path / 'other.safetensors'}"])
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quantize.py", f"--model={model}", f"--out={model}"])
    with pytest.raises(SystemExit, match=r"^error: --out=.* is there already"):
        runpy.run_path(script.__file__, run_name="__main__")


# ---- sensitivity ---------------------------------------------------------------------------------------------------------------------------


def test_what_is_lost_is_paired_by_stream():
    scenes = prompts(np.random.default_rng(0), 32, 3)
    before = ideal_seen(scenes, range(3))
    figures = {row.measure: row for row in toypaired.paired_rows("x", before, before)}
    assert all(row.value == 0 and 0 < row.high < 5 for name, row in figures.items() if "motion, " not in name)
    assert figures["mean motion, loss"].n == 32 and figures["four, loss"].high == pytest.approx(300 / 96)
    colour, centre = before.readings[2].colour.copy(), {k: r.centre / 2 for k, r in before.readings.items()}
    colour[:8] = -1  # a third of the chunks of a quarter of the streams: 8.3 points
    readings = {k: r._replace(centre=centre[k]) for k, r in before.readings.items()}
    after = before._replace(readings=readings | {2: readings[2]._replace(colour=colour)})
    figures = {row.measure: row for row in toypaired.paired_rows("x", before, after)}
    assert figures["colour, loss"].value == figures["four, loss"].value == pytest.approx(100 / 12)
    assert 100 / 12 < figures["four, loss"].high < 14 and figures["shape, loss"].value == 0
    assert figures["mean motion, loss"].value == pytest.approx(50)
    unread = before._replace(readings=before.readings | {1: before.readings[1]._replace(objects=np.zeros(32, int))})
    assert not any("mean motion" in row.measure for row in toypaired.paired_rows("x", before, unread))
    with pytest.raises(ConfigError, match="different scenes"):
        toypaired.paired_rows("x", before, ideal_seen(scenes[::-1], range(3)))


def test_groups_are_left_dense_until_the_loss_is_small_enough():
    worth = dict(zip(script.GROUPS, (0.1, 0.2, 3.0, 1.0, 0.5, 0.0, 0.0)))
    asked = []

    def measure(cases, n, whole):
        asked.extend(cases)
        bound = lambda left: max(0.0, whole - sum(worth[group] for group in left))
        return {(kind, left): [SimpleNamespace(measure="four, loss", high=bound(left))] for kind, left in cases}

    args = SimpleNamespace(kinds=["w4a4"], within=1.0, all_groups=False, n=8, group_n=8)
    found, answer = script.leave_out(args, functools.partial(measure, whole=4.8))
    assert answer == {"w4a4": ["cross_attn", "ffn_up"]} and len(asked) == len(set(asked)) == 1 + len(script.GROUPS) + 1
    assert found["w4a4", ("cross_attn", "ffn_up")][0].high == pytest.approx(0.8)
    asked.clear()
    assert script.leave_out(args, functools.partial(measure, whole=0.9))[1] == {"w4a4": []} and len(asked) == 1
    assert script.leave_out(args, functools.partial(measure, whole=50.0))[1] == {"w4a4": None}
    everything = SimpleNamespace(**{**vars(args), "all_groups": True})
    assert script.leave_out(everything, functools.partial(measure, whole=0.5))[1] == {"w4a4": []}
    assert {left for _, left in asked} >= {(group,) for group in script.GROUPS}


def test_a_probe_notes_how_far_the_quantised_product_is():
    draw = np.random.default_rng(0).normal
    weight, x = (jnp.asarray(draw(size=size), jnp.float32) for size in ((32, 48), (5, 48)))
    noted = []
    probe = toyprobe.Probe(weight, {"fp8": FP8.encode(weight)}, jnp.int32(3), lambda *found: noted.append(found))
    assert np.array_equal(jax.jit(matmul)(probe, x), matmul(weight, x)) and (probe.shape, probe.dtype) == ((32, 48), jnp.float32)
    jax.effects_barrier()
    ((number, found),) = noted
    (difference, size), y = found["fp8"], np.asarray(matmul(weight, x))
    assert number == 3 and size == pytest.approx(np.sum(y**2), rel=1e-5)
    assert difference == pytest.approx(np.sum((np.asarray(matmul(FP8.encode(weight), x)) - y) ** 2), rel=1e-4) and 0 < difference < 0.01 * size


@pytest.mark.exhaustive
def test_the_products_of_every_layer_are_probed():
    errors = toyprobe.layer_sensitivity((SMALL, *small_model()), ["fp8", "w4a4"], n=2, times=(0.5,))
    assert len(errors["fp8"]) == 10 * SMALL.transformer.layers
    assert all(0 < errors["fp8"][path] < errors["w4a4"][path] < 0.5 for path in errors["fp8"])


def test_sensitivity_pairs_the_kinds_and_writes_what_it_found(tmp_path, monkeypatch, capsys):
    """Perfect readings in place of the model's videos; with FP8 weights nothing moves and the colours are wrong."""
    played = []

    def observe(transformer, scenes, chunks):
        seen = ideal_seen(scenes, chunks)
        played.append(len(scenes))
        if any(isinstance(x, script.Switch) and isinstance(x.other, FP8) and x.on.all() for x in flat_params(transformer).values()):
            worse = lambda r: r._replace(centre=0 * r.centre, colour=0 * r.colour - 1)
            seen = seen._replace(readings={k: worse(r) for k, r in seen.readings.items()})
        return seen

    monkeypatch.setattr(script, "model_player", lambda experiment, transformer, *more, **options: transformer)
    monkeypatch.setattr(script, "told", lambda player, label, chunks: player)
    monkeypatch.setattr(script.toyeval, "observe", observe)
    monkeypatch.setattr(script, "layer_sensitivity", lambda bundle, kinds, seed: {kind: {PATH: 0.25} for kind in kinds})
    folder = save(tmp_path / "small", Bundle(SMALL, *small_model()))
    record = script.main(["--sensitivity", f"--model={folder}", f"--out={tmp_path / 'out'}", "--n=2", "--within=100", "--threads=2"])
    loss = {(row["group"], row["measure"]): row["value"] for row in record["rows"]}
    assert record["leave_dense"] == {"fp8": [], "w4a4": []} and len(record["rows"]) == 14
    assert all(value == 0 for (group, _), value in loss.items() if group == "w4a4")
    assert loss["fp8", "four, loss"] == loss["fp8", "mean motion, loss"] == 100 and loss["fp8", "shape, loss"] == 0
    assert "fp8: within 100 points (95 %) in all four attributes: leave dense: nothing" in capsys.readouterr().out
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"layers-fp8.png", "layers-w4a4.png", "sensitivity.json", "sensitivity.md", "sensitivity.png"}
    assert record["complete"] and played == [2] * 3 and "| fp8 | four, loss | 100.00 points |" in (tmp_path / "out/sensitivity.md").read_text()
    assert script.main(["--sensitivity", f"--model={folder}", f"--out={tmp_path / 'dry'}", "--dry-run"]) is None
    assert not (tmp_path / "dry").exists()


def test_single_groups_are_ordered_by_fewer_prompts():
    asked = []

    def measure(cases, n):
        asked.extend((left, n) for _, left in cases)
        return {key: [SimpleNamespace(measure="four, loss", high=5.0 - 4.5 * ("ffn_up" in key[1]))] for key in cases}

    args = SimpleNamespace(kinds=["fp8"], within=1.0, all_groups=False, n=8, group_n=2)
    assert script.leave_out(args, measure)[1] == {"fp8": ["ffn_up"]}
    assert asked == [((), 8), *(((group,), 2) for group in script.GROUPS), (("ffn_up",), 8)]


def test_a_switch_is_one_of_its_two_weights():
    x, w = (jnp.asarray(np.random.default_rng(i).normal(size=(32, 48)), jnp.float32) for i in range(2))
    product = jax.jit(matmul)
    for on, expected in ((False, w), (True, FP8.encode(w))):
        switch = cast({"w": script.Switch(w, FP8.encode(w), jnp.asarray(on))}, jnp.float32)["w"]
        assert (switch.shape, switch.dtype) == (w.shape, w.dtype)
        np.testing.assert_allclose(product(switch, x), matmul(expected, x), rtol=1e-5, atol=1e-5)


def test_tables_of_numbers_become_pictures(tmp_path):
    grid_picture(tmp_path / "x.png", "title", ["a", "b"], ["c"], {("a", "c"): 4.0, ("b", "c"): 0.0})
    picture = np.asarray(Image.open(tmp_path / "x.png"))
    assert (picture == (214, 96, 77)).all(-1).sum() > 500  # the cell of the largest number; that of 0 is white
    with pytest.raises(ConfigError, match="shows nothing"):
        grid_picture(tmp_path / "y.png", "title", [], [], {})
