"""A finished model on disk: weights, class names and preprocessing in one folder that never has to guess."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coatnet.bundle.card import model_card
from coatnet.bundle.config import describe, read_config
from coatnet.bundle.folder import publish
from coatnet.bundle.weights import read_weights, write_weights
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.model.coatnet import CoAtNet


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model with all it needs to be used and to be believed.

    `classes[i]` names output i. `preprocessing` is what the model saw when it was measured. `record` holds
    the recipe and the report as JSON values: read by people, never by code.

    Raises:
        UserError: the model's outputs are not one a class, or its inputs not what the preprocessing makes.
    """

    model: CoAtNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    multilabel: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.classes) != self.model.num_classes:
            raise UserError(f"{len(self.classes)} class names for a model of {self.model.num_classes} classes")
        if len(set(self.classes)) != len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise UserError(f"class {twice!r} is named twice; every output needs a name of its own")
        made, taken = self.preprocessing.channels, self.model.in_channels
        if made != taken:
            raise UserError(f"preprocessing makes {made} channels, the model takes {taken}")

    def save(self, folder: str | Path) -> Path:
        """Write model.safetensors, config.json and README.md, all or nothing; an older bundle is replaced.

        Raises:
            UserError: the folder holds something else than a bundle, or cannot be written.
        """
        config = describe(self.model, self.classes, self.preprocessing, self.multilabel, self.record)
        with publish(folder) as staged:
            write_weights(self.model, staged / "model.safetensors")
            (staged / "config.json").write_text(config, encoding="utf-8", errors="backslashreplace")
            (staged / "README.md").write_text(model_card(self), encoding="utf-8", errors="backslashreplace")
        return Path(folder)


def load(path: str | Path) -> Bundle:
    """The bundle in a folder, its model in evaluation mode; nothing in the folder is executed.

    Raises:
        UserError: the folder is no bundle, or a key or tensor of it is missing, unknown or out of bounds; the
            message names it. Sizes are compared with the file before memory is taken.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} is not a bundle: {_why_not(folder)}")
    config = read_config(folder / "config.json")
    model = config.build_model()
    read_weights(model, folder / "model.safetensors")
    return Bundle(model.eval(), config.classes, config.preprocessing, config.multilabel, config.record)


def _why_not(folder: Path) -> str:
    if (folder / "bundle" / "config.json").is_file():
        return f"the one of this run is {folder / 'bundle'}"
    if folder.is_file():
        return "it is a file; a bundle is a folder with model.safetensors and config.json"
    if not folder.exists():
        return "there is no such folder"
    return "a bundle holds model.safetensors and config.json"
