"""What a device would get is compiled here without one; what stands in the way is one line; and, where there is one, it runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rewriter import cli
from rewriter.algebra import BlockDiagonal, Compose
from rewriter.backends.kernels import naive
from rewriter.backends.kernels.plan import Ending, Plan, Product, plan
from rewriter.backends.triton_kernels import chain, delta, device, tuning
from rewriter.errors import RewriteError
from rewriter.operator import AbstractMatrix, AbstractRecurrence
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.passes.structures.monarch import Monarch
from rewriter.quantised import quantised
from tests.kernels.recurrent import given, inputs, recurrence, wanted
from tests.kernels.spelled import spelled
from tests.onnx.models import close
from tests.triton_kernels.test_chain import exact
from tests.triton_kernels.test_delta import taken

CHIPS = {"A100": 80, "H100": 90}
MOST_SHARED = 160 << 10  # bytes that an A100 gives one program; an H100 gives more


@pytest.fixture(params=CHIPS)
def launched(
    request: pytest.FixtureRequest, compiled: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[tuple[str, int]]:
    """Launches are compiled to machine code for a chip that is not there, and go no further: the kernel and its bytes of memory on chip."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", CHIPS[request.param], 32)
    absent = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: target.arch, get_current_stream=lambda _: 0)
    made: list[tuple[str, int]] = []
    jitted = compiled["chain_kernels"].triton.JITFunction
    launch = jitted.run

    def run(self: object, *args: object, grid: tuple[int, ...], warmup: bool, **options: object) -> None:
        assert len(grid) <= 3 and min(grid) > 0 and max(grid[1:], default=0) < 1 << 16
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        made.append((self.__name__, kernel.metadata.shared))  # type: ignore[attr-defined]

    monkeypatch.setattr(jitted, "run", run)
    monkeypatch.setattr(driver, "_active", absent)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(device, "interpreted", lambda: True)  # a CPU tensor's address is as good as any: nothing reads it
    for module in (chain, delta):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    return made


def test_every_tile_compiles(launched: list[tuple[str, int]]) -> None:
    """In bfloat16, read at a step and in runs, with bias, activation and split sums; none but the last needs more than every chip has."""
    operator = Monarch(torch.randn(4, 256, 64), torch.randn(4, 64, 256), 1024, 1024).to(torch.bfloat16)
    (first, second) = plan(operator, Ending(torch.zeros(1024, dtype=torch.bfloat16), "gelu")).steps
    assert isinstance(first, Product) and isinstance(second, Product) and second.run < 64
    for step, listed in ((first, tuning.MANY[:6:2]), (second, tuning.FEW[::5])):
        for tiles in listed:
            x = torch.zeros(64, 1024, dtype=torch.bfloat16)
            chain._product(step, {0: x, 1: x.clone(), 2: x.clone()}, tiles)
    names = [name for name, _ in launched]
    assert names.count("product") == 5 and "collected" in names
    assert max(shared for _, shared in launched) <= MOST_SHARED


@pytest.mark.parametrize("launched", ["A100"], indirect=True)
def test_copies_and_integers_compile(launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "choices", lambda *_: [tuning.FEW[0]])
    operator = quantised(BlockDiagonal(torch.randn(2, 32, 32)))
    assert operator is not None
    chain.run(plan(operator, Ending(None, "gelu-tanh")), torch.zeros(3, 64, dtype=torch.float16))
    chain.run(plan(spelled(4, sparse=False)), torch.zeros(3, spelled(4, sparse=False).shape[1]))
    assert {name for name, _ in launched} == {"product", "copied"}
    launched.clear()
    assert chain.run(plan(operator), torch.zeros(0, 64)).shape == (0, 64) and not launched


def test_recurrences_compile(launched: list[tuple[str, int]]) -> None:
    operator = LinearAttention(2, 64, 48, 4, 2, factors=2, decay="head")
    delta.run(delta.covered(operator), [x.bfloat16() for x in inputs(operator, 1, 12, 0)])
    plain = LinearAttention(2, 16, 16, 2, 2, rule="plain", carried=False)
    delta.run(delta.covered(plain), inputs(plain, 1, 1, 0))
    assert [name for name, _ in launched] == ["within", "across"] * 2
    assert max(shared for _, shared in launched) <= MOST_SHARED
    launched.clear()
    for batch, names in ((1, ["across"]), (0, [])):
        delta.run(delta.covered(plain), inputs(plain, batch, 0, 0))
        assert [name for name, _ in launched] == names
        launched.clear()


def test_devices_that_are_not_there_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.ready("cpu") == torch.device("cpu")
    monkeypatch.setattr(device, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, said in (
        ("gpu", "device 'gpu' is unknown; give cpu, cuda or cuda:N"),
        ("cpu", "device 'cpu' has no kernels"),
        ("meta", "device 'meta' has no kernels"),
        ("cuda", r"device 'cuda': torch .* sees no CUDA device; give cpu, or install a torch built for CUDA"),
    ):
        with pytest.raises(RewriteError, match=said):
            device.ready(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.ready("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RewriteError, match="device 'cuda:2' is not there; the last is cuda:1"):
        device.ready("cuda:2")


def test_no_triton_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RewriteError, match=r"kernels for a GPU need triton, which is not installed; install rewriter\[gpu\]"):
        device.kernels("chain_kernels")


def test_inputs_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreted", lambda: False)
    operator = LinearAttention(2, 5, 3, 2, 2)
    for call in (
        lambda: chain.run(plan(BlockDiagonal(torch.randn(1, 2, 3))), torch.randn(4, 2)),
        lambda: delta.run(delta.covered(operator), inputs(operator, 1, 2, 0)),
    ):
        with pytest.raises(RewriteError, match="the input is on cpu, this kernel runs on CUDA devices"):
            call()


@pytest.mark.parametrize(
    ("there", "spec", "said"), [(False, True, "none that torch sees"), (True, True, "H"), (True, False, "H, without triton")]
)
def test_status_says_which_gpu(there: bool, spec: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if spec else None)
    assert device.said().split(":")[0] == said


def test_status_has_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels"]) == 0
    assert f"GPU       {device.said()}\n" in capsys.readouterr().out


def on_device(steps: Plan) -> Plan:
    tensors, spec = chain.flatten(steps)
    return chain.unflatten([tensor.cuda() for tensor in tensors], spec)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 700])
def test_chains_on_a_device(rows: int) -> None:
    """Tuned tiles against the plain form, sizes that fill many and none."""
    wide: AbstractMatrix = Compose((BlockDiagonal(torch.randn(4, 512, 160) / 23), BlockDiagonal(torch.randn(2, 320, 1000) / 18)))
    for operator in (wide, *(spelled(seed, sparse=False) for seed in range(20))):
        steps = plan(operator, Ending(torch.randn(operator.shape[0]), "gelu"))
        for dtype in chain.DTYPES:
            x = torch.randn(rows, operator.shape[1]).to(dtype)
            rounded = _rounded(steps, dtype)
            close(chain.run(on_device(rounded), x.cuda()).cpu(), naive.run(_rounded(rounded, torch.float32), x.float()).to(dtype))


def _rounded(steps: Plan, dtype: torch.dtype) -> Plan:
    tensors, spec = chain.flatten(steps)
    return chain.unflatten([tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors], spec)


@pytest.mark.gpu
def test_integers_on_a_device() -> None:
    operator = quantised(BlockDiagonal(torch.randn(3, 200, 70)))
    assert operator is not None
    steps = plan(operator, Ending(torch.randn(210), "silu"))
    for rows in (1, 40):
        x = torch.randn(rows, 600) / 16
        close(chain.run(on_device(steps), x.cuda()).cpu(), naive.run(exact(steps), x))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", taken(range(40)))
def test_recurrences_on_a_device(seed: int) -> None:
    _agree_on_device(recurrence(seed), 1 + 17 * (seed % 7), seed, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("key", [32, 128, 256])
@pytest.mark.parametrize("dtype", chain.DTYPES, ids=str)
def test_wide_recurrences_on_a_device(key: int, dtype: torch.dtype) -> None:
    _agree_on_device(LinearAttention(2, key, 96, 4, 1, factors=2, decay="head", scale=0.1), 150, 0, dtype)


def _agree_on_device(operator: AbstractRecurrence, time: int, seed: int, dtype: torch.dtype) -> None:
    xs = [x.to(dtype) for x in inputs(operator, 2, time, seed)]
    found = delta.run(delta.covered(operator), [x.cuda() for x in given(operator, xs)])
    for one, expected in zip(found, wanted(operator, xs), strict=True):
        close(one.cpu(), expected.to(dtype))
