"""The doctor's report on machines that it is not running on, and the command line around it."""

import json
from types import SimpleNamespace

import pytest
import torch

from qcompile import doctor
from qcompile.__main__ import main as command_line
from qcompile.kernels import cpu

GPUS = doctor._gpus  # of which a healthy machine has none


def problems(found):
    return " | ".join(f"{entry['problem']}: {entry['remedy']}" for entry in found["problems"])


@pytest.fixture
def healthy(monkeypatch):
    """A machine without a problem, whatever this one is."""
    release, triton = next(iter(doctor.TESTED_PAIRS.items()))
    monkeypatch.setattr(torch, "__version__", f"{release}.0+cpu")
    monkeypatch.setattr(doctor, "_version", {"triton": f"{triton}.1", "qtrain": "1.0"}.get)
    monkeypatch.setattr(doctor, "_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(doctor, "_registered", lambda: True)
    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    monkeypatch.setattr(doctor, "_other_devices", lambda: [])
    monkeypatch.setattr(cpu, "self_test", lambda name: None)
    monkeypatch.setattr(cpu, "kernel_name", lambda m, n, k: "onednn")
    return monkeypatch


def test_the_docstring_names_every_key(healthy):
    named = [line.split()[0] for line in doctor.__doc__.splitlines() if line.startswith("    ")]
    assert sorted(named) == sorted(doctor.report())


def test_a_healthy_machine_has_no_problem(healthy):
    found = doctor.report()
    assert found["problems"] == [] and found["int8"]
    assert found["versions"]["pair"] == "tested"


def test_this_machine_reports_what_the_kernels_do():
    found = doctor.report()
    assert found["cpu"]["in_use"] == cpu.kernel_name(256, 256, 256)
    assert found["cpu"]["products"] == {name: cpu.self_test(name) or "exact" for name in cpu.CANDIDATES}
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "attribute, value, expected",
    [
        ("_cpp_compiler", lambda: None, "no C++ compiler, so nothing compiles for the CPU: install g++"),
        ("_registered", lambda: False, 'torch does not know backend="qtrain" by itself: install the package'),
        ("_version", {"triton": "2.1.0"}.get, "Triton 2.1.0 was not tested: tested: torch 2.11 with 3.6"),
        ("_other_devices", lambda: ["mps"], "device mps is not supported"),
    ],
)
def test_a_lack_is_named_with_its_remedy(healthy, attribute, value, expected):
    healthy.setattr(doctor, attribute, value)
    found = doctor.report()
    assert len(found["problems"]) == 1 and expected in problems(found)


def test_a_torch_that_was_not_tested_is_said(healthy):
    healthy.setattr(torch, "__version__", "2.99.1")
    assert "torch 2.99.1 with Triton" in problems(doctor.report())


def test_no_triton_is_fine_without_a_gpu_and_a_problem_with_one(healthy):
    healthy.setattr(doctor, "_version", {}.get)
    assert doctor.report()["problems"] == []
    turing = {"name": "T", "capability": "7.5", "int8_tensor_cores": True}
    healthy.setattr(doctor, "_gpus", lambda: [turing])
    assert "there is a GPU but no Triton" in problems(doctor.report())


@pytest.mark.parametrize(
    "capability, cores", [((7, 0), False), ((7, 5), True), ((9, 0), True), ((10, 0), True)]
)
def test_int8_tensor_cores_begin_with_turing(monkeypatch, capability, cores):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    found = doctor.report()
    assert [gpu["int8_tensor_cores"] for gpu in found["gpus"]] == [cores]
    assert ("some GPU" in problems(found)) == (not cores)


@pytest.mark.parametrize("arch, cores", [("gfx942:sramecc+:xnack-", True), ("gfx1100", True), ("gfx1030", False)])
def test_amd_gpus_have_int8_matrix_cores_and_were_never_tried(healthy, monkeypatch, arch, cores, capsys):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName=arch))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    healthy.setattr(doctor, "_gpus", GPUS)
    found = doctor.report()
    (gpu,) = found["gpus"]
    assert gpu["int8_tensor_cores"] == cores and gpu["capability"] == arch.partition(":")[0]
    told = problems(found)
    assert "on none of which the kernels have run yet" in told and "stay in high precision" not in told
    assert ("no int8 matrix cores" in told) == (not cores)
    doctor.main()
    assert f"some GPU, {gpu['capability']}, {'' if cores else 'no '}int8 matrix cores" in capsys.readouterr().out


def test_a_rejected_product_is_named_with_what_its_self_test_found(healthy):
    healthy.setattr(cpu, "self_test", lambda name: "wrong product" if name == "onednn" else None)
    healthy.setattr(cpu, "kernel_name", lambda m, n, k: "portable")
    found = doctor.report()
    assert found["cpu"]["products"]["onednn"] == "wrong product"
    assert "'onednn' is not used: wrong product" in problems(found)
    assert "portable one: right, and no faster" in problems(found)


def test_cpu_information_is_read_from_the_kernel_s_list(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 amx_int8 avx512_vnni_not\n\n"
    )
    assert doctor._cpuinfo(path) == ("Some CPU", ["avx2", "amx_int8"])
    path.write_text("Features\t: fp asimddp i8mm\n")
    assert doctor._cpuinfo(path)[1] == ["asimddp", "i8mm"]
    assert doctor._cpuinfo(tmp_path / "absent")[1] == []


# The command line


def test_doctor_prints_text_or_json_and_succeeds(healthy, capsys):
    assert command_line(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "onednn" in text and "Integer matrix products run here." in text and "what to do" not in text
    assert command_line(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == doctor.report()


def test_doctor_fails_where_no_integer_product_runs(healthy, capsys):
    from qcompile.errors import KernelError

    def none(m, n, k):
        raise KernelError("none")

    healthy.setattr(cpu, "kernel_name", none)
    assert command_line(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "No integer matrix product runs here." in text and "every site stays in high precision" in text


@pytest.mark.parametrize("argv", [[], ["operate"], ["doctor", "--xml"]])
def test_wrong_arguments_give_status_2_and_name_the_commands(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line(argv)
    assert stopped.value.code == 2
    assert "usage: python -m qcompile" in capsys.readouterr().err
