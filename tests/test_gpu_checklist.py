"""tests/benchmarks/gpu.py at toy size, and the computed table of docs/training.md."""

import itertools
import math
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch.backends.cuda import flash_sdp_enabled

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_attention  # noqa: E402
import gpu_steps  # noqa: E402
import memory  # noqa: E402
from gpu_plan import Plan, Result, SkippedError  # noqa: E402

PAGE = Path(__file__).parent.parent / "medgemma_clinical" / "docs" / "training.md"
NEEDS_CUDA = {"Gradients, cuDNN attention on", "Two processes"}


@pytest.fixture(scope="module")
def printed():
    """Return what the whole checklist prints; nothing of it has failed."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def rows_of(text):
    """Return state and figures of each step in the printed table."""
    rows = re.findall(r"^\| ([^|]+) \| (\w+), \d+ s \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == len({name for name, *_ in rows})
    return {name: (state, figures) for name, state, figures in rows}


def test_every_step_stands_in_the_table_and_none_fails(printed):
    rows = rows_of(printed)
    assert list(rows) == list(gpu.STEPS)
    skipped = {name for name, (state, _) in rows.items() if state == "skipped"}
    assert skipped <= NEEDS_CUDA
    assert skipped == NEEDS_CUDA or torch.cuda.is_available()
    assert all(state == "passed" for name, (state, _) in rows.items() if name not in skipped)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is skipped without a GPU")
def test_what_needs_a_gpu_says_so(printed):
    rows = rows_of(printed)
    assert {rows[name][1] for name in NEEDS_CUDA} == {"no GPU"}
    assert "Findings" not in printed


def test_the_steps_show_figures(printed):
    rows = rows_of(printed)
    assert "equal to the last bit" in rows["Stage 3 resumed"][1]
    assert "tokens a second" in rows["Stage 2, speed and memory"][1]
    assert re.search(r"8 reports of \d+ tokens", rows["Reports in a batch and one by one"][1])


def breaks(plan):
    sys.stdout.write("what it printed before\n")
    raise ValueError("something is wrong | here")


def exits(plan):
    raise SystemExit(0)


def dies(plan):
    os._exit(7)


def hangs(plan):
    time.sleep(60)
    return Result("")


def leaves(plan):
    raise SkippedError("no card")


def works(plan):
    return Result("1 MiB", ("larger than it should be",))


def test_a_failure_is_named_and_stops_no_other_step(monkeypatch, capsys):
    steps = {"A": breaks, "B": exits, "C": dies, "D": hangs, "E": leaves, "F": works}
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "LONGEST", 1.0)
    assert gpu.main(["--toy"]) == 1
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert [state for state, _ in rows.values()] == [*["failed"] * 4, "skipped", "passed"]
    assert rows["A"][1] == "ValueError: something is wrong / here"
    assert rows["C"][1] == "the process ended with 7"
    assert rows["D"][1] == "hangs: 1 s"
    assert rows["E"][1] == "no card"
    assert text.index("what it printed before") < text.index("Traceback") < text.index("| A |")
    assert text.endswith("Findings:\n- larger than it should be\n\nFailed: A, B, C, D\n")


def test_findings_alone_are_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STEPS", {"F": works})
    assert gpu.main(["--toy"]) == 0
    assert "Failed" not in capsys.readouterr().out


def test_the_parent_of_the_steps_leaves_the_card_alone():
    # A process that forks after CUDA began has children that cannot use it.
    program = (
        "import sys, torch\n"
        "def refuse(*_, **__): raise AssertionError('the card was asked')\n"
        "for name in ('_lazy_init', 'is_available', 'device_count', 'get_device_capability'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        f"sys.path.append({str(BENCHMARKS)!r})\n"
        "import gpu\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------- gpu_attention.py


def toy():
    return Plan(Path(), toy=True)


@pytest.fixture
def faulty(monkeypatch):
    """Let a fused attention multiply its result, and so its gradients, by a factor."""
    factor = [1.0]
    attend = torch.nn.functional.scaled_dot_product_attention

    def fused(*arguments, **more):
        return attend(*arguments, **more) * (factor[0] if flash_sdp_enabled() else 1.0)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(gpu_attention, "LENGTHS", (40,))
    return factor


@pytest.mark.parametrize(("factor", "said"), [(math.nan, "nan% apart"), (1.05, "5.0% apart")])
def test_wrong_gradients_of_the_programs_attention_are_a_failure(faulty, factor, said):
    assert "largest difference" in gpu_attention.gradients_without_cudnn(toy()).figures
    faulty[0] = factor
    with pytest.raises(AssertionError, match=said) as failure:
        gpu_attention.gradients_without_cudnn(toy())
    assert "Gemma-3-270M, 40 positions, attention alone" in str(failure.value)


def test_wrong_gradients_of_cudnn_are_findings(faulty, monkeypatch):
    monkeypatch.setattr(gpu_attention, "skip_without_gpu", lambda: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda _: None)
    assert not gpu_attention.gradients_with_cudnn(toy()).findings
    faulty[0] = math.nan
    findings = gpu_attention.gradients_with_cudnn(toy()).findings
    assert len([each for each in findings if "low logits: not finite" in each]) == 2
    assert all(each.startswith("cuDNN attention on: ") for each in findings)


def test_what_cudnn_cannot_do_is_a_finding(monkeypatch):
    def fails(_):
        raise RuntimeError("no valid execution plan")

    monkeypatch.setattr(gpu_attention, "skip_without_gpu", lambda: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda _: None)
    monkeypatch.setattr(gpu_attention, "compare_all", fails)
    (finding,) = gpu_attention.gradients_with_cudnn(toy()).findings
    assert "no valid execution plan" in finding


def test_a_machine_without_nvidia_smi_is_a_finding(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu, "on_gpu", lambda: True)
    for name in ("device_count", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**30))
    (finding,) = gpu.describe_machine(toy()).findings
    assert "nvidia-smi" in finding


def test_a_wrong_product_of_packed_weights_is_a_failure(tmp_path, monkeypatch):
    plan, product = Plan(tmp_path, toy=True), bitsandbytes.matmul_4bit
    gpu_steps.write_models(plan)
    gpu_attention.compare_products(plan)

    def wrong(given, *rest, **more):
        return product(given, *rest, **more) * (1.02 if len(given) == 300 else 1.0)

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", wrong)
    with pytest.raises(AssertionError) as failure:
        gpu_attention.compare_products(plan)
    assert set(re.findall(r"(\d+) rows", str(failure.value))) == {"300"}


def test_one_key_head_is_read_by_a_stride_of_zero():
    # As in the model; what is repeated without a copy is what the kernels have got wrong.
    assert gpu_attention.repeat_kv(torch.zeros(2, 1, 5, 8), 4).stride(1) == 0


# --------------------------------------------------------------------------- memory.py


@pytest.fixture(scope="module")
def small():
    config = memory.text_config(2, hidden_size=64, intermediate_size=128, vocab_size=512)
    return memory.build(torch.bfloat16, config)


@pytest.mark.parametrize("padded", [True, False])
def test_what_lives_behind_forward_is_what_autograd_keeps(small, padded):
    own = {p.untyped_storage()._cdata for p in (*small.parameters(), *small.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = memory.measure_step(small, 3, 40, padded=padded)
    saved = sum(storage.nbytes() for storage in kept.values())
    results = 3 * (64 * (2 + 4) + 40 * 64 * 2)  # last hidden states, those that are read
    assert saved <= found.kept <= saved + results
    assert found.peak > found.kept


def test_every_further_layer_adds_the_same():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
    models = [memory.build(torch.float32, memory.text_config(n, **sizes)) for n in (4, 5, 6, 7)]
    kept = [memory.measure_step(model, 2, 30, padded=True).kept for model in models]
    assert len({b - a for a, b in itertools.pairwise(kept)}) == 1


def test_float32_without_padding_keeps_one_matrix_a_head_and_layer():
    config = memory.text_config(2, hidden_size=64, intermediate_size=128, vocab_size=512)
    model = memory.build(torch.float32, config)
    kept = {n: memory.measure_step(model, 1, n, padded=False).kept for n in (100, 200, 300)}
    # Linear terms go in the second difference; what stays is layers x heads x 4 bytes x S^2.
    assert kept[300] - 2 * kept[200] + kept[100] == 2 * 8 * 4 * (300**2 - 2 * 200**2 + 100**2)


@pytest.mark.parametrize("padded", [True, False])
def test_eager_attention_keeps_a_matrix_in_float32_and_in_bfloat16(padded):
    config = memory.text_config(2, hidden_size=64, intermediate_size=128, vocab_size=512)
    model = memory.build(torch.bfloat16, config, "eager")
    kept = {n: memory.measure_step(model, 1, n, padded=padded).kept for n in (100, 200, 300)}
    squares = 300**2 - 2 * 200**2 + 100**2
    assert kept[300] - 2 * kept[200] + kept[100] == 2 * 8 * (4 + 2) * squares


def test_the_page_shows_rows_of_the_computed_table():
    page = PAGE.read_text(encoding="utf-8")
    for package, stated in re.findall(r"(torch|transformers|peft) (\d+\.\d+)[,)]", page):
        if not version(package).startswith(f"{stated}."):
            pytest.skip(f"the page was computed with {package} {stated}")
    head, *rows = re.findall(r"^\| (?:Card|T4|L4|A100)\b.+ \|$", page, re.MULTILINE)
    computed = memory.tables()[-1].splitlines()
    assert head == computed[0]
    assert len(rows) == 7
    assert {*rows} <= {*computed}
