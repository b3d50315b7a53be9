"""The scheduler of an engine that captures: `capture_scheduler`, for `LLM(scheduler_cls=...)`.

It keeps the rows of all tokens by KV slot and sends those of a request with its first token, every `STEPS_A_MESSAGE`
steps, and when it ends, before its blocks are freed. vLLM 0.22 to 0.30 keep the same store, and send a row a request
and step: a few hundred small arrays a step, each of them encoded, decoded and joined by itself.

A request whose answer is read when it is complete (`RequestOutputKind.FINAL_ONLY`, as `LLM.generate` and what does not
stream ask) sends its tokens and log-probabilities with its rows: what would be a message a token is encoded, decoded
and put away in the engine's and the caller's process, in turns with the steps of the model.

Rows come from vLLM's own capture (0.22 to 0.30), or from the hooks of `routing_worker` where vLLM refuses to.

Limits
1. An aborted request has lost the rows of its last steps, fewer than `STEPS_A_MESSAGE`; if it does not stream, their
   tokens too. Requests with stop strings send all in each step: it is the front end that ends them.
2. Rows of a request that was preempted are those under which its tokens were sampled, not those of its second prefill.
3. A server's metrics of times between tokens are those between messages.
4. `LLMEngine.step` returns with the next message: where no request streams, up to `STEPS_A_MESSAGE` steps of the model
   later. A loop by hand adds and aborts requests that often.

Imported in the engine's process alone.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from r3.capture.in_engine.held_outputs import HeldOutputs
from r3.capture.in_engine.slot_store import SlotStore, step_positions
from r3.vllm_compat.capture import full_attention_group, native_rows, native_store

STEPS_A_MESSAGE = 64


@dataclass
class _Progress:
    """How many rows of a request have been read.

    Attributes:
        end: position after the last row that was read.
        read: rows that were read and not yet sent.
    """

    end: int
    read: list[np.ndarray] = field(default_factory=list)


class CapturingScheduler:
    """Mixed into vLLM's scheduler, in front of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        store = native_store(self)
        self.r3_store = None if store is None else SlotStore(*store)
        # This disables vLLM's own path, which sends rows and copies all block ids in every step.
        self.enable_return_routed_experts = False
        self.r3_progress: dict[str, _Progress] = {}
        self.r3_finished: dict[str, np.ndarray] = {}
        self.r3_new: set[str] = set()  # requests without a token
        self.r3_eager: set[str] = set()  # requests with stop strings
        self.r3_held: dict[str, HeldOutputs] = {}  # of requests that nobody reads before they end
        self.r3_ended: list[str] = []  # requests that ended in the step whose output is being worked on
        # Blocks that a request had when it was preempted, and the last step that wrote into them.
        self.r3_freed: dict[str, tuple[list[int], int]] = {}
        self.r3_scheduled = 0  # steps scheduled so far
        self.r3_updating: int | None = None  # the step whose output is being worked on

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.r3_scheduled += 1
        output.r3_step = self.r3_scheduled
        return output

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.sampling_params is not None:
            self.r3_new.add(request.request_id)
            if request.sampling_params.stop:
                self.r3_eager.add(request.request_id)
            elif request.sampling_params.output_kind == RequestOutputKind.FINAL_ONLY:
                self.r3_held.setdefault(request.request_id, HeldOutputs())
        return super().add_request(request, *args, **kwargs)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        step = self.r3_updating = scheduler_output.r3_step
        try:
            self._r3_write(scheduler_output, model_runner_output)
            outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
            # Most requests send no rows in most steps.
            rows = self.r3_finished or self.r3_new or self.r3_eager or self.r3_freed or step % STEPS_A_MESSAGE == 0
            for client in outputs.values():
                client.outputs = [output for output in client.outputs if self._r3_sends(output, step, bool(rows))]
            for request_id in self.r3_ended:
                self.r3_held.pop(request_id, None)
        finally:
            self.r3_updating = None
            self.r3_ended.clear()
        return {client: message for client, message in outputs.items() if not _is_empty(message)}

    def _r3_sends(self, output: Any, step: int, rows: bool) -> bool:
        """Whether `output` is sent now: with its rows if they are due, and with what was held before it."""
        if rows and output.new_token_ids:
            output.routed_experts = self._r3_rows(output.request_id, step)
        held = self.r3_held.get(output.request_id)
        if held is None:
            return True
        if output.routed_experts is None and step % STEPS_A_MESSAGE and held.hold(output):
            return False
        held.release(output)
        return True

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.num_output_tokens:
            self._r3_read(request)
        self.r3_freed[request.request_id] = (self._r3_blocks(request.request_id), self.r3_scheduled)
        return super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if self.r3_updating is not None and request.num_output_tokens:
            self._r3_read(request)
            rows = self._r3_take(request.request_id)
            if rows is not None:
                self.r3_finished[request.request_id] = rows
        self.r3_progress.pop(request.request_id, None)
        self.r3_freed.pop(request.request_id, None)
        self.r3_new.discard(request.request_id)
        self.r3_eager.discard(request.request_id)
        if self.r3_updating is None:  # aborted
            self.r3_held.pop(request.request_id, None)
        else:
            self.r3_ended.append(request.request_id)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _r3_write(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """Store the rows of a step."""
        rows = native_rows(model_runner_output)
        if rows is not None:
            assert self.r3_store is not None
            self.r3_store.write(*rows)
        ids = model_runner_output.__dict__.pop("r3_rows", None)
        if ids is None:
            return
        if self.r3_store is None:
            self.r3_store = self._r3_new_store(ids)
        slots, kept, at = [], [], 0
        for rid, start, end in step_positions(scheduler_output, model_runner_output.req_ids):
            if rid in self.requests:  # type: ignore[attr-defined]
                slots.append(self.r3_store.slots(self._r3_blocks(rid), start, end))
                kept.append(ids[at : at + len(slots[-1])])
            at += end - start
        if slots:
            self.r3_store.write(np.concatenate(slots), np.concatenate(kept))

    def _r3_new_store(self, ids: np.ndarray) -> SlotStore:
        config = self.kv_cache_config  # type: ignore[attr-defined]
        group, block_size = full_attention_group(config)
        return SlotStore(np.zeros((config.num_blocks * block_size, *ids.shape[1:]), ids.dtype), block_size, group)

    def _r3_rows(self, request_id: str, step: int) -> np.ndarray | None:
        """Rows to send with an output of this request, or None if they can wait."""
        finished = self.r3_finished.pop(request_id, None)
        if finished is not None:
            return finished
        request = self.requests.get(request_id)  # type: ignore[attr-defined]
        if request is None:  # it has ended, and no rows ever came: `collect` says so
            return None
        progress = self.r3_progress.get(request_id)
        due = step % STEPS_A_MESSAGE == 0 or request_id in self.r3_new or request_id in self.r3_eager
        # A preempted request is computed again. Rows read later would be those of that second computation.
        if due or request_id in self.r3_freed or (progress is not None and progress.read):
            self.r3_new.discard(request_id)
            self._r3_read(request)
            return self._r3_take(request_id)
        return None

    def _r3_read(self, request: Any) -> None:
        """Read the rows up to the last token that was fed back; the one sampled last has none yet."""
        progress = self.r3_progress.get(request.request_id)
        if progress is None:
            progress = _Progress(request.sampling_params.routed_experts_prompt_start or 0)
            self.r3_progress[request.request_id] = progress
        if self.r3_store is not None:
            end = max(progress.end, request.num_tokens - 1)
            progress.read.append(self.r3_store.read(self._r3_blocks(request.request_id), progress.end, end))
            progress.end = end

    def _r3_take(self, request_id: str) -> np.ndarray | None:
        progress = self.r3_progress[request_id]
        read, progress.read = progress.read, []
        return np.concatenate(read) if len(read) > 1 else next(iter(read), None)

    def _r3_blocks(self, request_id: str) -> list[int]:
        """Block ids under which the rows of the step that is being worked on belong."""
        if self.r3_updating is not None and request_id in self.r3_freed:
            blocks, last_step = self.r3_freed[request_id]
            if self.r3_updating <= last_step:
                return blocks
            del self.r3_freed[request_id]
        group = 0 if self.r3_store is None else self.r3_store.group
        return self.kv_cache_manager.get_blocks(request_id).get_block_ids()[group]  # type: ignore[attr-defined]


def _is_empty(message: Any) -> bool:
    """Whether a step's message to a client says nothing."""
    return not (message.outputs or message.finished_requests) and message.scheduler_stats is None


class _Synchronous(CapturingScheduler, Scheduler):
    pass


class _Asynchronous(CapturingScheduler, AsyncScheduler):
    pass


def capture_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """The entry point that `scheduler_cls` names: the scheduler class that fits the engine."""
    asynchronous = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (_Asynchronous if asynchronous else _Synchronous)(*args, **kwargs)
