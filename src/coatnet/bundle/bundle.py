"""A trained model as a folder: weights, class names, preprocessing and record."""

import copy
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coatnet.bundle.calibration import Calibration, read_calibration, scale_classifier
from coatnet.bundle.card import model_card
from coatnet.bundle.config import RecordJson, config_json, read_config, require_memory
from coatnet.bundle.hub import CALIBRATION, CARD, CONFIG, WEIGHTS, UnknownRepository, download
from coatnet.bundle.timm.catalog import PRETRAINED
from coatnet.bundle.timm.folders import TimmModel, is_timm_folder, read_timm_file, read_timm_folder
from coatnet.bundle.weights import read_tensors, write_tensors
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError, counted, cut, nearest, one_line, shorten
from coatnet.model.network import CoAtNet
from coatnet.system.credentials import conceal
from coatnet.system.files import atomic_folder, output_path, translate_write_errors, user_path
from coatnet.system.json_reader import validate
from coatnet.system.terminal import report_wait

FILES = {WEIGHTS, CONFIG, CARD, CALIBRATION}
# A path is never looked up on the hub because it is misspelled: an id says that it is one, by hf:// (timm: hf-hub:),
# by a revision, or by timm as its owner.
HUB_ID = re.compile(r"(hf://|hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True, eq=False, repr=False)
class Bundle:
    """A trained model with everything that is needed to use it.

    Attributes:
        model: the network.
        classes: name of each output.
        preprocessing: how images were prepared when the model was evaluated.
        multilabel: whether an image may have several of the classes, or exactly one.
        record: recipe and report of the training as JSON values, for people to read; code does not depend on it.
        calibration: temperatures, novelty and thresholds from held-out images; None if it was never calibrated.

    Raises:
        UserError: the number of classes is not that of the model's outputs, a class name occurs twice, the
            preprocessing gives another number of channels than the model takes, or the report or the recipe of the
            record have values of other types than `train` writes.
    """

    model: CoAtNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    multilabel: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if len(self.classes) != self.model.num_classes:
            raise UserError(f"{len(self.classes)} class names for a model of {self.model.num_classes} classes")
        if len(set(self.classes)) != len(self.classes):
            duplicate, _ = Counter(self.classes).most_common(1)[0]
            raise UserError(f"class {duplicate!r} is named twice; every output needs a name of its own")
        given, expected = self.preprocessing.channels, self.model.in_channels
        if given != expected:
            raise UserError(f"preprocessing makes {given} channels, the model takes {expected}")
        validate(RecordJson, self.record, "record")

    def __repr__(self) -> str:
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        kind = "several per image" if self.multilabel else "one per image"
        seen = self.preprocessing
        channels = counted(seen.channels, "channel")
        return (
            f"Bundle of {one_line(self.model.variant.name)}, {num_parameters:,} parameters\n"
            f"  classes: {len(self.classes):,}, {kind}: {cut(one_line(shorten(self.classes)))}\n"
            f"  preprocessing: {seen.size[0]} x {seen.size[1]} pixels, {channels}, "
            f"{seen.crop} crop of {seen.crop_fraction:g}, {seen.interpolation}, mean {seen.mean}, std {seen.std}"
        )

    def save(self, folder: str | Path) -> Path:
        """Write model.safetensors, config.json, README.md and, if calibrated, calibration.safetensors, all or none.

        An older bundle is replaced.

        No folder of this machine and no credential is in them: see `without_places`.

        Raises:
            UserError: the folder holds something else than a bundle, or cannot be written.
        """
        shared, target = replace(self, record=without_places(self.record)), require_bundle_place(folder)
        with translate_write_errors(folder), atomic_folder(target, replace=True) as staged:
            write_tensors(self.model.state_dict(), staged / WEIGHTS)
            if self.calibration is not None:
                write_tensors(self.calibration.tensors(), staged / CALIBRATION)
            (staged / CONFIG).write_text(shared.config(), encoding="utf-8", errors="backslashreplace")
            (staged / CARD).write_text(shared.card(), encoding="utf-8", errors="backslashreplace")
        return target

    def uncalibrated(self) -> "Bundle":
        """The bundle with the network's own logits, as training left it; itself if it is not calibrated."""
        if self.calibration is None:
            return self
        model = copy.deepcopy(self.model)
        scale_classifier(model, self.calibration.temperature[0].to(next(model.parameters()).device))
        return replace(self, model=model, calibration=None)

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Weight (K, F) and bias (K,) of the last layer, on the CPU."""
        layer = self.model.get_classifier()
        assert isinstance(layer, nn.Linear)
        return layer.weight.detach().float().cpu(), layer.bias.detach().float().cpu()

    def with_classifier(
        self, classes: Sequence[str], weight: Tensor, bias: Tensor, *, multilabel: bool | None = None
    ) -> "Bundle":
        """The same network with another last layer, weight (K, F) and bias (K,): not calibrated, without a record."""
        model = copy.deepcopy(self.model)
        model.reset_classifier(len(classes))
        model.get_classifier().load_state_dict({"weight": weight, "bias": bias})
        several = self.multilabel if multilabel is None else multilabel
        return Bundle(model.eval(), tuple(classes), self.preprocessing, several)

    def in_order(self, classes: Sequence[str]) -> "Bundle":
        """A model that is not calibrated with its classes in this order; itself where they are others."""
        if self.classes == tuple(classes) or set(self.classes) != set(classes):
            return self
        rows, (weight, bias) = [self.classes.index(name) for name in classes], self.classifier()
        return replace(self.with_classifier(classes, weight[rows], bias[rows]), record=self.record)

    def config(self) -> str:
        """The text of config.json."""
        return config_json(self.model, self.classes, self.preprocessing, self.multilabel, self.record)

    def card(self) -> str:
        """The model card, README.md, as Markdown."""
        return model_card(self.model, self.classes, self.preprocessing, self.multilabel, self.record)


def require_bundle_place(folder: str | Path, *, sources: Sequence[str | Path] = ()) -> Path:
    """The path of a folder that a bundle may be written to.

    Args:
        folder: new, or with a bundle that is replaced.
        sources: models that must stay.

    Raises:
        UserError: the folder holds something else, or one of the sources.
    """
    target = output_path(folder)
    for source in sources:
        if (path := user_path(source)).is_dir() and find_folder(path).resolve() == target.resolve():
            raise UserError(f"--out {folder} would replace a model that is read: give a new folder")
    if target.exists() and not (target.is_dir() and {entry.name for entry in target.iterdir()} <= FILES):
        raise UserError(f"{folder} holds something else than a bundle; give a new folder, or remove it first")
    return target


def without_places(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what is of its machine alone: folders above the data, credentials of URLs.

    Data, the bundle to start from and the teacher keep their names, images their path below the data.
    """
    shared, recipe, report = dict(record), record.get("recipe"), record.get("report")
    data = ""
    if isinstance(recipe, Mapping):
        data = str(recipe.get("data"))
        places = {name: recipe.get(name) for name in ("data", "init", "teacher")}
        named = {name: place_name(place) for name, place in places.items() if isinstance(place, str)}
        shared["recipe"] = {**recipe, **named}

    def shorten_path(text: Any) -> Any:
        below = text.removeprefix(f"{data}/") if isinstance(text, str) else text
        return place_name(below) if isinstance(below, str) else below

    if isinstance(report, Mapping):  # of earlier releases, which named images by their whole path
        shared["report"] = dict(report)
        if isinstance(mistakes := report.get("mistakes"), list):
            rows = [each if isinstance(each, Mapping) else {} for each in mistakes]
            shared["report"]["mistakes"] = [
                {name: value if name in ("truth", "predicted") else shorten_path(value) for name, value in row.items()}
                for row in rows
            ]
        for name in ("bad_images", "bad_pictures"):
            if isinstance(bad := report.get(name), Mapping):
                shared["report"][name] = {shorten_path(image): reason for image, reason in bad.items()}
    return shared


def place_name(source: str) -> str:
    """A file or folder by its name, a bundle by that of its run; anything else, such as a URL, as it may be shown."""
    path = Path(source)
    if not (path.is_absolute() or source.startswith("~")):
        return conceal(source)
    return "/".join(path.parts[1:][-2:]) if path.name == "bundle" else path.name


@report_wait("loading the model")
def load(source: str | Path, *, architecture: str | None = None, allow_pickle: bool = False) -> Bundle:
    """Load a trained model in evaluation mode, without executing anything in its files.

    Args:
        source: the folder of a bundle; the folder of a run, for its bundle; a folder that timm wrote for the hub; a
            file of timm's weights; or the id of a model on the Hugging Face hub: "timm/coatnet_0_rw_224.sw_in1k", or
            "hf://owner/name" for other owners, with "@" and a revision after it if wanted.
        architecture: timm's name of the network, such as "coatnet_0_rw_224", if `source` is a file of weights.
        allow_pickle: also read weights of `torch.save` (only tensors) if there is no safetensors file.

    Raises:
        UserError: there is no model, or a key or tensor of it is missing, unknown or out of bounds; the message
            names it. Shapes are checked before memory is taken.
    """
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise UserError(f"{source!r} is not a model: give the folder of a run or bundle, or an id of the hub")
    path = user_path(source)
    if path.is_file():
        if architecture is None:
            raise UserError(
                f"{path} is a file, which does not say what network it is for: give a bundle (a folder with "
                "model.safetensors and config.json), or for weights of timm's the architecture"
            )
        return _from_timm(read_timm_file(path, architecture, allow_pickle=allow_pickle))
    path = find_folder(path) if path.exists() else _download(str(source), allow_pickle)
    if is_timm_folder(path):
        return _from_timm(read_timm_folder(path, allow_pickle=allow_pickle))
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path} is not a bundle: a bundle holds {WEIGHTS} and {CONFIG}")
    config = read_config(path / CONFIG)
    model = config.build_model()
    model.load_state_dict(read_tensors(path / WEIGHTS, model.state_dict()), assign=True)
    require_memory(model, config.preprocessing, path / CONFIG)
    model.to(memory_format=torch.channels_last)
    stored = path / CALIBRATION
    calibration = read_calibration(stored, model, config.multilabel) if stored.is_file() else None
    return Bundle(model.eval(), config.classes, config.preprocessing, config.multilabel, config.record, calibration)


def _from_timm(found: TimmModel) -> Bundle:
    return Bundle(found.model, found.classes, found.preprocessing)


def find_folder(path: Path) -> Path:
    """Return the folder of the model: `path`, or its bundle if it is the folder of a run."""
    if (path / CONFIG).is_file():
        return path
    if (path / "bundle" / CONFIG).is_file():
        return path / "bundle"
    if (path / "recipe.yaml").is_file():
        raise UserError(
            f"{path} is a run that has no bundle yet: its training has not finished; run it again to resume"
        )
    raise UserError(f"{path} is not a bundle: a bundle holds {WEIGHTS} and {CONFIG}")


def _download(source: str, allow_pickle: bool) -> Path:
    """Return the local folder of a model on the hub."""
    path, hub_ids = Path(source), [row.hub_id for row in PRETRAINED.values()]
    match = HUB_ID.fullmatch(source)
    prefix, repository, revision = match.groups() if match else (None, "", None)
    folder_of_that_name = path.parent.is_dir() and repository not in hub_ids
    if not (prefix or revision or (repository.startswith("timm/") and not folder_of_that_name)):
        similar = nearest(source, _folders_beside(path))
        hint = f"; for a model on the Hugging Face hub, write hf://{source}" if match else ""
        raise UserError(f"{path} is not a bundle: there is no such folder{similar}{hint}")
    try:
        return download(repository, revision=revision, allow_pickle=allow_pickle)
    except UnknownRepository as error:
        raise UserError(f"{error}{nearest(repository, hub_ids, most=3)}; `coatnet models` lists timm's") from None
    except UserError as error:
        where = "" if prefix else f"there is no folder {path}, and as a model of the hub: "
        hint = nearest(repository, hub_ids, most=3) if repository.startswith("timm/") else ""
        raise UserError(f"{where}{error}{'' if repository in hub_ids else hint}") from None


def _folders_beside(path: Path) -> list[str]:
    try:
        return [str(folder) for folder in path.parent.iterdir() if folder.is_dir()]
    except OSError:
        return []
