"""What is put around a network from outside changes nothing of what it computes."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.training.configs import config_of
from tests.training.trainers import trainer_for
from torch import nn

from coatnet.errors import UserError
from coatnet.model.network import create_model, has_batch_norm
from coatnet.model.registry import VARIANTS
from coatnet.training.config import Recipe
from coatnet.training.distributed.parallelize import (
    choose_parallelism,
    compile_and_checkpoint,
    materialize,
    own_tensors,
    untrained,
    use_sync_batch_norm,
)
from coatnet.training.distributed.processes import SINGLE_PROCESS, Processes
from coatnet.training.distributed.wrappers import Sharded

CPU = torch.device("cpu")


def network(**options):
    torch.manual_seed(0)
    return create_model("coatnet-femto-16", num_classes=10, in_channels=1, resolution=16, **options).train()


def gradients(model, images):
    torch.manual_seed(1)
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["transformer", "all"])
def test_activation_checkpointing_gives_the_same_gradients_and_counts_batch_norm_once(kind):
    plain = network(stochastic_depth=0.5)
    recomputed = copy.deepcopy(plain)
    compile_and_checkpoint(recomputed, config_of(activation_checkpointing=kind), CPU)
    images = torch.randn(6, 1, 16, 16)
    torch.testing.assert_close(gradients(recomputed, images), gradients(plain, images), rtol=0, atol=0)
    torch.testing.assert_close(recomputed.state_dict(), plain.state_dict(), rtol=0, atol=0)
    norms = [module for module in recomputed.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}
    with torch.no_grad():
        torch.testing.assert_close(recomputed.eval()(images), plain.eval()(images), rtol=0, atol=0)


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    kept = {}
    for kind in ("none", "transformer", "all"):
        model, kept[kind] = network(), 0
        compile_and_checkpoint(model, config_of(activation_checkpointing=kind), CPU)

        def keep(x, kind=kind):
            kept[kind] += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(torch.randn(6, 1, 16, 16))
    assert kept["none"] > kept["transformer"] > kept["all"]


@pytest.mark.nightly
def test_compiled_blocks_learn_as_plain_ones():
    plain = network()
    compiled = copy.deepcopy(plain)
    compile_and_checkpoint(compiled, config_of(compile=True), CPU)
    images = torch.randn(6, 1, 16, 16)
    torch.testing.assert_close(gradients(compiled, images), gradients(plain, images), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_weights_from_the_meta_device_are_distributed_as_those_of_an_ordinary_network():
    ordinary = network()
    with torch.device("meta"):
        model = network()
    materialize(model, 3, CPU)
    for (name, value), drawn in zip(ordinary.state_dict().items(), model.state_dict().values(), strict=True):
        assert drawn.shape == value.shape and drawn.dtype == value.dtype
        if value.numel() >= 500:
            assert float(drawn.std()) == pytest.approx(float(value.std()), rel=0.2), name
        elif not value.is_floating_point() or value.std() == 0 or value.numel() == 1:
            assert torch.equal(drawn, value), name
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(model.stages[1][0].expand[0].weight, model.stages[1][1].expand[0].weight)


def test_every_layer_of_the_family_has_reset_parameters():
    for name in VARIANTS:
        with torch.device("meta"):
            model = create_model(name)
        for module in model.modules():
            if own_tensors(module):
                assert callable(module.reset_parameters), name


def test_weights_are_a_function_of_seed_and_name():
    with torch.device("meta"):
        layer = nn.Linear(3, 4)
    assert torch.equal(untrained(layer, 1).weight, untrained(layer, 1).weight)
    assert not torch.equal(untrained(layer, 1).weight, untrained(layer, 2).weight)
    state = torch.get_rng_state()
    untrained(layer, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("config", "processes", "parallelism"),
    [
        (config_of(model="coatnet-5"), SINGLE_PROCESS, "ddp"),
        (config_of(model="coatnet-6"), SINGLE_PROCESS, "hsdp"),
        (config_of(model="coatnet-7"), Processes(0, 32, 0, 8), "hsdp"),
        (config_of(model="coatnet-7"), Processes(0, 31, 0, 8), "fsdp"),
        (config_of(model="coatnet-7", parallelism="ddp"), SINGLE_PROCESS, "ddp"),
        (config_of(model="coatnet-0", parallelism="fsdp"), SINGLE_PROCESS, "fsdp"),
    ],
)
def test_a_run_is_sharded_above_a_billion_parameters(config, processes, parallelism):
    assert choose_parallelism(config, None, processes) == parallelism


def test_a_sharded_run_on_one_process_starts_with_the_same_weights_every_time():
    recipe = Recipe(data="digits", parallelism="fsdp")
    one, other = (trainer_for(recipe) for _ in range(2))
    torch.testing.assert_close(one.tensors(), other.tensors(), rtol=0, atol=0)
    fresh = trainer_for(replace(recipe, seed=1))
    assert not torch.equal(one.tensors()["model.stem.0.0.weight"], fresh.tensors()["model.stem.0.0.weight"])


def test_blocks_with_batch_norm_are_recognized():
    model = network()
    assert [has_batch_norm(stage[0]) for stage in model.stages] == [True, True, False]


def test_a_torch_that_cannot_shard_on_cpus_is_an_error_that_names_the_version_needed(monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(UserError, match=r"^shards on CPUs, or plans of them, need torch 2.7 or newer, this is \d"):
        Sharded(network(), SINGLE_PROCESS, SimpleNamespace(device_type="cpu"), bf16=False)


@pytest.mark.parametrize(("batch_size", "synchronized"), [(32, True), (31, False)])
def test_statistics_are_synchronized_only_if_all_gpus_take_equally_many_passes(batch_size, synchronized):
    model = network()
    config = config_of(batch_size=batch_size, micro_batch_size=5)
    use_sync_batch_norm(model, config, Processes(0, 2), torch.device("cuda"))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == synchronized
