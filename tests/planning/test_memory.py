"""A simulated step takes what a real one takes, in memory and arithmetic; shards take their part of the state."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import plan_memory
from tests.training.launching import needs_shards_on_cpus

from coatnet.model.complexity import complexity
from coatnet.model.network import create_model
from coatnet.planning.memory import MemoryTracker, simulate_step
from coatnet.training.config import TrainingConfig
from coatnet.training.distributed.processes import Processes
from coatnet.training.optimizer import matrix_weights

ONE, MANY = Processes(), Processes(world_size=16, local_world_size=8)


def recipe_of(model: str, resolution: int, batch_size: int, **changes) -> TrainingConfig:
    return plan_memory.recipe_of(model, resolution, batch_size, **{"parallelism": "ddp", **changes})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", plan_memory.RECIPES, ids=lambda recipe: recipe.model)
def test_simulated_memory_equals_that_of_a_real_step(recipe):
    (found,) = plan_memory.compare([recipe])
    # Measured: -0.1, -0.5 and -0.0 %. The rest is what operations take for themselves.
    assert abs(found.error) < 0.01
    for kind, planned in vars(found.planned).items():
        assert planned == pytest.approx(getattr(found.counted, kind), rel=0.005), kind


@needs_shards_on_cpus
@pytest.mark.nightly
def test_simulated_memory_of_shards_equals_that_of_a_real_process_of_two():
    program = [str(Path(plan_memory.__file__)), "coatnet-femto-64", "coatnet-femto"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run([*launch, *program], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    errors = [float(each) for each in re.findall(r"error +│ ([+-][\d.]+)%", ran.stdout)]
    # Measured: -0.4 and up to -3.1 %; once, on a busy machine, beyond 4. The rest is what gloo has on its way.
    assert len(errors) == 2 and max(map(abs, errors)) < 8


def test_a_replica_holds_four_numbers_per_parameter():
    recipe = recipe_of("coatnet-femto-64", 32, 8, optimizer={"algorithm": "adamw"})
    cost = simulate_step(recipe, num_classes=10, images_per_gpu=8, processes=MANY)
    memory, size = cost.memory, 4 * cost.num_parameters
    assert memory.gradients == size  # the buckets of DDP exist all the time
    for held, times in ((memory.parameters, 1), (memory.average, 1), (memory.optimizer, 2)):
        assert held == pytest.approx(times * size, rel=0.02)


def test_muon_holds_one_number_for_a_weight_of_a_matrix():
    recipe = recipe_of("coatnet-femto", 64, 8, optimizer={"algorithm": "muon"})
    cost = simulate_step(recipe, num_classes=10, images_per_gpu=8, processes=ONE)
    model = create_model("coatnet-femto", num_classes=10, resolution=64)
    parameters = dict(model.named_parameters())
    with_muon = sum(parameters[name].numel() for name in matrix_weights(model))
    numbers = with_muon + 2 * (cost.num_parameters - with_muon)
    assert cost.memory.optimizer == pytest.approx(4 * numbers, rel=0.01)


@pytest.mark.slow
@needs_shards_on_cpus
@pytest.mark.parametrize(("parallelism", "shards"), [("fsdp", 16), ("hsdp", 8)])
def test_a_shard_holds_its_part_of_the_state(parallelism, shards):
    recipe = recipe_of("coatnet-femto", 64, 32, parallelism=parallelism, micro_batch_size=2)
    memory = simulate_step(recipe, num_classes=10, images_per_gpu=2, processes=MANY).memory
    whole = simulate_step(recipe, num_classes=10, images_per_gpu=2, processes=ONE).memory
    assert memory.optimizer == pytest.approx(whole.optimizer / shards, rel=0.1)
    assert memory.parameters < 2 * whole.parameters / shards


@needs_shards_on_cpus
def test_a_shard_may_have_a_part_of_the_queries_alone():
    processes = Processes(world_size=5, local_world_size=5)  # of weights for queries, keys and values one below another
    recipe = recipe_of("coatnet-femto", 64, 10, parallelism="fsdp", micro_batch_size=2, optimizer={"algorithm": "muon"})
    memory = simulate_step(recipe, num_classes=10, images_per_gpu=2, processes=processes).memory
    assert 0 < memory.optimizer < memory.total


def test_a_step_has_three_times_the_macs_of_the_forward_pass():
    cost = simulate_step(recipe_of("coatnet-0", 224, 4), num_classes=1000, images_per_gpu=4, processes=ONE)
    assert cost.macs / 4 == pytest.approx(3 * complexity("coatnet-0", 224).macs, rel=0.01)


@pytest.mark.slow
def test_recomputation_takes_less_memory_and_more_macs():
    none, some, everything = (
        simulate_step(
            recipe_of("coatnet-femto", 224, 8, activation_checkpointing=recomputation),
            num_classes=10,
            images_per_gpu=8,
            processes=ONE,
        )
        for recomputation in ("none", "transformer", "all")
    )
    assert everything.memory.total < some.memory.total < none.memory.total
    assert none.macs < some.macs < everything.macs <= 4 / 3 * none.macs


@pytest.mark.slow
def test_micro_batches_take_less_memory_and_the_same_macs():
    whole = simulate_step(recipe_of("coatnet-femto", 96, 8), num_classes=10, images_per_gpu=8, processes=ONE)
    parts = simulate_step(
        recipe_of("coatnet-femto", 96, 8, micro_batch_size=2), num_classes=10, images_per_gpu=8, processes=ONE
    )
    assert parts.memory.activations < 0.4 * whole.memory.activations
    assert parts.macs == pytest.approx(whole.macs, rel=1e-3)


def test_the_peak_is_where_the_sum_of_live_tensors_is_largest():
    memory = MemoryTracker()
    with memory:
        kept = torch.zeros(100)
        memory.label("kept", [kept])
        first = torch.zeros(1000)
        del first
        second = torch.zeros(500)
        view = second[:10]
        del second
        third = torch.zeros(300)
    assert memory.at_peak() == {"kept": 400, "activations": 4000}
    assert view.numel() + third.numel() == 310
