"""One process of the fuzzer: mutates inputs and reads them, within bounds on memory and time, until one is a fault.

Every input is written to a file before it is read, so that it is there if the process dies of it.
"""

import json
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tests.fuzz import targets

MEMORY = 2 << 30  # bytes, above what the imports and the seeds take
SECONDS = 20  # of one input
EXAMPLES = 50  # of a target, before the next one's turn
FAULT = 3  # exit code

# Hostile numbers, names and structures: huge, deep, none, of other types.
HOSTILE = (
    b"9" * 4_000, b"-1", b"0", b"1e999", b"NaN", b"5e-324", b"3e38", b"9223372036854775807", b"1e-5", b"true", b"null",
    b'"\\ud800"', b'"\\u001b[31m\\u202e"', b"[" * 10_000, b"[]", b"{}", b'{"a":' * 2_000, b'"' + b"x" * 100_000 + b'"',
    b"\x00", b"\xff\xfe", b"\r\n", b"\n", b",", b";", b"'", b'"', b"/dev/zero", b"../../../etc/passwd", b"&a [*a, *a]",
    b"!!bool x", b"!!timestamp x", b"2026-99-99", b"!!int x", b"9" * 5_000,
)  # fmt: skip
_PART = re.compile(rb"\{[^{}]*\}|\[[^\[\]]*\]")
_TOKEN = re.compile(rb'"[^"]*"|-?[0-9.]+(?:[eE][-+]?[0-9]+)?|true|false|null|\w+')


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A valid input after some changes: cut, flipped bits, other bytes, repeated parts, hostile tokens."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        end = len(content)
        place = draw(st.integers(0, max(0, end - 1)))
        match draw(st.sampled_from(("cut", "flip", "bytes", "remove", "repeat", "part", "token", "token"))):
            case "cut":
                del content[place:]
            case "flip" if end:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "bytes":
                new = draw(st.binary(max_size=8) | st.sampled_from([b"\xff" * 4, bytes(8), b"\x7f\xff\xff\xff"]))
                content[place : place + len(new)] = new
            case "remove":
                del content[place : place + draw(st.integers(1, 64))]
            case "repeat":
                content[place:place] = bytes(content[place : place + 64]) * draw(st.sampled_from([1, 3, 100]))
            case "part" if parts := list(_PART.finditer(content[:100_000])):
                first, last = parts[draw(st.integers(0, len(parts) - 1))].span()
                content[first:last] = draw(st.sampled_from(HOSTILE))
            case "token" if tokens := list(_TOKEN.finditer(content[:100_000])):
                first, last = tokens[draw(st.integers(0, len(tokens) - 1))].span()
                content[first:last] = draw(st.sampled_from(HOSTILE))
    return bytes(content)


class TooSlow(BaseException):
    """An input takes too long. No reader turns it into an error of its own, as it may do with any Exception."""


def read_within_bounds(read: Callable[[bytes], object], content: bytes) -> None:
    """Read an input. Raises what is not one of the allowed errors, and TooSlow after 20 seconds."""
    signal.alarm(SECONDS)
    try:
        read(content)
    except targets.ALLOWED as error:
        text = str(error)
        if len(text) > 4_000 or "\n" in text or "\x1b" in text:
            raise AssertionError(f"the error is no line of a reasonable length: {text[:200]!r}") from error
        if "no memory" in text:
            raise AssertionError(f"the input takes more than {MEMORY:,} bytes: {text[:200]!r}") from error
    finally:
        signal.alarm(0)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"more than {SECONDS} seconds")


def limit_memory() -> None:
    """Bound the address space of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


def fuzz(names: list[str], state: Path, seconds: float, number: int) -> int:
    """Fuzz the targets in turn until the time is over or one has a fault; returns the exit code."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found = targets.make_targets(Path(folder))
        names = names or list(found)
        signal.signal(signal.SIGALRM, _too_slow)
        limit_memory()
        counts = dict.fromkeys(names, 0)
        end, turn = time.monotonic() + seconds, number
        while time.monotonic() < end:
            name = names[turn % len(names)]
            try:
                _fuzz_target(name, found[name], state, counts, turn, end)
            except (Exception, TooSlow) as error:
                error.__notes__ = []  # Hypothesis's, with the whole input
                (state / "why").write_text(traceback.format_exc()[-3_000:])
                return FAULT
            turn += 1
        (state / "counts.json").write_text(json.dumps(counts))
    return 0


def _fuzz_target(
    name: str, target: targets.Target, state: Path, counts: dict[str, int], number: int, end: float
) -> None:
    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(mutated(target.seeds))
    def run(content: bytes) -> None:
        if time.monotonic() > end:
            return
        (state / "name").write_text(name)
        (state / "input").write_bytes(content)
        (state / "counts.json").write_text(json.dumps(counts))
        counts[name] += 1
        read_within_bounds(target.read, content)

    run()


if __name__ == "__main__":
    sys.exit(fuzz(sys.argv[4:], Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
