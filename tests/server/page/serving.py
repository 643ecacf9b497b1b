"""A server as people start it, in a process of its own, that a test can end and start again."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from coatnet.bundle import Bundle
from coatnet.data.transforms import Preprocessing
from coatnet.model.network import create_model


class Server:
    """`coatnet serve` with these arguments; `url` is where it listens, the same after another start."""

    def __init__(self, *arguments: str, token: str | None = None) -> None:
        self.arguments = arguments
        self.environment = {name: value for name, value in os.environ.items() if name != "COATNET_TOKEN"}
        if token is not None:
            self.environment["COATNET_TOKEN"] = token
        self.port = "0"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "coatnet", "serve", *self.arguments, "--port", self.port]
        command += ["--engine", "torch", "--precision", "fp32"]
        self.process = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if "listening at " in line:
                self.url = line.split()[-1]
                self.port = self.url.rpartition(":")[2]
                return
        raise AssertionError(f"the server ended with {self.process.wait()}: {said}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def answer(self, image: Path) -> list[dict[str, Any]]:
        """The predictions of `POST /predict`, asked without the page."""
        request = urllib.request.Request(f"{self.url}/predict", image.read_bytes(), method="POST")
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)["predictions"]


def save_bundle(folder: Path, classes: tuple[str, ...], *, multilabel: bool = False) -> Path:
    """A small network whose answers differ from image to image, though it has learned nothing."""
    torch.manual_seed(0)
    model = create_model("coatnet-femto-64", num_classes=len(classes), resolution=32)
    torch.nn.init.normal_(model.get_classifier().weight)
    torch.nn.init.zeros_(model.get_classifier().bias)
    return Bundle(model.eval(), classes, Preprocessing(resolution=32), multilabel=multilabel).save(folder)


def draw(path: Path, seed: int, side: int = 200) -> Path:
    """An image of soft colored spots; another seed is another image."""
    spots = np.random.default_rng(seed).integers(0, 255, (3 + seed % 4, 4, 3), dtype=np.uint8)
    Image.fromarray(spots).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return path
