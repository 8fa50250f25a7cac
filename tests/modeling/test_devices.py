"""Memory: what a container may take, and a heap that keeps what was freed."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from modeling import devices
from tests.conftest import ROOT

MIB = 2**20
# How many pages come anew when 64 MiB are taken and freed again and again
FAULTS = """
import resource, torch
from modeling import devices
if {is_kept}:
    devices.keep_heap(torch.device("cpu"))
def work():
    for _ in range(20):
        torch.ones(16 * 2**20)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def container(folder, limit, current, cached):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    files = f"file {cached + 9}\ninactive_file {cached - 5}\nactive_file 5\nshmem 9\n"
    (folder / "memory.stat").write_text(f"anon {current - cached}\n{files}")
    return folder


def test_a_container_may_take_no_more_than_its_limit(tmp_path):
    group = container(tmp_path, limit=300 * MIB, current=200 * MIB, cached=50 * MIB)
    assert devices.available_bytes(group) == 150 * MIB  # what is cached makes room
    assert devices.available_bytes(container(tmp_path, limit=MIB, current=2 * MIB, cached=9)) == 0


def test_a_container_without_a_limit_or_with_one_beyond_the_machine_has_what_the_machine_has(tmp_path):
    for limit in ("max", 2**60):
        group = container(tmp_path, limit, current=200 * MIB, cached=MIB)
        assert devices.available_bytes(group) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("of another form\n")
    assert devices.available_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert devices.available_bytes(tmp_path / "none") == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.skipif(not devices._glibc("mallopt"), reason="no glibc here, whose heap could be kept")
def test_a_kept_heap_serves_large_tensors_again_without_new_pages():
    def faults(is_kept):
        script = FAULTS.format(is_kept=is_kept)
        return int(subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True).stdout)

    pages = 20 * 64 * MIB // os.sysconf("SC_PAGE_SIZE")
    assert faults(is_kept=False) > pages / 2
    assert faults(is_kept=True) < pages / 20


@pytest.mark.skipif(not devices._glibc("malloc_trim"), reason="no glibc here, whose heap could be trimmed")
@pytest.mark.parametrize(("left", "is_trimmed"), [(0.5, True), (1.5, True), (3, False)])
def test_the_heap_is_trimmed_where_memory_is_scarce(monkeypatch, left, is_trimmed):
    trimmed = []
    held = psutil.Process().memory_info().rss
    monkeypatch.setattr(devices, "available_bytes", lambda: int(left * held))
    monkeypatch.setattr(devices, "trim_heap", lambda: trimmed.append(True))
    devices.trim_heap_if_scarce()
    assert bool(trimmed) == is_trimmed


def test_a_gpus_process_leaves_the_heap_alone(monkeypatch):
    monkeypatch.setattr(devices, "_glibc", lambda function: pytest.fail("asked for the heap"))
    devices.keep_heap(torch.device("cuda"))


@pytest.mark.parametrize(
    "capabilities, precision",
    [({"avx2": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"bf16": True}, "bf16")],
)
def test_auto_is_bf16_on_a_processor_that_computes_in_it(capabilities, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert devices.fastest_precision(torch.device("cpu")) == precision


@pytest.mark.parametrize("capability, precision", [((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")])
def test_auto_is_bf16_on_cards_since_ampere(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert devices.fastest_precision(torch.device("cuda")) == precision


@pytest.mark.parametrize("device, is_on", [("cuda", True), ("cpu", False)])
def test_tf32_is_allowed_on_cuda_inside_the_block_only(device, is_on):
    settings = torch.backends.cuda.matmul
    assert not settings.allow_tf32
    with pytest.raises(KeyError), devices.tf32(torch.device(device)):
        assert settings.allow_tf32 == is_on
        raise KeyError
    assert not settings.allow_tf32
