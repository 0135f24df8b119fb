"""Training in two processes: the steps of one process, shared; stopped together; saved and resumed as by one."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_training import CONFIG, DROPOUT, SAVED, TEXT, curve, in_float64

from fastgpt import GPT
from fastgpt.testing import numerics
from fastgpt.training.processes import Processes, joined, local_device
from fastgpt.training.trainer import Trainer


def either_way(test):
    """For either way; slow for the first test that starts processes."""
    return pytest.mark.slow(pytest.mark.parametrize("parallel", ["ddp", "fsdp"])(test))


def start(*arguments) -> subprocess.Popen:
    """Two processes under torchrun, with one thread each, as alone in them: sums then have the same order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where parallel_training.py has written."""
    folder = tmp_path_factory.mktemp("parallel_training")
    process = start(Path(__file__).parent / "parallel_training.py", folder)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return folder


@pytest.fixture(scope="module")
def curves(folder):
    return json.loads((folder / "results.json").read_text())["curves"]


@pytest.fixture(scope="module")
def seen(folder):
    return json.loads((folder / "results.json").read_text())["seen"]


@functools.cache
def yardstick(**settings):
    """Of the curves of a run in one process, from simulated arithmetic: the same on every machine."""
    config = dataclasses.replace(CONFIG, **settings)
    accumulate = 2 if settings else 1

    def reference():
        return torch.tensor(curve(in_float64(Trainer(TEXT, config, accumulate=accumulate))), dtype=torch.float64).unbind(1)

    return numerics.simulate(reference, runs=numerics.RUNS)


def check_rounding(actual, first: int = 0, **settings):
    """What is one computation but for rounding, from step `first` on."""
    of_names = zip(("losses", "gradient norms"), torch.tensor(actual, dtype=torch.float64).unbind(1), yardstick(**settings))
    for name, values, (oracle, errors) in of_names:
        numerics.check(values, numerics.Yardstick(oracle[first:], errors[:, first:]), dtype=torch.float32, name=name)


@either_way
@pytest.mark.parametrize("parts", ["", " in two parts"])
def test_two_processes_have_the_loss_curve_of_one(curves, parallel, parts):
    check_rounding(curves[parallel + parts])


@pytest.mark.slow
@pytest.mark.parametrize("dropout", ["", ", dropout"])
def test_two_processes_sum_gradients_as_one_accumulates_them(curves, dropout):
    """Bit for bit: a sum of two has one order."""
    assert curves["ddp" + dropout] == curves["one in two parts" + dropout]


@pytest.mark.slow
def test_sharded_processes_draw_the_dropout_of_one_in_two_parts(curves):
    """Not bit for bit: the gradient's norm, by which it is clipped, is a sum over the shards."""
    same = "one in two parts, dropout"
    check_rounding(curves["fsdp, dropout"], dropout=DROPOUT)
    assert curves[same] != curves["one in two parts"]


def test_dropout_differs_between_processes():
    """The same masks on each would make two half batches less than one batch."""
    seeds = []
    for rank in (0, 1):
        trainer = Trainer(TEXT, CONFIG)
        trainer.processes = Processes(rank=rank, size=2)
        next(trainer.micro_batches())
        seeds.append(torch.initial_seed())
    assert seeds[0] != seeds[1]


@either_way
def test_resuming_is_exact_also_with_more_or_fewer_processes(curves, parallel):
    straight = curves[parallel][SAVED:]
    assert curves[f"{parallel}, then {parallel}"] == straight
    for resumed in (curves[f"one, then {parallel}"], curves[f"{parallel}, then one"]):
        if parallel == "ddp":
            assert resumed == straight
        else:
            check_rounding(resumed, SAVED)


@either_way
def test_what_is_saved_is_whole(folder, parallel):
    resumed = Trainer.resume(folder / parallel, TEXT)
    assert resumed.step == SAVED
    for name, weight in GPT.from_pretrained(folder / parallel).state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@either_way
def test_all_processes_share_the_evaluation(seen, parallel):
    """Of seven windows one process has four and the other three."""
    rounding = CONFIG.eval_windows * torch.finfo(torch.float64).eps  # of a sum of as many losses, in another order
    assert seen[parallel]["held-out loss"] == pytest.approx(seen[parallel]["held-out loss alone"], rel=rounding)
    assert seen[parallel]["held-out loss alone"] < 0.99 * seen["one"]["held-out loss at first"]


@either_way
def test_the_first_process_samples(seen, parallel):
    assert seen[parallel]["sample"] == seen["one"]["sample"]


@either_way
def test_two_shards_need_half_the_memory_each(seen, parallel):
    for held in ("weights", "moments from one", f"moments from {parallel}"):
        share = seen[parallel][f"share of {held}"]
        assert share == 1 if parallel == "ddp" else 0.49 < share < 0.51, held


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_after_the_same_step(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    settings = "--layers 1 --heads 2 --width 32 --context 16 --batch-size 4 --eval-interval 100000 --steps 100000".split()
    process = start("-m", "fastgpt", "train", "--text", text, "--out", out, "--parallel", "fsdp", *settings)
    progress = ""
    while "tokens/s" not in progress:
        piece = process.stderr.read(50)
        assert piece, progress
        progress += piece
    process.send_signal(signal.SIGINT)  # torchrun passes it on
    shown, _ = process.communicate(timeout=600)
    (stopped,) = re.findall(r"Stopped after step (\d+) of 100000; continue with --resume", shown)  # once, so by one process
    assert shown.count("held-out loss") == 2 and shown.count(" parameters; ") == 1
    assert "in each of 2 processes (fsdp)" in shown
    assert Trainer.resume(out, TEXT).step == int(stopped)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "training_state.pt",
    ]  # fmt: skip


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of 6 \(processes: 2, parts in each: 3\), got 8"):
        Trainer(TEXT, CONFIG, accumulate=3, processes=Processes(size=2, parallel="ddp"))


def test_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(None, torch.device("cpu")) as processes:
        assert processes == Processes(rank=0, size=1, parallel=None)
    with pytest.raises(ValueError, match="parallel: expected processes to be started by torchrun .* got 'fsdp'"):
        with joined("fsdp", torch.device("cpu")):
            pass
    with pytest.raises(ValueError, match="parallel: expected one of ddp, fsdp, got 'pipeline'"):
        with joined("pipeline", torch.device("cpu")):
            pass


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected an integer >= 0 in this environment variable of torchrun, got 'two'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: expected processes that can be joined .*: .* environment variable RANK expected"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "WORLD_SIZE: expected processes that can be joined .* 'one'"),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "WORLD_SIZE: expected .* 'x'"),
        (
            {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999999"},
            "WORLD_SIZE: expected .*port",
        ),
    ],
    ids=["size", "no rank", "rank", "port", "large port"],
)
def test_wrong_environments_of_torchrun_are_one_sentence(environment, sentence, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence), joined(None, torch.device("cpu")):
        pass


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_wrong_local_ranks_are_one_sentence(name, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv(name, "-1")
    with pytest.raises(
        ValueError, match=f"{name}: expected an integer >= 0 in this environment variable of torchrun, got '-1'"
    ):
        local_device("cuda:0")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device("cuda") == "cuda" and local_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_device("cuda") == "cuda:3" and local_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device: expected cuda, of which each process on a machine takes one, got 'cuda:1'"):
        local_device("cuda:1")
