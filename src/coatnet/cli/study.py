"""`coatnet study`: ask the paper's questions of one's own images."""

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coatnet.cli.parser import DATA_HELP, FAILED, Parser
from coatnet.errors import UserError, counted, shorten
from coatnet.system.files import output_path, translate_write_errors
from coatnet.system.terminal import echo, echo_summary

if TYPE_CHECKING:
    from coatnet.study.plan import Options
    from coatnet.study.run import Part


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "study",
        "Train networks of equal cost on the same images in the same order, and tell which is better, and how sure\n"
        "that is. The same command again resumes it; more seeds, sizes or learning rates extend it.",
        "examples:\n"
        "  coatnet study layouts --data fashion-mnist-small --out studies/layouts --minutes 10\n"
        "  coatnet study attention --data path/to/folder --out studies/attention --sizes 10% 100% --seeds 5\n"
        "  coatnet study mine.yaml --data path/to/folder --out studies/mine --learning_rates 5e-4 2e-3\n"
        "  coatnet study --report studies/layouts                        # draws its pages again\n\n"
        "questions:\n"
        "  layouts     which stages are convolution and which attention (section 2.2, Figure 1)\n"
        "  attention   global with the relative bias before or after the softmax or without it; local; linear\n"
        "  bias        with and without the relative bias (Table 6)\n"
        "  blocks      where the blocks stand, V0, V1, V2 (Table 7)\n"
        "  heads       how wide a head is (Table 8)\n"
        "  norms       BatchNorm or LayerNorm in MBConv (Table 8)\n"
        "  stride      which convolution of MBConv has the stride (Table 9)\n"
        "  FILE.yaml   your own: members, or a grid over fields of a recipe\n\n"
        f"{DATA_HELP}",
    )
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="one of those below, or a YAML file")
    parser.add_argument("--data", metavar="DATA", help="what to learn from, see below")
    parser.add_argument("--out", metavar="STUDY", help="folder of the study, new or to be resumed (studies/QUESTION)")
    parser.add_argument(
        "--sizes", nargs="+", metavar="N", help="numbers or percentages of training images (10%% 100%%)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds each member is trained with (3)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each run (2000)")
    parser.add_argument("--epochs", type=float, metavar="E", help="instead: passes over the largest size")
    parser.add_argument("--minutes", type=float, metavar="M", help="instead: what the whole study may take here")
    parser.add_argument("--batch_size", type=int, metavar="N", help="images of a step (64)")
    parser.add_argument(
        "--learning_rates", nargs="+", type=float, metavar="X", help="of AdamW (2e-3 x the root of batch size / 128)"
    )
    parser.add_argument("--model", metavar="NAME", help="four-stage variant that all are made from (by the image size)")
    parser.add_argument("--width", type=float, metavar="F", help="width multiplier (1)")
    parser.add_argument("--resolution", type=int, metavar="R", help="side of the images in pixels (by the images)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (the cores, or the GPUs)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="auto: bf16 where it is faster")
    parser.add_device()
    parser.add_max_megapixels()
    parser.add_argument("--keep_weights", action="store_true", help="keep the models, and not their figures only")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, and train nothing")
    parser.add_argument("--report", metavar="STUDY", help="draw the pages of a study again, and train nothing")
    given = parser.parse(arguments)
    if given.report == "":
        parser.error("--report is empty: give a path")
    if given.report:
        names = (name for name, value in vars(given).items() if name != "report" and value != parser.get_default(name))
        others = sorted(names, key=lambda name: name != "question")
        if others:
            shown = shorten(["QUESTION" if name == "question" else f"--{name}" for name in others])
            raise UserError(f"--report draws the pages of a study again, and trains nothing: leave out {shown}")
    return given


def run(arguments: Sequence[str]) -> int:
    """Make a study, or go on with it, and write its pages."""
    given = parse_arguments(arguments)
    if given.report:
        return _report(output_path(given.report), shared=False)
    for name in ("question", "data"):
        if not getattr(given, name):
            option = "a question, such as layouts" if name == "question" else f"--{name}"
            raise UserError(f"study needs {option}; `coatnet study --help` shows how")
    from coatnet.study.folder import hold_study
    from coatnet.study.plan import Options
    from coatnet.study.run import Part

    part = Part.of(os.environ)
    names = ("sizes", "seeds", "steps", "epochs", "minutes", "batch_size", "learning_rates", "model", "width")
    asked: dict[str, Any] = {
        name: getattr(given, name) for name in (*names, "resolution", "precision", "jobs", "device")
    }
    if part.local_world_size > 1:  # of torchrun, each of which makes one run at once unless more are asked for
        asked["jobs"] = part.local_world_size * (1 if given.jobs is None else given.jobs)
    asked = {
        name: tuple(value) if isinstance(value, list) else value for name, value in asked.items() if value is not None
    }
    options = Options(given.question, given.data, **asked)
    folder = output_path(given.out or f"studies/{Path(given.question).stem}")
    with nullcontext() if given.dry_run else hold_study(folder, part):
        return _make(options, folder, part, given)


def _make(options: "Options", folder: Path, part: "Part", given: argparse.Namespace) -> int:
    from coatnet.study.folder import open_study
    from coatnet.study.plan import choose_jobs, describe_plan
    from coatnet.study.run import run_study

    study = open_study(options, folder, _say, dry_run=given.dry_run)
    jobs, devices = choose_jobs(options)
    if part.local_world_size > 1:  # each process has its own core or GPU
        jobs //= part.local_world_size
        devices = [devices[part.local_rank % len(devices)]]
    echo(describe_plan(study, jobs, part))
    if given.dry_run:
        echo("Nothing was trained or written.")
        return 0
    without = [run.folder for run in study.finished() if not (folder / run.folder / "bundle").exists()]
    if given.keep_weights and without:
        _say(
            f"warning: --keep_weights is too late for {counted(len(without), 'finished run')}, such as {without[0]}, "
            "whose weights were not kept: give a new folder for --out to keep all"
        )
    run_study(folder, jobs=jobs, devices=devices, part=part, keep_weights=given.keep_weights, say=_say)
    return _report(folder, shared=part.count > 1)


def _say(text: str) -> None:
    echo(text, error=True)


def _report(folder: Path, *, shared: bool) -> int:
    """Print what became of the study, and write its page. Where several processes share it, none fails while runs are
    left: torchrun would end the others."""
    from coatnet.study.record import Study
    from coatnet.study.report import write_report

    study = Study.read(folder)
    left = [run for run in study.runs if run.status == "planned"]
    failed = [run for run in study.runs if run.status == "failed"]
    for each in failed:
        echo(f"coatnet: error: {each.folder}: {each.reason}", error=True)
    with translate_write_errors(folder, "study.json has all figures, and the same command writes the page"):
        write_report(folder)
    echo_summary(f"The page is {folder}/study.html; study.md and study.json have the same.")
    if left:
        echo_summary(f"Still to be made, by the same command: {len(left)} of {counted(len(study.runs), 'run')}.")
    return FAILED if failed and not (shared and left) else 0
