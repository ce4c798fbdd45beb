"""experiments/convert.py and random_checkpoint.py: every layout in, loaded on any devices, out again; and all that is refused."""

import dataclasses
import functools
import gc
import itertools
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import longlive_jax
from experiments import convert, random_checkpoint
from longlive_jax.arrays import Reader, Unread, array_shapes, load_arrays, piece, save_arrays
from longlive_jax.checkpoint import CheckpointError, abstract_part, digest, load_bundle, load_parts
from longlive_jax.config import TINY, WAN_5B, ConfigError, Experiment, TextConfig, VAEConfig, VideoConfig, replace
from longlive_jax.convert import layouts
from longlive_jax.convert.table import ConversionError
from longlive_jax.convert.tensors import open_tensors
from longlive_jax.convert.writers import write_safetensors, write_sharded, write_torch
from longlive_jax.model.vae import VAE
from longlive_jax.sharding import REPLICATE, SHARD, make_mesh
from longlive_jax.streaming import bundles
from longlive_jax.streaming.bundles import open_tokenizer
from longlive_jax.tree import flat_params
from tests.golden_models import channels_last, frames_last, meta_of, transformer_config
from tests.shared import golden, shared
from tests.test_golden_pipeline import session
from tests.test_golden_transformer import causal, per_chunk

ROOT = pathlib.Path(__file__).resolve().parents[1]
EIGHT = replace(TINY, transformer=replace(TINY.transformer, channels=8), vae=replace(TINY.vae, channels=8))  # every axis divides by 8
PRUNABLE = replace(TINY, vae=replace(TINY.vae, dim=8, decoder_dim=8))


def config_file(folder, experiment):
    """The experiment as the JSON file that ``--model`` takes."""
    path = folder / f"{hash(experiment) & 0xFFFFFF:06x}.json"
    path.write_text(json.dumps(dataclasses.asdict(experiment)))
    return str(path)


def convert_as(folder, experiment, *sources, **options):
    """The bundle's folder of a conversion."""
    out = folder / f"bundle{len(list(folder.glob('bundle*')))}"
    convert.convert([str(s) for s in sources], out, model=config_file(folder, experiment), **options)
    return out


def params_of(module):
    return {path: np.asarray(x) for path, x in flat_params(module).items()}


def same(found, expected):
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape and found[name].tobytes() == np.asarray(x).tobytes(), name


# ---- every published layout, at a small size ---------------------------------------------------------------------------------------------


def written(layout, folder, experiment):
    """A random checkpoint on the disk: its folder."""
    random_checkpoint.write(layout, folder / layout, experiment, rank=4, shard_gb=0.0002)
    return folder / layout


def drawn(part, layout, experiment, dtype=np.float32, prefix=""):
    """The values of a part as ``random_checkpoint`` draws them: foreign name -> array."""
    tensors = random_checkpoint.part_of(experiment, part, layout, dtype, prefix)
    return {name.removeprefix(prefix): np.asarray(x) for name, x in tensors.items()}


def read_back(path):
    return {name: np.asarray(x) for name, x in layouts.open_source(path).tensors.items()}


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_a_repository_goes_in_and_comes_out_bit_for_bit(tmp_path, layout):
    source = written(layout, tmp_path, TINY)
    bundle = convert_as(tmp_path, TINY, source)
    names = {"wan": "original", "diffusers": "diffusers"}[layout]
    suffixes = {"transformer": "folder", "vae": ".pth", "text": ".safetensors"}
    for part, dtype in (("transformer", np.float32), ("vae", np.float32), ("text", ml_dtypes.bfloat16)):
        out = tmp_path / f"{part}{suffixes[part]}"
        convert.export(bundle, out.with_name("folder") if part == "transformer" else out, part, shard_gb=0.0002)
        found = read_back(out.with_name("folder") if part == "transformer" else out)
        same(found, drawn(part, names, TINY, dtype))
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    loaded = longlive_jax.load(str(bundle))
    assert loaded.experiment == TINY and {x.dtype for x in flat_params(loaded.text).values()} == {jnp.dtype(jnp.float32)}
    record = json.loads((bundle / "record.json").read_text())
    files = record["parts"]["transformer"]["files"]
    assert len([f for f in files if f["name"].endswith(".safetensors")]) > 1 and len(files[0]["sha256"]) == 64
    assert record["parts"]["vae"]["dtypes"] == {"float32": record["parts"]["vae"]["tensors"]}


def test_both_layouts_fill_the_same_places(tmp_path):
    """One set of values under both kinds of names gives one model."""
    loaded = []
    for layout in ("original", "diffusers"):
        folder = tmp_path / layout
        for part in ("transformer", "vae", "text"):
            shapes = flat_params(abstract_part(part, {"transformer": TINY.transformer, "vae": TINY.vae, "text": TINY.text}[part]))
            ours = {path: random_checkpoint.drawn(path, x.shape, np.float32) for path, x in shapes.items()}
            write_sharded(folder / part, "model", layouts.foreign(part, layout, ours, TINY), 1e9)
        loaded.append(longlive_jax.load(str(convert_as(tmp_path, TINY, *(folder / p for p in ("transformer", "vae", "text"))))))
    for part in ("transformer", "vae", "text"):
        a, b = (params_of(b._asdict()[part]) for b in loaded)
        same(a, b)


def test_longlive_files(tmp_path):
    base, merged = written("wan", tmp_path, TINY), written("longlive", tmp_path, TINY) / "model_bf16.pt"
    bundle = convert_as(tmp_path, TINY, base, merged)  # the file wins over the folder's transformer
    found = open_tensors(tmp_path / "x.safetensors") if convert.export(bundle, tmp_path / "x.safetensors", "transformer") else None
    same({n: np.asarray(x) for n, x in found.items()}, drawn("transformer", "original", TINY, ml_dtypes.bfloat16, "model."))
    record = json.loads((bundle / "record.json").read_text())["parts"]
    assert record["transformer"]["container"] == "generator." and set(record) == {"transformer", "vae", "text"}
    training = written("training", tmp_path, TINY) / "model.pt"
    for ema, prefix in ((False, "model."), (True, "model._fsdp_wrapped_module.")):
        one = convert_as(tmp_path, TINY, training, ema=ema)
        convert.export(one, tmp_path / f"{ema}.pt")
        same(read_back(tmp_path / f"{ema}.pt"), drawn("transformer", "original", TINY, prefix=prefix))
        assert json.loads((one / "record.json").read_text())["parts"]["transformer"]["beside"] == (
            {"generator": 69} if ema else {"generator_ema": 69}
        )
    assert longlive_jax.load(str(one)).vae is None


@pytest.mark.parametrize("layout, factor", [("lightvae", 2), ("lightvae_v2", 4)])
def test_pruned_vaes_are_sized_by_their_tensors(tmp_path, layout, factor):
    bundle = convert_as(tmp_path, PRUNABLE, *written(layout, tmp_path, PRUNABLE).iterdir())
    vae = load_parts(bundle, ("vae",))[1]
    assert (vae.config.dim, vae.config.decoder_dim) == (8 // factor, 8 // factor)
    record = json.loads((bundle / "record.json").read_text())["parts"]["vae"]
    assert record["container"] == "gen_model." and record["beside"] == {"dynamic_feature_projection_heads": 2}
    pruned = random_checkpoint.pruned(PRUNABLE, random_checkpoint.PRUNED[layout])
    convert.export(bundle, tmp_path / "back.pth")
    same(read_back(tmp_path / "back.pth"), drawn("vae", "diffusers", pruned))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_vae_file_may_hold_a_decoder_alone(tmp_path, layout):
    """Its bundle decodes, and says what it is where an encoder is asked for."""
    narrow = random_checkpoint.pruned(PRUNABLE, 0.5)
    tensors = random_checkpoint.part_of(narrow, "vae", layout, np.float32)
    kept = {n: x for n, x in tensors.items() if n.startswith(("decoder.", "conv2.", "post_quant_conv."))}
    write_torch(tmp_path / "decoder.pth", kept)
    bundle = convert_as(tmp_path, PRUNABLE, tmp_path / "decoder.pth")
    assert "decoder only" in json.loads((bundle / "record.json").read_text())["parts"]["vae"]["family"]
    vae = longlive_jax.load(str(bundle)).vae
    assert (vae.config.dim, vae.config.decoder_dim, vae.encoder) == (0, 4, None)
    with pytest.raises(ConfigError, match=r"this VAE has no encoder \(vae\.dim=0\)"):
        vae.encode(np.zeros((1, 1, 32, 64, 3), np.float32))
    convert.export(bundle, tmp_path / "back.pth")
    same(read_back(tmp_path / "back.pth"), {n: np.asarray(x) for n, x in kept.items()})
    wide = replace(PRUNABLE, vae=replace(PRUNABLE.vae, decoder_dim=2))  # one that is wider than the model's is another model's
    with pytest.raises(ConversionError, match="wrong shapes"):
        convert_as(tmp_path, wide, tmp_path / "decoder.pth")


@pytest.mark.slow
def test_random_layouts_have_the_published_names_shapes_and_sizes():
    """At full size, without values (spec/names.md §4, §5): tensors, parameters and bytes."""
    sizes = {"wan": (825 + 196 + 242, 19_999_150_848 + 4 * 704_688_668 + 11_361_820_672), "longlive": (825, 9_999_575_424), "lora": (600, None)}
    sizes |= {"training": (2 * 825, 2 * 19_999_150_848), "lightvae": (198, 4 * 176_981_772 + 512), "lightvae_v2": (198, 4 * 44_654_660 + 512)}
    for layout, (count, size) in sizes.items():
        tensors = [x for _, tree, _ in random_checkpoint.plan(layout, WAN_5B) for x in leaves(tree)]
        assert len(tensors) == count and size in (None, sum(x.nbytes for x in tensors)), layout
    _, tree, _ = random_checkpoint.plan("diffusers", WAN_5B)[1]
    assert tree["decoder.up_blocks.0.upsampler.time_conv.weight"].shape == (2048, 1024, 3, 1, 1)
    with pytest.raises(ConfigError, match="unknown layout 'wan3'; known: wan, "):
        random_checkpoint.plan("wan3", TINY)


def leaves(tree):
    return [y for x in tree.values() for y in (leaves(x) if isinstance(x, dict) else [x] if isinstance(x, Unread) else [])]


# ---- the golden files ----------------------------------------------------------------------------------------------------------------------


def golden_experiment(transformer, height=32, width=64):
    """An experiment around a golden transformer; the other parts are small."""
    text = TextConfig(vocab=8, dim=transformer.text_dim, attention_dim=8, ffn_dim=8, heads=1, layers=1)
    vae = VAEConfig(dim=4, decoder_dim=4, channels=transformer.channels)
    return Experiment(transformer=transformer, vae=vae, text=text, video=VideoConfig(height=height, width=width), dtype="float32")


def weights(arrays):
    return {name.removeprefix("weights/"): x for name, x in arrays.items() if name.startswith("weights/")}


def renamed(part, tensors, experiment, layout):
    """``tensors`` of the original layout under the names of another."""
    table = layouts.table_of(part, "original", experiment.vae.res_blocks)
    ours = {path: x for name, x in tensors.items() for row in table if (path := row.path(name)) is not None}
    other = layouts.table_of(part, layout, experiment.vae.res_blocks)
    return {next(n for row in other if (n := row.name(path)) is not None): x for path, x in ours.items()}


def test_a_golden_transformer_from_the_disk(tmp_path):
    arrays = golden("dit_causal.npz")
    e = golden_experiment(transformer_config(meta_of(arrays)), 64, 96)
    tensors = renamed("transformer", weights(arrays), e, "diffusers")
    assert "blocks.0.norm2.weight" in tensors and len(tensors) == 69
    write_sharded(tmp_path / "transformer", "diffusion_pytorch_model", tensors, 200_000)
    model = longlive_jax.load(str(convert_as(tmp_path, e, tmp_path / "transformer"))).transformer
    noisy, t = frames_last(arrays["tf/noisy"]), jnp.asarray(arrays["t/tf"])
    v = causal(model, noisy, t, per_chunk(arrays["tf/context"], len(t)), meta_of(arrays)["frames_per_block"])
    np.testing.assert_allclose(v, frames_last(arrays["causal/flow"]), atol=2e-4)


def test_golden_videos_from_the_disk(tmp_path):
    arrays, variant = golden("sample.npz"), "steps2"
    meta = json.loads(str(arrays["meta"]))[variant]
    e = golden_experiment(transformer_config(meta), 16 * meta["H"], 16 * meta["W"])
    write_torch(tmp_path / "g.pt", {"generator": {f"model.{n}": x for n, x in weights(arrays).items()}, "step": 1})
    s = session(arrays, meta, longlive_jax.load(str(convert_as(tmp_path, e, tmp_path / "g.pt"))).transformer)
    noise, state = channels_last(arrays["noise"]), s.start()
    for c in range(meta["n_chunks"]):
        part = slice(c * meta["frames_per_block"], (c + 1) * meta["frames_per_block"])
        text = s.read_embeddings(arrays["prompt_embeds"][c][None])
        state, z = s.step(state, text, cut=bool(arrays[f"{variant}/cut_flags"][c]), noise=noise[:, part])
        np.testing.assert_allclose(z, channels_last(arrays[f"{variant}/latents"])[:, part], atol=1e-4)


def test_a_golden_vae_from_the_disk(tmp_path):
    arrays = golden("vae22.npz")
    stats = {name: tuple(map(float, arrays[name])) for name in ("mean", "std")}
    e = replace(TINY, vae=VAEConfig(dim=8, decoder_dim=8, channels=4, **stats))
    write_torch(tmp_path / "light.pth", {"state_dict": {"gen_model": renamed("vae", weights(arrays), e, "diffusers")}})
    bundle = convert_as(tmp_path, e, tmp_path / "light.pth")
    assert json.loads((bundle / "record.json").read_text())["parts"]["vae"]["container"] == "state_dict.gen_model."
    vae = load_parts(bundle, ("vae",))[1]
    pixels = jax.jit(VAE.decode)(vae, np.moveaxis(arrays["z"], 1, -1))
    np.testing.assert_allclose(pixels, np.moveaxis(arrays["decoded"], 1, -1), atol=2e-5)


def test_a_golden_text_encoder_from_the_disk(tmp_path):
    arrays = golden("umt5.npz")
    m = meta_of(arrays)
    text = TextConfig(m["vocab"], m["dim"], m["dim_attn"], m["dim_ffn"], m["num_heads"], m["num_layers"], m["num_buckets"])
    e = replace(TINY, text=text, transformer=replace(TINY.transformer, text_dim=text.dim))
    tensors = renamed("text", weights(arrays), e, "diffusers") | {"lm_head.weight": np.ones(3, np.float32)}
    write_torch(tmp_path / "pytorch_model.bin", tensors)
    encoder = load_parts(convert_as(tmp_path, e, tmp_path / "pytorch_model.bin"), ("text",))[1]
    out = jax.jit(lambda e, i, m: e(i, m))(encoder, arrays["ids"], arrays["mask"])
    np.testing.assert_allclose(out, arrays["out"], atol=1e-4)


SMALL = golden_experiment(
    longlive_jax.config.TransformerConfig(dim=16, ffn_dim=24, heads=2, layers=2, channels=3, text_dim=8, text_len=4, freq_dim=8), 32, 32
)


@pytest.mark.parametrize(
    "files, expected, options",
    [
        (["generator.pt"], "generator.npz", {}),
        (["generator_bf16.pt"], "generator_bf16.npz", {}),
        (["generator_with_ema.pt"], "generator.npz", {}),
        (["generator_with_ema.pt"], "generator_with_ema.npz", {"ema": True}),
        (["generator_ema_only.pt"], "generator_ema_only.npz", {}),
        (["merged.pt"], "merged.npz", {}),
        (["generator.pt", "lora.pt"], "lora_merged_float32.npz", {"alpha": 8}),
    ],
)
def test_golden_containers_become_models(tmp_path, files, expected, options):
    bundle = convert_as(tmp_path, SMALL, *(shared("golden", "pt", name) for name in files), **options)
    convert.export(bundle, tmp_path / "x.safetensors", "transformer")
    found, arrays = open_tensors(tmp_path / "x.safetensors"), golden(f"pt/{expected}")
    assert set(found) == set(arrays)
    for name, x in arrays.items():
        np.testing.assert_allclose(np.asarray(found[name]).astype(np.float32), x, atol=1e-6 if "lora.pt" in files else 0, err_msg=name)


def test_the_scale_of_a_lora_is_alpha_over_rank(tmp_path):
    files = [shared("golden", "pt", name) for name in ("generator.pt", "lora.pt")]
    a, b = (longlive_jax.load(str(convert_as(tmp_path, SMALL, *files, alpha=alpha))).transformer for alpha in (None, 8))
    base = longlive_jax.load(str(convert_as(tmp_path, SMALL, files[0]))).transformer
    path = "blocks.1.ffn.down.weight"
    a, b, base = (params_of(m)[path] for m in (a, b, base))
    assert np.abs(a - base).max() > 1e-3
    np.testing.assert_allclose(b - base, 2 * (a - base), atol=1e-6)  # rank 4


# ---- on any devices ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    return convert_as(folder, EIGHT, written("wan", folder, EIGHT))


def test_one_device_and_eight(eight):
    one = longlive_jax.load(str(eight))
    mesh = make_mesh(2, 4)
    whole, parts = (longlive_jax.load(str(eight), mesh=mesh, policy=policy) for policy in (REPLICATE, SHARD))
    for part in ("transformer", "vae", "text"):
        for path, x in flat_params(one._asdict()[part]).items():
            w, p = (flat_params(b._asdict()[part])[path] for b in (whole, parts))
            assert x.sharding.device_set == {jax.devices()[0]} and len(w.sharding.device_set) == len(p.sharding.device_set) == 8
            assert w.addressable_shards[0].data.shape == x.shape and p.dtype == x.dtype == jnp.float32
            np.testing.assert_array_equal(x, w, err_msg=path)
            np.testing.assert_array_equal(x, p, err_msg=path)
    weight = flat_params(parts.transformer)["blocks.0.ffn.up.weight"]
    assert weight.addressable_shards[0].data.shape == (96 // 8, 64)


def test_the_package_s_own_bundles_go_on_any_devices():
    mesh = make_mesh(1, 4)
    one, parts = (load_parts(bundles.folder_of("toy"), ("transformer",), mesh=m, policy=SHARD)[1] for m in (None, mesh))
    assert flat_params(parts)["blocks.0.ffn.up.weight"].addressable_shards[0].data.shape == (160, 256)
    same(params_of(parts), params_of(one))


def test_weights_come_in_the_dtype_asked_for(eight, tmp_path):
    assert {x.dtype for x in flat_params(load_bundle(eight, dtype="bfloat16")[1]).values()} == {jnp.dtype(jnp.bfloat16)}
    half = convert_as(tmp_path, EIGHT, written("wan", tmp_path, EIGHT), dtype="bfloat16")
    assert {x.dtype for x in array_shapes(half / "arrays").values()} == {jnp.dtype(jnp.bfloat16)}
    assert digest(half) != digest(eight) and digest(eight) == digest(eight)


READER = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
port, rank, folder = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
from longlive_jax.arrays import load_arrays
mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("rows",))
like = jax.ShapeDtypeStruct((4096, 256), np.float32, sharding=NamedSharding(mesh, P("rows")))
x = load_arrays(folder, {"x": like})["x"]
for shard in x.addressable_shards:
    rows = shard.index[0]
    np.testing.assert_array_equal(shard.data, np.arange(rows.start * 256, rows.stop * 256, dtype=np.float32).reshape(-1, 256))
print("read", sorted(s.index[0].start for s in x.addressable_shards))
"""


@pytest.mark.slow
def test_a_host_reads_its_part_and_no_other(tmp_path):
    """Two processes; each has a copy of the array in which the other's half is rubbish."""
    save_arrays(tmp_path / "0", {"x": np.arange(4096 * 256, dtype=np.float32).reshape(4096, 256)})
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    pieces = sorted((tmp_path / "0" / "x").glob("[0-9]*"), key=lambda p: int(p.name.split(".")[0]))
    assert len(pieces) == 4
    for rank, other in ((0, pieces[2:]), (1, pieces[:2])):
        for p in other:
            (tmp_path / str(rank) / "x" / p.name).write_bytes(b"rubbish")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    command = lambda rank: [sys.executable, "-c", READER, port, str(rank), str(tmp_path / str(rank))]
    runs = [subprocess.Popen(command(rank), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    outs = [r.communicate(timeout=120) for r in runs]
    assert [r.returncode for r in runs] == [0, 0], outs
    assert "read [0, 1024]" in outs[0][0] and "read [2048, 3072]" in outs[1][0]


def test_pieces():
    assert piece((3072, 14336), 2) == (384, 14336) and piece((14336, 3072), 4) == (1792, 3072)
    assert piece((64, 64), 4) == (64, 64) and piece((), 4) == () and piece((0, 3), 4) == (1, 3)
    assert piece((7, 1 << 20), 4) == (1, 1 << 20)  # 7 rows do not split into 8
    assert np.prod(piece((256384, 4096), 2)) * 2 <= 64 << 20 and piece((3, 1 << 26), 1) == (1, 1 << 26)


def test_one_array_at_a_time_is_in_memory(tmp_path):
    alive, most = set(), []

    class Array(np.ndarray):
        pass

    def read(i):
        gc.collect()
        x = np.full((256, 1024), i, np.float32).view(Array)
        alive.add(i)
        weakref.finalize(x, alive.discard, i)
        most.append(len(alive))
        return x

    save_arrays(tmp_path / "a", {f"x{i}": Unread((256, 1024), np.dtype(np.float32), functools.partial(read, i)) for i in range(6)})
    assert len(most) == 6 and max(most) <= 2
    found = load_arrays(tmp_path / "a", {"x3": array_shapes(tmp_path / "a")["x3"]})
    assert list(found) == ["x3"] and (found["x3"] == 3).all()


def test_groups_of_arrays_are_read_together(tmp_path):
    arrays = {f"x{i}": np.full((1 << 20,), i, np.uint8) for i in range(4)} | {"large": np.ones((70 << 20,), np.uint8)}
    save_arrays(tmp_path / "a", arrays)
    reader = Reader(tmp_path / "a", array_shapes(tmp_path / "a"))
    for name in ("x1", "large", "x3"):
        np.testing.assert_array_equal(np.asarray(reader.entries[name]), arrays[name])
        assert set(reader.group) == ({"large"} if name == "large" else {"x0", "x1", "x2", "x3"})


def test_arrays_on_devices_keep_their_dtype_and_shape(tmp_path):
    arrays = {
        "bits": np.arange(8, dtype=np.uint8),
        "f8": np.ones((4, 4), ml_dtypes.float8_e4m3fn),
        "one": np.float32(3),
        "none": np.zeros((0, 3)),
    }
    save_arrays(tmp_path / "a", {name: np.asarray(x) for name, x in arrays.items()})
    rows = NamedSharding(make_mesh(1, 4), P("seq"))
    shapes = array_shapes(tmp_path / "a")
    found = load_arrays(tmp_path / "a", {n: jax.ShapeDtypeStruct(shapes[n].shape, shapes[n].dtype, sharding=rows) for n in ("bits", "f8")})
    found |= load_arrays(tmp_path / "a", {n: shapes[n] for n in ("one", "none")})
    for name, x in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[name]), x)
        assert found[name].dtype == x.dtype


# ---- what is refused -----------------------------------------------------------------------------------------------------------------------


def test_one_error_lists_the_mismatches_of_all_parts(tmp_path):
    tensors = {part: drawn(part, "original", TINY) for part in ("transformer", "vae")}
    t, v = tensors["transformer"], tensors["vae"]
    del t["blocks.1.norm3.bias"]
    t["blocks.0.extra.weight"] = np.ones(3, np.float32)
    t["blocks.0.self_attn.q.weight"] = np.ones((64, 32), np.float32)
    v["conv1.bias"] = np.ones(8, np.int64)
    write_safetensors(tmp_path / "t.safetensors", t)
    write_torch(tmp_path / "v.pth", v)
    with pytest.raises(ConversionError) as error:
        convert_as(tmp_path, TINY, tmp_path / "t.safetensors", tmp_path / "v.pth")
    assert {kind: len(lines) for kind, lines in error.value.problems.items()} == {
        "transformer: sources that no row matches": 1, "transformer: wrong shapes": 1, "transformer: targets without a source": 1,
        "vae: wrong dtypes": 1,
    }  # fmt: skip
    assert list(tmp_path.glob("bundle*")) == []


@pytest.mark.parametrize(
    "width, layers, channels, said",
    [(1536, 30, 16, "Wan2.1-T2V-1.3B"), (5120, 40, 36, "Wan2.2-I2V-A14B"), (3072, 30, 48, "Wan2.2-TI2V-5B")],
)
def test_another_family_is_named(tmp_path, width, layers, channels, said):
    tensors = {"patch_embedding.weight": (width, channels, 1, 2, 2), "head.head.weight": (1,)}
    tensors |= {f"blocks.{i}.norm3.bias": (1,) for i in range(layers)}
    source = layouts.SourceFile(tmp_path / "x", "transformer", "original", "", {n: np.empty(s) for n, s in tensors.items()}, {})
    with pytest.raises(ConversionError, match=f"is {said}.*the model to fill is width 64, 2 layers"):
        layouts.check_family(source, TINY)
    if said.endswith("5B"):
        layouts.check_family(source, WAN_5B)
    else:
        with pytest.raises(ConversionError, match=f"is {said}.*the model to fill is Wan2.2-TI2V-5B"):
            layouts.check_family(source, WAN_5B)


@pytest.mark.parametrize("layout, stem", [("original", "conv1 conv2"), ("diffusers", "conv_in post_quant_conv")])
def test_the_vae_of_another_family_is_named(tmp_path, layout, stem):
    stem, latent = stem.split()
    tensors = {f"decoder.{stem}.weight": np.empty((384, 16, 3, 3, 3)), f"{latent}.weight": np.empty((16, 16, 1, 1, 1))}
    source = layouts.SourceFile(tmp_path / "x", "vae", layout, "", tensors, {})
    with pytest.raises(ConversionError, match=r"the VAE of Wan2.1 and A14B \(16 latent channels\), and the model to fill has 48"):
        layouts.check_family(source, WAN_5B)
    tensors |= {"encoder.norm.weight": np.empty(4)}
    assert layouts.fit_vae(WAN_5B, source) == WAN_5B  # an encoder in part tells no width


def test_sources_that_are_refused(tmp_path):
    floats = {"a.b": np.ones(2, np.float32)}
    write_safetensors(tmp_path / "odd.safetensors", floats)
    with pytest.raises(ValueError, match=r"of no known layout: none or several of head\.head\.weight.* \(a\.b, \.\.\.\)"):
        convert_as(tmp_path, TINY, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        convert_as(tmp_path, TINY, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no safetensors and no torch files"):
        convert_as(tmp_path, TINY, tmp_path / "empty")
    lora = written("lora", tmp_path, TINY) / "lora.pt"
    with pytest.raises(ConfigError, match="a LoRA needs the transformer"):
        convert_as(tmp_path, TINY, lora)
    longlive = written("longlive", tmp_path, TINY) / "model_bf16.pt"
    with pytest.raises(ConfigError, match=r"both hold the transformer; name one of them"):
        convert_as(tmp_path, TINY, longlive, longlive)
    with pytest.raises(ValueError, match=r"holds no averaged weights \(generator_ema\) but dtype|generator"):
        convert_as(tmp_path, TINY, longlive, ema=True)
    with pytest.raises(ConversionError, match="sizes of another base"):
        convert_as(tmp_path, replace(TINY, transformer=replace(TINY.transformer, ffn_dim=80)), *another_base(tmp_path), lora)
    packed = drawn("transformer", "original", TINY) | {"blocks.0.ffn.0.quantized_weight_values": np.ones((2, 2), np.uint8)}
    write_safetensors(tmp_path / "packed.safetensors", packed)
    with pytest.raises(ConfigError, match=r"packed 4-bit layers; experiments/quantize\.py"):
        convert_as(tmp_path, TINY, tmp_path / "packed.safetensors")
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    (tmp_path / "google/umt5-xxl/tokenizer.json").write_text("{}")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="the sources hold no weights"):
        convert_as(tmp_path, TINY, tmp_path / "only")
    with pytest.raises(ConfigError, match=r"x\.json does not exist; give a preset"):
        layouts.experiment_of("x.json")
    assert layouts.experiment_of("tiny") == TINY


def another_base(folder):
    random_checkpoint.write("longlive", folder / "narrow", replace(TINY, transformer=replace(TINY.transformer, ffn_dim=80)))
    return (folder / "narrow").iterdir()


def test_a_missing_shard_is_named(tmp_path):
    source = written("wan", tmp_path, TINY)
    sorted(source.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"1 are missing: diffusion_pytorch_model-00002-of-0000\d\.safetensors"):
        convert_as(tmp_path, TINY, source)


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    source = written("longlive", tmp_path, TINY)
    bundle = convert_as(tmp_path, TINY, source)
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        convert.convert([str(source)], bundle)
    calls = itertools.count()

    def fail(path):
        if next(calls) == 0:
            raise OSError("no space left")

    monkeypatch.setattr(convert, "save_large_bundle", lambda *a: fail(a))
    with pytest.raises(OSError, match="no space left"):
        convert_as(tmp_path, TINY, source)
    assert sorted(p.name for p in tmp_path.glob("bundle*")) == ["bundle0"]
    few = lambda path: type("", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", few)
    with pytest.raises(ConfigError, match=r"needs up to 0\.0 GB and 0\.0 GB are free"):
        convert_as(tmp_path, TINY, source)
    with pytest.raises(ConfigError, match=r"lora needs 0\.0 GB and 0\.0 GB are free"):
        written("lora", tmp_path, TINY)


def test_damaged_bundles_are_named(eight, tmp_path):
    folder = shutil.copytree(eight, tmp_path / "copy")
    piece = next((folder / "arrays" / "transformer.blocks.0.ffn.up.weight").glob("0.*"))
    piece.write_bytes(piece.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"copy' is damaged or incomplete .*; copy or convert it again"):
        load_bundle(folder)
    (folder / "arrays" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_bundle(folder)
    other = shutil.copytree(eight, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["transformer"]["ffn_dim"] = 80
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"transformer\.blocks\.1\.ffn\.up\.weight has shape \(96, 64\), needed \(80, 64\)"):
        load_bundle(other)


def test_exports_that_are_refused(eight, tmp_path):
    with pytest.raises(ConfigError, match=r"--part=None: .* holds transformer, vae, text; name one of them"):
        convert.export(eight, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r"has an unknown format; give \.safetensors"):
        convert.export(eight, tmp_path / "x.gguf", "vae")
    (tmp_path / "there.pt").touch()
    with pytest.raises(ConfigError, match="exists; name a new file"):
        convert.export(eight, tmp_path / "there.pt", "vae")
    with pytest.raises(ConfigError, match=r"has no arrays/, so it is not what convert\.py wrote"):
        convert.export(tmp_path, tmp_path / "y.pt", "vae")
    copy = shutil.copytree(eight, tmp_path / "copy")
    (copy / "kinds.json").write_text('{"transformer.blocks.0.ffn.up.weight": {"kind": "FP8"}}')
    with pytest.raises(ConfigError, match="holds quantised weights"):
        convert.export(copy, tmp_path / "z.pt", "transformer")


# ---- beside the weights --------------------------------------------------------------------------------------------------------------------


def test_tokenizer_and_licence_come_along(tmp_path):
    source = written("diffusers", tmp_path, TINY)
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    (source / "LICENSE.txt").write_text("\n  Some Licence\nmore\n")
    bundle = convert_as(tmp_path, TINY, source)
    assert (bundle / "tokenizer" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    record = json.loads((bundle / "record.json").read_text())
    assert record["tokenizer"][0]["name"] == "tokenizer.json" and record["tokenizer"][0]["bytes"] == 18
    assert record["parts"]["vae"]["licence"] == {"README.md": "apache-2.0", "LICENSE.txt": "Some Licence"}
    assert open_tokenizer(str(bundle)) is None  # TINY reads words
    assert open_tokenizer("toy") is None and open_tokenizer("random:wan_5b") is None


def test_the_tokenizer_of_a_bundle(tmp_path, monkeypatch):
    (tmp_path / "b" / "tokenizer").mkdir(parents=True)
    (tmp_path / "b" / "config.json").write_text(json.dumps(dataclasses.asdict(WAN_5B)))
    assert open_tokenizer(str(tmp_path / "b")) is None  # no tokenizer.json
    (tmp_path / "b" / "tokenizer" / "tokenizer.json").touch()
    monkeypatch.setattr(bundles, "Umt5Tokenizer", lambda files, length: (files.name, length))
    assert open_tokenizer(str(tmp_path / "b")) == ("tokenizer", 512)


def test_commands(tmp_path, capsys, monkeypatch):
    source, model = written("wan", tmp_path, TINY), config_file(tmp_path, TINY)
    convert.main(["inspect", str(source / "Wan2.2_VAE.pth")])
    said = capsys.readouterr().out
    assert "vae, original names" in said and "144 tensors" in said and "decoder.head.2.weight" in said
    convert.main(["inspect", *map(str, written("lightvae", tmp_path, PRUNABLE).iterdir())])
    assert "in gen_model" in (said := capsys.readouterr().out) and "beside it: {'dynamic_feature_projection_heads': 2}" in said
    convert.main([str(source), f"--to={tmp_path / 'b'}", f"--model={model}"])
    assert "is ready: longlive_jax.load(" in (said := capsys.readouterr().out) and "licence not stated" in said
    convert.main(["export", str(tmp_path / "b"), f"--to={tmp_path / 'v.pth'}", "--part=vae"])
    assert "144 tensors" in capsys.readouterr().out
    random_checkpoint.main(["lora", f"--to={tmp_path / 'l'}", f"--model={model}", "--rank=2"])
    assert "lora, 0.00 GB of random tensors" in capsys.readouterr().out
    for words, why in ((["inspect"], "takes one file"), (["x.pt"], "say where to write"), (["export", "--to=x"], "takes one folder")):
        with pytest.raises(ConfigError, match=why):
            convert.main(words)
    monkeypatch.setattr(sys, "argv", ["convert.py", "nowhere.pt", "--to=x"])
    with pytest.raises(SystemExit, match=r"error: nowhere\.pt does not exist"):
        convert.run()
    monkeypatch.setattr(sys, "argv", ["random_checkpoint.py", "nothing", "--to=x"])
    with pytest.raises(SystemExit, match="error: unknown layout 'nothing'"):
        random_checkpoint.run()
