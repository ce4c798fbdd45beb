"""Verify real weights: what a user who has them runs once, and sends back the folder that it writes (a few MB, no weights).

    experiments/verify.py FOLDER [--out=outputs/verify] [--sources=PATH ...] [--prompt=TEXT] [--chunks=3] [--steps=4] [--weights-only]

FOLDER is what experiments/convert.py wrote, or any bundle. The report holds: where the files came from, their hashes again if the originals are
given, statistics and a hash of every tensor, statistics of the text embedding and of the first chunk from noise that is the same everywhere,
and one video with its contact sheet.
"""

import argparse
import dataclasses
import hashlib
import pathlib
import sys
import time

import jax
import numpy as np

import longlive_jax
from longlive_jax.arrays import Reader, array_shapes
from longlive_jax.checkpoint import ARRAYS, RECORD, is_large, read_experiment, read_json, read_weights
from longlive_jax.config import WAN_5B, ConfigError, require
from longlive_jax.convert.layouts import fingerprint, sources_in
from longlive_jax.metrics import provenance
from longlive_jax.streaming.bundles import folder_of, open_tokenizer
from longlive_jax.streaming.pictures import Album
from longlive_jax.streaming.writer import OutputError, VideoWriter, check_writable, write_record

PROMPTS = {  # by tokenizer
    "umt5": "A red panda walks along a mossy log in a misty forest at dawn, soft light, shallow depth of field.",
    "words": "A red star bounces in a meadow.",
}
PUBLISHED = {  # bytes of published files (spec/names.md §4)
    "diffusion_pytorch_model-00001-of-00003.safetensors": 9_825_014_472,
    "diffusion_pytorch_model-00002-of-00003.safetensors": 9_995_661_736,
    "diffusion_pytorch_model-00003-of-00003.safetensors": 178_558_176,
    "models_t5_umt5-xxl-enc-bf16.pth": 11_361_920_418,
    "Wan2.2_VAE.pth": 2_818_839_170,
    "spiece.model": 4_548_313,
}
BLOCK = 1 << 24  # elements that statistics take at once


def statistics(x):
    """Mean, deviation, extremes, non-finite and zero entries of an array, and SHA-256 of its bytes."""
    x = np.ascontiguousarray(x)
    flat, total, square, low, high, strange, zeros = x.reshape(-1), 0.0, 0.0, np.inf, -np.inf, 0, 0
    for at in range(0, flat.size, BLOCK):
        part = flat[at : at + BLOCK].astype(np.float32)
        fine = part[np.isfinite(part)]
        strange, zeros = strange + part.size - fine.size, zeros + int((fine == 0).sum())
        if fine.size:
            total, square = total + float(fine.sum(dtype=np.float64)), square + float((fine * fine).sum(dtype=np.float64))
            low, high = min(low, float(fine.min())), max(high, float(fine.max()))
    count = max(1, flat.size - strange)
    mean = total / count
    numbers = {"mean": mean, "std": max(0.0, square / count - mean**2) ** 0.5, "min": low, "max": high} if low <= high else {}
    about = {"shape": list(x.shape), "dtype": str(x.dtype), "nonfinite": strange, "zeros": zeros, **numbers}
    return about | {"sha256": hashlib.sha256(flat.view(np.uint8)).hexdigest()}


def weights(folder):
    """``part.path`` -> statistics of every tensor of a bundle, and what is wrong with some of them."""
    arrays = Reader(folder / ARRAYS, array_shapes(folder / ARRAYS)).entries if is_large(folder) else read_weights(folder)
    out, wrong = {}, []
    for name in sorted(arrays):
        x = out[name] = statistics(np.asarray(arrays[name]))
        if x["nonfinite"]:
            wrong.append(f"{name} has {x['nonfinite']} entries that are not finite")
        elif name.endswith("weight") and x.get("std") == 0 and np.prod(x["shape"]) > 1:
            wrong.append(f"{name} is constant")
    return out, wrong


def files(record, paths, published):
    """The hashes of the files at ``paths`` against those of the record, and what differs. ``published``: name -> bytes."""
    known = {f["name"]: f for part in record.get("parts", {}).values() for f in part["files"]}
    known |= {f["name"]: f for f in record.get("tokenizer", [])}
    sizes = {name: (f["bytes"], published.get(name, f["bytes"])) for name, f in known.items()}
    wrong = [f"{name} has {found} bytes, the published file {wanted}" for name, (found, wanted) in sizes.items() if found != wanted]
    inside = [p for path in map(pathlib.Path, paths) for p in (sorted(path.rglob("*")) if path.is_dir() else sources_in(path))]
    again = [fingerprint(p) for p in inside if p.is_file() and p.name in known]
    wrong += [f"{f['name']} is another file now than when it was converted" for f in again if f["sha256"] != known[f["name"]]["sha256"]]
    return again, wrong


def sample(name, out, prompt, chunks, steps, seed=0):
    """Statistics of the text embedding and of the first chunk, and a video of ``chunks`` in ``out``."""
    bundle = longlive_jax.load(name)
    e, settings = bundle.experiment, {} if steps is None else {"steps": steps}
    session = longlive_jax.Session(bundle, tokenizer=open_tokenizer(name), **settings)
    shape = (1, chunks * e.stream.chunk, *e.grid, e.transformer.channels)
    noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    readable = bundle.text is not None and session.tokenize is not None
    rows = np.random.default_rng(seed + 1).standard_normal((1, e.transformer.text_len, e.transformer.text_dim), np.float32)
    text, began = session.read(prompt) if readable else session.read_embeddings(0.1 * rows), time.perf_counter()
    state, z = session.step(session.start(seed), text, noise=noise[:, : e.stream.chunk])
    z = np.asarray(jax.device_get(z), np.float32)
    report = {"prompt": prompt if readable else None, "seed": seed, "steps": session.experiment.sampler.steps, "dtype": e.dtype}
    report |= {"first_chunk": statistics(z), "first_chunk_seconds": time.perf_counter() - began}
    report["channels"] = {"mean": z.mean((0, 1, 2, 3)).tolist(), "std": z.std((0, 1, 2, 3)).tolist()}
    report["frames"] = [float(np.abs(z[:, i + 1] - z[:, i]).mean()) for i in range(z.shape[1] - 1)]
    report["text_keys"] = statistics(np.asarray(jax.device_get(jax.tree.leaves(text)[0]), np.float32))
    del state
    if bundle.vae is not None and readable:
        report["video"] = film(session, out, prompt, chunks, seed, noise)
    return report


def film(session, out, prompt, chunks, seed, noise):
    """``out/video.mp4`` and its contact sheet; statistics of the pixels."""
    video, album, pixels = session.experiment.video, Album(), []
    with VideoWriter(out / "video.mp4", fps=video.fps, height=video.height, width=video.width) as writer:
        for chunk in session.stream([prompt] * chunks, seed=seed, noise=noise):
            writer.write(chunk.frames)
            album.add(chunk.frames, prompt if chunk.index == 0 else None)
            x = chunk.frames.astype(np.float32)
            pixels.append({"mean": float(x.mean()), "std": float(x.std()), "change": float(np.abs(np.diff(x, axis=0)).mean())})
            print(f"  chunk {chunk.index + 1}/{chunks}: {chunk.denoise_seconds:.2f} s, pixels {pixels[-1]}", flush=True)
    album.save(out / "video.png")
    return pixels


def verify(name, out, *, sources=(), prompt=None, chunks=3, steps=4, weights_only=False):
    """The report on the bundle ``name``, also written to ``out/verify.json``."""
    require(chunks > 0, f"--chunks={chunks} must be positive")
    folder, out = pathlib.Path(str(folder_of(name))), check_writable(pathlib.Path(out))
    record, e = read_json(folder, RECORD), read_experiment(folder)
    again, wrong = files(record, sources, PUBLISHED if e.transformer == WAN_5B.transformer else {})
    tensors, strange = weights(folder)
    report = {"what": "Verified by experiments/verify.py", "made_with": provenance(), "record": record, "experiment": dataclasses.asdict(e)}
    report |= {"sources": again, "tensors": tensors, "wrong": wrong + strange}
    write_record(out / "verify.json", report)  # what a run that fails below leaves
    parameters = sum(int(np.prod(x["shape"])) for x in tensors.values())
    print(f"{len(tensors)} tensors, {parameters:,} parameters, {len(again)} source files hashed again")
    if not weights_only:
        report["sample"] = sample(name, out, prompt or PROMPTS[e.text.tokenizer], chunks, steps)
        write_record(out / "verify.json", report)
    for line in report["wrong"]:
        print(f"wrong: {line}")
    return report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what experiments/convert.py wrote, or any bundle")
    parser.add_argument("--out", default="outputs/verify", help="folder of the report")
    parser.add_argument("--sources", nargs="*", default=[], help="the original files or their folder, to be hashed again")
    parser.add_argument("--prompt", help="of the video")
    parser.add_argument("--chunks", type=int, default=3, help="of the video")
    parser.add_argument("--steps", type=int, default=4, help="of the solver")
    parser.add_argument("--weights-only", action="store_true", help="no sampling")
    args = vars(parser.parse_args(argv))
    name, out = args.pop("folder"), args.pop("out")
    report = verify(name, out, **args)
    print(f"send back {out}: verify.json" + (", video.mp4, video.png" if "video" in report.get("sample", {}) else ""))
    return 1 if report["wrong"] else 0


def run():
    try:
        sys.exit(main())
    except (ConfigError, OutputError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
