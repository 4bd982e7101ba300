import os
import subprocess
import sys
import threading

import pytest
import torch

from tune_steel import matmul
from tune_steel.matmul import product

pytestmark = pytest.mark.usefixtures("one_thread")

SETTING = torch.backends.mkldnn.matmul
SMALL, LARGE = (3, 5, 4, 6), (3, 70, 130, 90)  # R, n, m, k


@pytest.fixture
def chosen(monkeypatch):
    """How each product was computed, by torch's setting at that time."""
    settings = []

    def noting(function):
        def call(*given, **options):
            settings.append(SETTING.fp32_precision)
            return function(*given, **options)

        return call

    for name in ("bmm", "baddbmm"):
        monkeypatch.setattr(torch, name, noting(getattr(torch, name)))
    return settings


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Large products by either, on whatever CPU this is."""
    if request.param == "oneDNN":
        monkeypatch.setattr(matmul, "_vendor", lambda: "AuthenticAMD")
        if not matmul.onednn_is_better.__wrapped__():
            pytest.skip("here oneDNN would compute in bfloat16, or has no AVX-512")
    monkeypatch.setattr(matmul, "onednn_is_better", lambda: request.param == "oneDNN")
    return request.param


def draw(shape, seed, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_(requires_grad)


def factors(shape, requires_grad=False):
    r, n, m, k = shape
    return draw((r, n, m), 0, requires_grad), draw((r, m, k), 1, requires_grad)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_product_is_that_of_double_precision_whatever_its_strides(library, shape):
    a, b = factors(shape)
    exact = torch.bmm(a.double(), b.double())
    column = draw((shape[0], shape[1], 1), 2)
    row = draw((shape[0], 1, shape[3]), 3)
    for left in (a, a.transpose(1, 2).contiguous().transpose(1, 2)):
        for right in (b, b.transpose(1, 2).contiguous().transpose(1, 2)):
            out = torch.empty_like(exact, dtype=torch.float32)
            assert product(left, right, out=out) is out
            for found in (out, product(left, right)):
                torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
            for bias in (column, row):
                assert product(left, right, bias, out=out) is out
                for found in (out, product(left, right, bias)):
                    torch.testing.assert_close(found.double(), exact + bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("bias_shape", [None, "column", "row"])
def test_gradients_are_those_of_torch(library, shape, bias_shape):
    r, n, _, k = shape
    weights = draw((r, n, k), 4).double()

    def gradients(multiply, dtype):
        a, b = (f.detach().to(dtype).requires_grad_() for f in factors(shape))
        if bias_shape is None:
            given, out = (a, b), multiply(a, b, None)
        else:
            bias = draw((r, n, 1) if bias_shape == "column" else (r, 1, k), 2).to(dtype)
            given = (bias.requires_grad_(), a, b)
            out = multiply(a, b, bias)
        return torch.autograd.grad((out.double() * weights).sum(), given)

    def plain(a, b, bias):
        return torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b)

    ours, theirs = gradients(product, torch.float32), gradients(plain, torch.float64)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_a_factor_without_a_gradient_costs_no_product(monkeypatch, chosen):
    monkeypatch.setattr(matmul, "onednn_is_better", lambda: True)
    a, b = factors(LARGE)
    product(a, b.requires_grad_()).sum().backward()
    assert len(chosen) == 2
    assert b.grad.shape == b.shape


def test_only_large_products_of_the_cpu_go_to_onednn(monkeypatch, chosen):
    monkeypatch.setattr(matmul, "onednn_is_better", lambda: True)
    for shape in (SMALL, LARGE):
        a, b = factors(shape)
        product(a, b)
        product(a, b, a[:, :, :1])
    assert chosen == ["none", "none", "bf16", "bf16"]
    monkeypatch.setattr(matmul, "onednn_is_better", lambda: False)
    product(*factors(LARGE))
    assert chosen[4:] == ["none"]
    elsewhere = (f.to("meta") for f in factors(LARGE))
    monkeypatch.setattr(matmul, "onednn_is_better", lambda: True)
    product(*elsewhere)
    assert chosen[5:] == ["none"]


@pytest.mark.parametrize("before", ["none", "ieee"])
def test_the_setting_is_put_back_after_an_error(before):
    SETTING.fp32_precision = before
    try:
        with pytest.raises(RuntimeError), matmul.onednn:
            torch.bmm(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
        assert SETTING.fp32_precision == before
    finally:
        SETTING.fp32_precision = "none"


def test_a_setting_that_is_inherited_stays_inherited():
    torch.backends.fp32_precision = "ieee"
    try:
        assert SETTING.fp32_precision == "ieee"
        with matmul.onednn:
            assert SETTING.fp32_precision == "bf16"
    finally:
        torch.backends.fp32_precision = "none"
    assert SETTING.fp32_precision == "none"


def test_threads_that_take_turns_leave_the_setting_as_it_was():
    begun, go_on = threading.Event(), threading.Event()

    def first():
        with matmul.onednn:
            begun.set()
            go_on.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait(10)
    with matmul.onednn:
        go_on.set()
        thread.join()
        assert SETTING.fp32_precision == "bf16"
    assert SETTING.fp32_precision == "none"


def test_a_cpu_that_would_round_to_bfloat16_is_found_out(monkeypatch):
    monkeypatch.setattr(matmul, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    plain = torch.bmm
    # Whatever this CPU has: products in float32, as of AMD's, and in bfloat16, as of Intel's AMX.
    monkeypatch.setattr(matmul, "onednn", torch.no_grad())
    assert matmul.onednn_is_better.__wrapped__()

    def rounded(a, b):
        if a.dtype != torch.float32:
            return plain(a, b)
        return plain(a.bfloat16().float(), b.bfloat16().float())

    monkeypatch.setattr(torch, "bmm", rounded)
    assert not matmul.onednn_is_better.__wrapped__()


@pytest.mark.parametrize(
    ("vendor", "capability"),
    [("GenuineIntel", "AVX512"), (None, "AVX512"), ("AuthenticAMD", "AVX2")],
)
def test_other_cpus_are_left_alone(monkeypatch, vendor, capability):
    monkeypatch.setattr(matmul, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not matmul.onednn_is_better.__wrapped__()


def test_the_vendor_is_read_where_linux_says_it(monkeypatch, tmp_path):
    cpu = tmp_path / "cpuinfo"
    monkeypatch.setattr(matmul, "_CPU", cpu)
    assert matmul._vendor() is None
    cpu.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n")
    assert matmul._vendor() == "AuthenticAMD"
    cpu.write_text("processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\n")
    assert matmul._vendor() is None


MANY_SHAPES = """
import random
import torch
from tune_steel import matmul

def megabytes():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

matmul._vendor = lambda: "AuthenticAMD"
torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
matmul.onednn_is_better()
draw = random.Random(0)
before = megabytes()
with matmul.onednn:
    for _ in range(300):
        n, m, k = (draw.randint(100, 500) for _ in range(3))
        torch.bmm(torch.zeros(1, n, m), torch.zeros(1, m, k))
print(megabytes() - before)
"""


def test_a_worker_does_not_keep_what_was_compiled_for_the_shapes_of_its_earlier_trials():
    def growth(**environment):
        printed = subprocess.run(
            [sys.executable, "-c", MANY_SHAPES],
            env={**os.environ, "MALLOC_ARENA_MAX": "1", **environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        return float(printed)

    unbounded = growth(**dict.fromkeys(matmul._CAPACITIES, "1024"))
    if unbounded < 60:
        pytest.skip("here oneDNN compiles no kernels for float32")
    assert growth() < unbounded / 2
