"""A finished model on disk: weights, class names and preprocessing in one folder that never has to guess."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coatnet.bundle.card import model_card
from coatnet.bundle.config import describe, read_config
from coatnet.bundle.hub import UnknownRepository, download
from coatnet.bundle.timm.catalog import PRETRAINED
from coatnet.bundle.timm.folders import TimmModel, is_timm_folder, read_timm_file, read_timm_folder
from coatnet.bundle.weights import read_tensors, write_tensors
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError, nearest
from coatnet.model.network import CoAtNet
from coatnet.system.files import atomic_folder, translate_write_errors

FILES = {"model.safetensors", "config.json", "README.md"}
# "owner/name" of the hub, and a branch, tag or commit behind an "@".
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


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
        target = Path(folder)
        if target.exists() and not (target.is_dir() and {entry.name for entry in target.iterdir()} <= FILES):
            raise UserError(f"{folder} holds something else than a bundle; give a new folder, or remove it first")
        with translate_write_errors(folder), atomic_folder(folder, replace=True) as staged:
            write_tensors(self.model.state_dict(), staged / "model.safetensors")
            (staged / "config.json").write_text(config, encoding="utf-8", errors="backslashreplace")
            (staged / "README.md").write_text(model_card(self), encoding="utf-8", errors="backslashreplace")
        return target


def load(source: str | Path, *, architecture: str | None = None, allow_pickle: bool = False) -> Bundle:
    """A finished model, in evaluation mode; nothing of what is read is executed.

    Args:
        source: a bundle's folder; a folder that timm wrote for the hub; a file of timm's weights; or the id of a
            repository on the hub, such as "timm/coatnet_0_rw_224.sw_in1k", "@" and a revision behind it if need be.
        architecture: timm's name of the network in a bare file, such as "coatnet_0_rw_224".
        allow_pickle: read weights of `torch.save` too, tensors only, where there is no safetensors file.

    Raises:
        UserError: there is no model, or a key or tensor of it is missing, unknown or out of bounds; the message
            names it. Sizes are compared with the file before memory is taken.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if architecture is None:
            raise UserError(
                f"{path} is a file, which does not say what network it is for: give a bundle (a folder with "
                "model.safetensors and config.json), or for weights of timm's the architecture"
            )
        return _bundle(read_timm_file(path, architecture, allow_pickle=allow_pickle))
    if not path.exists() and (id_and_revision := HUB_ID.fullmatch(str(source))):
        path = _download(id_and_revision[1], id_and_revision[2], allow_pickle)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a bundle: {_why_not(path)}")
    if is_timm_folder(path):
        return _bundle(read_timm_folder(path, allow_pickle=allow_pickle))
    if not (path / "model.safetensors").is_file():
        raise UserError(f"{path} is not a bundle: {_why_not(path)}")
    config = read_config(path / "config.json")
    model = config.build_model()
    model.load_state_dict(read_tensors(path / "model.safetensors", model.state_dict()), assign=True)
    model.to(memory_format=torch.channels_last)
    return Bundle(model.eval(), config.classes, config.preprocessing, config.multilabel, config.record)


def _bundle(found: TimmModel) -> Bundle:
    return Bundle(found.model, found.classes, found.preprocessing)


def _download(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    try:
        return download(repository, revision=revision, allow_pickle=allow_pickle)
    except UnknownRepository as error:
        known = [row.hub_id for row in PRETRAINED.values()]
        raise UserError(f"{error}{nearest(repository, known, most=3)}; `coatnet models` lists timm's") from None


def _why_not(folder: Path) -> str:
    if (folder / "bundle" / "config.json").is_file():
        return f"the one of this run is {folder / 'bundle'}"
    if not folder.exists():
        return "there is no such folder"
    return "a bundle holds model.safetensors and config.json"
