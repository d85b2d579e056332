"""Devices, kernels, memory, seeds, and launches that are refused."""

import importlib
import os
import platform
import sys
from datetime import timedelta

import pytest
import torch
import torch._inductor.config
from threadpoolctl import threadpool_info

import medgemma_clinical
import medgemma_trainer as trainer
from medgemma_clinical import distributed
from medgemma_clinical.commands import demo
from medgemma_clinical.distributed import SHARDING, derived_seed, exact_kernels, few_threads
from medgemma_clinical.files import InputError

COMMANDS = (
    *("--trajectory_only", "--dry_run", "--ablation", "--seeds 2"),
    "predict --checkpoint x --predictions y.csv --data_path z.csv",
)


def refused(words, text, capsys):
    assert trainer.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error


def test_the_cpu_of_a_machine_with_a_gpu_is_refused_unless_wanted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "GPUS", "nvidia[0-9]*")
    distributed.check_gpu()
    (tmp_path / "nvidia3").touch()
    for words in COMMANDS:
        refused(words, "CUDA_VISIBLE_DEVICES=", capsys)
    monkeypatch.setattr(demo, "stages", lambda args: {})
    assert trainer.main(["demo"]) == 0
    refused("compare none", "compare", capsys)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        distributed.check_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(InputError):
        distributed.check_gpu()
    monkeypatch.setattr(torch.version, "cuda", None)  # torch for CPUs
    distributed.check_gpu()


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nlaunch"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError("CUDA driver error: device not ready"), "PYTORCH_ALLOC_CONF="),
        (RuntimeError("CUDA driver error: unknown error"), "PYTORCH_ALLOC_CONF="),
        (torch.AcceleratorError(NO_KERNEL), "Tesla V100"),
        (torch.AcceleratorError("CUDA error: out of memory"), None),
    ],
    ids=str,
)
def test_a_gpu_that_fails_at_its_first_use_is_refused_in_one_line(
    error, shown, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    if shown is None:  # what needs the GPU says so
        distributed.check_gpu()
        return
    for words in COMMANDS:
        refused(words, shown, capsys)
    with pytest.raises(InputError, match=shown):
        trainer.fit_trajectory("x.csv")


def test_a_device_without_double_precision_is_refused(monkeypatch):
    """As Apple's GPUs are."""
    empty = torch.empty

    def without_double(*size, dtype=None, **options):
        if dtype is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        return empty(*size, dtype=dtype, **options)

    assert distributed.find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch, "empty", without_double)
    with pytest.raises(InputError, match="cpu"):
        distributed.find_device("cpu")


@pytest.mark.parametrize(
    ("release", "given", "found"),
    [
        ("6.8.0-generic", {}, "expandable_segments:True"),
        ("5.15.167.4-microsoft-standard-WSL2", {}, None),
        ("4.4.0-19041-Microsoft", {}, None),
        ("6.8.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
        ("6.8.0-generic", {"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ("5.15-microsoft", {"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
    ],
)
def test_segments_expand_but_under_wsl_and_where_the_user_decides(
    release, given, found, monkeypatch
):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "release", lambda: release)
    importlib.reload(medgemma_clinical)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == found


@pytest.mark.slow
def test_compiled_layers_without_a_compiler_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-compiler"))
    refused("--compile_layers --data_path no.csv", "--compile_layers", capsys)
    with pytest.raises(InputError, match="--compile_layers"):
        trainer.fit_generative("no.csv", compile_layers=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_exact_kernels_are_on_within_the_block_alone(deterministic):
    def kernels():
        precision = torch.get_float32_matmul_precision()
        cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
        return [precision, cudnn_attention, torch.are_deterministic_algorithms_enabled()]

    @exact_kernels(deterministic=deterministic)
    def work():
        with exact_kernels():
            pass
        assert kernels() == ["highest", False, deterministic]
        raise ZeroDivisionError

    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_cudnn_sdp(True)  # whatever a test before has left
    with pytest.raises(ZeroDivisionError):
        work()
    assert kernels() == ["medium", True, False]
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("given", "threads"),
    [(None, 1), ("", 1), ("many", 1), ("0", 1), ("1", 1), ("3", 3), ("3,2", 3)],
)
def test_stage_1_computes_with_one_thread_unless_the_user_says_how_many(
    given, threads, monkeypatch
):
    def used():
        return torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())

    def work(**stage):
        with few_threads(**stage):
            seen.append(used())
            raise ZeroDivisionError

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    torch.set_num_threads(2)
    try:
        before, seen = used(), []
        for stage in ({}, {"stage1": False}):
            with pytest.raises(ZeroDivisionError):
                work(**stage)
        assert {*seen[0]} == {threads}
        assert seen[1] == used() == before
    finally:
        torch.set_num_threads(1)


def test_processes_wait_two_hours_for_the_first_and_draw_from_seeds_of_their_own(monkeypatch):
    monkeypatch.setattr(distributed, "PartialState", lambda **options: options)
    assert distributed.processes.__wrapped__()["timeout"] == timedelta(hours=2)
    seeds = [derived_seed(seed, number) for seed in range(50) for number in range(5)]
    assert seeds[::5] == list(range(50)), "the first has the run's own"
    assert len(set(seeds)) == len(seeds)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak")
def test_a_new_measurement_forgets_the_peak_before():
    block = [b"1" * 200 * 2**20]
    block.append(block)  # as models that know each other: freed by the collector alone
    high = distributed.peak_mib()
    del block
    distributed.reset_peak_memory()
    assert distributed.peak_mib() < high - 150


@pytest.mark.parametrize(("variable", "way"), SHARDING.items())
def test_every_command_refuses_to_cut_a_model(variable, way, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "false")
    distributed.check_launch()
    monkeypatch.setenv(variable, "True")
    for words in ("demo", *COMMANDS):
        refused(words, way, capsys)
    with pytest.raises(InputError, match=way):
        trainer.fit_trajectory("x.csv")
