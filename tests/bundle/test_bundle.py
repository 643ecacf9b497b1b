"""Bundles: saving and loading, atomic writes, and the refusal of damaged or hostile files."""

import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from coatnet.bundle import Bundle, load
from coatnet.bundle.classes import drop_classes, rename_classes
from coatnet.data.transforms import Preprocessing
from coatnet.errors import UserError
from coatnet.model.network import create_model
from coatnet.system.terminal import escape_markdown

CLASSES = ("t-shirt", "cat|dog", "ключ \N{GRINNING FACE}")
SEEN = Preprocessing(resolution=32, crop="squash", crop_fraction=0.9, interpolation="bilinear", mean=(0.3,), std=(0.2,))
RECORD = {
    "recipe": {"name": "scratch", "optimizer": {"learning_rate": 1e-3}},
    "report": {
        "data": "digits", "split": "validation", "headline": "top-1 accuracy 90.0 %",
        "figures": {"n": 10, "top1": 0.9}, "intervals": {"top1": [0.6, 0.98]},
    },
}  # fmt: skip


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model("coatnet-femto", num_classes=3, in_channels=1, resolution=32, mbconv_norm="layer")
    return model.eval()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle(small_model(), CLASSES, SEEN, record=RECORD)


@pytest.fixture
def saved(bundle: Bundle, tmp_path: Path) -> Path:
    return bundle.save(tmp_path / "bundle")


def test_loaded_bundle_equals_saved_bundle(bundle: Bundle, saved: Path) -> None:
    again = load(saved)
    assert (again.classes, again.preprocessing, again.multilabel) == (CLASSES, SEEN, False)
    assert again.record == RECORD
    assert again.model.config() == bundle.model.config()
    images = torch.randn(2, 1, 32, 32)
    assert not again.model.training
    with torch.inference_mode():
        assert torch.equal(again.model(images), bundle.model(images))


def test_loaded_model_trains(saved: Path) -> None:
    model = load(saved).model.train()
    model(torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_multilabel_and_the_batch_norm_state_survive(tmp_path: Path) -> None:
    model = create_model("coatnet-femto", num_classes=2, resolution=32)
    model.train()(torch.randn(4, 3, 32, 32))
    Bundle(model, ("a", "b"), Preprocessing(resolution=32), multilabel=True).save(tmp_path / "b")
    again = load(tmp_path / "b")
    assert again.multilabel
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_timm_reads_the_preprocessing(saved: Path) -> None:
    hub = pytest.importorskip("timm.models._hub")
    from timm.data import resolve_data_config

    config, name, arguments = hub.load_model_config_from_path(saved)
    seen = resolve_data_config({}, pretrained_cfg=config)
    assert name == "coatnet-femto" and arguments["in_channels"] == 1
    assert (seen["input_size"], seen["mean"], seen["std"]) == ([1, 32, 32], [0.3], [0.2])
    assert (seen["crop_pct"], seen["crop_mode"], seen["interpolation"]) == (0.9, "squash", "bilinear")
    assert tuple(config["label_names"]) == CLASSES


def test_the_card_lists_figures_classes_and_recipe(saved: Path) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: coatnet\n")
    for piece in (
        "top-1 accuracy 90.0 %",
        "| top1 | 0.9000 | 0.6000 to 0.9800 |",
        "cat\\|dog",
        "learning_rate",
    ):
        assert piece in card


def test_the_card_of_other_classes_says_that_the_recipe_makes_those_before(bundle: Bundle, saved: Path) -> None:
    assert "`coatnet train --config` repeats" in (saved / "README.md").read_text(encoding="utf-8")
    card = drop_classes(bundle, ["t-shirt"]).card()
    assert "learning_rate" in card and "repeats" not in card
    assert "The recipe of the model before its classes were changed:" in card
    assert "Made from a model of 3 classes by `coatnet shrink`" in card
    renamed = rename_classes(drop_classes(bundle, ["t-shirt"]), {"cat|dog": "pet"})
    assert "Made from a model of 3 classes" in renamed.card()


def test_classes_added_earlier_stay_in_the_card_under_their_present_names(bundle: Bundle) -> None:
    extension = {"data": "more", "added": ["t-shirt"], "earlier": [{"data": "first", "added": ["cat|dog"]}]}
    extended = replace(bundle, record={"extension": extension})
    renamed = rename_classes(extended, {"t-shirt": "shirt", "cat|dog": "pet"})
    card = renamed.card()
    first, second = (card.index(f"Classes added by `coatnet extend`: {name};") for name in ("pet", "shirt"))
    assert first < second and "t-shirt" not in card
    card = drop_classes(renamed, ["shirt"]).card()
    assert "Classes added by `coatnet extend`: pet;" in card and "shirt" not in card
    again = {"earlier": [{"added": ["pet", "shirt"]}], "added": ["shirt"]}  # added, left out, added again
    card = replace(renamed, record={"extension": again}).card()
    assert card.count("Classes added by") == 2 and card.count("shirt;") == 1


HOSTILE = (
    "![x](https://tracker.example/a.png)",
    "# heading\n\n```\n</details><img src=https://tracker.example/b.png>",
    "[here](javascript:alert(1)) www.tracker.example @someone $x$ | cell | \x1b[31m \u202e",
)


def test_names_are_no_markup_in_the_card_and_the_report() -> None:
    record = {"recipe": {"name": "x```\n````\n# heading", "data": "```"}, "report": {"headline": HOSTILE[0]}}
    bundle = Bundle(small_model(), HOSTILE, SEEN, record=record)
    page = MarkdownIt("gfm-like", {"linkify": False}).enable("table")
    tokens = page.parse(bundle.card().partition("---\n\n")[2])
    flat = [*tokens, *(child for token in tokens for child in token.children or ())]
    kinds = {token.type for token in flat}
    assert not kinds & {"image", "link_open", "html_inline", "html_block"}
    headings = [token.content for before, token in pairwise(tokens) if before.type == "heading_open"]
    assert headings[1:] == ["How good it is", "How to use it", "Preprocessing", "Classes", "How it was trained"]
    assert not set("\x1b\u202e") & set(bundle.card())
    for name in HOSTILE:
        assert not re.search(r"://|www\.|@|(?<!\\)[`|]|^#|\n", escape_markdown(name))


def test_classes_and_channels_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(UserError, match="2 class names for a model of 3 classes"):
        Bundle(small_model(), ("a", "b"), SEEN)
    with pytest.raises(UserError, match="'a' is named twice"):
        Bundle(small_model(), ("a", "b", "a"), SEEN)
    with pytest.raises(UserError, match="preprocessing makes 3 channels, the model takes 1"):
        Bundle(small_model(), CLASSES, Preprocessing())


def test_saving_replaces_a_bundle_and_nothing_else(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    bundle.save(saved)
    assert load(saved).classes == CLASSES
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    (saved / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        bundle.save(saved)
    assert (saved / "thesis.tex").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_bundle(
    bundle: Bundle, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coatnet.bundle.bundle.write_tensors", full_disk)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        bundle.save(saved)
    assert load(saved).classes == CLASSES
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_other_files_and_folders_are_refused_in_one_line(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    (tmp_path / "empty").mkdir()
    for path, reason in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path / "weights.pt", "is a file, which does not say what network it is for"),
        (tmp_path / "empty", r"a bundle holds model.safetensors and config.json"),
    ):
        with pytest.raises(UserError, match=reason):
            load(path)


def test_the_folder_of_a_run_stands_for_its_bundle(saved: Path, tmp_path: Path) -> None:
    assert saved == tmp_path / "bundle"
    (tmp_path / "recipe.yaml").write_text("model: coatnet-femto")
    assert load(tmp_path).classes == CLASSES
    saved.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a run that has no bundle yet"):
        load(tmp_path)


def test_a_misspelled_path_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coatnet.bundle.bundle.download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"no such folder \(did you mean 'runs/mine'\?\); .* write hf://runs/mien"):
        load("runs/mien")
    for path in ("gone/mine", "runs/mine/x", "~/mine", "./mine", "mine", "runs\\mine", "/no/such", "https://h.co/a/b"):
        with pytest.raises(UserError, match="there is no such folder"):
            load(path)


def test_repr_is_three_lines(bundle: Bundle) -> None:
    model, classes, preprocessing = repr(bundle).splitlines()
    assert model.startswith("Bundle of coatnet-femto, ") and model.endswith(" parameters")
    assert classes.strip().startswith("classes: 3, one per image: t-shirt, cat|dog")
    assert "32 x 32 pixels, 1 channel, squash" in preprocessing


def nest(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def nested(config: dict, *keys: str) -> dict:
    for key in keys:
        config = config[key]
    return config


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.update(_target_="os.system"), "unknown key '_target_'"),
        (lambda c: c.update(auto_map={"x": "evil.py"}), "unknown key 'auto_map'"),
        (lambda c: c["model_args"].update(_target_="os.system"), "unknown key '_target_' in model_args"),
        (lambda c: c.pop("num_classes"), "num_classes is missing"),
        (lambda c: c.update(num_classes=0), "num_classes is 0; it must be greater than or equal to 1"),
        (lambda c: c.update(num_classes=10**12), "num_classes is 1000000000000"),
        (lambda c: c.update(num_classes=True), "num_classes is True; it must be a valid integer"),
        (lambda c: c.update(num_classes=4), "label_names has 3 names for num_classes 4"),
        (lambda c: c.update(format=2), "format 2; this coatnet reads format 1"),
        (lambda c: c.update(architecture="resnet50"), "architecture 'resnet50' is not"),
        (lambda c: c["model_args"].update(resolution=10**9), "resolution is 1000000000"),
        (lambda c: c["model_args"].update(resolution="32"), "resolution is '32'"),
        (lambda c: c["model_args"].update(in_channels=10**7), "in_channels is 10000000"),
        (lambda c: nested(c, "model_args", "variant")["stages"][0].update(depth=10**6), "depth"),
        (lambda c: nested(c, "model_args", "variant")["stages"][0].update(width="wide"), "model_args"),
        (lambda c: nested(c, "model_args", "variant").update(stages=[{}] * 10**5), "stages: 100000"),
        (lambda c: nested(c, "model_args", "variant").update(head_dim=0), "model_args"),
        (lambda c: nested(c, "model_args", "variant").update(stem_width=10**7), "stem.*10000000"),
        (lambda c: nested(c, "model_args", "variant").update(unheard_of=1), "unheard_of"),
        (lambda c: c["pretrained_cfg"].update(std=[0]), "std must be numbers, .* each above 0"),
        (lambda c: c["pretrained_cfg"].update(mean=["x"]), "mean is 'x'; it must be a valid number"),
        (lambda c: c["pretrained_cfg"].update(crop_pct=0), "crop_fraction must be above 0"),
        (lambda c: c["pretrained_cfg"].update(input_size=[3, 32, 32]), "input_size is"),
        (lambda c: c["pretrained_cfg"].update(label_names=["a", "b", 3]), "label_names is"),
        (lambda c: c["pretrained_cfg"].update(label_names=["a", "b", "a"]), "'a' is named twice"),
        (lambda c: c["pretrained_cfg"].update(label_names=[["x"]] * 10**5), "label_names is"),
        (lambda c: c["pretrained_cfg"].update(std=[5e-324]), "std from 1e-6 to 1e6"),
        (lambda c: c["pretrained_cfg"].update(mean=[3e38]), "mean must be at most 1e6"),
        (lambda c: c["pretrained_cfg"].update(crop_pct=1e-5), "enlarges images to 3,199,999, of which there may be"),
        (lambda c: c["pretrained_cfg"].update(crop_pct=1e-320), "enlarges images to 1,000,000,000, of which"),
        (lambda c: c["pretrained_cfg"].update(input_size=[1, 8192, 8192]), "16 GiB are not loaded"),
        (lambda c: c["pretrained_cfg"].update(input_size=[1] * 10**5), "input_size is"),
        (lambda c: nested(c, "model_args", "variant").update(window=99_999, attention="local"), r"\[4, 99999, 99999\]"),
        (lambda c: nested(c, "model_args", "variant").update(stem_width=int("9" * 4_000)), "model_args"),
        (lambda c: nested(c, "model_args", "variant").update(name=["coatnet"]), "architecture"),
        (lambda c: c.update(format=int("9" * 4_000)), "this coatnet reads format 1"),
        (lambda c: c.update(architecture="\x1b[31m" + "x" * 10**6), "architecture"),
        (lambda c: c.update({f"key {n}": n for n in range(10**5)}), "unknown key 'key 0'"),
        (lambda c: c["record"].update(report=["fine"]), "report is"),
        (lambda c: c["record"].update(report={"figures": {"top1": "high"}}), "top1 is 'high'"),
        (lambda c: c["record"].update(report={"intervals": {"top1": [0.1]}}), "top1 is"),
        (lambda c: c["record"].update(recipe="none"), "recipe is 'none'"),
        (lambda c: c["record"].update(recipe={"validation_fraction": "half"}), "validation_fraction is 'half'"),
        (lambda c: c["record"].update(recipe={"validation_fraction": int("9" * 4_000)}), "validation_fraction is"),
        (lambda c: c["record"].update(note=nest(40)), "nested more than 32 deep"),
    ],
)
def test_an_untrusted_config_is_refused_by_key(saved: Path, spoil: Callable[[dict], None], message: str) -> None:
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    spoil(config)
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load(saved)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 2_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": ',
        "[" * 100_000,
        "\xff",
        '{"format": ' + "9" * 5_000 + "}",
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "[" + "[]," * 2_000_000 + "[]]",
    ],
    ids=["empty", "list", "cut", "deep", "latin-1", "long number", "NaN", "twice", "many"],
)
def test_a_config_that_is_no_json_object_is_refused(saved: Path, text: str) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"not JSON|not a JSON object"):
        load(saved)


def test_a_network_that_would_take_too_much_memory_is_refused_before_it_computes(tmp_path: Path) -> None:
    """Without a relative bias, no tensor of the file depends on the size of the window."""
    model = create_model("coatnet-femto-16", num_classes=3, attention="local", window=1_001, relative_bias=False)
    with pytest.raises(UserError, match=r"one image takes this network about .* GiB; models of more than 16 GiB"):
        load(Bundle(model, ("a", "b", "c"), Preprocessing(resolution=128)).save(tmp_path / "bundle"))


def test_many_classes_with_one_twice_take_no_time() -> None:
    model = create_model("coatnet-femto-16", num_classes=60_000, in_channels=1)
    names = [*map(str, range(59_999)), "59998"]
    started = time.process_time()
    with pytest.raises(UserError, match="class '59998' is named twice"):
        Bundle(model, tuple(names), Preprocessing(resolution=8, mean=(0.5,), std=(0.5,)))
    assert time.process_time() - started < 1


TABLE = "stages.2.0.attention.relative_bias.table"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("head.hidden.bias"), "head.hidden.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not part of the model"),
        (lambda s: s.update({"head.hidden.bias": s["head.hidden.bias"].double()}), "head.hidden.bias is F64"),
        (lambda s: s.update({"head.hidden.bias": torch.zeros(7)}), r"head.hidden.bias is F32 \[7\]"),
        (lambda s: s.update({TABLE: s[TABLE].flatten(1).contiguous()}), "relative_bias.table is F32"),
        (lambda s: s["head.hidden.bias"].fill_(float("nan")), "head.hidden.bias holds NaN"),
        (lambda s: s["stem.0.1.running_var"].fill_(-1), "stem.0.1.running_var holds a negative variance"),
        (lambda s: s.update({f"extra {n}": torch.zeros(0) for n in range(20_000)}), "extra .* is not part of"),
        (lambda s: s.update({"x" * 10**6: torch.zeros(1)}), "x is not part of the model"),
        (lambda s: s.update(extra=torch.zeros([1] * 1_000)), "extra is not part of the model"),
    ],
)
def test_weights_of_another_network_are_refused_by_tensor_name(
    saved: Path, spoil: Callable[[dict], None], message: str
) -> None:
    state = load_file(saved / "model.safetensors")
    spoil(state)
    save_file(state, saved / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(saved)


def forged(header: bytes, tensors: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + tensors


DAMAGED = "not a safetensors file, damaged or cut short: "
ROW = '"dtype":"F32","shape":[1],"data_offsets":'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", DAMAGED),
        (forged(b"{}", length=2**63), DAMAGED),
        (forged(b"nonsense"), DAMAGED),
        (forged(b"[]"), DAMAGED),
        (forged(b'{"a":{}}'), DAMAGED),
        (forged(b'{"a":1,"a":2}'), DAMAGED),
        (forged(f'{{"a":{{{ROW}[0,4]}},"a":{{{ROW}[4,8]}}}}'.encode(), bytes(8)), DAMAGED),
        (forged(f'{{"a":{{{ROW}[0,4]}},"a":{{{ROW}[0,4]}}}}'.encode(), bytes(4)), "is missing"),
        (forged(f'{{"a":{{{ROW}[4,8]}}}}'.encode(), bytes(8)), DAMAGED),
        (forged(f'{{"a":{{{ROW}[0,4]}},"b":{{{ROW}[2,6]}}}}'.encode(), bytes(6)), DAMAGED),
        (forged(f'{{"a":{{{ROW}[0,4]}}}}'.encode(), bytes(9)), DAMAGED),
        (forged(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', bytes(4)), DAMAGED),
        (forged(b'{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,0]}}'), DAMAGED),
        (forged(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)), DAMAGED),
        (forged(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', bytes(4)), DAMAGED),
        (forged(b'{"head.hidden.bias":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]}}', bytes(4)), "is missing"),
        (forged(b"[" * 100_000), DAMAGED),
        (forged(b'{"__metadata__":' + b"[" * 100_000), DAMAGED),
    ],
)
def test_a_forged_weight_file_is_refused(saved: Path, content: bytes, message: str) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        load(saved)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_weights_cut_short_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="cut short"):
        load(saved)


def test_loading_does_not_import_torchs_compiler(tmp_path: Path) -> None:
    """It takes longer than the rest of loading; arithmetic on the meta device would import it."""
    model = create_model("coatnet-femto-64", num_classes=2, resolution=28).eval()
    Bundle(model, ("ant", "bee"), Preprocessing(resolution=28)).save(tmp_path / "bundle")
    program = (
        f"import coatnet, sys; coatnet.load({str(tmp_path / 'bundle')!r}); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
