"""README.md and docs/ are true of this commit: commands exist, code calls what there is, links resolve, figures are those of the presets."""

import ast
import importlib.util
import inspect
import pathlib
import re
import shlex
import subprocess
import tomllib

import pytest

import longlive_jax
from longlive_jax.config import TOY
from longlive_jax.data import toywords

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*.md")))
README = (ROOT / "README.md").read_text()


def blocks(text, *languages):
    """The fenced blocks of ``text`` in these languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def commands():
    """Every command line that README.md shows, as words."""
    lines = [line for body in blocks(README, "bash", "console") for line in body.splitlines() if line.strip()]
    return [shlex.split(part) for line in lines for part in line.split("&&")]


def flags_of(script):
    """Names of the flags that a script defines, read off its source."""
    names = {"help"}
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name.startswith("DEFINE_") or name == "add_argument":
                names.add(node.args[0].value.lstrip("-"))
    return names


def config_of(script, word):
    """The ``ConfigDict`` of ``--config=FILE:NAME``, by default the script's own."""
    if not word:
        word = re.search(r"configs/\w+\.py(:\w+)?", script.read_text()).group()
    file, _, name = word.partition(":")
    spec = importlib.util.spec_from_file_location("readme_config", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(name) if name else module.get_config()


def wrong_flags(words):
    """What is wrong with a command that runs a script of ours."""
    at = next((i for i, w in enumerate(words) if w.startswith("experiments/")), None)
    if at is None:
        return []
    script = ROOT / words[at]
    if not script.is_file():
        return [f"{words[at]} does not exist"]
    options = dict(w.lstrip("-").partition("=")[::2] for w in words[at + 1 :] if w.startswith("-"))
    known, bad = flags_of(script), []
    for name in options:
        if not name.startswith("config."):
            bad += [] if name.replace("-", "_") in known else [f"{script.name} has no --{name}"]
            continue
        config = config_of(script, options.get("config", ""))
        for key in name.split(".")[1:]:
            if key not in config:
                bad.append(f"{script.name}: no config key {name}")
                break
            config = config[key]
    return bad


def test_the_two_shell_blocks():
    """The first makes the video, the second runs the tests; CI runs the second, word for word."""
    first, second = (body.strip() for body in blocks(README, "bash"))
    assert first == "pip install uv && uv run experiments/stream.py"
    assert "pytest" in second and "git clone" not in README
    run = subprocess.run(["bash", ROOT / ".ci/run", "--print-tests"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == second


def test_commands_exist():
    assert [bad for words in commands() for bad in wrong_flags(words)] == []


def test_wrong_commands_are_found():
    assert wrong_flags(["uv", "run", "experiments/strem.py"]) == ["experiments/strem.py does not exist"]
    assert wrong_flags(["experiments/stream.py", "--prompt=x"]) == ["stream.py has no --prompt"]
    assert wrong_flags(["experiments/stream.py", "--config.sampler.step=4"]) == ["stream.py: no config key config.sampler.step"]


def test_uv_groups_and_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for group in re.findall(r"--group[= ](\w+)", README):
        assert group in project["dependency-groups"]
    for extra in re.findall(r'-e "?\.\[(\w+)\]', README):
        assert extra in project["project"]["optional-dependencies"]
    assert f"Python {project['project']['requires-python'].removeprefix('>=')} or newer" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_compiles_and_calls_what_there_is(page):
    known = {"longlive_jax": longlive_jax, "session": longlive_jax.Session}
    for body in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                owner = known.get(node.func.value.id)
                if owner is not None:
                    target = inspect.signature(inspect.getattr_static(owner, node.func.attr))
                    for keyword in node.keywords:
                        assert keyword.arg in target.parameters, f"{node.func.attr} has no argument {keyword.arg}"
    for name in re.findall(r"`session\.(\w+)", page.read_text()):
        assert callable(inspect.getattr_static(longlive_jax.Session, name))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page):
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.S)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_prompts_can_be_read():
    """The prompt file, and every caption in the code: the toy's tokenizer knows their words."""
    (lines,) = blocks(README, "text")
    board = longlive_jax.storyboard(lines.splitlines())
    assert board.chunks == 8 and [shot.cut for shot in board.shots] == [False, False, True]
    code = [node.value for body in blocks(README, "python") for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Constant)]
    captions = [text for text in code if isinstance(text, str) and text.endswith(".")]
    assert len(captions) == 4
    for text in (*board.prompts, *(re.sub(r"^[+ ]*\[\d+\] *", "", c) for c in captions)):
        toywords.tokenize(text, TOY.transformer.text_len)


def test_the_figures_are_the_presets():
    first, chunk = TOY.pixel_frames(TOY.stream.chunk), TOY.stream.chunk * TOY.vae.time_stride
    assert f"*chunks* of {chunk} pixel frames ({chunk / TOY.video.fps:.2f} s at {TOY.video.fps} fps; the first has {first})" in README
    assert f"{TOY.video.height}×{TOY.video.width} pixels at {TOY.video.fps} fps, {TOY.sampler.steps} steps with guidance" in README
    numbers = {2: "two", 6: "six", 8: "eight"}
    words = ("shapes", "colours", "sizes", "motions", "backgrounds")
    tables = (toywords.SHAPES, toywords.COLOURS, toywords.SIZES, toywords.MOTIONS, toywords.BACKGROUNDS)
    for word, table in zip(words, tables, strict=True):
        assert f"{numbers[len(table)]} {word}" in README
    assert "outputs/stream" in README and '"outputs/stream"' in (ROOT / "experiments/stream.py").read_text()


def test_the_design_names_every_file():
    """The tree of docs/design.md holds every module of the package, and nothing else."""
    (tree,) = blocks((ROOT / "docs/design.md").read_text(), "text")
    package, *rest = re.split(r"^(?=\w)", tree.removeprefix("longlive_jax/\n"), flags=re.M)
    listed = [line.split()[0] for line in package.splitlines()]
    folder = ROOT / "longlive_jax"
    there = [str(f.relative_to(folder)) for f in folder.rglob("*.py") if f.read_text().strip()]
    assert sorted(listed) == sorted(there)
    for line in rest:
        name, words = line.split(maxsplit=1)
        assert (ROOT / name).is_dir(), name
        for script in re.findall(r"\b(stream|train_\w+|evaluate|toy)\b", words):
            assert (ROOT / name / f"{script}.py").is_file(), line
