"""The plan of a study, settled before anything starts: its networks, its recipe, its runs and how long they take."""

import platform
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coatnet.data.open import data_path
from coatnet.data.splits import SMALL_IMAGE_PIXELS, Splits, choose_few
from coatnet.errors import UserError, counted
from coatnet.model.config import Variant
from coatnet.model.registry import find_variant
from coatnet.study.matching import TOLERANCE, Network, Problem, build, match, variations_of
from coatnet.study.questions import Choice, Question, base_row, find_question, read_question
from coatnet.study.record import Member, Run, SplitContent, Study
from coatnet.study.run import MAX_TRAINING_IMAGES, Part, measure_steps, recipe_of
from coatnet.system.files import require_outside
from coatnet.system.hardware import choose_device, describe_device, num_cores
from coatnet.training.config import Recipe
from coatnet.training.defaults import default_learning_rate, open_splits, resolve
from coatnet.training.duration import EVALUATION_COST
from coatnet.version import __version__

# Sizes and seeds, where they are not given: the first, or with a limit in minutes the first that leaves room for enough
# steps.
DEFAULTS = ((("10%", "100%"), 3), (("10%", "100%"), 2), (("10%",), 3), (("10%",), 2), (("10%",), 1))
ENOUGH_STEPS = 100
DEFAULT_STEPS = 2000
MOST_EVALUATIONS, FEWEST_EVALUATIONS = 12, 4
EVALUATION_SHARE = 0.15  # of the time of the steps, which decides how many evaluations there are
TIME_FOR_RUNS = 0.9  # of a limit in minutes; the rest are the plan, the pages, and what other programs take
LEAST_STEPS = 20
MAX_WIDTH = 100  # a factor; CoAtNet-7 so much wider would have 24 trillion parameters


@dataclass(frozen=True)
class Options:
    """What is asked of a study; the names are those of the command line.

    Attributes:
        question: a name of `QUESTIONS`, or a YAML file.
        data: as of a recipe.
        sizes: numbers of training images, or percentages of them such as "10%"; None for the default.
        seeds: how many; None for the default.
        steps: optimizer steps of each run; None follows from epochs or minutes.
        epochs: passes over the training images of the largest size, whose steps all sizes have.
        minutes: of the whole study on this machine.
        batch_size: images of a step.
        learning_rates: of AdamW; empty for the default.
        model: row that the members vary; None chooses by the size of the images.
        width: factor on its widths.
        resolution: side of the images in pixels; None chooses by the images.
        device: where to compute.
        precision: as of a recipe.
        jobs: runs at once on this machine; None for one on each core, or on each GPU.
    """

    question: str
    data: str
    sizes: tuple[str, ...] | None = None
    seeds: int | None = None
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_size: int = 64
    learning_rates: tuple[float, ...] = ()
    model: str | None = None
    width: float = 1.0
    resolution: int | None = None
    device: str = "auto"
    precision: str = "auto"
    jobs: int | None = None

    def check(self) -> None:
        """Raises UserError for values that make no study."""
        for name, least in (("seeds", 1), ("batch_size", 1), ("steps", 1), ("jobs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; it must be {least} or more")
        for name in ("epochs", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value:g}; it must be above 0")
        if not 0 < self.width <= MAX_WIDTH:
            raise UserError(f"width is {self.width:g}; it must be above 0, and {MAX_WIDTH} at most")
        if sum(value is not None for value in (self.steps, self.epochs, self.minutes)) > 1:
            raise UserError("steps, epochs and minutes each decide how long the runs are: give one of them")
        for rate in self.learning_rates:
            if not 0 < rate < float("inf"):
                raise UserError(f"learning rate {rate:g} must be above 0")
        shown = [f"{rate:g}" for rate in self.learning_rates]  # as folders show them
        if twice := [rate for rate in shown if shown.count(rate) > 1]:
            raise UserError(f"learning rate {twice[0]} is given twice; give each once, different in six digits")

    def command(self, folder: Path) -> str:
        """The command that makes the study, without what the time or the device of a run depends on, and the place."""
        words = ["coatnet", "study", self.question, "--data", self.data, "--out", folder.name]
        for each in fields(self)[2:]:
            value = getattr(self, each.name)
            if value != each.default and each.name not in ("device", "jobs"):
                several = value if isinstance(value, tuple) else (value,)
                words += [
                    f"--{each.name}",
                    *(
                        f"{part:g}" if isinstance(part, float) and float(f"{part:g}") == part else str(part)
                        for part in several
                    ),
                ]
        return shlex.join(words)

    def asked(self) -> dict[str, Any]:
        """What a plan follows from, apart from what may be extended: sizes, seeds and learning rates."""
        free = ("sizes", "seeds", "learning_rates", "jobs", "device")
        values = {**vars(self), "data": data_path(self.data)}
        return {name: value for name, value in values.items() if name not in free and value is not None}


def own_question(options: Options) -> Question | None:
    """The question of a YAML file; None for one of the paper's. Raises UserError for a wrong file."""
    path = Path(options.question)
    return read_question(path) if path.suffix in (".yaml", ".yml") else None


def parse_sizes(sizes: Sequence[str], splits: Splits) -> tuple[int, ...]:
    """Numbers of training images, ascending. Raises UserError for what is none, or what no run could be trained on."""
    found, num_images = set(), len(splits.training)
    for text in sizes:
        try:
            number = float(text.removesuffix("%"))
            size = round(number / 100 * num_images) if text.endswith("%") else round(number)
        except (ValueError, OverflowError):  # of nan and inf too
            raise UserError(
                f"size {text!r} is neither a number of images such as 600 nor a percentage such as 10%"
            ) from None
        if not 1 <= size <= num_images:
            raise UserError(f"size {text} is {size:,} of {num_images:,} training images; give 1 to {num_images:,}")
        try:
            choose_few(splits, size, seed=0)
        except UserError as error:
            raise UserError(f"size {text} is impossible: {error}") from None
        found.add(size)
    return tuple(sorted(found))


def candidates(options: Options, splits: Splits, say: Callable[[str], None]) -> list[tuple[tuple[int, ...], int]]:
    """Sizes and seeds that a plan may have, the best first: as they were given, and else defaults."""
    defaults = DEFAULTS
    if options.sizes is None:
        try:
            parse_sizes(("10%",), splits)
        except UserError as error:
            say(f"all training images are the only size: {error}")
            defaults = tuple((("100%",), seeds) for _, seeds in DEFAULTS)
    found = [(parse_sizes(options.sizes or sizes, splits), options.seeds or seeds) for sizes, seeds in defaults]
    return list(dict.fromkeys(found))


def choose_jobs(options: Options) -> tuple[int, list[str]]:
    """How many runs at once, and what they compute on in turn: a core each, or a GPU each."""
    device = choose_device(options.device)
    if device.type != "cuda":
        # A network of less than a million parameters gains nothing from a second thread.
        return options.jobs or num_cores(), [device.type]
    devices = [str(device)] if device.index is not None else [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    return options.jobs or len(devices), devices


def shared_recipe(options: Options, question: Question, splits: Splits, given: Recipe, jobs: int) -> Recipe:
    """The recipe of all members: AdamW, mild augmentation, no smoothing and no averaging, whatever the size.

    Everything that would follow from the number of images or of steps is settled here, on all images, and whether each
    of `jobs` runs at once may keep them decoded in memory.
    """
    asked: dict[str, Any] = {
        "data": given.data,
        "kept_together": given.to_dict().get("kept_together", []),
        "resolution": options.resolution,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "ema_decay": 0.0,
        "stochastic_depth": 0.0,
        "num_workers": 0,
        "cache": "auto",
        "optimizer": {"algorithm": "adamw"},
        "schedule": {"minimum_learning_rate": 1e-5},
    }
    start = Recipe.from_dict({name: value for name, value in asked.items() if value is not None})
    config = resolve(start.changed(question.recipe), splits, runs_at_once=jobs)
    flip = config.augmentation.flip_rate
    side = max(config.preprocessing.size)
    small = side <= SMALL_IMAGE_PIXELS
    mild: dict[str, Any] = {
        "placement": "shift" if small else "crop",
        "flip_rate": flip,
        "rand_augment_layers": 0,
        "erasing_rate": 0.0,
    }
    mild |= {"shift": max(1, side // 28)} if small else {"crop_scale": [0.6, 1.0]}
    settled = {
        "preprocessing": config.to_dict()["preprocessing"],
        "channels": config.channels,
        "augmentation": mild,
        "mixing": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0},
        "loss": "softmax",
    }
    return start.changed(settled).changed(question.recipe).changed({"cache": config.cache})


def matched_members(question: Question, options: Options, problem: Problem) -> tuple[str, tuple[Member, ...]]:
    """The row of the registry, and the members with their networks. Raises UserError if one is impossible."""
    row = base_row(problem.resolution, options.model, options.width)
    try:
        base = row.vary(**question.base)
    except UserError as error:
        raise UserError(f"the variations of all members are impossible: {error}") from None
    variants = {choice.name: build(choice.name, base, choice.variations, problem) for choice in question.choices}
    if question.matched:
        networks = match(variants, problem, fixed_depths=question.fixed_depths)
    else:
        networks = {name: Network(variant, *problem.count(variant)) for name, variant in variants.items()}
    registered = find_variant(row.name)
    assert isinstance(registered, Variant)  # timm's have no variations
    first = next(iter(networks.values()))
    return row.name, tuple(
        _member(choice, networks[choice.name], first, variations_of(networks[choice.name].variant, registered))
        for choice in question.choices
    )


def _member(choice: Choice, network: Network, first: Network, variations: dict[str, Any]) -> Member:
    distance = max(network.parameters / first.parameters, first.parameters / network.parameters)
    distance = max(distance, network.macs / first.macs, first.macs / network.macs) - 1
    note = f"its cost is {100 * distance:.1f} % from that of the first" if distance > TOLERANCE else ""
    return Member(
        name=choice.name,
        description=choice.description,
        parameters=network.parameters,
        macs=network.macs,
        changes={**choice.changes, "variations": variations},
        paper=choice.paper,
        note=note,
    )


def plan_study(options: Options, folder: Path, say: Callable[[str], None]) -> Study:
    """The study that is asked for, with all its runs and their expected seconds; nothing is written.

    Raises:
        UserError: a member, a size or an option is impossible.
    """
    options.check()
    own = own_question(options)
    if own is None:
        find_question(options.question, base_row(32, None, 1.0))  # its name, before the data is opened
    given, splits = open_splits(Recipe(data=data_path(options.data)).changed(own.recipe if own else {}), say)
    if splits.multilabel:
        raise UserError(f"{splits.name} has several labels per image; a study compares accuracy, and needs one")
    choices = candidates(options, splits, say)
    sizes, seeds = choices[0]
    jobs, devices = choose_jobs(options)
    recipe = shared_recipe(options, own or Question("", "", ()), splits, given, jobs)
    config = resolve(recipe, splits)
    require_outside(folder, config.data)
    if not isinstance(config.resolution, int):
        raise UserError(f"a study is for square images; resolution is {config.resolution}, give one side")
    problem = Problem(config.resolution, config.channels, len(splits.classes))
    question = own or find_question(options.question, base_row(problem.resolution, options.model, options.width))
    say(f"matching {len(question.choices)} networks at {problem.resolution} pixels by counting")
    model, members = matched_members(question, options, problem)
    rates = options.learning_rates or (default_learning_rate(options.batch_size),)
    study = Study(
        format=1,
        question=question.name,
        title=question.title,
        data=options.data,
        held_out=len(splits.validation),
        resolution=(config.resolution, config.resolution),
        classes=len(splits.classes),
        command=options.command(folder),
        versions={"coatnet": __version__, "torch": torch.__version__, "Python": platform.python_version()},
        machine=describe_device(choose_device(options.device)),
        recipe=recipe.changed({"model": model}).to_dict(),
        members=members,
        sizes=sizes,
        seeds=tuple(range(seeds)),
        learning_rates=tuple(sorted(rates)),
        asked=options.asked() | ({} if own is None else {"file": own.asked()}),
        content=content_of(splits),
    )
    threads = max(1, num_cores() // jobs)
    study = replace(study, threads=threads)
    # With a step each, every member is resolved as its runs will be; what is impossible is said before anything starts.
    probes = [recipe_of(study, run_of(study, member.name, sizes[-1], 0, rates[0], 1, 0.0)) for member in members]
    for member, probe in zip(members, probes, strict=True):
        try:
            resolve(probe, splits)
        except UserError as error:
            raise UserError(f"member {member.name} is impossible: {error}") from None
    at_once = min(jobs, len(members) * len(rates) * max(seeds * len(sizes) for sizes, seeds in choices))
    say(f"measuring a few steps of each, {counted(at_once, 'run')} at once")
    measured = measure_steps([probe.to_dict() for probe in probes], at_once, threads, devices)
    *seconds, opening, decoding = measured
    pace = _Pace(dict(zip((each.name for each in members), seconds, strict=True)), opening, decoding, jobs)
    return _with_runs(study, options, pace, choices)


@dataclass(frozen=True)
class _Pace:
    """Seconds of a step of each member by its name, of the opening of the data and to decode an image that a run keeps
    decoded; and how many runs go at once."""

    steps: dict[str, float]
    opening: float
    decoding: float
    jobs: int

    def before(self, num_images: float) -> float:
        """Seconds of a run before its first step, with so many images to learn from and to measure on."""
        return self.opening + self.decoding * num_images


def run_of(study: Study, member: str, size: int, seed: int, rate: float, steps: int, seconds: float) -> Run:
    """A planned run, with the folder that follows from its values."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in member)
    folder = f"runs/{plain}-{size}-seed{seed}-lr{rate:g}"
    return Run(
        member=member, size=size, seed=seed, learning_rate=rate, steps=steps, folder=folder, seconds=round(seconds, 2)
    )


def _with_runs(study: Study, options: Options, pace: _Pace, choices: Sequence[tuple[tuple[int, ...], int]]) -> Study:
    """The study with its runs: the same steps for all, as many as were asked for or fit into the minutes."""
    batch, evaluation = options.batch_size, EVALUATION_COST * study.held_out / options.batch_size
    # In steps: what an evaluation on the way takes, and the two at the end.
    ending = {
        size: evaluation + EVALUATION_COST * min(size, MAX_TRAINING_IMAGES) / batch
        for sizes, _ in choices
        for size in sizes
    }
    if options.minutes is None:
        sizes, seeds = choices[0]
        steps = options.steps or (round(options.epochs * sizes[-1] / batch) if options.epochs else DEFAULT_STEPS)
    else:
        steps = 0
        for sizes, seeds in choices:
            num_runs = seeds * len(sizes) * len(study.learning_rates) * len(pace.steps)
            rounds = -(-num_runs // pace.jobs)  # the last of which may leave cores idle
            step = _of_a_round(pace.steps.values(), rounds)
            before = pace.before(fmean(sizes) + study.held_out)
            of_a_run = 60 * options.minutes * TIME_FOR_RUNS / rounds - before
            left = of_a_run / step - sum(ending[size] for size in sizes) / len(sizes)
            steps = int(left - _evaluations(left, evaluation) * evaluation)
            if steps >= ENOUGH_STEPS:
                break
        if steps < LEAST_STEPS:
            raise UserError(
                f"minutes {options.minutes:g} is too short: {counted(num_runs, 'run')} would have {max(0, steps)} "
                f"steps of {step:.2g} s; give more minutes, or fewer seeds and sizes"
            )
    steps, evaluations = max(1, steps), _evaluations(steps, evaluation)
    study = replace(
        study,
        sizes=sizes,
        seeds=tuple(range(seeds)),
        asked={**study.asked, "evaluations": evaluations, "planned_steps": steps},
    )
    runs = []
    for seed, size, rate, member in product(study.seeds, study.sizes, study.learning_rates, study.members):
        before = pace.before(size + study.held_out)
        seconds = before + pace.steps[member.name] * (steps + evaluations * evaluation + ending[size])
        runs.append(run_of(study, member.name, size, seed, rate, steps, seconds))
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("names of members differ in punctuation only, which folders leave out: give other names")
    return replace(study, runs=tuple(runs))


def _of_a_round(seconds: Iterable[float], rounds: int) -> float:
    """Seconds of a round of runs: a single one ends with its slowest run; in several, slow and fast ones follow each
    other."""
    return max(seconds) if rounds == 1 else fmean(seconds)


def _evaluations(steps: float, evaluation: float) -> int:
    """Evaluations on the way, which take about a seventh of the time: 4 to 12."""
    fit = int(EVALUATION_SHARE * max(0.0, steps) / max(evaluation, 1e-9))
    return min(MOST_EVALUATIONS, max(FEWEST_EVALUATIONS, fit))


def content_of(splits: Splits) -> dict[str, SplitContent]:
    """What study.json keeps of the images."""
    content: dict[str, Any] = splits.content
    return {split: SplitContent(**values) for split, values in content.items()}


def describe_plan(study: Study, jobs: int, part: Part) -> str:
    """Members with their counts, how many runs there are, and how long those of a part take, so many at once."""
    first = study.members[0]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("member", "parameters", "to the first", "MACs", "to the first", "seconds a run"):
        table.add_column(column, justify="left" if column == "member" else "right", no_wrap=True)
    for member in study.members:
        planned = [run.seconds for run in study.runs if run.member == member.name]
        table.add_row(
            Text(member.name),
            f"{member.parameters:,}",
            f"{100 * (member.parameters / first.parameters - 1):+.2f} %",
            f"{member.macs:,}",
            f"{100 * (member.macs / first.macs - 1):+.2f} %",
            f"{sum(planned) / max(1, len(planned)):.0f}",
        )
    console = Console(width=110, highlight=False)
    with console.capture() as captured:
        console.print(table)
    left = [run for run in study.runs if run.status != "finished"]
    todo = [run for run in study.runs[part.index :: part.count] if run.status != "finished"]
    makes = f", of which process {part.index + 1} of {part.count} makes {len(todo):,}" if part.count > 1 else ""
    jobs = min(jobs, max(1, len(todo)))
    rounds = -(-len(todo) // jobs)
    minutes = rounds * _of_a_round([run.seconds for run in todo], rounds) / 60 if todo else 0.0
    steps = study.runs[0].steps
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    lines = [
        f"{study.title}",
        captured.get().rstrip(),
        *(f"{member.name}: {member.note}" for member in study.members if member.note),
        f"{counted(len(study.runs), 'run')}: {len(study.members)} members, sizes "
        f"{', '.join(f'{size:,}' for size in study.sizes)}, {counted(len(study.seeds), 'seed')}, learning rates "
        f"{rates}; {steps:,} steps of {study.recipe['batch_size']} images each",
        f"{counted(len(left), 'run')} to go{makes}, {jobs} at once: about {minutes:.0f} minutes on this machine",
    ]
    return "\n".join(lines)
