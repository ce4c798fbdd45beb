"""The laws of docs/design.md, read off the source. ``LAYERS`` is the one place that states which part may import which."""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "longlive_jax"

# From the bottom up. A part may import itself and what stands in earlier rows, also from inside a function; parts of one row are strangers.
LAYERS = (
    ("config", "tree", "arrays", "tensorfile"),
    ("config_train", "sharding", "quant.formats", "ops.dispatch"),
    ("quant.leaves", "kernels"),
    ("ops",),
    ("model",),
    ("diffusion", "quant.balance", "quant.rewrite"),
    ("quant.lora",),
    ("state", "checkpoint", "metrics", "convert"),
    ("data",),
    ("streaming",),
    ("longlive_jax",),  # the public names
    ("configs",),
    ("experiments",),
)
EMPTY = {"quant", "assets"}  # packages whose __init__ holds nothing

PACKAGE_LINES = 13800  # low precision, its fused kernels and memory, the conversion of checkpoints and every way of sampling are in it
FILE_LINES = 450
FUNCTION_LINES = 60
LONG_FUNCTIONS = {  # name in file -> why it is one piece
    "experiments/train_ar.py:train": "the loop, read from top to bottom",
}
LONG_FILES = {}  # file -> why it is one piece
ATTRIBUTES_BY_NAME = ("getattr", "hasattr", "setattr", "delattr")  # at most one use per 1,000 lines
COLLECTIVES = ("all_to_all", "all_gather", "psum", "psum_scatter", "ppermute", "shard_map", "pcast")  # in sharding.py alone
UNFINISHED = re.compile("TO" + "DO|FIX" + r"ME|\bXX" + r"X\b|NotImplemented" + "Error")
MODES = {"training", "is_training", "train", "causal", "is_causal", "sequence_parallel", "deterministic"}  # law 1: a mode is data, not a branch
MACHINE = re.compile(r"(?<![\w.~}])/(?:work|root|mnt|Users|home)/")
HOSTS = re.compile(r"https?://([\w.-]+)")
KNOWN_HOSTS = {"arxiv.org", "github.com", "huggingface.co", "keepachangelog.com", "semver.org", "www.apache.org"}
TEXT = {".py", ".md", ".toml", ".txt", ".ipynb", ".json", ".yml", ".yaml", ".sh", ".cfg", ""}


def sources(*folders):
    files = sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))
    assert files, f"no source in {folders}"
    return {str(f.relative_to(ROOT)): f.read_text() for f in files}


def tracked():
    """Paths that git tracks; skips where this is no checkout."""
    try:
        out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in out.split("\0") if name and (ROOT / name).is_file()]


# ---- imports -------------------------------------------------------------------------------------------------------------------------------


def part_of(module):
    """The part a dotted module belongs to, the longest match in ``LAYERS``; ``longlive_jax.model.rope`` -> ``model``."""
    name = module.removeprefix("longlive_jax.")
    known = [part for row in LAYERS for part in row if name == part or name.startswith(part + ".")]
    return max(known, key=len) if known else name.split(".")[0]


def module_of(path):
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported(source, modules):
    """Modules of this project that ``source`` imports anywhere in it, as dotted names."""
    ours = ("longlive_jax", "experiments", "configs", "tests")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the whole name"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in whole]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in ours)


def upward_imports(files):
    rank = {part: i for i, row in enumerate(LAYERS) for part in row}
    modules, bad = {module_of(path) for path in files}, []
    for path, source in files.items():
        own = part_of(module_of(path))
        if own in EMPTY and not source.strip():
            continue
        if own not in rank:
            bad.append(f"{path}: part {own!r} has no row in LAYERS")
            continue
        for line, name in imported(source, modules):
            other = part_of(name)
            if other != own and rank.get(other, len(LAYERS)) >= rank[own]:
                bad.append(f"{path}:{line}: {own} imports {other}")
    return bad


def import_cycles(files):
    """Cycles between modules, inner imports included."""
    modules = {module_of(path): source for path, source in files.items()}
    edges = {m: {name for _, name in imported(source, modules) if name != m} for m, source in modules.items()}
    bad, state = [], {}

    def visit(m, path):
        state[m] = "open"
        for other in sorted(edges.get(m, ())):
            if state.get(other) == "open":
                bad.append(" -> ".join((*path[path.index(other) :], other)))
            elif other not in state:
                visit(other, (*path, other))
        state[m] = "done"

    for m in modules:
        if m not in state:
            visit(m, (m,))
    return bad


def test_imports_go_one_way():
    files = sources("longlive_jax", "experiments", "configs")
    assert upward_imports(files) == []
    assert import_cycles(files) == []


# ---- banned patterns -----------------------------------------------------------------------------------------------------------------------


def called(node):
    """The dotted name that a node spells, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{called(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def banned(path, source):
    """Violations of the laws that hold for one file of the package or of the scripts."""
    bad = []
    inside = path.startswith("longlive_jax/")
    for node in ast.walk(ast.parse(source)):
        say = lambda text, node=node: bad.append(f"{path}:{node.lineno}: {text}")
        name = called(node)
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(t is None or called(t) in ("Exception", "BaseException") for t in caught):
                say("catches everything; name the exceptions")
        elif isinstance(node, ast.Global):
            say("global; return the state")
        elif name in ("os.environ", "os.getenv", "os.putenv") and inside:
            say("reads the environment; pass an argument")
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and {"environ", "getenv"} & {a.name for a in node.names} and inside:
            say("reads the environment; pass an argument")
        elif re.fullmatch(r"nnx\.(jit|grad|value_and_grad|scan|vmap|remat|cond)", name):
            say(f"{name}; modules are pytrees, use the function of jax")
        elif isinstance(node, ast.Attribute) and node.attr in COLLECTIVES and inside and path != "longlive_jax/sharding.py":
            say(f"{node.attr} outside sharding.py; use local, frames_to_heads, heads_to_frames")
        elif isinstance(node, ast.ClassDef) and {called(b).split(".")[-1] for b in node.bases} & {"VideoTransformer", "VAE", "TextEncoder"}:
            say("subclass of a model; what a mode changes is data")
        elif isinstance(node, ast.If | ast.IfExp) and path.startswith("longlive_jax/model/"):
            modes = {called(n).split(".")[-1] for n in ast.walk(node.test)} & MODES
            if modes:
                say(f"branch on {', '.join(sorted(modes))}; what a mode changes is data")
    for number, line in enumerate(source.splitlines(), 1):
        if UNFINISHED.search(line):
            bad.append(f"{path}:{number}: unfinished: {line.strip()}")
    return bad


def attributes_by_name(source):
    return sum(isinstance(n, ast.Call) and called(n.func) in ATTRIBUTES_BY_NAME for n in ast.walk(ast.parse(source)))


def too_long(path, source):
    bad = []
    if (lines := len(source.splitlines())) > FILE_LINES and path not in LONG_FILES:
        bad.append(f"{path}: {lines} lines; split it")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES and f"{path}:{node.name}" not in LONG_FUNCTIONS:
                bad.append(f"{path}:{node.lineno}: {node.name} has {lines} lines; split it")
    return bad


def test_nothing_banned():
    files = sources("longlive_jax", "experiments", "configs", "tests")
    assert [b for path, source in files.items() for b in banned(path, source)] == []


def test_attributes_by_name_are_rare():
    files = sources("longlive_jax")
    lines = sum(len(s.splitlines()) for s in files.values())
    uses = {path: n for path, source in files.items() if (n := attributes_by_name(source))}
    print(f"{sum(uses.values())} uses of {'/'.join(ATTRIBUTES_BY_NAME)} in {lines} lines: {uses}")
    assert sum(uses.values()) * 1000 <= lines, uses


def test_sizes():
    files = sources("longlive_jax", "experiments", "configs")
    assert [b for path, source in files.items() for b in too_long(path, source)] == []
    lines = sum(len(s.splitlines()) for path, s in files.items() if path.startswith("longlive_jax/"))
    print(f"{lines} lines in the package")
    assert lines <= PACKAGE_LINES


def test_every_exception_from_a_size_is_needed():
    """A name on a list of exceptions that no longer needs to be there is taken off."""
    for name in LONG_FUNCTIONS:
        path, function = name.split(":")
        nodes = [n for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef) and n.name == function]
        assert any(n.end_lineno - n.lineno + 1 > FUNCTION_LINES for n in nodes), name
    for name in LONG_FILES:
        assert len((ROOT / name).read_text().splitlines()) > FILE_LINES, name


# ---- scripts -------------------------------------------------------------------------------------------------------------------------------


def commandless(files):
    """Experiments whose docstring has no command, neither itself nor in the config that it names."""
    bad = []
    for path, source in files.items():
        text, own = ast.get_docstring(ast.parse(source)) or "", path.split("/")[-1]
        text += "".join(ast.get_docstring(ast.parse(files.get(config, ""))) or "" for config in re.findall(r"configs/\w+\.py", text))
        if path.startswith("experiments/") and not re.search(rf"experiments/{own}\b", text):
            bad.append(f"{path}: the docstring does not say the command")
        if path.startswith("configs/") and "experiments/" not in text:
            bad.append(f"{path}: the docstring does not say the command")
    return bad


def test_every_script_says_its_command():
    assert commandless(sources("experiments", "configs")) == []


# ---- what is tracked -----------------------------------------------------------------------------------------------------------------------


def foreign(text):
    """Machine paths and unknown hosts in ``text``."""
    return sorted({m.group() for m in MACHINE.finditer(text)} | {h for h in HOSTS.findall(text) if h not in KNOWN_HOSTS})


def test_tracked_files_name_no_machine():
    own = {"tests/test_laws.py", "tests/test_metrics.py"}  # this file, and the test that paths are taken out of records
    texts = {name: (ROOT / name).read_text() for name in tracked() if pathlib.Path(name).suffix in TEXT and name not in own}
    assert {name: found for name, text in texts.items() if (found := foreign(text))} == {}


def test_no_lock_file_and_nothing_large():
    names = tracked()
    assert [n for n in names if n.endswith(".lock") or n.split("/")[-1].startswith("requirements")] == []
    assert [n for n in names if (ROOT / n).stat().st_size > 16 << 20] == []


# ---- the laws can fail ---------------------------------------------------------------------------------------------------------------------

PLANTED = {
    "longlive_jax/model/a.py": "def f():\n    from longlive_jax.streaming import session\n",
    "longlive_jax/ops/b.py": "import longlive_jax.model.layers\n",
    "longlive_jax/state.py": "from longlive_jax import metrics\n",
    "longlive_jax/metrics.py": "",
    "longlive_jax/data/c.py": "from longlive_jax.data import d\n",
    "longlive_jax/data/d.py": "def f():\n    import longlive_jax.data.c\n",
    "longlive_jax/new/e.py": "x = 1\n",
    "longlive_jax/tree.py": "from experiments import stream\n",
}


def test_planted_imports_are_found():
    found = upward_imports(PLANTED)
    expected = ["model imports streaming", "ops imports model", "state imports metrics", "'new' has no row", "tree imports experiments"]
    assert len(found) == len(expected), found
    for text in expected:
        assert any(text in line for line in found), text
    assert import_cycles(PLANTED) == ["longlive_jax.data.c -> longlive_jax.data.d -> longlive_jax.data.c"]


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept Exception:\n    pass\n",
        "try:\n    f()\nexcept (ValueError, BaseException):\n    pass\n",
        "try:\n    f()\nexcept:\n    pass\n",
        "def f():\n    global x\n    x = 1\n",
        "import os\nx = os.environ['A']\n",
        "import os\nx = os.getenv('A')\n",
        "from os import environ\n",
        "step = nnx.jit(f)\n",
        "y = jax.lax.all_to_all(x, 'seq', 0, 1)\n",
        "class CausalTransformer(VideoTransformer):\n    pass\n",
        "def f(self, x):\n    if self.training:\n        return x\n",
        "y = a if config.causal else b\n",
        "x = 1  # TO" + "DO: later\n",
        "raise NotImplemented" + "Error\n",
    ],
)
def test_planted_violations_are_found(source):
    assert len(banned("longlive_jax/model/planted.py", source)) == 1


def test_what_resembles_a_violation_is_none():
    fine = "try:\n    f()\nexcept (OSError, ValueError):\n    raise\nif memory is None:\n    x = 'environ'\nglobal_sink = 8\n"
    assert banned("longlive_jax/model/fine.py", fine) == []


def test_planted_sizes_and_names_are_found():
    assert attributes_by_name("x = getattr(a, 'b')\nif hasattr(a, 'c'):\n    setattr(a, 'c', 1)\n") == 3
    assert len(too_long("longlive_jax/x.py", "x = 1\n" * (FILE_LINES + 1))) == 1
    assert len(too_long("longlive_jax/x.py", "def f():\n" + "    x = 1\n" * FUNCTION_LINES)) == 1
    assert commandless({"experiments/a.py": '"""Does a thing."""\n', "configs/b.py": '"""Numbers."""\n'}) != []
    assert commandless({"experiments/a.py": '"""See configs/b.py."""\n', "configs/b.py": '"""experiments/a.py --x"""\n'}) == []
    assert foreign("see /wo" + "rk/main and ht" + "tp://mirror.internal/simple, https://github.com/a/b") == ["/wo" + "rk/", "mirror.internal"]
    assert foreign("outputs/wo" + "rk/film.mp4 and ../ro" + "ot/x") == []
