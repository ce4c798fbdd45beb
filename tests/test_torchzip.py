"""The reader of torch's files: what it reads, and all that it refuses without executing anything."""

import io
import json
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.convert.torchzip import MAGIC, PROTOCOL, TorchFileError, named_tensors, read_torch
from longlive_jax.convert.writers import WriteError, write_safetensors, write_torch
from tests.shared import golden, shared


def read(path):
    return {name: np.asarray(x) for name, x in named_tensors(read_torch(path), path).items()}


def contents(name):
    """Tensors of a golden file under the names of its npz, and that npz."""
    path = shared("golden", "pt", name)
    return named_tensors(read_torch(path), path), golden(f"pt/{path.stem}.npz")


# ---- the golden files ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, top",
    [
        ("generator.pt", "generator.model."),
        ("generator_bf16.pt", "generator.model."),
        ("generator_with_ema.pt", "generator_ema.model."),
        ("generator_ema_only.pt", "generator_ema.model."),
        ("lora.pt", "generator_lora."),
        ("merged.pt", "generator.model."),
        ("vae.pth", ""),
        ("vae_legacy.pth", ""),
    ],
)
def test_good_files_are_read_exactly(name, top):
    tensors, expected = contents(name)
    notes = json.loads(shared("golden", "pt", "index.json").read_text()).get(name, {})
    found = {n.removeprefix(top).replace("_fsdp_wrapped_module.", ""): x for n, x in tensors.items() if n.startswith(top)}
    assert set(found) == set(expected)
    for n, x in expected.items():
        values = np.asarray(found[n])
        assert values.shape == x.shape == found[n].shape and values.dtype == found[n].dtype, n
        np.testing.assert_array_equal(values.astype(np.float32), x, err_msg=n)
    if notes.get("dtype"):
        assert {str(x.dtype) for x in found.values()} == {notes["dtype"]}


def test_dtypes_views_and_shared_storages():
    dtypes = json.loads(shared("golden", "pt", "index.json").read_text())["vae.pth"]["dtypes"]
    for name in ("vae.pth", "vae_legacy.pth"):
        tensors, _ = contents(name)
        assert {n: f"torch.{x.dtype}" for n, x in tensors.items()} == dtypes
        assert tensors["conv1.weight"].strides is not None and tensors["scale"].shape == ()
        assert len({(x.path, x.offset) for x in tensors.values()}) < len(tensors)  # views begin where their storage does


def test_everything_beside_the_tensors_is_kept():
    tree = read_torch(shared("golden", "pt", "merged.pt"))
    assert tree["checkpoint_format"] == "longlive_generator_merged_lora" and tree["merged_lora"] is True
    tree = read_torch(shared("golden", "pt", "generator_with_ema.pt"))
    assert set(tree) == {"generator", "generator_ema", "generator_optimizer", "step"}


@pytest.mark.parametrize(
    "name, why",
    [
        ("truncated.pt", r"truncated\.pt is truncated or damaged: 41030 bytes"),
        ("short_record.pt", r"storage '0' has 764 bytes and needs 768 \(192 x float32\)"),
        ("malicious.pt", r"names posix\.system, and only tensors .* nothing of it was executed"),
    ],
)
def test_bad_files_are_refused(name, why, monkeypatch):
    monkeypatch.setattr("os.system", lambda command: pytest.fail("executed"))
    with pytest.raises(TorchFileError, match=why):
        read_torch(shared("golden", "pt", name))


# ---- written here --------------------------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": RNG.normal(size=(3, 4)).astype(np.float32),
    "b.c": RNG.normal(size=(5,)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(-7, np.int64),
    "none": np.zeros((0, 3), np.float16),
    "flags": np.array([True, False]),
}


def test_what_is_written_comes_back(tmp_path):
    write_torch(tmp_path / "x.pt", {"generator": ARRAYS, "step": 70_000, "note": "é", "nothing": None, "minus": -1})
    tree = read_torch(tmp_path / "x.pt")
    assert (tree["step"], tree["note"], tree["nothing"], tree["minus"]) == (70_000, "é", None, -1)
    found = read(tmp_path / "x.pt")
    assert set(found) == {f"generator.{n}" for n in ARRAYS}
    for n, x in ARRAYS.items():
        assert found[f"generator.{n}"].dtype == x.dtype and found[f"generator.{n}"].shape == x.shape
        assert found[f"generator.{n}"].tobytes() == x.tobytes()
    assert [f.name for f in tmp_path.iterdir()] == ["x.pt"]


class Stub(pickle.Unpickler):
    """The standard unpickler with tuples in place of torch's functions: shows that what is written is a pickle that torch can read."""

    def find_class(self, module, name):
        return (lambda *args: (name, *args)) if name.startswith("_rebuild") else dict if name == "OrderedDict" else name

    def persistent_load(self, key):
        return key


def test_what_is_written_is_a_whole_pickle(tmp_path):
    write_torch(tmp_path / "x.pt", {"generator": ARRAYS, "step": 3})
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        assert file.testzip() is None
        tree = Stub(io.BytesIO(file.read("x/data.pkl"))).load()
        sizes = {info.filename: info.file_size for info in file.infolist()}
    storage = ("storage", "FloatStorage", "0", "cpu", 12)
    assert tree["step"] == 3 and tree["generator"]["a"] == ("_rebuild_tensor_v2", storage, 0, (3, 4), (4, 1), False, {})
    assert sizes["x/data/0"] == 48 and tree["generator"]["scalar"][3:5] == ((), ())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    for write, what in ((write_torch, "x.pt"), (write_safetensors, "x.safetensors")):
        with pytest.raises(WriteError, match=r"tensor 'odd' is complex64; the format takes .*bfloat16"):
            write(tmp_path / what, {"fine": ARRAYS["a"], "odd": np.ones(2, np.complex64)})

    class Broken:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise OSError("the source went away")

    for write in (write_torch, write_safetensors):
        with pytest.raises(OSError, match="went away"):
            write(tmp_path / "x.pt", {"a": ARRAYS["a"], "b": Broken()})
    assert list(tmp_path.iterdir()) == []


def archive(path, data, records=(), method=zipfile.ZIP_STORED, root="x/"):
    """A zip container with the pickle ``data`` and ``records``: name -> bytes."""
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in {"data.pkl": data, **dict(records)}.items():
            out.writestr(root + name, content)
    return path


FLOATS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"  # storage '0' of 4 elements


def view(storage=FLOATS, offset=0, shape=(2, 2), strides=(2, 1), function=b"ctorch._utils\n_rebuild_tensor_v2\n", extra=b""):
    row = lambda xs: b"(" + b"".join(b"J" + struct.pack("<i", x) for x in xs) + b"t"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"".join((function, b"(", storage, b"J", struct.pack("<i", offset), row(shape), row(strides), hooks, extra, b"tR"))


def of(tensor):
    return b"\x80\x02}X\x01\x00\x00\x00t" + tensor + b"s."


STORED = {"data/0": np.arange(4, dtype=np.float32).tobytes(), "byteorder": b"little"}


def test_views_of_a_storage(tmp_path):
    for kwargs, expected in (
        ({}, [[0, 1], [2, 3]]),
        ({"strides": (1, 2)}, [[0, 2], [1, 3]]),
        ({"offset": 1, "shape": (3,), "strides": (1,)}, [1, 2, 3]),
        ({"offset": 1, "shape": (2,), "strides": (2,)}, [1, 3]),
        ({"shape": (3, 2), "strides": (0, 1)}, [[0, 1]] * 3),
        ({"offset": 3, "shape": (), "strides": ()}, 3),
    ):
        found = read(archive(tmp_path / "x.pt", of(view(**kwargs)), STORED))["t"]
        np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_parameters_and_narrow_types(tmp_path):
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + view() + b"\x88ccollections\nOrderedDict\n)RtR"
    assert read(archive(tmp_path / "x.pt", of(parameter), STORED))["t"].shape == (2, 2)
    untyped = FLOATS.replace(b"ctorch\nFloatStorage\n", b"ctorch.storage\nUntypedStorage\n")
    narrow = view(untyped, shape=(4,), strides=(1,), function=b"ctorch._utils\n_rebuild_tensor_v3\n", extra=b"ctorch\nfloat8_e4m3fn\n")
    values = np.array([0.5, -1, 2, 448], ml_dtypes.float8_e4m3fn)
    found = read(archive(tmp_path / "y.pt", of(narrow), {"data/0": values.tobytes()}))["t"]
    assert found.dtype == values.dtype and found.tobytes() == values.tobytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_of_every_protocol(tmp_path, protocol):
    tree = {"a": [1, -(2**70), 2.5, None, True], "b": (1, (2, 3), ("x", {}, [])), 3: b"bytes" if protocol > 2 else 3, "long": "é" * 300}
    tree["again"] = tree["a"]
    assert read_torch(archive(tmp_path / "x.pt", pickle.dumps(tree, protocol))) == tree


def test_shared_and_endless_containers_come_once(tmp_path):
    endless = []
    endless.append(endless)
    path = archive(tmp_path / "x.pt", pickle.dumps({"a": endless, "b": endless}, 2))
    assert named_tensors(read_torch(path), path) == {}
    inner = view()
    data = b"\x80\x02}(X\x01\x00\x00\x00a}X\x01\x00\x00\x00b" + inner + b"sX\x03\x00\x00\x00a.b" + inner + b"u."
    path = archive(tmp_path / "y.pt", data, STORED)
    with pytest.raises(TorchFileError, match=r"two tensors called 'a\.b'"):
        named_tensors(read_torch(path), path)


REFUSED = {
    "a function": (pickle.dumps(pathlib.PurePosixPath("x"), 2), "names pathlib"),
    "a function by stack": (pickle.dumps(print, 4), r"names builtins\.print"),
    "a module": (b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.", r"names torch\.nn\.modules\.linear\.Linear"),
    "a name alone": (b"\x80\x02ctorch\nFloatStorage\n.", r"holds the name torch\.FloatStorage and no tensors"),
    "an inert name that is called": (b"\x80\x02ctorch\nFloatStorage\n)R.", r"calls torch\.FloatStorage"),
    "a value that is called": (b"\x80\x02K\x01)R.", "calls 1"),
    "an old instance": (b"(icollections\nOrderedDict\n.", "uses INST"),
    "a new object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses NEWOBJ"),
    "a set": (pickle.dumps({1, 2}, 4), "uses EMPTY_SET"),
    "attributes of a list": (b"\x80\x02]}b.", "no dict to fill"),
    "an extension": (b"\x80\x02\x82\x01.", "uses EXT1"),
    "no end": (b"\x80\x02}", "damaged pickle"),
    "nothing on the stack": (b"\x80\x02.", "damaged pickle"),
    "a tuple of nothing": (b"\x80\x02K\x01\x86.", "the stack is too short"),
    "no mark": (b"\x80\x02K\x01t.", "there is no mark"),
    "an odd list of items": (b"\x80\x02}(K\x01u.", "damaged pickle"),
    "a key that is a list": (b"\x80\x02}]K\x01s.", "damaged pickle"),
    "a memory that is not there": (b"\x80\x02h\x05.", "damaged pickle"),
    "text of more bytes than there are": (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged pickle"),
    "no opcode": (b"\x80\x02\xff.", "damaged pickle"),
    "another kind of storage": (of(view(FLOATS.replace(b"storage", b"storagX"))), "unknown kind 'storagX'"),
    "a storage that is not there": (of(view(FLOATS.replace(b"\x01\x00\x00\x000X", b"\x01\x00\x00\x007X"))), "lacks storage '7'"),
    "a view beyond its storage": (of(view(offset=1)), "reaches element 4 of a storage of 4"),
    "a negative stride": (of(view(offset=3, strides=(-2, -1))), "with strides"),
    "strides of another rank": (of(view(strides=(1,))), "with strides"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_is_refused(tmp_path, what):
    data, why = REFUSED[what]
    with pytest.raises(TorchFileError, match=why):
        read_torch(archive(tmp_path / "x.pt", data, STORED))


def test_other_archives_are_refused(tmp_path):
    good = of(view())
    with pytest.raises(TorchFileError, match=r"record 'x/data\.pkl' is compressed"):
        read_torch(archive(tmp_path / "a.pt", good, STORED, zipfile.ZIP_DEFLATED))
    with pytest.raises(TorchFileError, match="no torch file of tensors but another zip archive"):
        read_torch(archive(tmp_path / "b.pt", good, STORED, root="x/y/"))
    with pytest.raises(TorchFileError, match="no torch file of tensors but another zip archive"):
        read_torch(archive(tmp_path / "c.pt", good, STORED | {"code/model.py": b"def forward(): pass"}))
    with pytest.raises(TorchFileError, match="big-endian"):
        read_torch(archive(tmp_path / "d.pt", good, STORED | {"byteorder": b"big"}))
    path = archive(tmp_path / "e.pt", good, STORED)
    moved = path.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1)
    path.write_bytes(moved)
    with pytest.raises(TorchFileError, match="does not lie where the table says"):
        read_torch(path)


# ---- the format before torch 1.6 -----------------------------------------------------------------------------------------------------------


def sequence(data, keys=("0",), storages=None, magic=MAGIC, system=None):
    storages = struct.pack("<q", 4) + STORED["data/0"] if storages is None else storages
    data = data.replace(b"cpuK\x04t", b"cpuK\x04Nt")  # a storage's fields end with its view, always None
    parts = (magic, PROTOCOL, system or {"little_endian": True, "protocol_version": PROTOCOL})
    return b"".join(pickle.dumps(x, 2) for x in parts) + data + pickle.dumps(list(keys), 2) + storages


def test_the_older_format(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(sequence(of(view())))
    np.testing.assert_array_equal(read(path)["t"], [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "not a torch file"),
        (b"no pickle at all", "not a torch file"),
        (sequence(of(view()), magic=1), "not a torch file"),
        (sequence(of(view()), system={"little_endian": False}), "not a torch file"),
        (sequence(of(view()))[:-1], "truncated or damaged: storage '0'"),
        (sequence(of(view()), storages=struct.pack("<q", 3) + bytes(12)), "storage '0' of 3 elements"),
        (sequence(of(view()), keys=()), "lacks storage '0'"),
        (sequence(of(view()), keys=("0", "1"), storages=struct.pack("<q", 4) + bytes(30)), "truncated or damaged: storage '1'"),
        (sequence(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."), r"names posix\.system"),
    ],
)
def test_older_files_that_are_refused(tmp_path, content, why):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(TorchFileError, match=why):
        read_torch(tmp_path / "x.pth")
