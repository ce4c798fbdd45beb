"""experiments/bench.py on the tiny model, and what its figures are made of."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench
from longlive_jax.config import ConfigError, preset
from longlive_jax.diffusion.solvers import make_solver
from longlive_jax.streaming import ceilings, profiles
from longlive_jax.streaming.figures import Figures, OutOfTimeError


@pytest.mark.slow
def test_the_step_is_measured_and_saved(tmp_path):
    record = bench.main(["--model=tiny", "--parts=dit", f"--out={tmp_path}", "--repeats=2"])
    assert record.errors == {}
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["provenance"]["jax"] == jax.__version__ and "streaming step, bf16" in saved["programs"]
    steps = saved["figures"]["streaming step, 4 steps, bf16"]
    fps = saved["figures"]["denoise FPS, 4 steps, bf16"]
    assert len(steps["samples"]) == 2 and fps["samples"] == pytest.approx([8 / s for s in steps["samples"]])  # a chunk of 2 latents: 8 frames
    assert "denoise FPS, 2 steps, bf16" in (tmp_path / "bench.md").read_text()


def test_a_counted_solver_takes_the_first_steps_of_the_whole_one():
    whole = make_solver("unipc", 4, 5.0)

    @jax.jit
    def solve(solver, x):
        return jax.lax.fori_loop(0, solver.steps, lambda i, s: solver.step(s, i, 0.1 * s.x), solver.init(x)).x

    x = jnp.linspace(-1, 1, 5)
    counted = lambda n: solve(bench.Counted(**vars(whole), count=jnp.int32(n)), x)
    np.testing.assert_allclose(counted(4), solve(whole, x), atol=1e-6)
    assert np.abs(counted(2) - counted(4)).max() > 1e-3


def test_random_weights_are_finite_distinct_and_of_unit_gain():
    values = bench.draw(
        jax.random.key(0), (("q.weight", (64, 64)), ("k.weight", (64, 64)), ("norm.weight", (64,)), ("q.bias", (64,))), jnp.float32
    )
    assert abs(float(jnp.std(values["q.weight"])) - 1 / 8) < 0.01
    assert not np.array_equal(values["q.weight"], values["k.weight"])
    assert abs(float(values["norm.weight"].mean()) - 1) < 0.02 and abs(float(values["q.bias"].mean())) < 0.02


def test_floors_follow_the_work():
    e = preset("wan_5b")
    assert ceilings.floors({}, e, "bf16") == (None, None)
    rates = {"attention": 700e12, "copy": 3e12}
    for part in ("up", "down", "square"):
        rates |= {f"bf16 {part}": 812e12, f"FP8 {part}": 1490e12}
    forward, remember = ceilings.floors(rates, e, "bf16")
    assert forward == pytest.approx(0.193, abs=0.002) and remember < forward  # the sum that the goals state
    assert ceilings.floors(rates, e, "fp8")[0] == pytest.approx(0.158, abs=0.002)
    assert ceilings.floors(rates, e, "fp8_memory") == (None, None)  # its attention was not measured
    slower = ceilings.floors(rates | {"bf16 up": 406e12}, e, "bf16")[0]
    assert slower - forward == pytest.approx(30 * 2 * 7040 * 3072 * 14336 / 812e12)


def test_ceilings_are_of_the_sizes_of_the_work():
    cases = {case.name: case for case in ceilings.cases(preset("wan_5b"))}
    assert len(cases) == 13 and cases["bf16 matmul 7040 x 3072 x 14336"].amount == 2 * 7040 * 3072 * 14336
    assert cases["copy"].amount == 2 * 2**30 and cases["attention bf16 7040 x 28160, by length"].kind == "attention by length"
    narrow = cases.pop("attention FP8 7040 x 28160")  # cuDNN's kernel, which cannot be traced without cuDNN
    assert narrow.amount == cases["attention bf16 7040 x 28160"].amount and {dtype for _, dtype in narrow.operands} == {jnp.float8_e4m3fn}
    shapes = [jax.eval_shape(case.function, *(jax.ShapeDtypeStruct(*x) for x in case.operands)).shape for case in cases.values()]
    assert shapes[:2] == [(7040, 14336), (7040, 3072)] and shapes[-1] == (1, 8, 88, 160, 1024)


def test_flops_are_counted_through_loops_of_functions():
    x, w, k = jnp.ones((4, 8)), jnp.ones((8, 16)), jnp.ones((3, 3, 2, 5))
    assert profiles.flops(jax.jit(lambda x, w: x @ w), x, w) == 2 * 4 * 8 * 16
    looped = lambda x, w: jax.lax.scan(lambda x, _: (x @ w @ w.T, None), x, length=3)[0]
    assert profiles.flops(looped, x, w) == 3 * 2 * 2 * 4 * 8 * 16
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert profiles.flops(convolve, jnp.ones((1, 6, 7, 2)), k) == 2 * 6 * 7 * 5 * 9 * 2


def test_figures_know_goals_floors_and_time(tmp_path, capsys):
    now = [0.0]
    record = Figures(tmp_path, "x", {"a": 2.0, "b": 30}, 1, clock=lambda: now[0])
    record.add("a", [1.0, 4.0, 3.0], "s", 1.5)
    record.add("b", [31.0], "FPS", 40)
    record.failed("c", ValueError("no\nsuch  device"))
    a, b = record.figures["a"], record.figures["b"]
    assert (a["value"], a["met"], a["of_floor"], a["spread"]) == (3.0, False, 0.5, 1.0)
    assert b["met"] and b["of_floor"] == pytest.approx(31 / 40) and record.errors["c"] == "ValueError: no such device"
    text = (tmp_path / "bench.md").read_text()
    assert "| a | 3.000 s | 100.0% | 2 | not met | 1.500 | 50% |" in text and "c: ValueError: no such device" in text
    record.picture()
    assert (tmp_path / "bench.png").stat().st_size > 500
    now[0] = 50.0
    record.need(9, "a short one")
    with pytest.raises(OutOfTimeError, match="a long one needs about 11 s and 10 s are left; raise --minutes"):
        record.need(11, "a long one")
    assert "NOT MET" in capsys.readouterr().out


def test_a_part_that_fails_is_a_row_and_the_rest_goes_on(tmp_path):
    record = Figures(tmp_path, "x", {}, 1)

    def fail(*_):
        raise ConfigError("latents are not finite")

    bench.attempt(record, "dit", fail)
    operands = (((2, 3), jnp.float32),)
    cases = [ceilings.Case("a", "broken", fail, operands, 1), ceilings.Case("b", "sum", jnp.sum, operands, 1e9, "GB/s")]
    ceilings.measure(record, cases, 1, span=1e-4)
    assert record.errors == dict.fromkeys(("dit", "broken"), "ConfigError: latents are not finite") and list(record.ceilings) == ["sum"]
    assert record.rates == {"b": record.ceilings["sum"]["value"] * 1e9} and len(record.ceilings["sum"]["samples"]) == 1
    bench.attempt(record, "dit", lambda: None)
    assert list(record.errors) == ["broken"]  # a part that comes again is judged anew


def test_a_part_keeps_to_its_share(tmp_path, capsys):
    now = [0.0]
    record = Figures(tmp_path, "x", {}, 1, clock=lambda: now[0])
    record.begin("dit", 20)
    assert record.left() == 20

    def spent(repeats, **options):
        for i in record.turns(repeats, **options):
            now[0] += 6
            yield i

    assert list(spent(9)) == [0, 1, 2]  # a fourth would end after the share
    assert "[  18.0 s] 3 of 9 repeats fit" in capsys.readouterr().out
    assert list(spent(9, least=4)) == [0, 1, 2, 3]
    record.begin("vae", 100)
    assert record.left() == 60 - 42  # the whole budget is the bound of the last part
    now[0] += 30
    record.grant(30)  # compiling
    assert record.left() == 60 - 42
    record.begin("first_frame", 50)
    assert record.left() == 50 + 30 - 72


def test_a_run_goes_on_with_what_another_process_found(tmp_path):
    first = Figures(tmp_path, "x", {"a": 2.0}, 1)
    first.add("a", [1.0], "s")
    first.failed("vae", ValueError("no device"))
    first.rates = {"copy": 3e12}
    first.write()
    assert Figures(tmp_path, "x", {}, 1).figures == {} == Figures(tmp_path, "y", {}, 1, keep=True).figures
    second = Figures(tmp_path, "x", {}, 1, keep=True)
    assert (second.figures, second.rates, second.errors) == (first.figures, first.rates, {"vae": "ValueError: no device"})


@pytest.mark.slow
def test_a_sequence_of_devices_is_compared_with_one(tmp_path):
    """Eight fake devices of a CPU; a chunk of two latents divides over two."""
    record = bench.main(["--model=tiny", "--parts=sequence", f"--out={tmp_path}", "--repeats=1"])
    assert record.errors == {}
    assert record.figures["sequence over 2, first chunk to one device"]["value"] < 1e-5
    assert record.figures["sequence over 2, times one device"]["value"] > 0
    assert sum(name.startswith(("frames to heads, 2", "heads to frames, 2")) for name in record.ceilings) == 2


def test_a_sequence_needs_devices_that_divide(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None])
    with pytest.raises(ConfigError, match="sequence needs 2 or more devices that divide a chunk of 2 and 8 heads; 1 are here"):
        bench.sequence(None, bench.Workload(bench.bench_experiment("tiny")), 1)


@pytest.mark.parametrize("option, message", [("--parts=dit,vea", "unknown names; known: ceilings"), ("--repeats=0", "must be positive")])
def test_bad_options(option, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        bench.main([option, f"--out={tmp_path}", "--model=tiny"])


HLO = """HloModule jit_f, entry_computation_layout={()->f32[]}
ENTRY %main {
  %fusion.3 = f32[8]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(f)/solve/while/body/block_12/ffn/mul" source_line=3}
  ROOT %dot = f32[8]{0} dot(%p, %q), metadata={op_name="jit(f)/remember/dot_general"}
}
"""


def test_profiles_name_the_part_of_the_model():
    names = profiles.scopes(HLO)
    assert names == {("jit_f", "fusion.3"): "solve/block/ffn/mul", ("jit_f", "dot"): "remember/dot_general"}
    rows = {("jit_f", "dot", "gemm"): (3e6, 2), ("", "fusion_3", "fusion_3"): (1e6, 1), ("", "memcpy", "memcpy"): (0.5e6, 1)}
    lines = [line.split() for line in profiles.report(rows, names).splitlines()]
    assert ["3.000", "66.7%", "2", "jit_f", "remember/dot_general"] in lines and ["1.000", "22.2%", "1", "solve/block/ffn/mul"] in lines
    assert lines[0] == ["4.50", "ms", "in", "4", "calls"]


def test_a_trace_holds_what_ran():
    f = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((64, 64))
    jax.block_until_ready(f(x))
    rows = profiles.traced(lambda: f(x))
    assert rows and all(time >= 0 and calls > 0 for time, calls in rows.values())
