"""Averages of trained models that started from the same weights: greedy soups, chosen by held-out images.

Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time". BatchNorm as in Izmailov et al. 2018, "Averaging weights leads to wider optima and better
generalization": its statistics are computed anew, since those of an average are not the average of those.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coatnet.bundle import Bundle
from coatnet.bundle.bundle import find_folder, place_name
from coatnet.bundle.config import extensions, provenance
from coatnet.data.datasets import Dataset
from coatnet.data.loader import BadImages, training_batches
from coatnet.data.splits import Splits
from coatnet.data.transforms import Augmentation
from coatnet.errors import UserError, shorten
from coatnet.evaluation.calibrate import calibrate_and_evaluate
from coatnet.evaluation.evaluate import EVALUATED_TOGETHER, SplitOutputs, load_model, open_recorded
from coatnet.evaluation.metrics import Metrics, main_figure
from coatnet.evaluation.report import Report
from coatnet.inference.logits import workers_for
from coatnet.model.network import CoAtNet, create_model
from coatnet.system.files import user_path
from coatnet.system.hardware import choose_device
from coatnet.system.progress import ProgressBar

MAX_STATISTICS_IMAGES = 4096  # chosen: they settle a mean and a variance
AS_EVALUATED = Augmentation("none", flip_rate=0.0)
SELECTED = (
    "These held-out images chose the models, so the figure is a little too good: measure it on images that had no part "
    "in it (coatnet evaluate)."
)


@dataclass(frozen=True)
class Member:
    """A model that was offered for an average.

    Attributes:
        name: of its run or bundle.
        taken: whether it is in the average.
        figure: its own, on the held-out images; None without images.
        together: that of the average with it, where that was tried.
    """

    name: str
    taken: bool
    figure: float | None = None
    together: float | None = None


@dataclass(frozen=True)
class Soup:
    """What `soup` returns.

    Attributes:
        bundle: the average; its record holds all that follows.
        members: the models that were offered, in the order in which they were tried.
        report: the evaluation of the calibrated average; None without images.
        notes: what there is to say about the average, in a line each.
    """

    bundle: Bundle
    members: tuple[Member, ...]
    report: Report | None
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """The models, the main figure of their average and the notes, in a few lines of text."""
        lines = []
        for member in self.members:
            figure = "" if member.figure is None else f"  {100 * member.figure:6.2f} %"
            together = "" if member.together is None else f"  ({100 * member.together:.2f} % together)"
            lines.append(f"{'taken   ' if member.taken else 'left out'}{figure}  {member.name}{together}")
        taken = sum(member.taken for member in self.members)
        if self.report is not None:
            lines.append(f"{taken} of {len(self.members)} models: {self.report.headline()}")
        return "\n".join([*lines, *self.notes]) + "\n"


def soup(
    models: Sequence[str | Path | Bundle],
    data: str | Path | Splits | None = None,
    *,
    uniform: bool = False,
    batch_size: int = EVALUATED_TOGETHER,
    num_workers: int | None = None,
    device: str | None = None,
) -> Soup:
    """Average the weights of models that started from the same weights, while held-out accuracy does not fall.

    The greedy rule: the best model first, then each other one, from the best down, if the main figure of the average
    (top-1 accuracy, or mean average precision) does not fall with it. BatchNorm statistics of an average are computed
    anew on up to 4,096 training images, seen as in evaluation, except frozen ones, which all models share; without
    training images they are averaged too. Each model, and each average that is tried, computes the held-out images
    once; the last one is calibrated by what it computed, as after a training.

    Args:
        models: two or more bundles, runs, or ids of the hub, of the same network, classes and preprocessing.
        data: the images to choose by: splits, or what `open_dataset` opens, split as for the training of the models.
        uniform: average all of them, whatever the images say; without `data`, nothing is evaluated.
        batch_size: images per batch, also of those that BatchNorm statistics are computed on.
        num_workers: processes that decode, as in `evaluate`.
        device: where to compute: "cpu", "cuda" or "cuda:1"; by default the first GPU, or the CPU without one.

    Raises:
        UserError: a model is missing, is another network than the first one, or held out other images; or `uniform`
            models did not start from the same weights.
    """
    if isinstance(models, str | Path | Bundle) or len(models) < 2:
        raise UserError("an average takes two models or more: give the folders of several runs that started alike")
    if data is None and not uniform:
        raise UserError("data is missing: give the images to choose by, or average all (uniform)")
    paths = [user_path(source) for source in models if not isinstance(source, Bundle)]
    paths = [(find_folder(path) if path.is_dir() else path).resolve() for path in paths]  # a run stands for its bundle
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is named twice: name each model once")
    names = [_name(source, number) for number, source in enumerate(models, start=1)]
    target = choose_device(device or "auto")
    bundles = [load_model(source, str(target)).uncalibrated() for source in models]
    bundles = [bundle.in_order(bundles[0].classes) for bundle in bundles]
    for name, bundle in zip(names[1:], bundles[1:], strict=True):
        check_alike(bundles[0], names[0], bundle, name)
    recipes = [_recipe(bundle) for bundle in bundles]
    notes = _notes(recipes, names, uniform=uniform)
    figure = main_figure(bundles[0].multilabel)
    splits = None if data is None else open_recorded(data, bundles[0])
    if not isinstance(splits, Splits | None):
        raise UserError(f"data must be what open_dataset opens, or the splits that it returns, got {data!r:.80}")
    training = None if splits is None else splits.training

    def measured(bundle: Bundle, name: str) -> tuple[SplitOutputs | None, float]:
        """What the network of a bundle computes for the held-out images, and its figure."""
        if splits is None:
            return None, 0.0
        images = SplitOutputs(bundle, splits, batch_size=batch_size, num_workers=num_workers, keep=True)
        metrics = Metrics(len(bundle.classes), bundle.multilabel)
        with ProgressBar(f"evaluating {name}") as bar:
            for batch in images.batches(lambda done: bar.update(done, len(images))):
                metrics.update(batch.logits(bundle), batch.labels)
        return images, metrics.compute()[figure]

    def average(numbers: Sequence[int]) -> Bundle:
        return average_weights([bundles[number] for number in numbers], training, num_workers, batch_size)

    images, report = None, None  # what is kept of the best so far
    alone, together, best = list[float](), dict[int, float](), -1.0
    for bundle, name in zip(bundles, names, strict=True):
        outputs, found = measured(bundle, name)
        alone.append(found)
        if found > best:  # of equals, the first given
            best, images = found, outputs
    order = sorted(range(len(models)), key=lambda number: -alone[number])
    taken, bundle = order[:1], bundles[order[0]]
    if uniform:
        taken, bundle = order, average(order)
        images, _ = measured(bundle, "the average")
    for number in [] if uniform else order[1:]:
        tried = average([*taken, number])
        outputs, together[number] = measured(tried, f"the average with {names[number]}")
        if together[number] >= best:
            taken, bundle, images, best = [*taken, number], tried, outputs, together[number]

    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in bundle.model.modules())
    if len(taken) == 1:
        notes.append("No average is as good as the best model alone: the bundle is that model, calibrated.")
    elif has_norms and (training is None or not len(training)):
        notes.append("BatchNorm statistics are averaged: there are no training images to compute them anew.")
    elif has_norms and training is not None:
        learned = min(len(training), MAX_STATISTICS_IMAGES)
        notes.append(f"BatchNorm statistics were computed anew on {learned:,} training images.")
    if images is not None:
        with ProgressBar("calibrating") as bar:
            bundle, report = calibrate_and_evaluate(bundle, images, progress=bar.update)
    if bundle.calibration is None:
        few = "no images" if splits is None else "too few held-out images"
        notes.append(f"The average is not calibrated ({few}): `coatnet calibrate` does it with others.")
    if report is not None:
        if report.figures[figure] < alone[order[0]]:
            notes.append(f"The best model alone has {100 * alone[order[0]]:.2f} %, more than the average.")
        if not uniform:
            notes.append(SELECTED)
    members = tuple(
        Member(names[number], number in taken, None if splits is None else alone[number], together.get(number))
        for number in order
    )
    made = Soup(bundle, members, report, tuple(notes))
    added = [each for number in taken for each in extensions(bundles[number].record)]
    added = [each for place, each in enumerate(added) if each not in added[:place]]
    record = {
        **provenance(bundles[order[0]].record),
        "recipe": dict(recipes[order[0]]),
        **({"extension": {"earlier": added}} if added else {}),
        "soup": {
            "rule": "uniform" if uniform else "greedy",
            "members": [asdict(member) for member in members],
            "summary": made.to_text(),
        },
        **({} if report is None else {"report": report.to_dict()}),
    }
    return replace(made, bundle=replace(bundle, record=record))


def average_weights(
    bundles: Sequence[Bundle],
    images: Dataset | None,
    num_workers: int | None,
    batch_size: int = EVALUATED_TOGETHER,
) -> Bundle:
    """A model with the mean of the weights of models that are alike; BatchNorm statistics of the images, if any."""
    first, states = bundles[0], [bundle.model.state_dict() for bundle in bundles]
    with torch.device("meta"):
        model = create_model(**first.model.config())
    model.load_state_dict({name: _mean([state[name] for state in states]) for name in states[0]}, assign=True)
    model.to(memory_format=torch.channels_last)
    if images is not None and len(images) and (norms := _learned_norms(model, states)):
        batch_size = min(max(2, batch_size), len(images))  # of one image, a map of one cell has no variance
        batches = training_batches(
            images,
            preprocessing=first.preprocessing,
            augmentation=AS_EVALUATED,
            batch_size=batch_size,
            seed=0,
            first_step=0,
            num_steps=math.ceil(min(len(images), MAX_STATISTICS_IMAGES) / batch_size),
            num_workers=workers_for(images, num_workers),
            bad_images=BadImages(len(images)),
        )
        compute_statistics(model, norms, batches)
    return replace(first, model=model.eval())


@torch.no_grad()
def compute_statistics(
    model: CoAtNet, norms: Sequence[nn.BatchNorm2d], batches: Generator[tuple[Tensor, ...], None, None]
) -> None:
    """Compute the running statistics of some BatchNorms as means over batches, in place; others are left as they are.

    As `torch.optim.swa_utils.update_bn`, which resets all of them.
    """
    device, momenta = next(model.parameters()).device, [norm.momentum for norm in norms]
    model.train()  # in evaluation they would be folded into convolutions; the model has no stochastic depth
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module not in norms:
            module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    with closing(batches):
        for images, *_ in batches:
            model(images.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _learned_norms(model: CoAtNet, states: Sequence[Mapping[str, Tensor]]) -> list[nn.BatchNorm2d]:
    """The BatchNorms of an average but those that were frozen, which are equal in all models, statistics too.

    The weights behind a frozen one have learned with its statistics.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            keys = [f"{name}.{key}" for key in module.state_dict()]
            if not all(torch.equal(states[0][key], state[key]) for state in states for key in keys):
                found.append(module)
    return found


def _mean(values: Sequence[Tensor]) -> Tensor:
    """The mean, summed in double precision; of counters, the first."""
    if not values[0].is_floating_point():
        return values[0].clone()
    return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)


_DIVISION = ("validation_fraction", "test_fraction", "kept_together")  # unknown without a recipe


def check_alike(first: Bundle, first_name: str, other: Bundle, name: str) -> None:
    """Raises UserError unless two models are the same network for the same classes and images.

    Models that held out other shares of the images cannot be compared: one has learned what the other is measured on.
    """
    ours, theirs = _traits(first), _traits(other)
    for trait, value in ours.items():
        if theirs[trait] != value and not (trait in _DIVISION and None in (value, theirs[trait])):
            values = f" ({theirs[trait]}, not {value})" if len(f"{theirs[trait]}{value}") < 80 else ""
            raise UserError(
                f"{trait} of {name} is another than of {first_name}{values}: give models that were trained alike, from "
                "the same weights"
            )


def _traits(bundle: Bundle) -> dict[str, object]:
    """What models must have in common, by name."""
    recipe: Mapping[str, Any] = _recipe(bundle)
    return {
        "the network": bundle.model.variant.name,
        "the architecture": bundle.model.config(),
        "the list of classes": ", ".join(bundle.classes),
        "multilabel": bundle.multilabel,
        **{f"preprocessing.{name}": value for name, value in asdict(bundle.preprocessing).items()},
        "validation_fraction": recipe.get("validation_fraction"),
        "test_fraction": recipe.get("test_fraction", 0.0) if recipe else None,
        "kept_together": [*map(list, recipe.get("kept_together") or ())] if recipe else None,
        "fold": recipe.get("fold") or "",
    }


def _notes(recipes: Sequence[Mapping[str, object]], names: Sequence[str], *, uniform: bool) -> list[str]:
    """What the records say about starts and data. Raises UserError if starts differ and no image would tell."""
    known = [(name, recipe) for name, recipe in zip(names, recipes, strict=True) if recipe]
    starts = [
        (name, recipe.get("init") or f"untrained weights of seed {recipe.get('seed', 0)}") for name, recipe in known
    ]
    notes = []
    for name, start in starts[1:]:
        if start != starts[0][1]:
            text = f"{name} started from {start}, {starts[0][0]} from {starts[0][1]}"
            if uniform:
                raise UserError(f"{text}: only models of one start can be averaged; leave out uniform, or one of them")
            notes.append(f"{text}: averages of such networks are hardly ever as good as one of them.")
            break
    places = sorted({str(recipe["data"]) for _, recipe in known if recipe.get("data")})
    if len(places) > 1:
        notes.append(f"The models learned from {shorten(places)}: what one held out, another may have learned.")
    return notes


def _recipe(bundle: Bundle) -> Mapping[str, object]:
    """The recipe in a model's record, without places; empty if there is none."""
    recipe = bundle.record.get("recipe")
    if not isinstance(recipe, Mapping):
        return {}
    named = {key: place_name(str(recipe[key])) for key in ("data", "init") if recipe.get(key)}
    return {**recipe, **named}


def _name(source: str | Path | Bundle, number: int) -> str:
    """`model 2` for a bundle in memory, else the name of the run, bundle or hub id."""
    if isinstance(source, Bundle):
        return f"model {number}"
    path = user_path(source)
    return place_name(str(path.resolve()) if path.exists() else str(source))
