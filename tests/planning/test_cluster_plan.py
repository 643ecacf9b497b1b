"""Plans: the fastest layout that fits, its cost, the command that repeats it, and errors of one line."""

import json
import shlex

import pytest
from tests.training.launching import needs_shards_on_cpus

from coatnet.cli.main import main
from coatnet.cli.train import parse_arguments
from coatnet.errors import UserError
from coatnet.planning.cluster_plan import plan_training, recipe_for


@pytest.mark.slow
@needs_shards_on_cpus
def test_coatnet_7_fits_on_256_gpus_of_80_gb():
    plan = plan_training("coatnet-7", gpus=256, gpu_memory=80, num_images=3_000_000_000, resolution=512)
    recipe, memory, size = plan.layout.config, plan.layout.cost.memory, plan.layout.cost.num_parameters
    assert (recipe.name, recipe.parallelism, recipe.batch_size) == ("jft-3b", "hsdp", 4096)
    assert (recipe.micro_batch_size, recipe.activation_checkpointing) == (8, "none")
    assert memory.total < 0.9 * 80e9
    assert size == pytest.approx(2.44e9 + 3072 * 29_593, rel=0.01)  # as published, and a larger classifier
    # AdamW and weights in eight shards; the gradients of two passes are added up whole.
    assert memory.optimizer == pytest.approx(8 * size / 8, rel=0.002)
    assert memory.parameters == pytest.approx(4 * size / 8, rel=0.002)
    assert memory.gradients == pytest.approx(4 * size, rel=0.002)
    assert plan.steps == 3_662_110
    # 2,538.53 * 10^9 multiply-accumulates an image, of two operations each, and twice as many backwards; there
    # attention, which keeps no weights, makes them a second time.
    assert 1 < plan.seconds_per_step / (16 * 3 * 2 * 2538.53e9 / (0.3 * 312e12)) < 1.02
    assert "the paper is silent" in plan.describe()


@pytest.mark.slow
def test_the_accuracy_of_the_paper_is_given_for_its_own_recipe_only():
    given = {"gpus": 8, "gpu_memory": 80}
    assert "the paper reports 81.60% top-1" in plan_training("coatnet-0", **given).describe()
    for change in ({"epochs": 100}, {"resolution": 192}, {"num_images": 1_000_000}):
        assert "the paper" not in plan_training("coatnet-0", **given, **change).describe()


@pytest.mark.nightly
def test_the_networks_of_the_jft_results_are_distinguished():
    given = {"gpus": 8, "gpu_memory": 80, "recipe": "jft-to-1k-384"}
    assert "--variations.downsample depthwise" in plan_training("coatnet-3", **given).describe()
    assert "depthwise" not in plan_training("coatnet-4", **given).describe()


@pytest.mark.nightly
@needs_shards_on_cpus
def test_a_batch_size_that_cannot_be_sharded_comes_with_one_that_can():
    given = {"gpus": 3, "gpus_per_node": 3, "gpu_memory": 200, "resolution": 64, "recipe": "jft-3b"}
    unsharded = plan_training("coatnet-6", batch_size=64, **given)
    assert unsharded.layout.config.parallelism == "ddp" and "batch-size 63 or 66 would let" in unsharded.describe()
    for batch_size in (63, 66):
        plan = plan_training("coatnet-6", batch_size=batch_size, **given)
        assert plan.layout.config.parallelism == "fsdp" and "would let" not in plan.describe()
    with pytest.raises(UserError, match="batch-size 63 or 66 would let"):
        plan_training("coatnet-6", batch_size=64, **given | {"gpu_memory": 16})


def test_days_are_the_operations_divided_by_their_rate():
    plan = plan_training("coatnet-0", gpus=8, gpu_memory=80, gpu="H100", mfu=0.4)
    assert (plan.layout.config.name, plan.steps, plan.layout.config.parallelism) == ("imagenet-1k", 93_836, "ddp")
    operations = 6 * 4.14e9 * 300 * 1_281_167
    assert plan.days == pytest.approx(operations / (8 * 0.4 * 989e12) / 86_400, rel=0.02)


@pytest.mark.slow
def test_with_less_memory_there_are_more_passes_then_recomputation():
    given = {"gpus": 1, "batch_size": 16, "resolution": 128}
    whole = plan_training("coatnet-femto", gpu_memory=16, **given).layout
    assert whole.images_per_pass == 16 and whole.config.activation_checkpointing == "none"
    takes = whole.cost.memory.total / 1e9
    half, little = (plan_training("coatnet-femto", gpu_memory=takes * part, **given).layout for part in (0.9, 0.4))
    assert half.images_per_pass == 8 and half.config.activation_checkpointing == "none"
    assert little.images_per_pass < 8 or little.config.activation_checkpointing != "none"
    assert little.cost.memory.total < 0.4 * whole.cost.memory.total


def test_a_plan_for_finetuning_has_the_optimizer_of_a_network_that_has_learned():
    plan = plan_training(
        "coatnet-femto",
        gpus=1,
        gpu_memory=24,
        recipe="finetune",
        num_images=10_000,
        resolution=64,
        epochs=1,
        batch_size=8,
    )
    assert plan.layout.config.optimizer.algorithm == "adamw"


def test_the_recipe_is_chosen_by_the_number_of_images_or_by_the_model():
    assert recipe_for("coatnet-3", None).recipe.name == "imagenet-1k"
    assert recipe_for("coatnet-4", None).recipe.name == "imagenet-21k"
    assert recipe_for("coatnet-7", None).recipe.name == "jft-3b"
    names = [recipe_for("coatnet-3", number).recipe.name for number in (50_000, 10**7, 2 * 10**8, 3 * 10**9)]
    assert names == ["imagenet-1k", "imagenet-21k", "jft", "jft-3b"]


@pytest.mark.parametrize("resolution", ["96", "64x96"])
def test_the_command_repeats_the_plan(resolution, capsys):
    options = ["--gpus", "16", "--gpu-memory", "24", "--batch-size", "512", "--resolution", resolution, "--json"]
    assert main(["plan", "coatnet-femto", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    words = shlex.split(plan["command"].replace("\\\n", " "), comments=True)
    recipe, _ = parse_arguments(words[words.index("coatnet") + 2 :])
    for name in ("model", "resolution", "batch_size", "micro_batch_size", "parallelism", "activation_checkpointing"):
        planned = tuple(plan[name]) if isinstance(plan[name], list) else plan[name]
        assert getattr(recipe, name) == planned, name
    assert plan["memory"]["total"] == sum(value for name, value in plan["memory"].items() if name != "total")


@pytest.mark.parametrize("launcher", ["torchrun", "slurm", "kubernetes", "skypilot"])
def test_the_printed_plan_ends_with_the_command(launcher, capsys):
    given = ["plan", "coatnet-femto-64", "--gpus", "2", "--gpu-memory", "24", "--recipe", "imagenet-1k"]
    assert main([*given, "--resolution", "32", "--batch-size", "64", "--launcher", launcher]) == 0
    page = capsys.readouterr().out
    for expected in ("parameters", "gradients", "optimizer", "activations", "steps", "days", "MFU", "torchrun"):
        assert expected in page


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"model": "coatnet-00"}, "did you mean 'coatnet-0'"),
        ({"gpus": 0}, "gpus must be above 0, got 0"),
        ({"gpu_memory": -1}, "gpu-memory must be above 0, got -1"),
        ({"gpu_memory": float("inf")}, "gpu-memory must be at most 1e+15, got inf"),
        ({"num_images": 1e307}, "data must be at most 1e+15, got 1e+307"),
        ({"gpus": 12}, "12 GPUs do not fill machines of 8"),
        ({"recipe": "imagenet-2k"}, "did you mean 'imagenet-21k'"),
        ({"recipe": "scratch"}, "recipe 'scratch' takes resolution from the images"),
        ({"gpu": "H10"}, "did you mean 'H100'"),
        ({"mfu": 30}, "mfu is a share between 0 and 1"),
        ({"batch_size": 4}, "batch-size 4 is below the number of GPUs"),
        pytest.param({"gpu_memory": 0.02, "gpus": 1, "batch_size": 2}, "GB of each GPU", marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value),
)
def test_an_error_is_one_line_that_says_what_would_be_right(changes, answer):
    given = {"model": "coatnet-femto", "gpus": 8, "gpu_memory": 24, "resolution": 64, "batch_size": 64}
    given |= changes
    if changes.get("recipe") == "scratch":
        del given["resolution"]
    with pytest.raises(UserError) as met:
        plan_training(given.pop("model"), **given)
    assert answer in str(met.value) and "\n" not in str(met.value)
