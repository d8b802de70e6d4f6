"""What is asked of a cache beside its predictions: retrieval tasks, how long and how many, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcfg.config.retrieval_tasks import unknown_task
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.quality import CacheMaker, full_precision
from kvcfg.evaluation.retrieval.answers import retrieve
from kvcfg.evaluation.retrieval.prompts import NoRoomError, RetrievalPrompt
from kvcfg.evaluation.retrieval.tasks import TASKS, retrieval_prompts
from kvcfg.results.task_score import TaskScore


@dataclass(frozen=True, slots=True)
class RetrievalRequest:
    """Retrieval tasks.

    Attributes:
        tasks: names in `TASKS`.
        prompt_tokens: tokens of every prompt.
        num_prompts: prompts of every task.

    Raises:
        ConfigError: if there is no task of a name.
    """

    tasks: tuple[str, ...]
    prompt_tokens: int = 1024
    num_prompts: int = 8

    def __post_init__(self) -> None:
        if problem := unknown_task(self.tasks):
            raise ConfigError(problem)

    @property
    def num_tokens(self) -> int:
        """Tokens of a prompt and the longest answer; 0 without tasks."""
        return max((self.prompt_tokens + TASKS[task].answer_tokens for task in self.tasks), default=0)

    def prompts(self, tokenizer: Any, context: int) -> dict[str, list[RetrievalPrompt]]:
        """Prompts of each task.

        Args:
            tokenizer: of the model.
            context: tokens that the model can read.

        Raises:
            ConfigError: if prompts are too short for their task, or too long for the model.
        """
        if self.num_tokens > context:
            answer = self.num_tokens - self.prompt_tokens
            rule = f"and {answer} tokens of an answer must together fit in the model's context of {context}"
            raise ConfigError(
                Problem("task_tokens", rule, self.prompt_tokens, f"task_tokens={max(1, context - answer)}")
            )
        return {task: self._prompts_of(task, tokenizer) for task in self.tasks}

    def _prompts_of(self, task: str, tokenizer: Any) -> list[RetrievalPrompt]:
        try:
            return retrieval_prompts(task, tokenizer, self.prompt_tokens, self.num_prompts)
        except NoRoomError as error:
            rule = f"{task} needs at least {error.least} tokens"
            raise ConfigError(Problem("task_tokens", rule, self.prompt_tokens, f"task_tokens={error.least}")) from error


def task_scores(
    model: Any,
    tokenizer: Any,
    asked: Mapping[str, Sequence[RetrievalPrompt]],
    candidate: CacheMaker,
    on_task: Callable[[], None],
) -> dict[str, TaskScore]:
    """Put the prompts of each task to a model with a full-precision cache and with the candidate's, one at a time.

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model.
        asked: prompts by the name of their task.
        candidate: makes the cache to judge.
        on_task: called after each task.
    """
    scores = {}
    for name, prompts in asked.items():
        found, reference = (
            retrieve(model, tokenizer, TASKS[name], prompts, cache, batch_size=1).right.mean().item()
            for cache in (candidate, full_precision)
        )
        scores[name] = TaskScore(
            right=found,
            right_reference=reference,
            num_prompts=len(prompts),
            prompt_tokens=len(prompts[0].tokens),
        )
        on_task()
    return scores
