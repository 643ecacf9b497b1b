"""Other classes for a finished model, without training: some renamed, left out or taken together.

Shapes: N features drawn from what the bundle knows of its training images, F features, K classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coatnet.bundle.bundle import Bundle
from coatnet.bundle.calibration import MAX_FEATURES, MAX_MEANS, may_describe_features
from coatnet.bundle.config import extensions, provenance
from coatnet.errors import UserError, nearest

DRAWN_FEATURES = 20_000
# Of a report, as `Report.to_dict` gives it: the columns that name classes.
_TABLES_WITH_CLASSES = {
    "per_class": ("class",),
    "mistakes": ("truth", "predicted"),
    "suspects": ("label", "suggested"),
}


class Merged(NamedTuple):
    """What `merge_classes` returns.

    Attributes:
        bundle: the model of the new classes.
        agreement: share of drawn features that get the class whose summed probabilities are the largest.
    """

    bundle: Bundle
    agreement: float


def rename_classes(bundle: Bundle, names: Mapping[str, str]) -> Bundle:
    """Give classes other names; answers, calibration and figures stay.

    Args:
        bundle: the model.
        names: new names by the present ones.

    Raises:
        UserError: there is no such class, or two would have one name.
    """
    _require_classes(bundle, names)
    classes = tuple(names.get(name, name) for name in bundle.classes)
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise UserError(f"two classes would be called {twice[0]!r}; `coatnet shrink --merge` makes one of two")
    return replace(bundle, classes=classes, record=_renamed(bundle.record, names))


def drop_classes(bundle: Bundle, dropped: Sequence[str]) -> Bundle:
    """Leave classes out: the probabilities of the others are as before in proportion, and are not calibrated.

    Args:
        bundle: the model.
        dropped: names of classes.

    Raises:
        UserError: there is no such class, or fewer than two would stay.
    """
    _require_classes(bundle, dropped)
    kept = [index for index, name in enumerate(bundle.classes) if name not in dropped]
    if len(kept) < 2:
        raise UserError(f"{len(kept)} of {len(bundle.classes)} classes would stay; a model has at least two")
    weight, bias = bundle.classifier()
    return _with_classes(bundle, tuple(bundle.classes[index] for index in kept), weight[kept], bias[kept])


def merge_classes(bundle: Bundle, groups: Mapping[str, Sequence[str]]) -> Merged:
    """Make one class of several, whose probability is about the sum of theirs.

    The logit of the sum is log(exp a + exp b) for two logits, which is no linear function of the features. The new row
    is the nearest linear one in least squares, over features drawn from the summary of the training images.

    Args:
        bundle: a calibrated model of one label per image.
        groups: names of classes by the new name of each group. It may be one of theirs.

    Raises:
        UserError: there is no such class, one is in two groups, fewer than two classes would stay, several labels are
            possible, or the bundle does not know the features of its training images.
    """
    members = [name for group in groups.values() for name in group]
    _require_classes(bundle, members)
    if twice := [name for name, count in Counter(members).items() if count > 1]:
        raise UserError(f"class {twice[0]!r} is to be merged twice; name it once")
    if bundle.multilabel:
        raise UserError("this model gives several labels per image; classes are merged in models that give one")
    rest = [name for name in bundle.classes if name not in members]
    classes = (*rest, *groups)
    if len(classes) < 2:
        raise UserError("one class would stay; a model has at least two")
    summary = bundle.calibration.features if bundle.calibration is not None else None
    if summary is None:
        if not may_describe_features(bundle):
            raise UserError(
                f"merging is for models of up to {MAX_MEANS:,} classes and {MAX_FEATURES:,} features, of which a "
                "calibration knows the training images: fine-tune on images of the new classes"
            )
        raise UserError(
            "merging needs what a calibrated model knows of its training images: "
            "`coatnet calibrate BUNDLE --data DATA` first"
        )
    features, _ = summary.draw(max(20, DRAWN_FEATURES // len(bundle.classes)))
    weight, bias = bundle.classifier()
    logits = F.linear(features.double(), weight.double(), bias.double())  # (N, K)
    place = {name: index for index, name in enumerate(bundle.classes)}
    indices = [[place[name]] for name in rest] + [[place[name] for name in group] for group in groups.values()]
    exact = torch.stack([logits[:, group].logsumexp(1) for group in indices], dim=1)  # (N, K')
    ones = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    # Where the group has no chance, its logit may be anything: features count by its probability, and a little.
    rows = []
    for column, group in enumerate(indices):
        if len(group) == 1:
            rows.append(torch.cat([weight[group[0]], bias[group]]).double())
            continue
        trust = (exact.softmax(1)[:, column : column + 1] + 1e-2).sqrt()
        rows.append(torch.linalg.lstsq(ones * trust, exact[:, column : column + 1] * trust).solution[:, 0])
    fitted = torch.stack(rows)
    agreement = ((ones @ fitted.mT).argmax(1) == exact.argmax(1)).double().mean()
    changed = _with_classes(bundle, classes, fitted[:, :-1].float(), fitted[:, -1].float())
    return Merged(changed, float(agreement))


def _require_classes(bundle: Bundle, names: Mapping[str, Any] | Sequence[str]) -> None:
    for name in names:
        if name not in bundle.classes:
            raise UserError(f"the model has no class {name[:100]!r}{nearest(name[:100], bundle.classes, most=3)}")


def _with_classes(bundle: Bundle, classes: tuple[str, ...], weight: Tensor, bias: Tensor) -> Bundle:
    """The bundle with another classifier: neither its calibration nor its figures belong to it any more."""
    record = {"classes_before": list(bundle.classes), **provenance(bundle.record)}
    if earlier := extensions(bundle.record):  # whose figures are of other classes
        record["extension"] = {"earlier": earlier}
    return replace(bundle.with_classifier(classes, weight, bias), record=record)


def _renamed(record: Any, names: Mapping[str, str]) -> Any:
    """A record in which the classes of the report, and those that were added, have their new names."""
    if extension := record.get("extension"):
        *earlier, last = (
            {**each, "added": [names.get(name, name) for name in each["added"]]} if "added" in each else each
            for each in (*extension.get("earlier", []), extension)
        )
        record = {**record, "extension": {**last, **({"earlier": earlier} if earlier else {})}}
    report = record.get("report")
    if not isinstance(report, Mapping):
        return record
    classes = present if isinstance(present := report.get("classes"), list | tuple) else []

    def new(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value in names or value in classes or not report.get("multilabel"):
            return names.get(value, value)
        # A mistake about an image of several labels is "not sea", and its truth "beach, sea".
        absent = "not " if value.startswith("not ") else ""
        return absent + ", ".join(names.get(name, name) for name in value.removeprefix(absent).split(", "))

    changed = dict(report)
    if classes:
        changed["classes"] = [new(name) for name in classes]
    if isinstance(pairs := report.get("confused_pairs"), list | tuple):
        changed["confused_pairs"] = [[new(value) for value in pair] for pair in pairs]
    for table, columns in _TABLES_WITH_CLASSES.items():
        if isinstance(rows := report.get(table), list | tuple):
            changed[table] = [
                {key: new(value) if key in columns else value for key, value in row.items()} for row in rows
            ]
    return {**record, "report": changed}
