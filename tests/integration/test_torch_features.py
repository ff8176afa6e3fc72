"""Adapted models under what PyTorch does to models: compile, checkpointing, autocast, torch.func, DDP and FSDP2."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import adapted, only_layer, train
from toys.layers import input_for
from toys.processes import leave_group, run_group

LINEAR = "torch.nn.modules.linear.Linear"


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + torch.tanh(self.q_proj(h)) * self.v_proj(h)


class Model(nn.Module):
    def __init__(self, width: int = 8, checkpointing: str = "none") -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            if self.checkpointing == "none":
                h = layer(h)
            else:
                h = checkpoint(layer, h.requires_grad_() if not h.requires_grad else h,
                               use_reentrant=self.checkpointing == "reentrant")  # fmt: skip
        y: Tensor = self.head(h)
        return y


def model_of(checkpointing: str = "none", dtype: torch.dtype = torch.float64, **settings: object) -> PeftModel:
    torch.manual_seed(0)
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_seed": 0} | settings
    model = get_peft_model(Model(checkpointing=checkpointing).to(dtype), LoraConfig(**config))  # type: ignore[arg-type]
    train(model)
    return model


X = torch.arange(12).view(2, 6) % 11


def gradients(model: nn.Module, seed: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    model(X).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert first
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_gradients_under_activation_checkpointing_are_those_without_it(kind: str, dora: bool, dropout: float) -> None:
    settings = {"use_dora": dora, "lora_dropout": dropout}
    assert_same(gradients(model_of(kind, **settings)), gradients(model_of(**settings)), 0.0)


def test_dropout_draws_differ_from_layer_to_layer_and_step_to_step() -> None:
    model = model_of(lora_dropout=0.5)
    first = model(X)
    assert not torch.equal(first, model(X))


KINDS = {
    "linear": (LINEAR, {}),
    "dora": (LINEAR, {"use_dora": True}),
    "pissa": (LINEAR, {"init_lora_weights": "pissa"}),
    "lora_sb": (LINEAR, {"init_lora_weights": "lora_sb"}),
    "kasa": (LINEAR, {"init_lora_weights": "kasa"}),
    "conv": ("torch.nn.modules.conv.Conv2d", {}),
    "embedding": ("torch.nn.modules.sparse.Embedding", {}),
    "nf4": ("lorafa.backends.nf4.NF4Linear", {}),
    "int8": ("lorafa.backends.int8.Int8Linear", {}),
    "bnb4": ("bitsandbytes.nn.modules.Linear4bit", {}),
    "bnb8": ("bitsandbytes.nn.modules.Linear8bitLt", {}),
    "torchao": ("tensor:torchao.quantization.Int8Tensor", {}),
    "experts": ("experts (E, out, in)", {}),
    "attention": ("torch.nn.modules.activation.MultiheadAttention", {}),
}


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize("case", KINDS)
def test_layer_compiles_without_a_graph_break(case: str) -> None:
    kind, settings = KINDS[case]
    model, x = adapted(kind, **settings), input_for(kind)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for run, owner in ((model, model), (compiled, twin)):
        run(x).square().sum().backward()
        assert all(p.grad is not None for p in owner.parameters() if p.requires_grad)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    for ours, eager in zip(twin.parameters(), model.parameters(), strict=True):
        if eager.grad is not None:
            torch.testing.assert_close(ours.grad, eager.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_model_compiles_whole_and_trains_as_in_eager_mode(dora: bool) -> None:
    model = model_of(use_dora=dora)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    wanted = gradients(model)
    compiled(X).square().sum().backward()
    assert_same({n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, wanted)


def test_compiled_model_with_dropout_keeps_its_share() -> None:
    model = adapted(LINEAR, lora_dropout=0.25)
    layer = only_layer(model)
    with torch.no_grad():  # y = mean over the kept inputs
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        layer.lora_A["default"].weight.zero_()[0, 0] = 1
        layer.lora_B["default"].weight.zero_()[0, 0] = 1 / 1.5
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    values = compiled(torch.ones(20_000, 8))[:, 0]
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 4 / 3]))
    assert (values == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_torch_func_differentiates_an_adapted_model() -> None:
    model = model_of()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(model, values, (X,))
        return y.square().sum()

    assert_same(torch.func.grad(loss)(parameters), gradients(model))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_autocast_on_a_float32_model_is_close_to_float32(dora: bool) -> None:
    model = model_of(dtype=torch.float32, use_dora=dora)
    wanted = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model)
    for name, gradient in wanted.items():
        assert found[name].dtype is torch.float32
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_training_brings_the_loss_down_and_leaves_the_base_alone(settings: dict[str, object]) -> None:
    model = model_of(dtype=torch.float32, **settings)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    targets = (X + 1) % 11
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


# ---- two processes, which take seconds to start: one start for all


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def trained_parts(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _ddp_gradients(x: Tensor) -> dict[str, Tensor]:
    model = model_of()
    parallel = nn.parallel.DistributedDataParallel(model)  # has to live until backward
    parallel(x).square().sum().backward()
    return {name: p.grad for name, p in trained_parts(model).items()}


def _fsdp_step(x: Tensor) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    model = model_of()
    for block in model.get_base_model().layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(x).square().sum().backward()
    torch.optim.SGD(trained_parts(model).values(), lr=0.1).step()
    return {name: p.full_tensor() for name, p in trained_parts(model).items()}


def _work(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    shard = X[rank : rank + 1]
    results = {"ddp": _ddp_gradients(shard), "fsdp": _fsdp_step(shard)}
    if rank == 0:
        torch.save(results, out)
    leave_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("processes") / "results.pt"
    run_group(_work, free_port(), str(out))
    return torch.load(out)  # type: ignore[no-any-return]


def mean_gradients() -> dict[str, Tensor]:
    """Of the two shards, by one process."""
    model = model_of()
    ((model(X[:1]).square().sum() + model(X[1:]).square().sum()) / 2).backward()
    return {name: p.grad for name, p in trained_parts(model).items()}


def test_ddp_gives_the_mean_of_the_gradients(of_two_processes: dict[str, dict[str, Tensor]]) -> None:
    assert_same(of_two_processes["ddp"], mean_gradients())


def test_fsdp2_takes_the_step_of_one_process(of_two_processes: dict[str, dict[str, Tensor]]) -> None:
    step = mean_gradients()
    wanted = {name: p.detach() - 0.1 * step[name] for name, p in trained_parts(model_of()).items()}
    assert_same(of_two_processes["fsdp"], wanted)
