"""Continuous batching: `serve` gives an engine, the engine takes requests and runs them together, step by step.

    engine = kvcfg.serve(experiment, model)
    answers = [engine.submit(prompt, max_new_tokens=100) for prompt in prompts]
    for token in answers[0]:                  # as they come; the others run along
        ...
    engine.run()                              # until all have ended
    print(engine.metrics())

Every step is one forward pass over a row of tokens: pieces of prompts beside the last tokens of requests that decode.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from kvcfg.cache.building import build_manager
from kvcfg.cache.manager import KVCacheManager
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import stored_layers
from kvcfg.errors import BackendUnavailable, CapacityError, ConfigError, Problem
from kvcfg.integrations.calibrated_layers import calibrated_groups
from kvcfg.integrations.serving.metrics import ServingCounters, ServingMetrics
from kvcfg.integrations.serving.request import Finish, Request
from kvcfg.integrations.serving.runner import PackedRunner
from kvcfg.integrations.serving.sampling import sampled, token_list, token_logprobs
from kvcfg.integrations.serving.scheduler import Scheduler, Share
from kvcfg.integrations.serving.scoring import completion_logprobs
from kvcfg.integrations.transformers import check_model, layer_places
from kvcfg.units import ceil_div

STEP_TOKENS = 256
"""Tokens of a step unless something else is asked for: enough to keep a CPU busy, few enough to let decoding go on."""


def serve(
    experiment: ExperimentConfig, model: Any, *, step_tokens: int = STEP_TOKENS, batch_invariant: bool = False
) -> ServingEngine:
    """An engine over the planned pages of an experiment.

    Args:
        experiment: what to build; `workload.max_batch_size` requests run at a time, up to `workload.max_seq_len`
            tokens each. There need not be memory for all of them at full length. With `cache.enable_prefix_caching`
            they share what they have in common.
        model: the causal language model of transformers that will run.
        step_tokens: the most tokens of a step, prompts and decoding together.
        batch_invariant: compute every step in exactly `step_tokens` rows, and every query's attention alone. Then a
            request's logits are the same bits whatever else runs, and `logprobs` gives them again; it costs what the
            empty rows cost, so `step_tokens` should be near the number of requests that decode together.

    Raises:
        ConfigError, BackendUnavailable, CapacityError, ShapeError: as `kvcfg.build`; also if `step_tokens` is below 1
            or, with `batch_invariant`, no multiple of 16; if the config spreads over replicas; if layers keep latents
            or states instead of keys and values.
    """
    params = experiment.to_params()
    if params.data_parallel_degree > 1:
        raise BackendUnavailable(
            f"the engine runs one replica, the config has {params.data_parallel_degree}. "
            "Try: devices.data_parallel_degree=1"
        )
    check_model(experiment, model)
    manager = build_manager(
        experiment,
        devices=[model.device] * params.n_devices,
        calibrated=calibrated_groups(experiment, model),
        overcommit=True,
    )
    places = layer_places([layers.group for layers in stored_layers(experiment)])
    return ServingEngine(manager, model, places, step_tokens=step_tokens, batch_invariant=batch_invariant)


class ServingEngine:
    """Runs requests together; see `serve`. Threads may share it: a step is made by one at a time.

    Args:
        manager: the pages, of one replica; nobody else claims sequences there.
        model: a causal language model of transformers.
        places: for every layer of the model its group and its place in it.
        step_tokens: the most tokens of a step.
        batch_invariant: see `serve`.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        model: Any,
        places: Sequence[tuple[int, int] | None],
        *,
        step_tokens: int = STEP_TOKENS,
        batch_invariant: bool = False,
    ) -> None:
        if step_tokens < 1:
            raise ConfigError(Problem("step_tokens", "must be at least 1", step_tokens))
        self.manager, self.step_tokens = manager, step_tokens
        self.runner = PackedRunner(manager, model, places, fixed_rows=step_tokens if batch_invariant else None)
        self._stop_ids = _stop_ids(model)
        self._counters = ServingCounters()
        self._scheduler = Scheduler(manager, step_tokens, self._counters)
        self._lock = RLock()

    @property
    def pending(self) -> int:
        """Requests that wait or run."""
        return len(self._scheduler.waiting) + len(self._scheduler.running)

    def submit(
        self,
        prompt: Iterable[int] | Tensor,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
        priority: int = 0,
    ) -> Request:
        """Add a request; it runs when `step`, `run` or an iteration over any request gets to it.

        Args:
            prompt: token ids, a list or a tensor `[num_tokens]` or `[1, num_tokens]`.
            max_new_tokens: it ends after so many.
            temperature: 0 takes the most likely token; else one is drawn.
            seed: of what is drawn; None = torch's own generator.
            stop_ids: tokens after which it ends; None = the model's end-of-sequence tokens.
            priority: higher ones run first, and take pages from lower ones.

        Raises:
            CapacityError: if prompt and answer are longer than a sequence may be, or than all pages.
            ConfigError: if the prompt is empty or a number is out of range.
        """
        ids = tuple(token_list(prompt))
        self._check(ids, max_new_tokens, what="max_new_tokens")
        if not temperature >= 0:
            raise ConfigError(Problem("temperature", "must be at least 0", temperature))
        generator = None
        if seed is not None:
            generator = torch.Generator(self.runner.model.device).manual_seed(seed)
        with self._lock:
            request = Request(
                engine=self,
                number=self._counters.submitted,
                prompt=ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_ids=self._stop_ids if stop_ids is None else frozenset(stop_ids),
                priority=priority,
                generator=generator,
                submitted=time.monotonic(),
            )
            self._counters.submitted += 1
            self._scheduler.add(request)
            return request

    def step(self) -> list[Request]:
        """One forward pass.

        Returns:
            The requests that got a token; some may have ended with it. None where only prompts were computed, or
            nothing is left to do (`pending`).

        Raises:
            CapacityError: if pages that something else holds leave no room for a single request.
        """
        with self._lock:
            begin = time.monotonic()
            shares = self._scheduler.next_step()
            if not shares:
                return []
            self._counters.peak_pages = max(self._counters.peak_pages, self.manager.metrics().used_pages)
            ready = [share for share in shares if share.stop == share.request.length]
            logits = self._run(shares)
            for share in shares:
                self.manager.commit(share.request.number, share.stop - share.start)
            if ready:
                self._take([share.request for share in ready], logits)
            self._counters.steps += 1
            self._counters.seconds += time.monotonic() - begin
            return [share.request for share in ready]

    def run(self) -> None:
        """Make steps until every request has ended."""
        while self.pending:
            self.step()

    def cancel(self, request: Request) -> None:
        """End a request now; its pages are free again. Nothing happens if it has ended already."""
        with self._lock:
            if request.finish is None:
                self._scheduler.remove(request)
                request.finish = Finish.cancelled
                self._counters.cancelled += 1

    def logprobs(self, prompt: Iterable[int] | Tensor, completion: Iterable[int] | Tensor) -> Tensor:
        """Log-probabilities of tokens that are given after a prompt, over the engine's own pages.

        With `batch_invariant` these are, bit for bit, the `Request.logprobs` of a request that generated them; else up
        to how torch rounds products of different shapes.

        Args:
            prompt: token ids, as for `submit`; what the prefix cache has of it is not computed again.
            completion: token ids that follow.

        Returns:
            float32 `[len(completion)]`.

        Raises:
            ConfigError: if one of them is empty.
            CapacityError: if they do not fit beside the requests that run now.
        """
        given, chosen = token_list(prompt), token_list(completion)
        self._check(given, len(chosen), what="completion tokens")
        with self._lock:
            return completion_logprobs(self.runner, "logprobs", given, chosen, self.step_tokens)

    def metrics(self) -> ServingMetrics:
        """What was counted so far."""
        with self._lock:
            scheduler = self._scheduler
            return self._counters.snapshot(waiting=len(scheduler.waiting), running=len(scheduler.running))

    def _run(self, shares: Sequence[Share]) -> Tensor:
        """The step's logits, for each request that has all its tokens in, by the order of shares."""
        ids, wanted = list[int](), list[int]()
        for request, start, stop in shares:
            ids += request.span(start, stop)
            if stop == request.length:
                wanted.append(len(ids) - 1)
        try:
            numbers = [share.request.number for share in shares]
            counts = [share.stop - share.start for share in shares]
            return self.runner.run(numbers, counts, ids, wanted)
        except BaseException:
            # Nothing was committed: they begin again.
            for share in shares:
                self._scheduler.preempt(share.request)
            raise

    def _take(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Choose the next token of each request, a row of logits each."""
        tokens = [
            sampled(row, request.temperature, request.generator) for request, row in zip(requests, logits, strict=True)
        ]
        now = time.monotonic()
        for request, token, logprob in zip(requests, tokens, token_logprobs(logits, tokens).tolist(), strict=True):
            request.tokens.append(token)
            request.logprobs.append(logprob)
            self._counters.generated_tokens += 1
            if request.first_token is None:
                request.first_token = now
                self._counters.times_to_first_token.append(now - request.submitted)
            if token in request.stop_ids or len(request.tokens) == request.max_new_tokens:
                request.finish = Finish.stop if token in request.stop_ids else Finish.length
                self._scheduler.remove(request)
                self._counters.finished += 1
            else:
                self.manager.extend(request.number, [token])

    def _check(self, prompt: Sequence[int], num_new_tokens: int, *, what: str) -> None:
        """Refuse what would never fit. The last token is not stored."""
        num_tokens, manager = len(prompt), self.manager
        for key, number in (("prompt tokens", num_tokens), (what, num_new_tokens)):
            if number < 1:
                raise ConfigError(Problem(key, "must be at least 1", number))
        stored = num_tokens + num_new_tokens - 1
        both = f"a prompt of {num_tokens} tokens and an answer of {num_new_tokens} do not fit in"
        if stored > manager.max_seq_len:
            raise CapacityError(
                f"{both} sequences of {manager.max_seq_len} tokens. Try: workload.max_seq_len={stored + 1}"
            )
        pages, size = manager.replicas[0].num_pages, manager.params.page_size
        if any(group.grows for group in manager.params.params) and ceil_div(stored, size) > pages:
            raise CapacityError(
                f"{both} the {pages} pages of {size} tokens that there are. "
                f"Try: a larger cache.kv_cache_memory_bytes, or max_new_tokens={max(1, pages * size - num_tokens + 1)}"
            )


def _stop_ids(model: Any) -> frozenset[int]:
    """The model's end-of-sequence tokens."""
    config = getattr(model, "generation_config", None) or model.config
    ids = config.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
