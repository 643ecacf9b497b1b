"""What a study asks: the paper's own questions with their members and what the paper says of them, or a YAML file."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coatnet.errors import UserError, nearest
from coatnet.model.config import Variant
from coatnet.model.registry import find_variant
from coatnet.study.record import Paper
from coatnet.training.config import Recipe, read_yaml

MAX_MEMBERS = 64  # chosen: a grid grows as a product
MAX_NAME_BYTES = 150  # of a member; its folders add size, seed and learning rate, and file systems allow 255


@dataclass(frozen=True)
class Choice:
    """A member before its network is matched.

    Attributes:
        name: unique in the question.
        description: what it is, in a line.
        variations: of the study's row.
        changes: other fields of the recipe.
        paper: what the paper says of it.
    """

    name: str
    description: str
    variations: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    paper: Paper = field(default_factory=Paper)


@dataclass(frozen=True)
class Question:
    """A question with its members, the first of which the others are compared with.

    Attributes:
        name: as on the command line.
        title: the question in words.
        choices: its members.
        base: variations of all members; those of a member come over them.
        fixed_depths: the blocks of each stage are what is asked about, and are not matched.
        matched: whether members are given the same cost.
        recipe: fields of the recipe of all members, from a YAML file.
    """

    name: str
    title: str
    choices: tuple[Choice, ...]
    base: Mapping[str, Any] = field(default_factory=dict)
    fixed_depths: bool = False
    matched: bool = True
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def asked(self) -> dict[str, Any]:
        """What a YAML file asks apart from its title, as study.json keeps it to tell whether the file was changed."""
        members = {choice.name: {**choice.changes, "variations": choice.variations} for choice in self.choices}
        recipe = {**self.recipe, "variations": self.base} if self.base else self.recipe
        return json.loads(json.dumps({"members": members, "recipe": recipe, "match": self.matched}))


def base_row(resolution: int, model: str | None, width: float) -> Variant:
    """The network that the members of a study vary, C-C-T-T.

    Args:
        resolution: side of the images in pixels.
        model: a row of the registry with four stages; None chooses by the resolution.
        width: factor on all widths.

    Raises:
        UserError: there is no such row.
    """
    if model is not None:
        row = find_variant(model)
        if not isinstance(row, Variant):
            raise UserError(f"{model} is a network of timm, whose options are fixed: give one of the paper's family")
    elif resolution > 96:
        row = find_variant("coatnet-femto")
    else:
        # chosen: 0.36 M parameters and 19 M multiply-accumulates at 28 pixels, where S3 has 7 x 7 cells to attend over
        # and S4 has 4 x 4; as many as a ViT_REL of seven blocks with patches of 4 x 4.
        strides = [1, 2, 1, 2] if resolution <= 48 else [1, 2, 2, 2]
        tiny = resolution <= 16
        row = find_variant("coatnet-femto").vary(
            stem_stride=1 if tiny else 2,
            stem_width=12 if tiny else 48,
            depths=[1, 2, 2, 1] if tiny else [1, 3, 3, 1],
            widths=[16, 32, 32, 48] if tiny else [28, 52, 64, 80],
            strides=strides,
            head_dim=8 if tiny else 16,
        )
    assert isinstance(row, Variant)
    if width == 1:
        return row
    scaled = [max(1, round(width * stage.width / row.head_dim)) * row.head_dim for stage in row.stages]
    return row.vary(widths=scaled, stem_width=4 * max(1, round(width * row.stem_width / 4)))


def find_question(name: str, row: Variant) -> Question:
    """The question of this name, about variations of a row. Raises UserError if there is none, or it does not apply."""
    if name not in QUESTIONS:
        raise UserError(
            f"there is no study {name!r}{nearest(name, list(QUESTIONS))}; there are {', '.join(QUESTIONS)}, or give a "
            "YAML file"
        )
    return QUESTIONS[name](row)


def _ranked(generalization: int | None, capacity: int | None = None) -> Paper:
    return Paper(generalization_rank=generalization, capacity_rank=capacity)


# paper: section 2.2: generalization C-C-C-C ~ C-C-C-T >= C-C-T-T > C-T-T-T >> ViT_REL;
# capacity C-C-T-T ~ C-T-T-T > ViT_REL > C-C-C-T > C-C-C-C.
_LAYOUTS = Question(
    "layouts",
    "Which stages should be convolution, and which attention?",
    (
        Choice("C-C-T-T", "convolution in S1 and S2, attention in S3 and S4", {}, paper=_ranked(3, 1)),
        Choice("C-C-C-C", "convolution in all stages", {"layout": "C-C-C-C"}, paper=_ranked(1, 5)),
        Choice("C-C-C-T", "attention in S4 only", {"layout": "C-C-C-T"}, paper=_ranked(1, 4)),
        Choice("C-T-T-T", "convolution in S1 only", {"layout": "C-T-T-T"}, paper=_ranked(4, 1)),
        Choice("ViT_REL", "patches, then attention on one grid", {"layout": "ViT_REL"}, paper=_ranked(5, 3)),
    ),
)
# paper: equation 3 and section 2.2, options A to C; Table 6 for the bias. It chose pre over post without a figure.
_ATTENTION = Question(
    "attention",
    "How should attention know positions, and should it be global?",
    (
        Choice("pre", "relative bias before the softmax, global", paper=_ranked(1, 1)),
        Choice("post", "relative bias after the softmax, global", {"attention": "post"}),
        Choice("none", "no relative bias, global", {"relative_bias": False}, paper=_ranked(2, 1)),
        Choice("local", "relative bias, windows of 7 x 7 cells", {"attention": "local"}, paper=_ranked(None, 3)),
        Choice("linear", "linear attention", {"attention": "linear", "relative_bias": False}, paper=_ranked(3, None)),
    ),
)
_BIAS = Question(  # paper: Table 6: 84.1 with, 83.8 without; the capacity is the same
    "bias",
    "Does a relative bias help?",
    (
        Choice("with", "relative bias before the softmax", paper=_ranked(1, 1)),
        Choice("without", "no relative bias", {"relative_bias": False}, paper=_ranked(2, 1)),
    ),
)
_NORMS = Question(  # paper: Table 8: 84.1 with both at 224 pixels
    "norms",
    "Which normalization in MBConv?",
    (
        Choice("batch", "BatchNorm in MBConv", paper=_ranked(1)),
        Choice("layer", "LayerNorm in MBConv", {"mbconv_norm": "layer"}, paper=_ranked(1)),
    ),
)
_STRIDE = Question(  # paper: Table 9: the strided depthwise convolution is better by 0.4 for CoAtNet-0
    "stride",
    "Which convolution of MBConv should have the stride?",
    (
        Choice("expand", "stride in the expanding convolution, equation 5", paper=_ranked(2)),
        Choice("depthwise", "stride in the depthwise convolution", {"downsample": "depthwise"}, paper=_ranked(1)),
    ),
)


def _blocks(row: Variant) -> Question:
    """Table 7: V1 moves two thirds of the blocks of S2 to S3, V2 a third of its number from S3 to S2."""
    depths = [stage.depth for stage in row.stages]
    if len(depths) != 4 or depths[1] < 2 or depths[2] < 2:
        raise UserError(f"blocks moves blocks between S2 and S3, but {row.name} has stages of {depths} blocks")
    to_s3, to_s2 = round(2 * depths[1] / 3), max(1, round(depths[1] / 3))
    s1, s2, s3, s4 = depths

    def moved(count: int) -> dict[str, list[int]]:
        return {"depths": [s1, s2 - count, s3 + count, s4]}

    return Question(
        "blocks",
        "Should S2 or S3 have more of the blocks?",
        (  # paper: 84.1, 83.4 and 84.0
            Choice("V0", f"{s2} blocks in S2, {s3} in S3", paper=_ranked(1)),
            Choice("V1", f"{s2 - to_s3} blocks in S2, {s3 + to_s3} in S3", moved(to_s3), paper=_ranked(3)),
            Choice("V2", f"{s2 + to_s2} blocks in S2, {s3 - to_s2} in S3", moved(-to_s2), paper=_ranked(2)),
        ),
        fixed_depths=True,
    )


def _heads(row: Variant) -> Question:
    """Table 8: heads half as wide, as they are, and twice as wide; the paper has 32 and 64."""
    size = row.head_dim
    double = 2 * size
    widths = [
        -(-stage.width // double) * double if stage.kind == "transformer" else stage.width for stage in row.stages
    ]
    return Question(
        "heads",
        "How wide should the heads of attention be?",
        (  # paper: 84.1 with 32, 83.9 with 64
            Choice(f"{size}", f"heads of {size} channels", paper=_ranked(1)),
            Choice(f"{double}", f"heads of {double} channels", {"head_dim": double}, paper=_ranked(2)),
            Choice(f"{size // 2}", f"heads of {size // 2} channels", {"head_dim": size // 2}),
        ),
        base={"widths": widths},
    )


# By name, of the row that is varied; most are the same for all rows.
QUESTIONS: dict[str, Callable[[Variant], Question]] = {
    "layouts": lambda _: _LAYOUTS,
    "attention": lambda _: _ATTENTION,
    "bias": lambda _: _BIAS,
    "norms": lambda _: _NORMS,
    "stride": lambda _: _STRIDE,
    "blocks": _blocks,
    "heads": _heads,
}


def read_question(path: Path) -> Question:
    """A question from a YAML file: `members` by name, or a `grid` of values by field; `recipe` for all.

    Raises:
        UserError: the file cannot be read, or holds no question.
    """
    values = read_yaml(path)
    known = ("title", "members", "grid", "recipe", "match")
    for key in values:
        if key not in known:
            raise UserError(f"{path}: {key} is unknown{nearest(str(key), list(known))}; there are {', '.join(known)}")
    members, grid = values.get("members", {}), values.get("grid", {})
    for name, given in (("members", members), ("grid", grid), ("recipe", values.get("recipe", {}))):
        if not isinstance(given, Mapping):
            raise UserError(f"{path}: {name} must be names with values, got {given!r:.80}")
    if not isinstance(values.get("match", True), bool):
        raise UserError(f"{path}: match must be true or false, got {values['match']!r:.80}")
    if bool(members) == bool(grid):
        raise UserError(
            f"{path}: give members, such as {{a: {{}}, b: {{optimizer.weight_decay: 0}}}}, or a grid, and not both"
        )
    made = dict(members) if members else dict(_grid(grid, path))
    if not 2 <= len(made) <= MAX_MEMBERS:
        raise UserError(f"{path} has {len(made)} members; a study has 2 to {MAX_MEMBERS}")
    choices = []
    for name, given in made.items():
        if len(os.fsencode(str(name))) > MAX_NAME_BYTES:
            raise UserError(
                f"{path}: member {name!s:.40}... has a name of {len(str(name))} letters, too long for a folder; give "
                f"{'members with shorter names' if grid else 'a shorter one'}, of up to {MAX_NAME_BYTES} bytes"
            )
        if not isinstance(given, Mapping):
            raise UserError(f"{path}: member {name} must be names with values, got {given!r:.80}")
        try:
            changes = Recipe.from_dict(_nested(given)).to_dict()
        except UserError as error:
            raise UserError(f"{path}: member {name}: {error}") from None
        _refuse(_nested(given), FIXED | ALIKE, f"{path}: member {name}")
        variations = changes.pop("variations", {})
        changes = {key: changes[key] for key in changes if key in _nested(given)}
        description = ", ".join(f"{key} {value}" for key, value in given.items()) or "the study's recipe"
        choices.append(Choice(str(name), description, variations, changes))
    try:
        given = _nested(values.get("recipe", {}))
        recipe = Recipe.from_dict(given).to_dict()
    except UserError as error:
        raise UserError(f"{path}: recipe: {error}") from None
    _refuse(given, FIXED, f"{path}: recipe")
    return Question(
        path.stem,
        str(values.get("title", path.stem)),
        tuple(choices),
        base=recipe.pop("variations", {}),
        matched=values.get("match", True),
        recipe={key: recipe[key] for key in recipe if key in given},
    )


def _refuse(given: Mapping[str, Any], fixed: Mapping[str, str], where: str) -> None:
    """Raises UserError for one of some fields, whose values say what to give instead."""
    for name, instead in fixed.items():
        section, _, key = name.partition(".")
        inner = given.get(section)
        if section in given and (not key or (isinstance(inner, Mapping) and key in inner)):
            raise UserError(f"{where}: {name} is the same for all members; give {instead}")


# Fields of a recipe, and what gives them to all members of a study.
FIXED = {
    "name": "the values of the named recipe",
    "data": "--data",
    "model": "--model",
    "resolution": "--resolution",
    "preprocessing.resolution": "--resolution",
    "batch_size": "--batch_size",
    "device": "--device",
    "init": "a network without weights, as a study trains",
    "training_images": "--sizes",
    "seed": "--seeds",
    "epochs": "--epochs",
    "max_minutes": "--minutes",
    "patience": "nothing, as no run of a study stops early",
    "evaluate_every": "nothing, as the plan chooses it",
    "optimizer.learning_rate": "--learning_rates",
}
# What else decides which images are held out, or how many pixels and channels are computed on.
ALIKE = dict.fromkeys(
    ("validation_fraction", "test_fraction", "fold", "kept_together", "channels", "progressive_resizing"),
    "it under recipe",
)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{optimizer.weight_decay: 0}` as `{optimizer: {weight_decay: 0}}`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = str(name).partition(".")
        if key:
            inner = nested.setdefault(section, {})
            if not isinstance(inner, dict):
                raise UserError(f"{section} is {inner!r:.80}, and {name} is given too; give one of them")
            inner[key] = value
        else:
            nested[section] = {**nested.get(section, {}), **value} if isinstance(value, Mapping) else value
    return nested


def _grid(grid: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Members of all combinations of values."""
    axes: list[Sequence[Any]] = []
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid.{name} must be a list of values, such as [0, 0.05], got {values!r:.80}")
        axes.append(values)
    size = 1
    for values in axes:
        size *= len(values)
    if size > MAX_MEMBERS:
        raise UserError(f"{path}: the grid has {size:,} members; a study has 2 to {MAX_MEMBERS}")
    made = {}
    for combination in itertools.product(*axes):
        name = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in zip(grid, combination, strict=True))
        made[name] = dict(zip(grid, combination, strict=True))
    return made
