"""Figures of a benchmark: medians with goals and floors, written after each one, so that a run that is killed keeps what it had."""

import json
import math
import statistics
import time

import jax

from longlive_jax.metrics import plain, provenance

UPPER = ("s", "GiB", "error")  # units of which less is better
REFUSED = (RuntimeError, ValueError)  # of the compiler, the device or the package: JaxRuntimeError is a RuntimeError


class OutOfTimeError(RuntimeError):
    """No time is left for the next measurement."""


def say(text):
    print(text, flush=True)


def seconds_of(call, repeats):
    """Seconds of each of ``repeats`` calls, the device waited for."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        samples.append(time.perf_counter() - start)
    return samples


class Figures:
    """Figures by name, in the folder ``out`` as ``bench.json`` and ``bench.md``; ``goals``: name -> goal; ``minutes``: the budget.

    ``keep``: begin with what ``out`` holds of the same title and device, for a run in several processes.
    """

    def __init__(self, out, title, goals, minutes, clock=time.perf_counter, keep=False):
        self.out, self.title, self.goals, self.clock = out, title, goals, clock
        self.start = clock()
        self.end = self.until = self.start + 60 * minutes
        self.granted = 0.0  # seconds on top of the budget
        self.figures, self.ceilings, self.programs, self.errors, self.rates = {}, {}, {}, {}, {}
        self.provenance = provenance()
        out.mkdir(parents=True, exist_ok=True)
        if keep and (out / "bench.json").exists():
            before = json.loads((out / "bench.json").read_text())
            if before["title"] == title and before["provenance"]["device"] == self.provenance["device"]:
                self.figures, self.ceilings, self.rates = before["figures"], before["ceilings"], before["rates"]
                self.programs, self.errors = before["programs"], before["errors"]

    def begin(self, name, seconds):
        """A part begins: it has until ``seconds`` after the start, and what was granted."""
        self.until = min(self.end, self.start + seconds + self.granted)
        self.errors.pop(name, None)
        self.stage(f"{name}: {self.left():.0f} s")

    def grant(self, seconds):
        """Give the part and the run as much more: what compiling took is not taken from the readings."""
        self.granted, self.end, self.until = self.granted + seconds, self.end + seconds, self.until + seconds

    def stage(self, text):
        """Say what begins, and when: the last line of a run that hangs."""
        say(f"[{self.clock() - self.start:6.1f} s] {text}")

    def left(self):
        """Seconds of the part."""
        return self.until - self.clock()

    def turns(self, repeats, least=2):
        """``0 .. repeats - 1``, ended early, not before ``least``, when another one would not fit into the part."""
        before = self.clock()
        for i in range(repeats):
            if i >= least and self.left() < (self.clock() - before) / i:
                self.stage(f"{i} of {repeats} repeats fit")
                return
            yield i

    def need(self, seconds, what):
        """Raise ``OutOfTimeError`` where fewer ``seconds`` are left than ``what`` takes."""
        left = self.left()
        if left < seconds:
            raise OutOfTimeError(f"{what} needs about {seconds:g} s and {max(0.0, left):.0f} s are left; raise --minutes")

    def ceiling(self, name, samples, unit):
        """A rate that the device reached on one kind of work."""
        self.ceilings[name] = summary(samples, unit)
        say(f"  {name:52}{self.ceilings[name]['value']:10.1f} {unit:8} +-{self.ceilings[name]['spread']:6.1%}")
        self.write()

    def add(self, name, samples, unit, floor=None, **more):
        """A figure from its ``samples``; ``floor``: the time, or of a rate the rate, that the ceilings allow. Returns the median."""
        row = summary(samples, unit) | more
        share = lambda bound: bound / row["value"] if unit in UPPER else row["value"] / bound
        if floor:
            row |= {"floor": floor, "of_floor": share(floor)}
        if name in self.goals:
            row |= {"goal": self.goals[name], "of_goal": share(self.goals[name]), "met": share(self.goals[name]) >= 1}
        self.figures[name] = row
        text = f"{name:54}{row['value']:10.4g} {unit:4} +-{row['spread']:6.1%}"
        text += f"  goal {row['goal']:g} {'met' if row['met'] else 'NOT MET'}" if "goal" in row else ""
        say(text + (f"  {row['of_floor']:.0%} of ceilings" if floor else ""))
        self.write()
        return row["value"]

    def compile(self, name, lowered):
        """The compiled program of ``jax.jit(...).lower(...)``, its seconds and its memory noted."""
        self.stage(f"compile {name}")
        start = self.clock()
        compiled = lowered.compile()
        row = {"compile_s": self.clock() - start}
        self.grant(row["compile_s"])
        memory = compiled.memory_analysis()
        if memory is not None:
            sizes = {"argument": memory.argument_size_in_bytes, "output": memory.output_size_in_bytes}
            sizes |= {"alias": memory.alias_size_in_bytes, "temp": memory.temp_size_in_bytes}
            row |= {n: size / 2**30 for n, size in sizes.items()}
            row["peak"] = row["argument"] + row["output"] - row["alias"] + row["temp"]
        self.programs[name] = row
        say(f"  compiled {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()) + f"; {self.left():.0f} s left")
        self.write()
        return compiled

    def failed(self, name, error):
        """Note why there is no figure."""
        self.errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        say(f"  {name} stopped: {self.errors[name]}")
        self.write()

    def write(self):
        record = {"title": self.title, "figures": self.figures, "ceilings": self.ceilings, "rates": self.rates, "programs": self.programs}
        record |= {"errors": self.errors, "seconds": self.clock() - self.start, "provenance": self.provenance}
        (self.out / "bench.json").write_text(json.dumps(plain(record), indent=1))
        (self.out / "bench.md").write_text("\n".join(self.markdown()) + "\n")

    def markdown(self):
        made = self.provenance
        yield from (f"# {self.title} on {made['device']}, jax {made['jax']}, {made['time']}", "")
        yield from table(
            ("ceiling", "", "spread"), ((n, f"{r['value']:.1f} {r['unit']}", f"{r['spread']:.1%}") for n, r in self.ceilings.items())
        )
        rows = []
        for name, row in self.figures.items():
            goal = (f"{row['goal']:g}", "met" if row["met"] else "not met") if "goal" in row else ("", "")
            floor = (f"{row['floor']:.3f}", f"{row['of_floor']:.0%}") if "floor" in row else ("", "")
            rows.append((name, f"{row['value']:.3f} {row['unit']}", f"{row['spread']:.1%}", *goal, *floor))
        yield from table(("figure", "median", "spread", "goal", "", "at these ceilings", "reached"), rows)
        cells = lambda r: (f"{r['compile_s']:.1f}", f"{r.get('peak', math.nan):.2f}", f"{r.get('temp', math.nan):.2f}")
        yield from table(("program", "compile s", "peak GiB", "temporary GiB"), ((n, *cells(r)) for n, r in self.programs.items()))
        yield from (f"{name}: {error}" for name, error in self.errors.items())

    def picture(self):
        """``bench.png``: how much of the ceilings and of the goals was reached."""
        from longlive_jax.streaming.charts import grid_picture  # brings pictures along, which measuring does not need

        columns = {"of ceilings": "of_floor", "of goal": "of_goal"}
        cells = {(n, column): 100 * row[key] for n, row in self.figures.items() for column, key in columns.items() if key in row}
        rows = [n for n in self.figures if any((n, column) in cells for column in columns)]
        if rows:
            grid_picture(self.out / "bench.png", f"{self.title} on {self.provenance['device']}", rows, list(columns), cells)


def summary(samples, unit):
    value = statistics.median(samples)
    spread = (max(samples) - min(samples)) / abs(value) if value else 0.0
    return {"value": value, "unit": unit, "spread": spread, "samples": list(samples)}


def table(head, rows):
    """Lines of a Markdown table."""
    yield from ("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
    yield ""


__all__ = ["REFUSED", "Figures", "OutOfTimeError", "say", "seconds_of"]
