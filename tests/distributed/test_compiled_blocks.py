"""Compiled blocks in real DeepSpeed steps: two graphs for each network, and what eager blocks compute."""

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import run_in_processes
from torch import nn

from vmd_scale.build import Parts, build_model
from vmd_scale.checkpoints import find_checkpoint, load_weights
from vmd_scale.config_file import load_config


class OtherBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *arguments):
        return self.block(*arguments)


def with_other_blocks(config, vocab_size):
    """The same network, to `gather_whole_blocks` one of a user's own."""
    model = build_model(config, vocab_size)
    for stack in model.stacks:
        stack[0] = OtherBlock(stack[0])
    return model


def with_frozen_embeddings(config, vocab_size):
    model = build_model(config, vocab_size)
    for network in (model.denoiser, model.encoder):
        for module in network.children():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
    return model


@dataclass(frozen=True)
class Run:
    stage: int
    compiled: bool = True
    checkpointing: str = "none"
    parts: Parts | None = None

    @property
    def settings(self):
        always_sharded = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        return (
            *(f"deepspeed.zero_optimization.stage3_{key}=0" for key in always_sharded if self.stage == 3),
            f"deepspeed.zero_optimization.stage={self.stage}",
            f"training.activation_checkpointing={self.checkpointing}",
            "training.steps=3",
            "training.micro_batch=2",
            "training.checkpoint_every=100",
            "model.dropout=0.0",
        )


FROZEN, OTHER = Parts(model=with_frozen_embeddings), Parts(model=with_other_blocks)
RUNS = {
    "eager": Run(1, compiled=False),
    "eager, stage 3, selective": Run(3, compiled=False, checkpointing="selective"),
    "stage 1": Run(1),
    "stage 2": Run(2),
    "stage 3": Run(3),
    "stage 3, full": Run(3, checkpointing="full"),
    "stage 3, selective": Run(3, checkpointing="selective"),
    "stage 3, other blocks": Run(3, parts=OTHER),
    "frozen, eager": Run(1, compiled=False, parts=FROZEN),
    "frozen, stage 3": Run(3, parts=FROZEN),
}
WHOLE_GRAPHS = [name for name, run in RUNS.items() if run.compiled and run.parts is None]


def train(config_path, folder):
    """On each rank, run after run: the number of graphs, and the elements of weights that are there at the end.

    The backend cuts forward from backward as inductor does, and needs no C++.
    """
    from vmd_scale.tokenization import load_tokenizer
    from vmd_scale.training import engine
    from vmd_scale.training.launch import join_world, leave_world
    from vmd_scale.training.loop import Trainer

    backend, graphs = torch._dynamo.lookup_backend("aot_eager_decomp_partition"), []

    def counting(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    torch.compile = functools.partial(torch.compile, backend=counting)
    world, found = join_world(), {}
    for name, run in RUNS.items():
        torch._dynamo.reset()
        graphs.clear()
        engine.compiles_on = lambda device: run.compiled  # noqa: B023
        config = load_config(config_path, run.settings)
        output = folder / name
        output.mkdir(exist_ok=True)
        world.barrier()
        trainer = Trainer(config, output, world, load_tokenizer(config.data.tokenizer), run.parts)
        assert trainer.train(0) == 0
        found[name] = len(graphs), sum(p.numel() for p in trainer.engine.module.parameters())
    leave_world()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def ranks(lab, folder):
    return run_in_processes(train, 2, lab.config, folder, timeout=240)


@pytest.mark.parametrize("name", WHOLE_GRAPHS)
def test_all_blocks_of_a_network_share_one_graph(ranks, name):
    """Any break of a graph would make two of it, and others where the code around it is compiled."""
    for rank in ranks:
        graphs, _ = rank[name]
        assert graphs == 4  # of denoiser and encoder, a block's and the last norm's


@pytest.mark.parametrize("name", ["stage 3, other blocks", "frozen, stage 3"])
def test_stage_3_compiles_nothing_where_it_cannot_gather_whole_blocks(ranks, name):
    assert [rank[name][0] for rank in ranks] == [0, 0]


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run != RUNS["eager"]])
def test_losses_and_gradient_norms_are_those_of_eager_blocks(ranks, lab, folder, name):
    reference = "frozen, eager" if RUNS[name].parts is FROZEN else "eager"
    found, wanted = lab.metrics(folder / name), lab.metrics(folder / reference)
    assert len(found) == 3
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in wanted], rel=1e-5)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.stage == 3])
def test_between_steps_no_weight_is_whole(ranks, name):
    assert [rank[name][1] for rank in ranks] == [0, 0]


@pytest.mark.parametrize("name", WHOLE_GRAPHS)
def test_a_checkpoint_knows_nothing_of_the_compiler(ranks, folder, name):
    found, wanted = (load_weights(find_checkpoint(folder / run), "raw") for run in (name, "eager"))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=key)
