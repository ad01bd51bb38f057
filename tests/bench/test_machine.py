"""What a run says of its machine."""

from types import SimpleNamespace

import torch

import atst_fast
from atst_fast.bench import machine, timing
from tests.bench.fake import Clock


def test_a_copy_without_git_is_known_by_its_files(monkeypatch):
    def no_git(*_):
        raise FileNotFoundError

    monkeypatch.setattr(machine, "_named", "")
    monkeypatch.setattr(machine, "_git", no_git)
    assert machine._commit() == {"id": f"files-{machine._hash()}", "dirty": False}
    machine.name_commit("abc")
    assert machine._commit() == {"id": "abc", "dirty": False}


def test_what_nvidia_smi_says(monkeypatch):
    said = "580.159.04, 1980, 1980, 3201, 3201, 700.00\n"
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assert machine.nvidia_smi()["driver_version"] == "580.159.04"
    assert machine.nvidia_smi()["clocks_max_mem"] == "3201"

    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine.nvidia_smi() == {}


def test_what_a_gpu_run_says_of_its_machine(monkeypatch):
    properties = SimpleNamespace(name="Some GPU", multi_processor_count=132, major=9, minor=0, L2_cache_size=1 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(timing, "Cuda", Clock)
    asked = []
    monkeypatch.setattr(machine, "nvidia_smi", lambda: {"driver_version": "580", "clocks_sm": str(len(asked))})
    monkeypatch.setattr(machine, "bandwidths", lambda *a: asked.append(a[1]) or {"copy_bytes_per_s": 4e12})
    monkeypatch.setattr(machine, "sgemm_rate", lambda n, device, median, *dtype: asked.append((device, *dtype)) or 1.0)
    says = machine.describe_gpu()
    assert says["device"]["name"] == "Some GPU"
    assert says["device"]["isa"] == "sm_90"
    assert says["device"]["clocks_sm"] == "3"  # read after the products, which keep the GPU from idling
    assert says["versions"]["driver"] == "580"
    assert asked == ["cuda", ("cuda",), ("cuda", torch.bfloat16)]


def test_rates_come_from_whoever_measures_them():
    bytes_of = {"copy_bytes_per_s": 8, "add_bytes_per_s": 12, "scale_bytes_per_s": 8}
    assert machine.bandwidths(1 << 10, median=lambda call: 1.0) == {k: n << 10 for k, n in bytes_of.items()}
    assert machine.sgemm_rate(16, median=lambda call: 2.0, dtype=torch.bfloat16) == 16**3


def test_an_installed_package_is_known_by_its_version(monkeypatch, tmp_path):
    """Whatever repository its environment lies in."""
    monkeypatch.setattr(machine, "_named", "")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine._commit() == {"id": f"version-{atst_fast.__version__}", "dirty": False}


def test_rates_are_measured_with_every_number_of_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "rates", lambda: {"sgemm_flops": torch.get_num_threads()})
    says = machine.describe({before, before + 1})
    assert says["rates"] == {"sgemm_flops": before}
    assert says["rates_of_threads"] == {str(before + 1): {"sgemm_flops": before + 1}}
