"""Sweeps: complete, resumed, killed, failing, refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_cases import analytic_macs, numbers, plain_conv_net, tiny_config, write_folders, write_parquet
from cases import conv_net
from safetensors.torch import save_file

from tp_twoaxis import TwoAxisError
from tp_twoaxis.benchmark import LocalEngine, NetworkConfig, cross, run_benchmark, trial, trial_runner
from tp_twoaxis.benchmark.methods import Method
from tp_twoaxis.benchmark.report import make_report
from tp_twoaxis.benchmark.results import claim_folder, open_folder
from tp_twoaxis.benchmark.shared_work import LoadedNetwork
from tp_twoaxis.benchmark.sweep_images import rows_from_text, split_rows
from tp_twoaxis.benchmark.trial_runner import chunks
from tp_twoaxis.importance import pruning_state

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("bench") / "images")


@pytest.fixture(scope="module")
def config(images):
    return tiny_config(images)


@pytest.fixture(scope="module")
def complete(config, tmp_path_factory):
    """The sweep run without interruption, in this process."""
    folder = tmp_path_factory.mktemp("complete")
    summary = run_benchmark(config, folder / "out", progress=False)
    assert (summary.total, summary.ran, summary.skipped, summary.failed) == (12, 12, 0, [])
    records = summary.folder.read_all()
    assert records[0]["accuracy"]["dense"] > 0.7
    assert len({record["accuracy"]["pruned"] for record in records}) > 4  # there is something to compare
    return summary.folder


def test_a_trial_records_what_made_it(complete, config):
    record = complete.read(config.trials()[0])
    assert record["status"] == "ok"
    assert (record["seed"], record["keep"], record["method"]["name"]) == (42, 0.7, "capture+bn")
    assert record["achieved"] == record["macs"]["pruned"] / record["macs"]["dense"] == pytest.approx(0.7, abs=0.02)
    assert all(record[name]["pruned"] < record[name]["dense"] for name in ("host_macs", "thop_macs", "params"))
    assert record["images"] == {
        "evaluated": 40, "evaluated_on": "test", "calibration": 24, "selection": 10, "training": 0
    }  # fmt: skip
    rows = rows_from_text(record["calibration_rows"])
    assert torch.equal(rows, split_rows(60, config.data, 42)[0])
    assert all(other["calibration_rows"] == record["calibration_rows"] for other in complete.read_all())
    assert {"statistics", "score", "plan", "remove", "repair", "evaluate", "total"} <= set(record["seconds"])
    made = record["provenance"]
    assert made["versions"]["torch"] == version("torch")
    assert {"commit", "machine", "command", "date"} <= set(made)
    assert 0 <= record["accuracy"]["pruned"] <= 1
    assert sum(kept for kept, _ in record["kept_channels"].values()) > 0


def test_finished_trials_are_skipped(complete, config, monkeypatch):
    monkeypatch.setattr(trial_runner, "run_trial", None)
    times = {path: path.stat().st_mtime_ns for path in complete.path.rglob("*.json")}
    summary = run_benchmark(config, complete.path, progress=False)
    assert (summary.ran, summary.skipped) == (0, 12)
    assert times == {path: path.stat().st_mtime_ns for path in complete.path.rglob("*.json")}


def test_order_does_not_matter(complete, config, tmp_path):
    """Each trial draws its own numbers: a sweep of one trial gives what the whole sweep gave."""
    last = config.trials()[-1]
    alone = dataclasses.replace(config, methods=(last.method,), keep=(last.keep,), seeds=(last.seed,))
    summary = run_benchmark(alone, tmp_path / "out", progress=False)
    assert numbers(summary.folder) == [numbers(complete)[-1]]


def test_parts_make_a_whole(complete, config, tmp_path):
    for part in ((2, 2), (1, 2)):
        assert run_benchmark(config, tmp_path / "out", part=part, progress=False).ran == 6
    assert numbers(open_folder(tmp_path / "out")) == numbers(complete)
    with pytest.raises(TwoAxisError, match="k of n"):
        run_benchmark(config, tmp_path / "out", part=(3, 2), progress=False)


def test_a_pool_gives_the_same_numbers(complete, config, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    summary = run_benchmark(config, tmp_path / "out", engine=LocalEngine(2), progress=False)
    assert summary.ran == 12
    assert numbers(summary.folder) == numbers(complete)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 12


def start(config_file, out, *options):
    command = [sys.executable, "-m", "tp_twoaxis", "bench", "--config", config_file, "--out", out, "--json", *options]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children(pid):
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def long(images, tmp_path_factory):
    """A sweep of more trials than can be run between two looks, uninterrupted."""
    config = tiny_config(images, keep=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4))
    return run_benchmark(config, tmp_path_factory.mktemp("long") / "out", progress=False).folder


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again(workers, long, tmp_path):
    config = long.config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    process = start(tmp_path / "config.json", tmp_path / "out", "--workers", workers)
    cells = tmp_path / "out" / "cells"
    deadline = time.monotonic() + 60
    while len(list(cells.glob("*.json"))) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers_of_it = children(process.pid) if Path("/proc").is_dir() else []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # those that are there are whole
    before = {path.name: json.loads(path.read_text())["status"] for path in cells.glob("*.json")}
    assert 3 <= len(before) < 36
    while not all(map(gone, workers_of_it)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    after_death = len(list(cells.glob("*.json")))
    again = run_benchmark(config, tmp_path / "out", progress=False)
    assert again.skipped == after_death
    assert again.ran == 36 - after_death
    assert numbers(again.folder) == numbers(long)
    resumed, uninterrupted = (make_report(folder.path) for folder in (again.folder, long))
    assert resumed.summary.equals(uninterrupted.summary)
    assert resumed.auc.table.equals(uninterrupted.auc.table)
    assert resumed.wins.equals(uninterrupted.wins)


def test_a_full_disk_leaves_whole_trials_only(config, tmp_path, monkeypatch, complete):
    folder = claim_folder(tmp_path / "out", config)
    real, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TwoAxisError, match="No space left"):
        run_benchmark(config, folder.path, progress=False)
    monkeypatch.setattr(os, "fsync", real)
    left = list((folder.path / "cells").iterdir())
    assert len(left) == 2
    assert all(json.loads(path.read_text())["status"] == "ok" for path in left)
    assert run_benchmark(config, folder.path, progress=False).skipped == 2
    assert numbers(folder) == numbers(complete)


def test_an_interrupted_write_leaves_no_half_trial(config, tmp_path, monkeypatch):
    folder = claim_folder(tmp_path / "out", config)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(config, folder.path, progress=False)
    assert list((folder.path / "cells").iterdir()) == []
    # what a kill in the middle of a write leaves has another name, and is not read
    first = config.trials()[0]
    (folder.path / "cells" / f".{first.file_name}.x1y2z3").write_text('{"format": "tp-tw')
    assert folder.read(first) is None
    assert folder.read_all() == []


def test_failing_trials_are_recorded_and_the_sweep_goes_on(images, tmp_path, monkeypatch):
    methods = (Method("bench_cases:broken"), Method("l2"), Method("bench_cases:own_score"))
    config = tiny_config(images, methods=methods, keep=(0.7, 0.001))
    summary = run_benchmark(config, tmp_path / "out", progress=False)
    assert (summary.total, summary.ran) == (12, 12)
    assert len(summary.failed) == 4 + 2 + 2  # the broken one, and a target that nobody reaches
    records = {record["key"]: record for record in summary.folder.read_all()}
    error = records["net|42|bench_cases:broken+bn|0.7"]["error"]
    assert (error["type"], error["message"]) == ("RuntimeError", "this criterion never works")
    assert any("bench_cases.py" in line for line in error["traceback"])
    assert records["net|42|l2+bn|0.001"]["error"]["type"] == "UnreachableTargetError"
    assert records["net|42|l2+bn|0.7"]["status"] == records["net|123|bench_cases:own_score+bn|0.7"]["status"] == "ok"
    report = make_report(tmp_path / "out")
    assert len(report.failures) == 8
    assert "8 trials failed" in report.notes
    assert report.failures.error[0] == "RuntimeError: this criterion never works"
    assert run_benchmark(config, tmp_path / "out", progress=False).ran == 0
    monkeypatch.setattr("bench_cases.broken", lambda seed: __import__("bench_cases").by_seed(seed))
    again = run_benchmark(config, tmp_path / "out", retry_failed=True, progress=False)
    assert again.ran == 8
    assert len(again.failed) == 6


def test_results_of_another_config_are_refused(complete, config, tmp_path):
    longer = dataclasses.replace(config, keep=(0.7, 0.5, 0.4))
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, calibration_images=23))
    before = numbers(complete)
    with pytest.raises(TwoAxisError, match=r"differs in keep.*or extend"):
        run_benchmark(longer, complete.path, progress=False)
    for extend in (False, True):
        with pytest.raises(TwoAxisError, match="differs in data"):
            run_benchmark(other, complete.path, extend=extend, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(TwoAxisError, match="empty folder or one of results"):
            run_benchmark(config, path, progress=False)
    assert numbers(complete) == before
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".config.json.x1y2").write_text('{"netw')
    assert claim_folder(tmp_path / "killed", config).config == config


def test_trials_of_another_config_are_refused(complete, config, tmp_path):
    other = dataclasses.replace(config, tolerance=0.02)
    folder, first = claim_folder(tmp_path / "out", other), config.trials()[0]
    folder.file(first).write_bytes(complete.file(first).read_bytes())
    with pytest.raises(TwoAxisError, match="one of another"):
        run_benchmark(other, folder.path, progress=False)
    for text, message in (("{", "delete it"), ("{}", "remove it")):
        folder.file(first).write_text(text)
        with pytest.raises(TwoAxisError, match=message):
            make_report(folder.path)


def test_a_folder_can_be_extended(config, tmp_path):
    small = dataclasses.replace(config, seeds=(42,), keep=(0.7,), methods=(Method("l2"),))
    larger = dataclasses.replace(small, methods=(Method("l2"), Method("random")))
    run_benchmark(small, tmp_path / "out", progress=False)
    summary = run_benchmark(larger, tmp_path / "out", extend=True, progress=False)
    assert (summary.ran, summary.skipped) == (1, 1)
    assert open_folder(tmp_path / "out").config == larger
    with pytest.raises(TwoAxisError, match="differs in methods"):
        run_benchmark(small, tmp_path / "out", progress=False)


def test_wrong_inputs_fail_before_a_folder_is_made(config, tmp_path):
    lost = dataclasses.replace(config, networks=(NetworkConfig("net", "cases:conv_net", str(tmp_path / "no")),))
    with pytest.raises(TwoAxisError):
        run_benchmark(lost, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TwoAxisError, match="at least 1"):
        LocalEngine(0)


def test_fine_tuning_gets_its_budget(images, tmp_path, monkeypatch):
    calls = []

    def finetune(model, loader, *, epochs, max_batches, lr, amp, seed, progress):
        calls.append((epochs, max_batches, lr, seed, progress, len(list(loader))))
        with torch.no_grad():
            model.fc.bias.zero_()
            model.fc.weight.zero_()
            model.fc.bias[2] = 1.0
        return SimpleNamespace(batches=7, losses=[2.0, 1.0])

    monkeypatch.setattr(trial, "finetune", finetune)
    config = tiny_config(images, methods=cross(["l2"], budgets=[0, 7]), keep=(0.5,), seeds=(42,))
    folder = run_benchmark(config, tmp_path / "out", progress=False).folder
    plain, trained = folder.read_all()
    assert calls == [(5, 7, 0.01, 42, False, 5)]
    assert plain["finetuning"] is None
    assert trained["accuracy"]["before_finetuning"] == plain["accuracy"]["pruned"]
    assert trained["accuracy"]["pruned"] == 8 / 40
    assert trained["images"]["training"] == 50
    assert "finetune" in trained["seconds"]


def test_the_learning_rate_is_chosen_on_the_selection_images(images, tmp_path, monkeypatch):
    trained = {}

    def finetune(model, loader, *, epochs, max_batches, lr, amp, seed, progress):
        assert not trained.values() or all(torch.equal(model.fc.weight, start) for start in trained.values())
        trained[lr] = model.fc.weight.clone()
        with torch.no_grad():
            model.fc.weight.zero_()
            model.fc.bias.copy_(torch.arange(len(model.fc.bias)) == lr)  # a rate of 3 answers class 3
        return SimpleNamespace(batches=7, losses=[2.0, 1.0])

    monkeypatch.setattr(trial, "finetune", finetune)
    config = tiny_config(images, methods=cross(["l2"], budgets=[7]), keep=(0.5,), seeds=(42,))
    data = dataclasses.replace(config.data, selection_images=10)
    config = dataclasses.replace(config, finetune_lr=(1.0, 3.0, 2.0), data=data)
    report = run_benchmark(config, tmp_path / "out", progress=False)
    record = report.folder.read_all()[0]
    own = LoadedNetwork(config, config.networks[0].name, 42, "cpu").images
    held_out = torch.tensor([own.train[row][1] for row in split_rows(len(own.train), data, 0)[1].tolist()])
    shares = {rate: float((held_out == int(rate)).double().mean()) for rate in (1.0, 3.0, 2.0)}
    assert len(set(shares.values())) > 1
    best = max(shares, key=shares.get)
    assert record["finetuning"]["selection_accuracy"] == {str(rate): share for rate, share in shares.items()}
    assert record["finetuning"]["lr"] == best
    tests = torch.cat([labels for _, labels in own.evaluation[0]])
    assert record["accuracy"]["pruned"] == float((tests == int(best)).double().mean())
    assert make_report(report.folder.path).trials.finetune_lr.tolist() == [best]


def test_counters_in_every_trial_agree_with_arithmetic(tmp_path):
    save_file(plain_conv_net().state_dict(), tmp_path / "net.safetensors")
    network = NetworkConfig(
        "plain", "bench_cases:plain_conv_net", str(write_parquet(tmp_path / "data")), str(tmp_path / "net.safetensors")
    )
    config = tiny_config(tmp_path, networks=(network,), seeds=(42,), tolerance=0.2)
    folder = run_benchmark(config, tmp_path / "out", progress=False).folder
    for record in folder.read_all():
        pruned = plain_conv_net()
        widths = {name: kept for name, (kept, _) in record["kept_channels"].items()}
        pruned[0].out_channels, pruned[1].out_channels, pruned[2].out_channels = (widths[name] for name in "012")
        for counter in ("macs", "host_macs", "thop_macs"):
            assert record[counter] == {"dense": analytic_macs(plain_conv_net()), "pruned": analytic_macs(pruned)}


def test_the_paper_s_grid_removes_shares_of_the_channels(config, tmp_path):
    grid = dataclasses.replace(config, grid="channels", keep=(0.75, 0.5), seeds=(42,))
    folder = run_benchmark(grid, tmp_path / "out", progress=False).folder
    records = folder.read_all()
    for record in records:
        kept, total = (sum(column) for column in zip(*record["kept_channels"].values(), strict=True))
        assert kept / total == pytest.approx(record["keep"], abs=0.02)
        assert record["grid"] == "channels"
    # what is equal are the channels, not the MACs
    assert len({record["macs"]["pruned"] for record in records if record["keep"] == 0.5}) > 1
    assert "share of channels kept" in make_report(folder.path).markdown()
    assert not any("other MACs" in note for note in make_report(folder.path).notes)


def test_layout_and_precision_are_conditions(config, images, tmp_path, monkeypatch):
    methods = cross(["l2"], budgets=[3])
    plain = tiny_config(images, methods=methods, keep=(0.5,), seeds=(42,))
    fast = dataclasses.replace(plain, channels_last=True, finetune_amp="bf16")
    assert fast.conditions() != plain.conditions()
    (record,) = run_benchmark(fast, tmp_path / "fast", progress=False).folder.read_all()
    (other,) = run_benchmark(plain, tmp_path / "plain", progress=False).folder.read_all()
    assert record["status"] == "ok"
    # the same images in the same order, in another precision
    assert record["finetuning"]["last_loss"] == pytest.approx(other["finetuning"]["last_loss"], rel=0.05)
    assert record["finetuning"] != other["finetuning"]


def test_repairs_need_no_change_of_the_runner(images, tmp_path, monkeypatch):
    calls, calibrate = [], pruning_state.calibrate
    monkeypatch.setattr(pruning_state, "calibrate", lambda *a, **o: calls.append(o["consumers"]) or calibrate(*a, **o))
    methods = cross(["l2", "capture(site='consumer')"], repairs=[("ridge", "bn"), ("sequential",)])
    config = tiny_config(images, methods=methods, keep=(0.6, 0.4), seeds=(42,))
    summary = run_benchmark(config, tmp_path / "out", progress=False)
    assert summary.failed == []
    assert calls == [True]  # what layers read is gathered once for all trials
    assert {"repair/ridge", "repair/bn"} <= set(summary.folder.read_all()[0]["seconds"])


def test_steps_are_an_axis_of_methods(images, tmp_path):
    criteria = ["cap-a", "taylor", "l2", "bench_cases:own_score"]
    methods = (*cross(criteria, repairs=[("ridge", "bn")], steps=[1, 3]), Method("vbp", "uniform", (), steps=2))
    config = tiny_config(images, methods=methods, keep=(0.6,), seeds=(42,))
    summary = run_benchmark(config, tmp_path / "out", progress=False)
    records = {record["method"]["name"]: record for record in summary.folder.read_all()}
    assert summary.failed == []
    assert list(records) == [method.name for method in methods]
    for name, record in records.items():
        assert record["achieved"] == pytest.approx(0.6, abs=0.03)  # a channel is 2 or 3 % of this network
        assert record["method"]["steps"] == {"3": 3, "2": 2}.get(name[-1], 1)
    for name in criteria:
        once, often = (records[f"{name}+ridge+bn{steps}"] for steps in ("", "+steps3"))
        assert once["weights"] == often["weights"]
        accuracies = [record["accuracy"]["pruned"] for record in records.values()]
    assert accuracies[0:8:2] != accuracies[1:8:2]  # it is not the same thing under another name
    table = make_report(tmp_path / "out").trials
    assert sorted(table.steps) == [1, 1, 1, 1, 2, 3, 3, 3, 3]
    assert "ridge+bn+steps3" in set(table.treatment)


def test_every_seed_may_have_its_own_weights(config, tmp_path):
    network = config.networks[0]
    for seed in (42, 123):
        weights = conv_net(seed).state_dict()
        save_file(weights, tmp_path / f"net-{seed}.safetensors")
    own = dataclasses.replace(network, checkpoint=str(tmp_path / "net-{seed}.safetensors"))
    sweep = dataclasses.replace(config, networks=(own,), methods=cross(["l2"]), keep=(0.5,))
    records = run_benchmark(sweep, tmp_path / "out", progress=False).folder.read_all()
    assert records[0]["weights"] != records[1]["weights"]
    assert records[1]["network"]["checkpoint"].endswith("net-123.safetensors")
    assert not any("dense weights" in note for note in make_report(tmp_path / "out").notes)
    lost = dataclasses.replace(sweep, seeds=(42, 7))
    with pytest.raises(TwoAxisError, match="net-7"):
        run_benchmark(lost, tmp_path / "lost", progress=False)


def test_parts_split_a_single_seed_by_trials(config, tmp_path):
    one = dataclasses.replace(config, seeds=(42,))
    counts = [run_benchmark(one, tmp_path / "out", part=(k, 4), progress=False).ran for k in (1, 2, 3, 4)]
    assert sum(counts) == 6
    assert max(counts) == 2


def test_chunks_keep_statistics_together_where_they_can(config):
    trials = config.trials()
    assert [len(chunk) for chunk in chunks(trials, 2)] == [6, 6]
    assert [len(chunk) for chunk in chunks(trials, 4)] == [3, 3, 3, 3]
    assert sorted(t.key for chunk in chunks(trials, 3) for t in chunk) == sorted(t.key for t in trials)
    assert all(len({(t.network, t.seed) for t in chunk}) == 1 for chunk in chunks(trials, 5))
