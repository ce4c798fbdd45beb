"""Prompts for every chunk: layout rules, both written forms, every refusal."""

import json

import pytest

from longlive_jax.config import CUT_PREFIX, ConfigError
from longlive_jax.data.prompts import Shot, Storyboard, read_prompts, read_storyboards, storyboard
from tests.shared import shared

CUT = CUT_PREFIX


def folder(path, captions, durations=None):
    path.mkdir(parents=True, exist_ok=True)
    for name, caption in captions.items():
        (path / f"{name}.json").write_text(json.dumps({"caption": caption}), encoding="utf-8")
    if durations is not None:
        (path / "shot_durations.txt").write_text(durations)
    return path


def shots(n):
    return {str(i): f"shot {i}" for i in range(n)}


def test_published_examples_fill_48_chunks():
    boards = read_storyboards(shared("data", "prompts"))
    assert [name for name, _ in boards] == [
        "african_savanna",
        "aquamarine_underwater",
        "brown_bear_river",
        "cozy_red_room",
    ]
    for _, board in boards:
        assert board.chunks == 48 and len(board.shots) in (7, 8)
        assert board.shots[0].prompt.strip() and not board.unused
        assert [i for i, cut in enumerate(board.cuts) if cut] == [s.start for s in board.shots[1:]]


def test_source_layout_examples(tmp_path):
    three = read_prompts(folder(tmp_path / "three", shots(3)), 12, chunks_per_shot=4)
    s0, s1, s2 = "shot 0", "shot 1", "shot 2"
    assert three.prompts == (s0, s0, s0, s0, CUT + s1, s1, s1, s1, CUT + s2, s2, s2, s2)
    two = read_prompts(folder(tmp_path / "two", shots(2)), 12, chunks_per_shot=4)  # the surplus goes to the last shot
    assert two.prompts == (s0,) * 4 + (CUT + s1,) + (s1,) * 7
    assert two.cuts == (False,) * 4 + (True,) + (False,) * 7


def test_even_split_gives_the_extra_to_the_first_shots(tmp_path):
    board = read_prompts(folder(tmp_path, shots(3)), 8)
    assert [s.stop - s.start for s in board.shots] == [3, 3, 2]


def test_durations_go_before_chunks_per_shot_and_give_the_length(tmp_path):
    path = folder(tmp_path, shots(3), "2, 1\n3")
    assert [s.stop - s.start for s in read_prompts(path, chunks_per_shot=5).shots] == [2, 1, 3]


def test_short_video_cuts_durations_off_and_says_so(tmp_path):
    board = read_prompts(folder(tmp_path, shots(3), "2 2 2"), 3)
    assert board.prompts == ("shot 0", "shot 0", CUT + "shot 1")
    assert board.unused == ("shot 2",)
    assert "not reached in 3 chunks: shot 2" in board.describe()


def test_file_order_is_names_then_numbers_without_global(tmp_path):
    path = folder(tmp_path, {"10": "ten", "9": "nine", "b": "bee", "a": "ay", "global": "no"})
    assert [s.prompt for s in read_prompts(path, 4).shots] == ["ay", "bee", "nine", "ten"]


def test_caption_folder_is_used_where_present(tmp_path):
    folder(tmp_path / "set" / "caption" / "one", shots(1))
    folder(tmp_path / "set" / "caption" / "two", shots(2))
    (tmp_path / "set" / "caption" / ".cache").mkdir()
    (tmp_path / "set" / "video").mkdir()
    assert [(name, len(board.shots)) for name, board in read_storyboards(tmp_path / "set", 2)] == [
        ("one", 1),
        ("two", 2),
    ]
    folder(tmp_path / "single" / "caption", shots(2))
    assert read_prompts(tmp_path / "single", 2).cuts == (False, True)
    assert [name for name, _ in read_storyboards(tmp_path / "single", 2)] == ["single"]


def test_a_shot_of_the_same_caption_is_still_a_cut():
    assert [(s.start, s.stop, s.cut) for s in storyboard(["a", "a"], 4).shots] == [(0, 2, False), (2, 4, True)]


def test_lines_counts_continuations_comments(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("\ufeff# a comment\n[2] A ball.\n\n+ [1] It turns blue | slowly.\n  A tower, 6 [m] high.\n", encoding="utf-8")
    board = read_prompts(path, 5)
    assert board.prompts == (
        "A ball.",
        "A ball.",
        "It turns blue | slowly.",
        CUT + "A tower, 6 [m] high.",
        "A tower, 6 [m] high.",
    )
    assert board.cuts == (False, False, False, True, False)
    assert board.shots[1] == Shot(2, 3, "It turns blue | slowly.", False)
    assert board.describe().splitlines() == [
        "chunks 0-1: A ball.",
        "chunk 2: same shot, It turns blue | slowly.",
        "chunks 3-4: cut, A tower, 6 [m] high.",
    ]
    assert [name for name, _ in read_storyboards(path, 5)] == ["story"]


def test_length_is_the_sum_of_the_counts():
    assert storyboard(["[3] a", "+[2] b", "[1]c"]).prompts == ("a", "a", "a", "b", "b", CUT + "c")
    assert storyboard(["a", "b"], chunks_per_shot=2).chunks == 4
    assert storyboard("one prompt", 3).prompts == ("one prompt",) * 3


def test_prefix_in_the_text_is_not_doubled():
    board = storyboard([CUT + "a", CUT + "b"], 4)
    assert board.prompts == ("a", "a", CUT + "b", "b")
    assert storyboard(["a", "NEW b"], 2, cut_prefix="NEW ").prompts == ("a", "NEW b")


def test_describe_shortens():
    line = storyboard(["word " * 100], 1).describe(width=40)
    assert line.endswith("…") and len(line) <= len("chunk 0: ") + 40
    assert storyboard(["word " * 100], 1).describe(width=0).count("word") == 100


@pytest.mark.parametrize(
    ("lines", "chunks", "message"),
    [
        ([], 2, "holds no prompt; write at least one"),
        (["# only a comment", " "], 2, "holds no prompt"),
        (["a", "b", "c"], 2, r"3 prompts need at least 3 chunks, but chunks=2; use chunks=3"),
        (["[2] a", "b"], 2, r"need at least 3 chunks, but chunks=2"),
        (["[2] a", "b"], None, r"1 of 2 prompts do not say their chunks; give chunks="),
        (["a"], 0, "chunks=0 must be positive"),
        (["[six] a"], 2, "line 1: 'six' is not a whole number of chunks; write e.g. 6"),
        (["a", "[2.5] b"], 9, r"line 2: '2.5' is not a whole number"),
        (["[0] a"], 2, "0 chunks is not positive"),
        (["[-3] a"], 2, "-3 chunks is not positive"),
        (["[2]"], 2, "line 1: the prompt is empty"),
        (["a", CUT], 2, "line 2: the prompt is empty"),
        (["+ a"], 2, "no shot to continue; remove the '\\+'"),
        (["a", "[2] + b"], 4, r"has its \+ after the count; write '\+ \[2\] prompt'"),
        (["a", "+ " + CUT + "b"], 4, "remove one of the two"),
    ],
)
def test_lines_refused(lines, chunks, message):
    with pytest.raises(ConfigError, match=message):
        storyboard(lines, chunks)


def test_options_refused():
    with pytest.raises(ConfigError, match="chunks_per_shot=-1 must not be negative; 0 splits evenly"):
        storyboard(["a"], 2, chunks_per_shot=-1)
    with pytest.raises(ConfigError, match="cut_prefix=' ' is blank"):
        storyboard(["a"], 2, cut_prefix=" ")
    with pytest.raises(ConfigError, match="0 prompts"):
        Storyboard(())


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(ConfigError, match="do not exist; give a text file"):
        read_prompts(tmp_path / "nowhere", 4)
    with pytest.raises(ConfigError, match="do not exist"):
        read_storyboards(tmp_path / "nowhere", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no <number>\.json of its own; put 0\.json"):
        read_prompts(tmp_path / "empty", 4)
    with pytest.raises(ConfigError, match="holds no storyboard"):
        read_storyboards(tmp_path / "empty", 4)
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(ConfigError, match=r"empty\.txt holds no prompt"):
        read_prompts(tmp_path / "empty.txt", 4)
    folder(tmp_path / "set" / "one", shots(1))
    with pytest.raises(ConfigError, match=r"name one of its storyboards \(one\) or use read_storyboards"):
        read_prompts(tmp_path / "set", 4)


def test_bad_caption_files(tmp_path):
    path = folder(tmp_path, shots(2))
    (path / "1.json").write_text('{\n "caption": "a",\n}')
    with pytest.raises(ConfigError, match=r"1\.json, line 3: not valid JSON"):
        read_prompts(path, 4)
    (path / "1.json").write_text('{"title": "a"}')
    with pytest.raises(ConfigError, match=r'1\.json has no text field "caption" \(fields: title\); add one'):
        read_prompts(path, 4)
    (path / "1.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"fields: none"):
        read_prompts(path, 4)
    (path / "1.json").write_text('{"caption": "  "}')
    with pytest.raises(ConfigError, match=r"1\.json: the prompt is empty"):
        read_prompts(path, 4)
    (path / "1.json").write_bytes(b'{"caption": "\xff"}')
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 13\)"):
        read_prompts(path, 4)


@pytest.mark.parametrize(
    ("durations", "message"),
    [
        ("6 6 6", r"holds 3 durations for 2 shots; write one number for each"),
        ("6", r"holds 1 durations for 2 shots"),
        ("6 x", "'x' is not a whole number of chunks"),
        ("6 1.5", "'1.5' is not a whole number"),
        ("6, 0", "0 chunks is not positive"),
        ("-1 6", "-1 chunks is not positive"),
    ],
)
def test_bad_durations(tmp_path, durations, message):
    with pytest.raises(ConfigError, match=message):
        read_prompts(folder(tmp_path, shots(2), durations), 12)
