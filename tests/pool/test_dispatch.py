"""Which engine gets which request: properties of the schedule, with simulated engines."""

import asyncio
import random
from collections import Counter

import pytest
from simulated_engines import SimulatedEngine

from r3 import CaptureError
from r3.pool.clients.client import RequestAbortedError
from r3.pool.dispatch import Dispatcher
from r3.pool.health import HealthCheck
from r3.pool.member import Member, MemberState
from r3.pool.request import Request


class Simulation:
    """A dispatcher over simulated engines, on the running event loop."""

    def __init__(self, count: int, *, seconds: float = 0.0, misses: int = 3, request_timeout_s: float = 60, **limits):
        self.engines = [SimulatedEngine(f"engine-{number}", seconds) for number in range(count)]
        self.suspected = []
        self.dispatcher = Dispatcher(**{"max_in_flight": 8, "suspect": self._suspect} | limits)
        self.health = HealthCheck(
            self.dispatcher, every_s=0.02, timeout_s=0.05, misses=misses, request_timeout_s=request_timeout_s
        )
        self.members = [Member(engine) for engine in self.engines]
        for member in self.members:
            self.dispatcher.add(member)

    def _suspect(self, member):
        self.suspected.append(member.name)
        self.health.ask(member)

    def submit(self, *, prompt: int = 10, samples: int = 1, tokens: int = 10, conversation=None) -> Request:
        answer = asyncio.get_running_loop().create_future()
        sampling = {"n": samples, "max_tokens": tokens}
        request = Request([1] * prompt, sampling, answer, conversation=conversation)
        self.dispatcher.submit(request)
        return request

    async def all(self, requests):
        return await asyncio.wait_for(asyncio.gather(*(each.answer for each in requests), return_exceptions=True), 20)


def run(body):
    return asyncio.run(body)


def test_load_is_even_by_tokens_not_by_requests():
    async def body():
        pool = Simulation(4, seconds=0.02, max_in_flight=1000)
        of = random.Random(0)
        sizes = [of.choice([10, 20, 400]) for _ in range(400)]
        requests = [pool.submit(tokens=size) for size in sizes]
        load = [member.load for member in pool.members]
        await pool.all(requests)
        assert [member.load for member in pool.members] == [0] * 4
        return load

    load = run(body())
    assert max(load) - min(load) <= 410  # of the largest request, prompt and samples


def test_64_engines_are_never_given_more_than_the_bound_and_each_request_is_answered_once():
    async def body():
        pool = Simulation(64, seconds=0.005, max_in_flight=8)
        requests = [pool.submit(samples=1 + number % 4) for number in range(3000)]
        assert pool.dispatcher.waiting > 2000
        answers = await pool.all(requests)
        assert len(set(answers_of(answers))) == 3000
        assert all(2 <= engine.most <= 8 for engine in pool.engines)
        assert sum(len(engine.asked) for engine in pool.engines) == 3000

    run(body())


def answers_of(answers):
    return [answer.response for answer in answers]


def test_one_request_of_more_samples_than_the_bound_goes_to_an_idle_engine():
    async def body():
        pool = Simulation(1, seconds=0.01, max_in_flight=4)
        small, large = pool.submit(samples=1), pool.submit(samples=9)
        assert pool.dispatcher.waiting == 1
        assert len(await pool.all([small, large])) == 2
        assert pool.engines[0].most == 9

    run(body())


def test_a_conversation_stays_where_its_prefix_is_until_that_engine_is_far_busier_or_gone():
    async def body():
        pool = Simulation(3, seconds=0.05, max_in_flight=100)
        (home,) = answers_of(await pool.all([pool.submit(conversation="a")]))
        others = [pool.submit(tokens=10) for _ in range(3)]  # one for each engine: home is now as busy as the others
        (turn,) = answers_of(await pool.all([pool.submit(conversation="a")]))
        assert turn[0] == home[0]
        await pool.all(others)
        where = next(member for member in pool.members if member.name == home[0])
        busy = [pool.submit(tokens=500, conversation="a")]
        moved = pool.submit(conversation="a")
        (answer,) = answers_of(await pool.all([moved]))
        assert answer[0] != home[0]
        await pool.all(busy)
        (after,) = answers_of(await pool.all([pool.submit(conversation="a")]))
        assert after[0] == answer[0], "the prefix is now there"
        pool.dispatcher.lose(next(m for m in pool.members if m.name == answer[0]), "gone")
        (last,) = answers_of(await pool.all([pool.submit(conversation="a")]))
        assert last[0] != answer[0]
        assert where.load == 0

    run(body())


def test_a_turn_waits_for_room_on_the_engine_of_its_conversation():
    async def body():
        pool = Simulation(2, seconds=0.05, max_in_flight=2, far_busier=4.0)
        (home,) = answers_of(await pool.all([pool.submit(conversation="a")]))
        turns = [pool.submit(conversation="a") for _ in range(4)]
        where = next(member for member in pool.members if member.name == home[0])
        assert (where.sequences, len(where.queue)) == (2, 2)
        assert {name for name, _ in answers_of(await pool.all(turns))} == {home[0]}

    run(body())


def test_of_many_conversations_the_one_that_was_used_last_is_remembered_also_if_it_moved(monkeypatch):
    monkeypatch.setattr("r3.pool.dispatch._CONVERSATIONS", 2)

    async def body():
        pool = Simulation(3, seconds=0.01, max_in_flight=100)
        (first,) = answers_of(await pool.all([pool.submit(conversation="a")]))
        await pool.all([pool.submit(conversation="b")])
        pool.dispatcher.lose(next(m for m in pool.members if m.name == first[0]), "gone")
        (moved,) = answers_of(await pool.all([pool.submit(conversation="a")]))
        busy = [pool.submit(tokens=20, conversation="c")]  # one too many: "b" is forgotten
        for _ in range(3):
            (turn,) = answers_of(await pool.all([pool.submit(conversation="a")]))
            assert turn[0] == moved[0]
        await pool.all(busy)

    run(body())


def test_requests_of_an_engine_that_dies_move_and_come_once():
    async def body():
        pool = Simulation(4, seconds=0.05, max_in_flight=8)
        requests = [pool.submit() for _ in range(100)]
        await asyncio.sleep(0.02)
        engine = pool.engines[1]
        engine.dead = "its engine has died"
        checking = asyncio.ensure_future(pool.health.run())
        answers = await pool.all(requests)
        checking.cancel()
        assert len(set(answers_of(answers))) == 100
        assert pool.members[1].state is MemberState.LOST
        assert pool.dispatcher.moved == 8
        assert engine.name not in {answer.engine for answer in answers}

    run(body())


def test_an_engine_that_says_nothing_loses_its_requests_after_three_checks_and_its_late_answers_are_dropped():
    async def body():
        pool = Simulation(2, seconds=0.02)
        pool.engines[0].silent = True
        requests = [pool.submit() for _ in range(8)]
        checking = asyncio.ensure_future(pool.health.run())
        answers = await pool.all(requests)
        checking.cancel()
        assert {answer.engine for answer in answers} == {"engine-1"}
        assert pool.dispatcher.moved == 4
        assert pool.engines[0].in_flight == 0, "what it still has was not given up"

    run(body())


def test_an_engine_that_holds_a_request_for_too_long_is_lost_though_its_server_answers():
    async def body():
        pool = Simulation(2, seconds=0.02, request_timeout_s=0.1)
        pool.engines[0].seconds = 30.0
        requests = [pool.submit() for _ in range(4)]
        checking = asyncio.ensure_future(pool.health.run())
        answers = await pool.all(requests)
        checking.cancel()
        assert {answer.engine for answer in answers} == {"engine-1"}

    run(body())


def test_one_failed_request_suspends_an_engine_until_its_health_is_known():
    async def body():
        pool = Simulation(2, seconds=0.01)
        pool.engines[0].fails = True
        requests = [pool.submit() for _ in range(2)]
        await asyncio.sleep(0.02)
        pool.engines[0].fails = False
        answers = await pool.all(requests)
        assert pool.suspected == ["engine-0"]
        assert {answer.engine for answer in answers} == {"engine-1"}
        await asyncio.sleep(0.01)
        assert pool.members[0].state is MemberState.SERVING

    run(body())


def test_a_request_that_ends_engines_does_not_end_all_of_them():
    async def body():
        pool = Simulation(8, seconds=0.001)
        for engine in pool.engines:
            engine.fails = True
        (error,) = await pool.all([pool.submit()])
        assert isinstance(error, CaptureError)
        assert "not answered by 3 engines" in str(error)
        assert len(pool.suspected) == 3
        assert str(error).count("the connection failed") == 3

    run(body())


def test_what_waits_fails_with_all_causes_when_no_engine_is_left():
    async def body():
        pool = Simulation(2, seconds=0.5, max_in_flight=1)
        requests = [pool.submit() for _ in range(4)]
        for member in pool.members:
            pool.dispatcher.lose(member, "it was unplugged")
        answers = await pool.all(requests)
        assert all(isinstance(answer, CaptureError) for answer in answers)
        assert all("no engine of the pool is left" in str(answer) for answer in answers)
        assert "engine-0: it was unplugged" in str(answers[0])

    run(body())


def test_nothing_is_sent_while_a_sync_holds_the_pool_and_a_joining_engine_gets_nothing():
    async def body():
        pool = Simulation(1, seconds=0.01)
        joining = Member(SimulatedEngine("new", 0.01), MemberState.JOINING)
        pool.dispatcher.add(joining)
        pool.dispatcher.held = True
        requests = [pool.submit() for _ in range(16)]
        await asyncio.sleep(0.05)
        assert not pool.engines[0].asked
        pool.dispatcher.held = False
        pool.dispatcher.go_on()
        answers = await pool.all(requests)
        assert {answer.engine for answer in answers} == {"engine-0"}
        joining.state = MemberState.SERVING
        pool.dispatcher.update(joining)
        answers = await pool.all([pool.submit() for _ in range(16)])
        assert Counter(answer.engine for answer in answers) == {"engine-0": 8, "new": 8}

    run(body())


def test_requests_that_are_given_up_are_taken_from_their_engines():
    async def body():
        pool = Simulation(2, seconds=5.0, max_in_flight=1)
        requests = [pool.submit() for _ in range(6)]
        pool.dispatcher.forget(requests)
        await asyncio.sleep(0.01)
        assert [engine.in_flight for engine in pool.engines] == [0, 0]
        assert not pool.suspected
        assert sum(len(engine.asked) for engine in pool.engines) == 2, "what waited was sent after all"

    run(body())


@pytest.mark.parametrize("seed", range(8))
def test_whatever_fails_each_request_is_answered_once_or_fails_by_name(seed):
    """64 engines that die, fall silent, fail for a while, slow down, join and leave, while requests come."""

    async def body():
        of = random.Random(seed)
        pool = Simulation(64, seconds=0.002, max_in_flight=4)
        checking = asyncio.ensure_future(pool.health.run())
        requests, joined = [], 0
        for _ in range(40):
            requests += [
                pool.submit(samples=of.choice([1, 2, 4]), conversation=of.choice([None, of.randrange(20)]))
                for _ in range(of.randrange(8))
            ]
            member = of.choice(pool.members)
            match of.choice(["die", "silent", "fail", "slow", "leave", "join", "nothing"]):
                case "die":
                    member.client.dead = "killed"
                case "silent":
                    member.client.silent = True
                case "fail":
                    member.client.fails = True
                    asyncio.get_running_loop().call_later(0.05, setattr, member.client, "fails", False)
                case "slow":
                    member.client.seconds = 0.05
                case "leave" if member in pool.dispatcher.members:
                    pool.dispatcher.remove(member, "it left")
                case "join":
                    joined += 1
                    pool.members.append(Member(SimulatedEngine(f"joined-{joined}", 0.002)))
                    pool.dispatcher.add(pool.members[-1])
            await asyncio.sleep(0.005)
        answers = await pool.all(requests)
        checking.cancel()
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        answered = [answer.response for answer in answers if not isinstance(answer, BaseException)]
        assert len(set(answered)) == len(answered), "an answer was counted twice"
        assert all(isinstance(error, CaptureError) and "not answered by 3 engines" in str(error) for error in failed)
        assert len(failed) <= len(requests) // 10
        alive = [member for member in pool.dispatcher.members if member.state is not MemberState.LOST]
        assert all((member.load, member.sequences, len(member.in_flight)) == (0, 0, 0) for member in alive)

    run(body())


def test_requests_that_syncs_abort_are_asked_anew_however_often_and_nobody_is_suspected():
    async def body():
        pool = Simulation(1, seconds=0.05, max_attempts=2)
        request = pool.submit()
        for _ in range(5):
            pool.dispatcher.held = True
            for under_way in [*pool.members[0].in_flight.values()]:
                under_way.set_exception(RequestAbortedError())
            await asyncio.sleep(0)
            assert pool.dispatcher.waiting == 1
            pool.dispatcher.held = False
            pool.dispatcher.go_on()
        (answer,) = await pool.all([request])
        assert (answer.engine, answer.response) == ("engine-0", ("engine-0", 6))
        assert pool.suspected == []
        assert pool.dispatcher.moved == 0

    run(body())


def test_a_request_that_an_engine_aborts_without_a_sync_moves_and_counts():
    async def body():
        pool = Simulation(2, seconds=0.05, max_attempts=2)
        request = pool.submit()
        for _ in range(2):
            (under_way,) = [each for member in pool.members for each in member.in_flight.values()]
            under_way.set_exception(RequestAbortedError())
            await asyncio.sleep(0)
        (error,) = await pool.all([request])
        assert isinstance(error, CaptureError)
        assert "it has aborted the request" in str(error)

    run(body())
