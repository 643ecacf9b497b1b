"""`coatnet serve` under load from a second process, beside the same predictor called from Python.

    python benchmarks/server.py                         # coatnet-0 at 224, JPEGs of 500 x 375: about five minutes
    python benchmarks/server.py --bundle runs/mine/bundle --engine openvino --soak

The load comes from this process over real sockets, the server is a process of its own; both share the machine, so the
server pays for its clients. Four questions:

- saturation: 2 batches of clients, each asking again as soon as it is answered, in turns with the predictor on the
  same images as one list. To show: at least 85 % of the predictor's rate.
- half the rate: images that come whether or not others are answered, at an even pace and at random times (Poisson);
  latency counts from the time that was meant. To show: 99 % within 4 times the time of one request to the idle server.
  At random times images queue whatever the server does: where a batch takes as long as its images one by one, which
  is nearly so on a CPU, the best server needs 4.3 times (the queue M/D/1 at a load of one half).
- a flood: 500 requests at once. To show: 200 or 503 only.
- with --soak: 10,000 requests. To show: memory that does not grow.

The JPEGs are those of benchmarks/images.py.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from images import write_photographs
from rich.console import Console
from rich.table import Table

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.inference.predictor import Predictor
from coatnet.model.network import create_model
from coatnet.server import Settings

FLOOD, SOAK = 500, 10_000


def main() -> None:
    arguments = parse()
    batch_size = Settings.batch_size
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.jpg" for number in range(arguments.images)]
        write_photographs(paths, 500, 375)
        images = [path.read_bytes() for path in paths]
        bundle = arguments.bundle or str(write_bundle(arguments.model, Path(folder) / "model"))
        predictor = Predictor(bundle, arguments.engine, arguments.precision)
        name = f"{predictor.bundle.model.variant.name}, {predictor.engine.name} {predictor.engine.precision}"
        with serving(bundle, arguments.engine, arguments.precision) as (port, process_id):
            load = Load(port, images)
            asyncio.run(load.closed(1, seconds=2))  # both are warm after this
            predictor(images[: 2 * batch_size], batch_size=batch_size)
            single = statistics.median(asyncio.run(load.closed(1, arguments.seconds)).latencies)
            offline, saturated = [], []
            for _ in range(arguments.rounds):
                offline.append(offline_rate(predictor, images, batch_size, arguments.seconds))
                saturated.append(asyncio.run(load.closed(2 * batch_size, arguments.seconds)).rate)
            rate = statistics.median(saturated)
            source = random.Random(0)
            arrivals: dict[str, Callable[[], float]] = {
                "evenly": lambda: 2 / rate,
                "at random": lambda: source.expovariate(rate / 2),
            }
            half = {how: asyncio.run(load.open(gap, 4 * arguments.seconds)) for how, gap in arrivals.items()}
            flood = asyncio.run(load.flood(FLOOD))
            table = Table("what", "measured", "to show", title=f"coatnet serve: {name}")
            share = rate / statistics.median(offline)
            table.add_row("predictor, images/s", f"{statistics.median(offline):.1f}", "")
            table.add_row("server, images/s", f"{rate:.1f}", "")
            table.add_row("server / predictor", f"{share:.2f}", ">= 0.85")
            table.add_row("one request, idle, ms", f"{1e3 * single:.1f}", "")
            for (how, outcome), goal in zip(half.items(), ("< 4", "4.3 at best"), strict=True):
                p50, p99 = (percentile(outcome.latencies, percent) for percent in (50, 99))
                table.add_row(f"{rate / 2:.1f} a second, {how}", show_counts(outcome), "")
                table.add_row("p50, p99, ms", f"{1e3 * p50:.1f} {1e3 * p99:.1f}", "")
                table.add_row("p99 / one request", f"{p99 / single:.2f}", goal)
            table.add_row(f"{FLOOD} at once", show_counts(flood), "200, 503")
            table.add_row("503 after, ms (p50)", f"{1e3 * percentile(flood.refusals, 50):.0f}", "")
            if arguments.soak:
                asyncio.run(load.count(SOAK // 5, batch_size))
                before = resident_bytes(process_id)
                soaked = asyncio.run(load.count(SOAK, batch_size))
                grown = resident_bytes(process_id) - before
                table.add_row(f"{SOAK:,} requests", show_counts(soaked), "200")
                table.add_row("memory then, MB", f"{before / 1e6:.0f} {grown / 1e6:+.1f}", "flat")
        Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="a finished model; else an untrained one of --model")
    parser.add_argument("--model", default="coatnet-0")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--soak", action="store_true")
    given = parser.parse_args()
    if given.images < Settings.batch_size:
        parser.error(f"--images {given.images}: at least a batch of the server, {Settings.batch_size}")
    return given


def write_bundle(variant: str, folder: Path) -> Path:
    """Untrained, 1,000 classes, at the resolution of the variant."""
    torch.manual_seed(0)
    model = create_model(variant, num_classes=1000).eval()
    names = tuple(f"class {number}" for number in range(1000))
    return Bundle(model, names, Preprocessing(resolution=model.resolution)).save(folder)


@contextlib.contextmanager
def serving(bundle: str, engine: str, precision: str) -> Iterator[tuple[int, int]]:
    """The port and the process of a server."""
    command = [sys.executable, "-m", "coatnet", "serve", bundle, "--port", "0"]
    command += ["--engine", engine, "--precision", precision]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = next(line for line in process.stdout if line.startswith("listening"))
        yield int(address.rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        process.wait(60)


def offline_rate(predictor: Predictor, images: list[bytes], batch_size: int, seconds: float) -> float:
    """Images a second of the predictor, encoded images to names, as many lists as fit into the time."""
    started, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < seconds:
        answers = predictor(images[: len(images) // batch_size * batch_size], batch_size=batch_size)
        assert not any(answer.error for answer in answers)
        count += len(answers)
    return count / taken


@dataclass
class Outcome:
    """Answers by status; seconds of those with 200 and of those without; the rate of those with 200."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    rate: float = 0.0

    def add(self, status: int, seconds: float) -> None:
        self.statuses[status] += 1
        (self.latencies if status == 200 else self.refusals).append(seconds)


class Load:
    """Clients that keep their connections."""

    def __init__(self, port: int, images: list[bytes]) -> None:
        self.port = port
        head = "POST /predict?top_k=5 HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
        self.requests = [head.format(len(image)).encode() + image for image in images]

    async def closed(self, clients: int, seconds: float) -> Outcome:
        """Each client asks again as soon as it is answered."""
        end = time.perf_counter() + seconds
        return await self._clients(clients, lambda: time.perf_counter() < end)

    async def count(self, requests: int, clients: int) -> Outcome:
        """So many requests."""
        left = iter(range(requests))
        return await self._clients(clients, lambda: next(left, None) is not None)

    async def _clients(self, clients: int, another) -> Outcome:
        outcome, started = Outcome(), time.perf_counter()

        async def client(number: int) -> None:
            async with self._connection() as connection:
                while another():
                    number += 1
                    begun = time.perf_counter()
                    status = await self._ask(connection, number)
                    outcome.add(status, time.perf_counter() - begun)

        await asyncio.gather(*(client(7 * number) for number in range(clients)))
        outcome.rate = outcome.statuses[200] / (time.perf_counter() - started)
        return outcome

    async def open(self, gap: Callable[[], float], seconds: float) -> Outcome:
        """Requests `gap()` seconds apart, whether or not others are answered."""
        outcome, tasks = Outcome(), []
        idle: list = []

        async def one(number: int, meant: float) -> None:
            connection = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", self.port)
            status = await self._ask(connection, number)
            outcome.add(status, time.perf_counter() - meant)
            idle.append(connection)

        meant = started = time.perf_counter()
        while meant < started + seconds:
            meant += gap()
            await asyncio.sleep(max(0.0, meant - time.perf_counter()))
            tasks.append(asyncio.create_task(one(len(tasks), meant)))
        await asyncio.gather(*tasks)
        for _, writer in idle:
            writer.close()
        return outcome

    async def flood(self, requests: int) -> Outcome:
        """All at once, each over a connection of its own."""
        outcome = Outcome()

        async def one(number: int) -> None:
            begun = time.perf_counter()
            async with self._connection() as connection:
                outcome.add(await self._ask(connection, number), time.perf_counter() - begun)

        await asyncio.gather(*(one(number) for number in range(requests)))
        return outcome

    @contextlib.asynccontextmanager
    async def _connection(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        yield reader, writer
        writer.close()

    async def _ask(self, connection, number: int) -> int:
        reader, writer = connection
        writer.write(self.requests[number % len(self.requests)])
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        status, body = int(head.split(b" ", 2)[1]), await reader.readexactly(length)
        assert status != 200 or json.loads(body)["predictions"]
        return status


def percentile(seconds: list[float], percent: int) -> float:
    """Of no seconds, nan."""
    return statistics.quantiles(seconds, n=100)[percent - 1] if len(seconds) > 1 else float("nan")


def show_counts(outcome: Outcome) -> str:
    return ", ".join(f"{status}: {count:,}" for status, count in sorted(outcome.statuses.items()))


def resident_bytes(process_id: int) -> int:
    """Of a process of this machine (Linux)."""
    status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


if __name__ == "__main__":
    main()
