"""Errors that a user can correct, and the wording they share: one line, with the nearest right name."""

import errno
import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

# Control characters, line separators, and what turns the direction of writing or cannot be seen.
UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
# User and password of a URL; of a password with one of "/?#" in it, all up to the last "@". "::" chains URLs of fsspec.
# A path that was made of a URL has one slash.
_USER = re.compile(r"(?<=\w\w)(:/{1,2})(?:[^/?#\s@:]{1,255}:(?!:|\d{1,5}(?:[/?#\s]|$))\S{0,500}@|[^/?#\s]*@)")
_QUERY = re.compile(r"((?<=\w\w):/{1,2}[^?#\s'\"<>]{0,2000})[?#][^\s'\"<>]*")
_LONGEST_START, _LONGEST_END = 1_200, 400  # characters of an error: the longest of the package's own have a thousand

# Names that other programs use for an option or a command, and the names that it may have here.
USUAL_NAMES = {
    **dict.fromkeys(("gpu", "cuda", "accelerator"), ("device",)),
    **dict.fromkeys(("gpus", "ngpus", "n_gpus", "num_gpus", "devices"), ("gpus",)),
    **dict.fromkeys(("o", "output", "output_dir", "output_file", "save", "save_dir", "run", "resume"), ("out",)),
    **dict.fromkeys(("b", "bs", "batch", "max_batch_size", "train_batch_size"), ("batch_size",)),
    **dict.fromkeys(("j", "workers", "num_workers", "threads"), ("num_workers", "workers")),
    **dict.fromkeys(("dataset", "data_dir", "data_path", "train_dir", "input", "i"), ("data", "images")),
    **dict.fromkeys(("lr",), ("learning_rate",)),
    **dict.fromkeys(("wd",), ("weight_decay",)),
    **dict.fromkeys(("opt", "optim"), ("algorithm",)),
    **dict.fromkeys(("momentum", "beta1", "beta2", "opt_betas", "adam_betas"), ("betas",)),
    **dict.fromkeys(
        ("grad_accum_steps", "gradient_accumulation_steps", "accumulate_grad_batches"), ("micro_batch_size",)
    ),
    **dict.fromkeys(("iters", "steps", "max_epochs", "max_steps", "num_steps"), ("epochs",)),
    **dict.fromkeys(("max_time", "time_limit"), ("max_minutes",)),
    **dict.fromkeys(("ddp", "fsdp", "distributed", "strategy"), ("parallelism",)),
    **dict.fromkeys(("in_chans", "in_channels"), ("channels",)),
    **dict.fromkeys(("criterion", "loss_fn"), ("loss",)),
    **dict.fromkeys(("class_weights", "class_weight", "weighted"), ("balance",)),
    **dict.fromkeys(("aa", "auto_augment", "rand_augment", "randaugment"), ("rand_augment_layers",)),
    **dict.fromkeys(("trivial", "trivialaugment", "ta_wide"), ("trivial_augment",)),
    **dict.fromkeys(("crop_pct",), ("crop_fraction",)),
    **dict.fromkeys(("eval_every", "eval_interval", "val_interval"), ("evaluate_every",)),
    **dict.fromkeys(("checkpoint_interval", "save_every", "save_interval"), ("checkpoint_every_minutes",)),
    **dict.fromkeys(("name", "project", "experiment"), ("out",)),
    **dict.fromkeys(("clip", "clip_grad", "max_grad_norm", "grad_clip"), ("grad_clip_norm",)),
    **dict.fromkeys(("warmup", "warmup_epochs"), ("warmup_steps",)),
    **dict.fromkeys(("lr_min", "min_lr", "eta_min"), ("minimum_learning_rate",)),
    **dict.fromkeys(("scheduler", "sched", "lr_scheduler"), ("decay",)),
    **dict.fromkeys(("arch", "backbone", "architecture", "m"), ("model",)),
    **dict.fromkeys(("pretrained", "weights", "checkpoint", "ckpt", "finetune"), ("init", "train")),
    **dict.fromkeys(("img_size", "imgsz", "image_size", "input_size", "size"), ("resolution",)),
    **dict.fromkeys(("amp", "dtype", "fp16", "bf16", "fp32", "half"), ("precision",)),
    **dict.fromkeys(("n_epochs", "num_epochs", "e"), ("epochs",)),
    **dict.fromkeys(("drop", "dropout", "drop_path", "drop_path_rate"), ("stochastic_depth",)),
    **dict.fromkeys(("ema", "model_ema_decay"), ("ema_decay",)),
    **dict.fromkeys(("smoothing",), ("label_smoothing",)),
    **dict.fromkeys(("mixup",), ("mixup_alpha",)),
    **dict.fromkeys(("cutmix",), ("cutmix_alpha",)),
    **dict.fromkeys(("reprob", "random_erasing"), ("erasing_rate",)),
    **dict.fromkeys(("hflip",), ("flip_rate",)),
    **dict.fromkeys(("grad_checkpointing", "gradient_checkpointing"), ("activation_checkpointing",)),
    **dict.fromkeys(("torchcompile",), ("compile",)),
    **dict.fromkeys(("early_stopping",), ("patience",)),
    **dict.fromkeys(("logger", "log", "wandb", "tensorboard", "mlflow"), ("loggers",)),
    **dict.fromkeys(("val_split", "val_fraction", "validation_split"), ("validation_fraction",)),
    **dict.fromkeys(("tta", "crops"), ("views",)),
    **dict.fromkeys(("top", "topk", "n"), ("top_k",)),
    **dict.fromkeys(("backend", "runtime", "provider"), ("engine",)),
    **dict.fromkeys(("quantize", "int4"), ("int8",)),
    **dict.fromkeys(("address", "bind", "ip"), ("host",)),
    **dict.fromkeys(("timeout",), ("deadline",)),
    **dict.fromkeys(("format", "type"), ("format", "out")),
    **dict.fromkeys(("fit", "learn"), ("train",)),
    **dict.fromkeys(("eval", "test", "val", "validate", "measure"), ("evaluate",)),
    **dict.fromkeys(("infer", "inference", "classify"), ("predict",)),
    **dict.fromkeys(("embed", "embeddings", "extract"), ("features",)),
    **dict.fromkeys(("convert", "onnx"), ("export",)),
    **dict.fromkeys(("upload", "publish"), ("push",)),
    **dict.fromkeys(("check", "inspect", "verify"), ("doctor",)),
    **dict.fromkeys(("list", "info"), ("models",)),
    **dict.fromkeys(("shard", "webdataset"), ("pack",)),
}

# Usual names of what has no option here, and why: `nearest_option` says it.
NO_OPTION = {
    **dict.fromkeys(("num_classes", "n_classes", "classes", "nb_classes"), "the classes are those of the data"),
    **dict.fromkeys(
        ("gpus", "ngpus", "n_gpus", "num_gpus", "devices", "nproc", "nproc_per_node", "world_size", "nodes", "nnodes"),
        "--device names a GPU; train and predict use several under torchrun --nproc-per-node N",
    ),
    **dict.fromkeys(("verbose", "v", "quiet", "q", "debug", "log_level"), "output has one level of detail"),
    **dict.fromkeys(("shuffle",), "training images are shuffled, others keep their order"),
    **dict.fromkeys(("color_jitter", "jitter", "vflip"), "coatnet has no such augmentation"),
}


class UserError(ValueError):
    """An error that a user can correct. One line: what was given, what is wrong with it, what would be right.

    The command line prints it without a traceback and exits with code 2. Control characters of what it quotes are
    escaped, credentials of URLs are cut out, and the middle of a long text is left out.
    """

    def __init__(self, *message: object) -> None:
        super().__init__(
            *(cut(one_line(without_credentials(part))) if isinstance(part, str) else part for part in message)
        )


class NotFinite(UserError):
    """A loss, a gradient or an output of the model is NaN or infinite."""


def without_credentials(text: str) -> str:
    """A text with user, password, query and fragment cut out of every URL in it."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text)) if ":/" in text else text


def first_line(message: object) -> str:
    """The first line of a message or exception, without its full stop; the name of its class if it is empty."""
    return (str(message).strip() or type(message).__name__).splitlines()[0].rstrip(".")


def reason_of(error: BaseException) -> str:
    """The message of an exception in a line of at most 200 characters; the name of its class if it is empty.

    Credentials of URLs are cut out, before the line is shortened.
    """
    return one_line(" ".join(without_credentials(str(error)).split()))[:200] or type(error).__name__


def one_line(text: str) -> str:
    r"""The text with control characters escaped as \n, \x1b and the like, since they break lines and move cursors."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cut(text: str) -> str:
    """The text, or the beginning and the end of one that is too long for a line."""
    left_out = len(text) - _LONGEST_START - _LONGEST_END
    if left_out <= 0:
        return text
    return f"{text[:_LONGEST_START]} ... ({left_out:,} characters) ... {text[-_LONGEST_END:]}"


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a module of a package that not every installation has.

    Args:
        module: such as `pyarrow.parquet`.
        extra: the extra of coatnet that installs it.
        purpose: what needs it, for the error: `PURPOSE needs pyarrow: pip install 'coatnet[EXTRA]'`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if is_memory_shortage(error):
            raise
        package = module.partition(".")[0]
        is_missing = isinstance(error, ModuleNotFoundError) and error.name in (package, module)
        reason = "" if is_missing else f" (what is installed does not work: {cut(first_line(error))})"
        raise UserError(f"{purpose} needs {package}: pip install 'coatnet[{extra}]'{reason}") from None


def nearest(given: str, known: Iterable[str], most: int = 1) -> str:
    """` (did you mean 'x' or 'y'?)` to append to a message, with at most `most` names; empty if none is similar."""
    matches = get_close_matches(given, list(known), n=most)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def nearest_option(given: str, known: Iterable[str]) -> str:
    """Like `nearest`, for options, fields and commands, whose usual names elsewhere (`USUAL_NAMES`) are understood too.

    The last part of a dotted name is enough: `--lr` leads to `--optimizer.learning_rate`. A usual name whose meaning is
    not among the known ones leads nowhere, however similar its letters are to another one's; for some, `NO_OPTION` has
    the reason.
    """
    names = sorted(known, key=lambda name: name.count("."))
    plain = _plain_name(given)
    for wanted in (plain, *USUAL_NAMES.get(plain, ())):
        for name in names:
            if wanted in (_plain_name(name), _plain_name(name).rpartition(".")[2]):
                return f" (did you mean {name!r}?)"
    if plain in NO_OPTION:
        return f": {NO_OPTION[plain]}"
    return "" if plain in USUAL_NAMES else nearest(given, names)


def _plain_name(option: str) -> str:
    """The name of an option without its hyphens: `--top-k` and `--top_k` are both `top_k`."""
    return option.lstrip("-").replace("-", "_")


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 image`, `12,000 images`, `2 classes`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def shorten(names: Sequence[str]) -> str:
    """The first five names and the number of the others: `cat, dog, fox, hen, owl and 7 more`."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# What torch, C++ and the loader of libraries say; CPUs and imports have no exception of their own.
_SHORTAGE = re.compile(
    r"can't allocate memory|cannot allocate memory(?! in static TLS)|std::bad_alloc|failed to map segment|out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|can't start new thread",
    re.IGNORECASE,
)
_ENOUGH_ADDRESS_SPACE = (
    8e9  # chosen: torch with CUDA takes 3.3 GB of addresses when it is imported, its threads and data more
)


def is_memory_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory is exhausted: by its class, or by its words where many things have its
    class. Subclasses of RuntimeError, such as a missing compiler or a lost process, are not meant by them."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if type(error) is ImportError and address_space() < _ENOUGH_ADDRESS_SPACE:
        return True  # a module that is half there, as memory ended while it was imported
    has_many_reasons = type(error) in (RuntimeError, ImportError) or type(error).__name__ == "AcceleratorError"
    return has_many_reasons and _SHORTAGE.search(str(error)) is not None


def explain_memory_shortage(error: BaseException) -> str:
    """A line for a user whose command has met a shortage of memory: what is limited, and what would help."""
    reason = f" ({cut(first_line(error))})" if str(error) else ""
    if (limit := address_space()) < _ENOUGH_ADDRESS_SPACE:
        return (
            f"the address space of a process is limited to {limit / 1e9:.1f} GB{reason}; this needs about "
            f"{_ENOUGH_ADDRESS_SPACE / 1e9:.0f} GB: `ulimit -v {_ENOUGH_ADDRESS_SPACE / 1e3:.0f}` or unlimited"
        )
    return f"there is not enough memory{reason}: end other programs, or give a smaller batch size where there is one"


def address_space() -> float:
    """The bytes that this process may address at most. The module `resource` might find no memory to be imported."""
    try:
        with open("/proc/self/limits") as file:
            found = re.search(r"^Max address space +(\d+)", file.read(), re.MULTILINE)
    except (OSError, MemoryError):
        return math.inf
    return int(found[1]) if found else math.inf
