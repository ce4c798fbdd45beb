"""Notebooks run from top to bottom, here on a tiny untrained model set after the cell tagged ``parameters``; none is stored with outputs."""

import base64
import io
import pathlib
import re

import av
import nbformat
import pytest
from nbclient import NotebookClient

from longlive_jax.checkpoint import save_bundle
from longlive_jax.config import TINY
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.tree import flat_params
from tests import run_folder

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHUNKS = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder that ``longlive_jax.load`` reads."""
    folder = tmp_path_factory.mktemp("bundle")
    bundle = random_bundle(TINY)
    parts = {"transformer": bundle.transformer, "vae": bundle.vae, "text": bundle.text}
    save_bundle(folder, TINY, {name: flat_params(part) for name, part in parts.items()}, {"steps": 0})
    return folder


def cells(notebook, kind="code"):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells(notebook))
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in notebook.cells) == 1


def executed(path, folder, **parameters):
    """The notebook after a run in ``folder``. Every parameter must be one that the notebook has."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    assert set(parameters) <= set(re.findall(r"^(\w+) = ", cell.source, re.M))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def embedded_frames(output):
    """Frames in the player that a cell shows."""
    (data,) = re.findall(r"data:video/mp4;base64,([^\"]+)", output["data"]["text/html"])
    with av.open(io.BytesIO(base64.b64decode(data))) as file:
        return sum(1 for _ in file.decode(video=0))


@pytest.mark.slow
def test_stream_a_video(model, tmp_path, monkeypatch):
    """Six thumbnails a chunk, both films whole, and a prompt asked for only after the frames before it were seen."""
    for name, value in {"PYTHONPATH": str(ROOT), **run_folder.QUICK}.items():
        monkeypatch.setenv(name, value)
    notebook = executed(ROOT / "notebooks/01_stream_a_video.ipynb", tmp_path, MODEL=str(model), CHUNKS=CHUNKS)
    outputs = [output for cell in cells(notebook) for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5 * CHUNKS
    films = [output for output in outputs if "video/mp4" in output.get("data", {}).get("text/html", "")]
    frames = [TINY.pixel_frames(shots * CHUNKS * TINY.stream.chunk) for shots in (1, 2, 3)]
    assert [embedded_frames(film) for film in films] == [frames[1], frames[2]]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert re.findall(r"(\d+) frames seen", said) == [str(frames[0]), str(frames[1])]
    assert ", a cut" in said
    assert list(tmp_path.iterdir()) == []
