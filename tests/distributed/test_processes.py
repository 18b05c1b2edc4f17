"""Runs that are killed, stopped, or lose a rank, in a few cases; and what counts signals and ranks, piece by piece.

The whole is in tests/faults.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
from conftest import TORCHRUN
from entries import launched
from faults import kills, rank_faults
from faults.kills import OPTIONS
from faults.report import Report
from faults.running import Moment, forked, typed
from faults.scene import Scene
from faults.signals import judge_end, judge_resumed, too_long, twice

from lora_alpaca import FinetuneConfig, signals
from lora_alpaca.distributed.heartbeat import ANOTHER, STOPPED, Heartbeat
from lora_alpaca.distributed.rendezvous import rendezvous
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import ConfigError, RankError
from lora_alpaca.signals import Interrupted, StepAbandoned, Stop

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are copies of this process")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Return where runs take place, with one that was never stopped."""
    scene = Scene(tmp_path_factory.mktemp("processes"), dict(OPTIONS))
    kills.uninterrupted(scene)
    return scene


# -------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_killed_at_random_and_resumed(tmp_path):
    report = kills.some(list(range(4)), tmp_path)
    assert report.failures == []
    assert report.counts["kills"] >= 4
    assert report.counts["kills of real processes"] == 1


def test_one_run_killed_five_times(tmp_path):
    report = kills.chaos(5, tmp_path)
    assert report.failures == []
    assert report.counts["kills of one run"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_the_command_line(scene, sent):
    """In the middle of training, with more steps than could be taken by the time."""
    report, options = Report(), {"max_steps": 400, "eval_steps": 400}
    running = typed(scene, scene.fresh("stopped"), **options)
    assert running.waits_for(Moment("train", 3).has_come)
    assert running.send(sent)
    ended = running.ended()
    judge_end(report, sent.name, running, ended, sent, 1)
    assert report.failures == []
    assert "is saved; --resume goes on from there" in ended.said


def test_a_signal_while_loading_writes_nothing(scene):
    running = forked(scene, scene.fresh("stopped"))
    assert running.waits_for(Moment("load").has_come)
    running.send(signal.SIGTERM)
    ended = running.ended()
    assert (ended.code, ended.said.splitlines()[-1]) == (143, "stopped by SIGTERM: nothing was written")
    assert not running.out.exists()


@pytest.mark.slow
def test_a_second_signal_and_a_step_that_takes_too_long(scene):
    report = Report()
    twice(report, scene, scene.folder / "whole")
    too_long(report, scene, scene.folder / "whole")
    assert report.failures == []
    assert (report.counts["second signals"], report.counts["abandoned steps"]) == (3, 3)


def test_a_stopped_run_goes_on_to_the_same_bits(scene):
    report, running = Report(), forked(scene, scene.fresh("stopped"))
    assert running.waits_for(Moment("train", 5).has_come)
    running.send(signal.SIGTERM)
    ended = running.ended()
    assert ended.code == 143
    judge_resumed(report, "resumed", scene.folder / "whole", forked(scene, running.out, resume=True))
    assert report.failures == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [rank_faults.FAULTS[0], rank_faults.FAULTS[2]], ids=lambda case: f"{case[0]} {case[1]}"
)
def test_a_rank_that_fails(tmp_path, case, monkeypatch):
    monkeypatch.setattr(rank_faults, "FAULTS", [case])
    monkeypatch.setattr(rank_faults, "WITHIN", 60)  # on a machine that does other things too
    report = rank_faults.programme(1, tmp_path)
    assert report.failures == []
    assert report.counts["rank_faults"] == 1


# ------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def stop():
    stop = Stop()
    with stop.watching():
        yield stop


def test_a_signal_interrupts_what_is_not_deferred(stop):
    with pytest.raises(Interrupted, match="nothing was written") as caught:
        signal.raise_signal(signal.SIGHUP)
    assert (caught.value.signal, caught.value.exit_code) == ("SIGHUP", 129)


def test_a_deferred_signal_only_sets_a_flag(stop):
    with stop.deferred():
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == signal.SIGTERM


def test_a_second_signal_ends_the_process():
    codes = []
    stop = Stop(relay_window=0, exit=codes.append)
    with stop.watching(), stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert codes == [130]


def test_the_same_ctrl_c_relayed_by_torchrun_is_no_second_one():
    stop = Stop(relay_window=60, exit=lambda code: pytest.fail("ended"))
    with stop.watching(), stop.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert stop.asked == signal.SIGINT


def test_what_takes_too_long_after_a_signal_is_given_up():
    stop = Stop(grace=0.1)
    with stop.watching(), stop.deferred(), pytest.raises(StepAbandoned), stop.interruptible():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(30)


def test_with_a_shortened_grace_a_step_is_given_up_at_once(stop):
    stop.shorten_grace()
    with stop.deferred(), pytest.raises(StepAbandoned), stop.interruptible():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(5)


def test_what_is_not_interruptible_takes_its_time():
    stop = Stop(grace=0.05)
    with stop.watching(), stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert stop


def test_signals_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with Stop().watching():
        assert [signal.getsignal(number) for number in signals.SIGNALS] != before
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


# --------------------------------------------------------------------------------------------------------- world


def test_the_world_looks_at_the_stop_it_is_given():
    """A stop that no signal has asked for is false."""
    stop = Stop()
    with World(FinetuneConfig(device="cpu"), stop) as world:
        assert world.stop is stop


def test_one_process_agrees_with_itself():
    with World(FinetuneConfig(device="cpu")) as world:
        world.require_same({"anything": "at all"}, "")
        assert world.least(7) == 7
        assert world.broadcast(lambda: "a plan") == "a plan"


# ----------------------------------------------------------------------------------------- rendezvous and heartbeat


@pytest.mark.parametrize("launcher", ["torchrun", "variables"])
def test_two_runs_of_the_same_processes(tmp_path, launcher, free_port):
    """A second `finetune` of processes that torchrun, or a batch system's variables, have started together."""
    program = tmp_path / "runs.py"
    program.write_text(
        "import datetime, time, torch\n"
        "from accelerate import PartialState\n"
        "from lora_alpaca.distributed.rendezvous import rendezvous\n"
        "for number in (1, 2, 3):\n"
        "    state = PartialState(cpu=True, **rendezvous(datetime.timedelta(seconds=20 + number), dict))\n"
        "    total = torch.tensor(number * (1 + state.process_index))\n"
        "    torch.distributed.all_reduce(total)\n"
        "    assert total == 3 * number\n"
        "    state.destroy_process_group()\n"
        "    time.sleep(state.process_index == 0)  # which saves what came of a run, while the other goes on\n"
        "    state._reset_state()\n"
    )
    if launcher == "torchrun":
        assert subprocess.run([*TORCHRUN, str(program)], timeout=90).returncode == 0
        return
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    ranks = [
        subprocess.Popen([sys.executable, str(program)], env=os.environ | together | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]


@pytest.fixture
def pair():
    """Return the two ranks of a run, as each sees the other; `terminated` lists those that ended themselves."""
    store, terminated = torch.distributed.HashStore(), []

    def heartbeat(rank):
        return Heartbeat(rank, 2, Stop(), store, "a run", timeout=1.5, terminate=lambda: terminated.append(rank))

    ranks = [heartbeat(rank) for rank in (0, 1)]
    ranks[0].terminated = terminated
    yield ranks
    for rank in ranks:
        rank.close()


@pytest.fixture
def alone(monkeypatch, free_port):
    """Let this process be one of two ranks, the other of which does not come; return `alone(rank)`."""

    def launch(rank):
        launched(monkeypatch, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port), RANK=rank)

    monkeypatch.setattr("lora_alpaca.distributed.rendezvous._stores", [])
    return launch


@pytest.mark.parametrize(("rank", "other"), [("0", 1), ("1", 0)])
def test_a_rank_that_does_not_come_is_named(alone, rank, other):
    alone(rank)
    with pytest.raises(RankError, match=f"rank {other} failed: it did not come: the others waited for it"):
        rendezvous(timedelta(seconds=0.1), dict)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_who_waits_for_the_others_hears_signals(alone, rank):
    """Inside torch.distributed, it would be as deaf as long as --rank_timeout says."""
    alone(rank)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    with Stop().watching(), pytest.raises(Interrupted):
        timer.start()
        rendezvous(timedelta(seconds=60), dict)


def test_a_port_that_is_taken(alone):
    alone("0")
    with socket.socket() as taken:
        taken.bind(("", int(os.environ["MASTER_PORT"])))
        taken.listen()
        with pytest.raises(ConfigError, match="the port of the variable MASTER_PORT cannot be opened"):
            rendezvous(timedelta(seconds=5), dict)


def test_nobody_is_dead_while_all_give_signs_of_life(pair):
    assert pair[0].dead_rank() is None


def test_a_rank_that_fails_says_why_and_the_others_are_ended(pair):
    pair[1].report("rows.json:7: no output")
    assert pair[0].failed_rank("Connection closed by peer") == (1, "rows.json:7: no output")
    until = time.monotonic() + 10
    while not pair[0].terminated and time.monotonic() < until:
        time.sleep(0.05)
    assert pair[0].terminated == [0]


def test_what_is_done_in_vain_for_a_rank_that_gave_up_is_ended(pair):
    """One that hangs is told so by those who no longer wait for it."""
    pair[1].report(f"{ANOTHER}0")
    until = time.monotonic() + 10
    while not pair[0].terminated and time.monotonic() < until:
        time.sleep(0.05)
    assert pair[0].terminated[0] == 0
    assert pair[0].reported_failure() is None


def test_a_rank_without_signs_of_life_is_gone(pair):
    pair[1].close()
    time.sleep(0.6)
    rank, cause = pair[0].failed_rank("Connection closed by peer")
    assert rank == 1
    assert cause.startswith("it is gone without a word")


def test_a_rank_that_lives_and_does_not_come_hangs(pair):
    pair[0].calls = 3
    assert pair[0].failed_rank("Timed out")[1].startswith("it hangs: the others waited for it")


def test_a_rank_that_a_signal_stopped_has_not_failed(pair):
    pair[1].report(f"{STOPPED}SIGTERM")
    assert pair[0].reported_failure() is None
    assert pair[0].dead_rank() is None
    assert pair[0].failed_rank("Connection closed") == (1, "stopped by SIGTERM")


def test_a_rank_that_another_one_ended_is_not_the_one_to_name(pair):
    """It reports whose failure ended it; its own error stays as it is."""
    assert pair[1].verdict(RankError(0, "the sky fell")) is None
    assert pair[0]._causes() == {1: f"{ANOTHER}0"}


@pytest.mark.parametrize(("asked", "raised"), [(signal.SIGTERM, Interrupted), (0, type(None))])
def test_a_rank_whose_others_the_same_signal_stopped_is_stopped_too(pair, asked, raised):
    """They left a moment before; without a signal of its own, the others are what ended it."""
    pair[0]._stop.asked = asked
    verdict = pair[0].verdict(RankError(1, f"{STOPPED}SIGTERM", "step 3 of 9 is saved"))
    assert isinstance(verdict, raised)
    assert verdict is None or "step 3 of 9 is saved" in str(verdict)


def test_a_signal_that_reached_one_rank_after_another_died_is_that_rank_s_failure(pair):
    pair[1].report("rows.json:7: no output")
    verdict = pair[0].verdict(Interrupted(signal.SIGTERM, "step 3 of 9 is saved"))
    assert isinstance(verdict, RankError)
    assert str(verdict) == "rank 1 failed: rows.json:7: no output; step 3 of 9 is saved"


@pytest.mark.parametrize(
    ("error", "cause"),
    [(SystemExit(3), "it left in the middle of the run, with exit code 3"), (ValueError("the sky\nfell"), "the sky")],
)
def test_the_cause_of_any_other_end_is_reported(pair, error, cause):
    assert pair[1].verdict(error) is None
    assert pair[0].reported_failure() == (1, cause)
