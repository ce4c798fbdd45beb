"""The schema: presets, round trips through ConfigDict, overrides, and the message of every rule."""

import math
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from longlive_jax.config import (
    CUT_PREFIX,
    PRESETS,
    TINY,
    TOY,
    WAN_5B,
    ConfigError,
    Experiment,
    MeshConfig,
    SamplerConfig,
    StreamConfig,
    StreamJob,
    TextConfig,
    TransformerConfig,
    VAEConfig,
    VideoConfig,
    check_frames,
    from_config_dict,
    preset,
    replace,
    to_config_dict,
)

# ---- presets -------------------------------------------------------------------------------------------------------------------------------


def test_presets_have_the_published_sizes():
    assert (WAN_5B.grid, WAN_5B.tokens, WAN_5B.transformer.head_dim) == ((44, 80), 880, 128)
    assert (WAN_5B.vae.space_stride, WAN_5B.vae.time_stride) == (16, 4)
    assert len(WAN_5B.vae.mean) == len(WAN_5B.vae.std) == 48
    assert (WAN_5B.stream.chunk, WAN_5B.stream.window, WAN_5B.stream.sink, WAN_5B.stream.cut_prefix) == (8, 32, 8, CUT_PREFIX)
    assert (TOY.grid, TOY.tokens, TOY.video.fps) == ((8, 8), 64, 24)
    assert TOY.stream == WAN_5B.stream
    assert (TINY.grid, TINY.tokens) == ((2, 4), 8)


@pytest.mark.parametrize(("height", "width", "tokens"), [(480, 832, 390), (1280, 704, 880), (32, 32, 1)])
def test_other_sizes(height, width, tokens):
    assert replace(WAN_5B, video=VideoConfig(height, width)).tokens == tokens


def test_preset_by_name():
    assert preset("toy") is TOY and set(PRESETS) == {"wan_5b", "toy", "tiny"}
    with pytest.raises(ConfigError, match="unknown preset 'tinny'; did you mean 'tiny'"):
        preset("tinny")
    with pytest.raises(ConfigError, match="unknown preset 'zzz'; known: wan_5b, toy, tiny"):
        preset("zzz")


def test_pins_need_both_sinks():
    assert StreamConfig().pins
    assert not StreamConfig(sink=0).pins and not StreamConfig(shot_sink=False).pins


# ---- lengths -------------------------------------------------------------------------------------------------------------------------------


def test_pixel_frames():
    assert [WAN_5B.pixel_frames(n) for n in (1, 2, 8, 16)] == [1, 5, 29, 61]


@pytest.mark.parametrize("experiment", [WAN_5B, TINY])
def test_chunks_for_is_the_least_that_lasts(experiment):
    chunk, fps = experiment.stream.chunk, experiment.video.fps
    for tenths in range(1, 400, 7):
        seconds = tenths / 10
        n = experiment.chunks_for(seconds)
        assert experiment.pixel_frames(n * chunk) >= math.ceil(seconds * fps)
        assert n == 1 or experiment.pixel_frames((n - 1) * chunk) < seconds * fps
    assert experiment.chunks_for(0.001) == 1
    exact = experiment.pixel_frames(5 * chunk) / fps
    assert experiment.chunks_for(exact) == 5 and experiment.chunks_for(exact + 0.01) == 6


def test_check_frames():
    check_frames(24, 8)
    for frames, advice in ((20, 16), (3, 8), (0, 8), (-8, 8)):
        with pytest.raises(ConfigError, match=f"frames={frames} does not split into chunks of 8; use a multiple of 8, e.g. frames={advice}"):
            check_frames(frames, 8)


# ---- round trips and overrides -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    e = preset(name)
    values = to_config_dict(e)
    assert values.is_locked and from_config_dict(Experiment, values) == e
    assert from_config_dict(Experiment, values.to_dict()) == e
    job = StreamJob(sampler=e.sampler, stream=e.stream)
    assert from_config_dict(StreamJob, to_config_dict(job)) == job


def test_missing_keys_keep_their_defaults():
    assert from_config_dict(Experiment, {"stream": {"window": 64}}).stream == StreamConfig(window=64)
    assert from_config_dict(StreamJob, {}) == StreamJob()


def test_values_take_the_type_of_their_field():
    e = from_config_dict(Experiment, ConfigDict({"transformer": {"patch": [2, 2]}, "sampler": {"shift": 3}, "vae": {"std": [1] * 48}}))
    assert e.transformer.patch == (2, 2) and isinstance(e.transformer.patch, tuple)
    assert isinstance(e.sampler.shift, float) and e.vae.std == (1.0,) * 48 and isinstance(e.vae.std[0], float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steam": {}}, "unknown config key 'steam'; did you mean stream?"),
        ({"stream": {"windw": 8}}, r"unknown config key 'stream\.windw'; did you mean stream\.window\?"),
        ({"stream": {"zzz": 8}}, r"unknown config key 'stream\.zzz'; known keys: chunk, window"),
        ({"sampler": {"steps": 4.0}}, r"sampler\.steps=4\.0 must be of type int"),
        ({"sampler": {"steps": True}}, r"sampler\.steps=True must be of type int"),
        ({"sampler": {"shift": True}}, r"sampler\.shift=True must be of type float"),
        ({"stream": {"shot_sink": 1}}, r"stream\.shot_sink=1 must be of type bool"),
        ({"transformer": {"patch": 2}}, r"transformer\.patch=2 must be a sequence"),
        ({"transformer": {"patch": ["2", 2]}}, r"transformer\.patch='2' must be of type int"),
        ({"dtype": None}, "dtype=None must be of type str"),
    ],
)
def test_keys_and_types_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(Experiment, values)


@pytest.fixture
def parsed(monkeypatch):
    """Words of a command line -> the ``Experiment`` TINY with these overrides."""

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["program", *words])  # ml_collections reads the overrides there
        values = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", to_config_dict(TINY), flag_values=values)
        values(sys.argv)
        return from_config_dict(Experiment, values.config)

    return parse


def test_overrides_from_the_command_line(parsed):
    e = parsed(
        "--config.sampler.steps=7", "--config.sampler.shift=4", "--config.stream.shot_sink=false", "--config.transformer.patch=(2,2)",
        "--config.sampler.solver=euler", "--config.mesh.seq=2",
    )  # fmt: skip
    assert e.sampler == SamplerConfig("euler", 7, 4.0, TINY.sampler.guidance, "") and isinstance(e.sampler.shift, float)
    assert (e.stream.shot_sink, e.transformer.patch, e.mesh.seq) == (False, (2, 2), 2)
    with pytest.raises(ConfigError, match=r"stream\.sink=3 is not a multiple"):
        parsed("--config.stream.sink=3")


# ---- every rule ----------------------------------------------------------------------------------------------------------------------------

SMALL = {"dim": 64, "heads": 8}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TransformerConfig(layers=0), r"TransformerConfig\.layers=0 must be positive"),
        (lambda: TransformerConfig(dim=100, heads=24), r"transformer\.dim=100 does not split over heads=24; use dim=96"),
        (lambda: TransformerConfig(dim=24, heads=8), r"head_dim=3 \(dim 24 / heads 8\) must be even and at least 6"),
        (lambda: TransformerConfig(dim=32, heads=8), r"head_dim=4 .* at least 6"),
        (lambda: TransformerConfig(**SMALL, freq_dim=31), r"transformer\.freq_dim=31 must be even .*; use 32"),
        (lambda: TransformerConfig(**SMALL, patch=(2,)), r"transformer\.patch=\(2,\) must be two positive sizes"),
        (lambda: TransformerConfig(**SMALL, patch=(2, 0)), r"transformer\.patch=\(2, 0\) must be two positive sizes"),
        (lambda: VAEConfig(channels=0), r"VAEConfig\.channels=0 must be positive"),
        (lambda: VAEConfig(multipliers=(1, 2)), r"vae\.time_downsample has 3 entries; it needs one per stage but the last, 1"),
        (lambda: VAEConfig(mean=(0.0,)), r"vae\.mean has 1 entries; it needs none or one per latent channel, 48"),
        (lambda: VAEConfig(std=(1.0,) * 47 + (0.0,)), r"vae\.std must be positive in every channel"),
        (lambda: TextConfig(attention_dim=100), r"text\.attention_dim=100 does not split over heads=64; use attention_dim=128"),
        (lambda: TextConfig(vocab=-1), r"TextConfig\.vocab=-1 must be positive"),
        (lambda: TextConfig(tokenizer="bpe"), r"text\.tokenizer='bpe' must be 'umt5' or 'words'"),
        (lambda: VideoConfig(fps=0), r"VideoConfig\.fps=0 must be positive"),
        (lambda: StreamConfig(chunk=0), r"StreamConfig\.chunk=0 must be positive"),
        (lambda: StreamConfig(sink=-8), r"stream\.sink=-8 must not be negative; 0 turns the sink off"),
        (lambda: StreamConfig(window=30), r"stream\.window=30 is not a multiple of chunk=8; use 32"),
        (lambda: StreamConfig(sink=12), r"stream\.sink=12 is not a multiple of chunk=8, .*; use sink=0 or sink=16"),
        (lambda: StreamConfig(window=16), r"window=16 cannot hold sink=8 with shot sinks on, which needs sink \+ 2 chunks; use window=24"),
        (lambda: StreamConfig(window=8, sink=8, shot_sink=False), r"cannot hold sink=8 and the current chunk; use window=16"),
        (lambda: StreamConfig(cut_prefix="  "), r"stream\.cut_prefix is empty, so every chunk would be a cut"),
        (lambda: SamplerConfig(solver="heun"), r"sampler\.solver='heun' must be 'unipc' or 'euler'"),
        (lambda: SamplerConfig(steps=0), r"sampler\.steps=0 must lie in 1\.\.1000"),
        (lambda: SamplerConfig(steps=1001), r"sampler\.steps=1001 must lie in 1\.\.1000"),
        (lambda: SamplerConfig(shift=0.0), r"sampler\.shift=0\.0 must be positive"),
        (lambda: MeshConfig(seq=0), r"MeshConfig\.seq=0 must be positive"),
        (lambda: replace(TINY, vae=VAEConfig(channels=8)), r"transformer\.channels=4 and vae\.channels=8 must be equal"),
        (lambda: replace(TINY, text=TextConfig(dim=32)), r"transformer\.text_dim=16 and text\.dim=32 must be equal"),
        (lambda: replace(WAN_5B, video=VideoConfig(720, 1280)), r"video\.height=720 is not a multiple of 32 .*; use height=704"),
        (lambda: replace(WAN_5B, video=VideoConfig(704, 1300)), r"video\.width=1300 is not a multiple of 32 .*; use width=1312"),
        (lambda: replace(WAN_5B, mesh=MeshConfig(seq=5)), r"transformer\.heads=24 does not divide by mesh\.seq=5; use seq in \[1, 2, 4, 8\]"),
        (lambda: replace(TINY, mesh=MeshConfig(seq=4)), r"stream\.chunk=2 does not divide by mesh\.seq=4; use seq in \[1, 2\]"),
        (lambda: replace(TINY, dtype="float16"), "dtype='float16' must be 'float32' or 'bfloat16'"),
        (lambda: StreamJob(batch=0), r"StreamJob\.batch=0 must be positive"),
        (lambda: StreamJob(model=""), "model is empty; use 'toy', a folder, or random:tiny"),
    ],
)  # fmt: skip
def test_rules(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_edges_are_allowed():
    StreamConfig(window=24, sink=8)
    StreamConfig(window=16, sink=8, shot_sink=False)
    StreamConfig(window=8, sink=0)
    SamplerConfig(steps=1)
    replace(WAN_5B, mesh=MeshConfig(data=3, seq=8))
