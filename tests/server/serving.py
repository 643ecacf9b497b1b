"""A real server in a thread of the tests, real sockets to it, and engines that fail on purpose."""

import contextlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from numpy.typing import NDArray
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.inference.predictor import Predictor
from coatnet.model.network import create_model
from coatnet.server import Settings
from coatnet.server.app import create_app
from coatnet.server.main import uvicorn_config
from coatnet.server.service import Service

PROGRAM = [sys.executable, "-m", "coatnet", "serve"]
# Beginnings of lines about steps of the start that took over two seconds.
SLOW_START = ("coatnet: loading ", "coatnet: preparing ", "coatnet: making the graph")
HOSTILE = ("<script>alert(1)</script>", "a\u2028b", "\udc80", "quote\"'", "\x00", "é", "dog", "cat", "elk", "gnu")


@cache
def make_bundle(classes: tuple[str, ...] = HOSTILE, resolution: int = 32) -> Bundle:
    """A small network whose answers differ from image to image."""
    torch.manual_seed(0)
    model = create_model("coatnet-femto-64", num_classes=len(classes), resolution=resolution)
    torch.nn.init.normal_(model.get_classifier().weight, std=3)
    return Bundle(model.eval(), classes, Preprocessing(resolution=resolution))


def make_predictor(**changes: Any) -> Predictor:
    return Predictor(make_bundle(**changes), "torch", "fp32")


def make_scaled_predictor(channels: int) -> Predictor:
    """Of a small network for values from 0 to 255 in so many channels."""
    torch.manual_seed(0)
    model = create_model("coatnet-femto-16", num_classes=2, in_channels=channels, resolution=16)
    seen = Preprocessing(resolution=16, mean=(0.5,) * channels, std=(0.3,) * channels, value_range=(0, 255))
    return Predictor(Bundle(model.eval(), ("cat", "dog"), seen), "torch", "fp32")


def image(seed: int = 0, width: int = 100, height: int = 80, kind: str = "JPEG") -> bytes:
    """Encoded, with something to see in it."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


class FailingEngine:
    """An engine that does what its `act` does before it computes."""

    def __init__(self, predictor: Predictor) -> None:
        self.inside = predictor.engine
        self.name, self.precision = self.inside.name, self.inside.precision
        self.sizes: list[int] = []
        self.free = threading.Event()  # while it is clear, batches wait here
        self.free.set()
        self.fail: BaseException | None = None
        self.logit: float | None = None
        predictor.engine = self

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.sizes.append(len(images))
        assert self.free.wait(60)
        failure, self.fail = self.fail, None
        if failure is not None:
            raise failure
        logits = self.inside.run(images)
        if self.logit is not None:
            logits[0] = self.logit
        return logits


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]


@dataclass(frozen=True)
class Address:
    """Where a server listens, and how to ask it."""

    port: int
    service: Service | None = None

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, seconds: float = 30
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Reply(answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read())

    def predict(self, body: Any, query: str = "", **headers: str) -> Reply:
        return self.ask("POST", f"/predict{query}", body, headers)

    def infer(self, request: Any, model: str = "one") -> Reply:
        body = request if isinstance(request, bytes) else json.dumps(request)
        return self.ask("POST", f"/v2/models/{model}/infer", body)

    def metric(self, name: str) -> float:
        """The sum of the samples of one name."""
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        values = [line.rpartition(" ")[2] for line in lines if line.partition("{")[0].partition(" ")[0] == name]
        assert values, f"no figure is called {name}"
        return sum(map(float, values))

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def raw(self, sent: bytes, *, hang_up: bool = False, patience: float = 2) -> bytes:
        """Everything that the server says to these bytes, until it closes or is silent for so many seconds."""
        with self.socket() as client:
            client.settimeout(patience)
            with contextlib.suppress(OSError):
                client.sendall(sent)
                if hang_up:
                    client.shutdown(socket.SHUT_WR)
            heard = b""
            with contextlib.suppress(OSError):
                while part := client.recv(65536):
                    heard += part
            return heard


@contextlib.contextmanager
def running(
    predictors: Mapping[str, Predictor] | Predictor,
    settings: Settings | None = None,
    token: str | None = None,
    allowed_hosts: Collection[str] = (),
    own_names: Collection[str] = (),
) -> Iterator[Address]:
    """A server of these models, "one" for a single one, as long as the block lasts."""
    settings = settings or Settings()
    if "absl.logging" in sys.modules:  # of tensorboard: uvicorn closes all handlers, and this one pytest's capture
        sys.modules["absl.logging"].get_absl_handler().python_handler.stream = sys.__stderr__
    models = {"one": predictors} if isinstance(predictors, Predictor) else predictors
    app, service = create_app(models, settings, token, allowed_hosts, own_names)
    config = uvicorn_config(app, settings)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield Address(server.servers[0].sockets[0].getsockname()[1], service)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def program(*arguments: str, shell: str = "", **variables: str) -> Iterator[tuple[subprocess.Popen, Address]]:
    """The program in a process of its own, as soon as it listens; `shell` is what a shell does before it."""
    command = [*PROGRAM, *arguments, "--port", "0", "--engine", "torch", "--precision", "fp32"]
    process = subprocess.Popen(
        ["sh", "-c", f'{shell} exec "$@"', "sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("listening at "):
                break
        else:
            raise AssertionError(process.communicate()[1])
        yield process, Address(int(line.rpartition(":")[2]))
    finally:
        process.kill()
        process.communicate()


def resident_bytes() -> int:
    """Memory of this process, where the system tells."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell what memory a process has")
    return 1024 * int(Path("/proc/self/status").read_text(encoding="ascii").partition("VmRSS:")[2].split()[0])


def eventually(holds: Any, seconds: float = 20) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
