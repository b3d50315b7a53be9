"""Rollouts that are sampled while a step trains: how old they may be, who has the engine, and what an error does."""

import threading

import pytest

import r3
from r3.errors import CaptureError, ConfigError
from trainer_hooks.rollouts_ahead import RolloutsAhead

SOON = 20.0  # seconds: a test that waits so long has failed


class Engine:
    """Samples a step only when `let` says so, and tells by which version."""

    def __init__(self):
        self.version = 0
        self.began = {step: threading.Event() for step in range(10)}
        self.let = {step: threading.Event() for step in range(10)}

    def sample(self, step):
        version = self.version
        self.began[step].set()
        assert self.let[step].wait(SOON)
        assert self.version == version, "a sync while rollouts are sampled"
        return step, version

    def everything(self):
        for event in self.let.values():
            event.set()
        return self


def run(engine, ahead, steps):
    """A training loop; returns the version that sampled each step."""
    found = {}
    for step in steps:
        number, found[step] = ahead.get(step)
        assert number == step
        with ahead.engine():
            engine.version = step
        ahead.synced(step)
    return found


def test_without_staleness_each_step_is_sampled_by_the_weights_that_it_trains_and_without_a_thread():
    engine, steps = Engine().everything(), range(1, 5)
    with RolloutsAhead(engine.sample, steps) as ahead:
        assert run(engine, ahead, steps) == {step: step - 1 for step in steps}
        assert not any(thread.name == "r3-rollouts-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_no_step_is_sampled_by_weights_older_than_allowed(staleness):
    engine, steps = Engine().everything(), range(1, 10)
    with RolloutsAhead(engine.sample, steps, max_staleness=staleness) as ahead:
        for step, version in run(engine, ahead, steps).items():
            assert step - 1 - staleness <= version <= step - 1


def test_the_next_step_is_sampled_before_this_one_has_trained_and_the_one_after_it_is_not():
    engine = Engine()
    with RolloutsAhead(engine.sample, range(1, 6), max_staleness=1) as ahead:
        engine.let[1].set()
        assert ahead.get(1) == (1, 0)
        assert engine.began[2].wait(SOON)  # step 1 trains now
        engine.let[2].set()
        assert ahead.get(2) == (2, 0)
        assert not engine.began[3].wait(0.2)
        ahead.synced(1)
        assert engine.began[3].wait(SOON)
        engine.everything()


def test_a_sync_waits_for_the_step_that_is_sampled_and_goes_before_the_next():
    engine = Engine()
    with RolloutsAhead(engine.sample, range(1, 6), max_staleness=3) as ahead:
        assert engine.began[1].wait(SOON)
        synced = threading.Event()

        def sync():
            with ahead.engine():
                assert not engine.began[2].wait(0.2)
                engine.version = 1
                synced.set()

        syncing = threading.Thread(target=sync)
        syncing.start()
        assert not synced.wait(0.2)
        engine.everything()
        assert synced.wait(SOON)
        syncing.join(SOON)
        assert ahead.get(2) == (2, 1)


def test_engines_that_sample_and_sync_at_a_time_are_not_waited_for():
    engine = Engine()
    with RolloutsAhead(engine.sample, range(1, 3), max_staleness=1, shared=True) as ahead:
        assert engine.began[1].wait(SOON)
        with ahead.engine():
            pass
        engine.everything()


def test_steps_go_on_from_a_resumed_run_by_the_weights_that_it_pushed():
    engine, steps = Engine().everything(), range(4, 8)
    engine.version = 3
    with RolloutsAhead(engine.sample, steps, version=3, max_staleness=1) as ahead:
        assert run(engine, ahead, steps)[4] == 3


def test_an_error_of_the_thread_is_raised_in_the_step_that_asks_for_it_and_not_before():
    def sample(step):
        if step == 2:
            raise CaptureError("no routing")
        return step

    with RolloutsAhead(sample, range(1, 4), max_staleness=2) as ahead:
        assert ahead.get(1) == 1
        with pytest.raises(CaptureError, match="no routing"):
            ahead.get(2)
        with ahead.engine():  # not held for ever by the step that failed
            pass


@pytest.mark.timeout(60)
def test_an_error_of_the_loop_does_not_wait_for_the_engine():
    engine = Engine()

    def loop():
        with RolloutsAhead(engine.sample, range(1, 4), max_staleness=1):
            assert engine.began[1].wait(SOON)
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    engine.everything()


def test_a_step_is_given_once():
    engine = Engine().everything()
    with RolloutsAhead(engine.sample, range(1, 3), max_staleness=2) as ahead:
        ahead.get(1)
        ahead.get(2)
        with pytest.raises(CaptureError, match=r"step 2.*not given yet"):
            ahead.get(2)


def test_one_engine_is_idle_in_a_sync_whatever_should_become_of_its_requests():
    name = "generator.inference_engine.weight_sync.on_running=keep"
    with pytest.raises(ConfigError, match=r"on_running=keep needs addresses"):
        r3.R3Config.from_overrides([name]).check()
    r3.R3Config.from_overrides([name, "generator.inference_engine.addresses=[http://host:8000]"]).check()


def test_a_staleness_that_an_alarm_would_stop_is_refused():
    with pytest.raises(ConfigError, match=r"max_staleness=9.*version_lag_stop \(8\)"):
        r3.R3Config.from_overrides(["trainer.max_staleness=9", "trainer.diagnostics.alarms.enabled=true"]).check()
    r3.R3Config.from_overrides(["trainer.max_staleness=8", "trainer.diagnostics.alarms.enabled=true"]).check()
