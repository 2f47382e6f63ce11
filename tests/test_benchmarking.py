"""Laws of benchmarking.py. Clocks are faked where the law is about bookkeeping, so that no test depends on load."""

import argparse
import platform
import shutil
import statistics
import subprocess
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmarking
from benchmarking import Timing, choose_device, compare, default_device, measure, peak_memory
from command_line import positive_int

MIB = 2**20
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class FakeClock:
    """Stands in for `time`: it moves only when a timed function says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def taking(self, *durations):
        """A function whose successive calls take `durations` seconds, the last one for ever after."""
        remaining = list(durations)

        def fn():
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return fn


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(benchmarking, "time", fake)
    return fake


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_device_nobody_named_is_the_gpu_where_there_is_one(monkeypatch, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device(None) == default_device() == torch.device("cuda" if has_gpu else "cpu")


def test_a_named_device_is_taken():
    assert choose_device("cpu") == torch.device("cpu")


@gpu
def test_a_named_gpu_is_taken():
    assert choose_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cuda:", "cuda:99", "cpu cuda", "meta", "mps", "xpu", "hpu:1"])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ValueError, match=r"^--device .*cannot be used here \(.+\); use cpu, or cuda") as error:
        choose_device(name)
    assert "\n" not in str(error.value) and f"--device {name} " in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(ValueError, match="--device cuda cannot be used here"):
        choose_device("cuda")


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("12", 12), (" 3 ", 3)])
def test_a_positive_int_is_read(text, number):
    assert positive_int(text) == number


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "2e3", "", "many", "nan", "1 2"])
def test_what_is_no_positive_int_is_one_sentence_of_argparse(text, capsys):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--threads", type=positive_int)
    with pytest.raises(argparse.ArgumentError) as error:
        parser.parse_args([f"--threads={text}"])
    assert str(error.value) == f"argument --threads: expected a whole number, 1 or more; got {text!r}"


def test_percentiles_are_those_of_the_timed_runs(clock):
    durations = [5.0, 1.0, 4.0, 2.0, 3.0, 10.0, 6.0, 9.0, 7.0, 8.0, 11.0]
    timing = measure(clock.taking(*durations), device="cpu", warmup=0, min_runs=11, min_seconds=0, memory=False)
    deciles = statistics.quantiles(durations, n=10, method="inclusive")
    assert (timing.median, timing.p10, timing.p90) == pytest.approx(
        (statistics.median(durations), deciles[0], deciles[-1])
    )
    assert timing.runs == 11 and timing.ms == pytest.approx(6000) and timing.peak_bytes is None


def test_warm_up_is_not_timed(clock):
    timing = measure(clock.taking(100, 50, 1), device="cpu", warmup=2, memory=False)
    assert (timing.p10, timing.p90) == (1, 1)


def test_runs_go_on_until_both_minima_are_met(clock):
    assert measure(clock.taking(0.25), device="cpu", min_runs=3, min_seconds=2, memory=False).runs == 8
    assert measure(clock.taking(0.25), device="cpu", min_runs=20, min_seconds=2, memory=False).runs == 20


def test_candidates_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = compare(functions, device="cpu", warmup=1, min_runs=4, min_seconds=0, memory=False)
    assert "".join(calls) == "abc" * 5
    assert list(timings) == ["a", "b", "c"] and {timing.runs for timing in timings.values()} == {4}


def test_drift_of_the_machine_cancels_in_a_ratio(clock):
    """Each round the machine is half as fast; timing one after the other would call the second candidate 32x slower."""
    slowing = [2.0**i for i in range(5)]
    functions = {"base": clock.taking(*slowing), "double": clock.taking(*(2 * s for s in slowing))}
    timings = compare(functions, device="cpu", warmup=0, min_runs=5, min_seconds=0, memory=False)
    assert timings["base"].speedup_over(timings["double"]) == 2
    assert timings["double"].speedup_over(timings["base"]) == 0.5


def test_a_real_clock_sees_real_time():
    import time

    assert measure(lambda: time.sleep(0.01), device="cpu", min_runs=3, min_seconds=0).median >= 0.01


def test_a_timing_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Timing(1.0, 1.0, 1.0, runs=1).median = 2.0


def test_settings_that_measure_nothing_are_errors():
    with pytest.raises(ValueError, match="functions is empty"):
        compare({}, device="cpu")
    with pytest.raises(ValueError, match="min_runs is 0"):
        measure(int, device="cpu", min_runs=0)
    with pytest.raises(ValueError, match="device is meta"):
        measure(int, device="meta")


def test_an_error_of_a_candidate_is_passed_on():
    def out_of_memory():
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        compare({"fine": int, "too large": out_of_memory}, device="cpu")


def test_peak_memory_is_the_most_that_lives_at_once():
    def fn():
        a = torch.empty(3 * MIB, dtype=torch.uint8)
        b = torch.empty(2 * MIB, dtype=torch.uint8)  # 5 MiB live: the peak
        del a
        c = torch.empty(MIB, dtype=torch.uint8)  # 3 MiB live
        return b, c

    assert peak_memory(fn, "cpu") == 5 * MIB
    assert measure(fn, device="cpu", min_runs=1, min_seconds=0).peak_bytes == 5 * MIB


def test_peak_memory_leaves_out_what_was_live_before():
    weights = torch.ones(8 * MIB, dtype=torch.uint8)
    assert peak_memory(lambda: weights.bitwise_not_(), "cpu") == 0
    assert peak_memory(lambda: weights[:MIB] + weights[MIB : 2 * MIB], "cpu") == MIB


def test_peak_memory_sees_temporaries_inside_an_operation():
    """log_softmax of a transposed input copies it first: an allocation that no tensor in sight stands for."""
    x = torch.ones(1024, 256)
    assert peak_memory(lambda: x.T.log_softmax(-1), "cpu") >= 2 * x.nbytes


def test_peak_memory_counts_the_scores_that_fused_attention_never_stores():
    q = torch.ones(1, 2, 512, 32)
    scores = 2 * 512 * 512 * 4  # bytes of float32[H, T, T]

    def naive():
        return (q @ q.mT).softmax(-1) @ q

    fused = peak_memory(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), "cpu")
    assert peak_memory(naive, "cpu") >= 2 * scores > 4 * fused


def test_peak_memory_includes_the_backward_pass():
    weight = torch.ones(256, 1024, requires_grad=True)

    def step():
        weight.grad = None
        (weight.sin() * 2).sum().backward()

    step()
    assert peak_memory(step, "cpu") >= weight.nbytes  # the old gradient goes, a new one and an activation come


def test_measuring_says_nothing(capfd):
    peak_memory(lambda: torch.ones(3), "cpu")
    assert capfd.readouterr() == ("", "")


def test_ceilings_are_the_work_over_the_time(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(benchmarking, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert benchmarking.matmul_ceiling("cpu", torch.float64, size=8) == 8 * 8 * (8 + 8)  # a multiply and an add each
    assert benchmarking.matmul_ceiling("cpu") == 2 * 256**3  # one second a product: no need to double the size
    assert benchmarking.copy_ceiling("cpu", num_bytes=1000) == 2000  # read and written


def test_the_matmul_ceiling_is_above_a_product_too_small_to_reach_it():
    assert benchmarking.matmul_ceiling("cpu") > benchmarking.matmul_ceiling("cpu", size=4)


def test_the_same_seed_draws_the_same_numbers():
    def draws(seed):
        generator = benchmarking.seed_everything(seed)
        return torch.rand(3).tolist(), torch.rand(3, generator=generator).tolist()

    assert draws(7) == draws(7) != draws(8)
    assert draws(7)[1] == torch.rand(3, generator=torch.Generator().manual_seed(7)).tolist()


def test_the_environment_says_what_ran_and_not_where():
    record = benchmarking.environment("cpu")
    assert set(record) == {"device", "cpu", "threads", "torch", "python", "commit", "date"}
    assert record["device"] == "cpu" and record["torch"] == torch.__version__
    text = " ".join(map(str, record.values()))
    for private in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert not private or private not in text


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_dirty_when_code_changed_and_not_when_results_did(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert benchmarking.commit_hash(tmp_path) is None  # no repository
    git("init")
    assert benchmarking.commit_hash(tmp_path) is None  # no commit
    (tmp_path / "model.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "speed.json").write_text("{}")
    assert benchmarking.commit_hash(tmp_path) == head
    assert benchmarking.commit_hash(tmp_path / "results") is None  # a folder inside somebody else's repository
    (tmp_path / "model.py").write_text("a = 2\n")
    assert benchmarking.commit_hash(tmp_path) == f"{head}-dirty"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert benchmarking.commit_hash(tmp_path) is None


def test_the_default_device_is_cuda_exactly_where_there_is_one():
    assert benchmarking.default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@gpu
def test_on_cuda_time_covers_the_kernel_and_memory_its_result():
    x = torch.randn(4096, 4096, device="cuda")
    timing = measure(lambda: x @ x, device="cuda")
    assert (
        timing.median > 2 * 4096**3 / 2e15
    )  # no GPU does 2 PFLOP/s in float32: an unsynchronised launch would seem to
    assert timing.peak_bytes == x.nbytes
