"""Every way of plugging in runs; the examples assert what they claim."""

import importlib

import pytest


def run(name):
    module = importlib.import_module(f"plugging_in.{name}")
    importlib.reload(module).main()  # registrations and module state anew


@pytest.mark.parametrize("name", ["one_pass", "partition_fn", "forward_graphs"])
def test_without_our_backend(name, capsys):
    run(name)
    assert capsys.readouterr().out.count("\n") == 2 + (name == "partition_fn")


@pytest.mark.parametrize("name", ["own_pass", "own_estimator"])
def test_inside_our_backend(name, interpreted, capsys):
    run(name)
    assert capsys.readouterr().out


def test_a_kernel_of_ones_own(interpreted, capsys):
    import torch

    module = importlib.import_module("plugging_in.own_kernel")
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert "my_gemm" in lines[0] and "linear_relu" in lines[1]
    torch._dynamo.reset()


def test_under_plain_inductor(capsys):
    run("inductor_hooks")
    assert "2 integer GEMMs" in capsys.readouterr().out
