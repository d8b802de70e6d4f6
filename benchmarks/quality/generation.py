"""What recipes lose when a model generates by itself: `python benchmarks/quality/generation.py`; see README.md.

Two questions to every cache, on the same prompts: after how many tokens does a greedy answer first differ from that
in full precision, and does the model still find a number hidden in a long text. Answers are added to a JSONL file
batch by batch, and a later run goes on where one ended. Then the tables are printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from books import prepared_books
from candidates import Running
from generation_answers import AnswerStore, blanks, markdown
from generation_trials import NEEDLE, Outcome, Trial, free_runs, passkeys
from measuring import FLOAT32, LoadedModels, Task, identity
from options import parsed

from kvcfg.integrations.loading import load_tokenizer


def main() -> None:
    """Ask what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=200, help="pieces of the books to go on from; 0 = none")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="length of such a piece")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate after it")
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024, 2048, 4096], help="of texts with a key")
    parser.add_argument("--keys", type=int, default=4, help="at each of five depths, for every length")
    parser.add_argument("--batch", type=int, default=5, help="prompts at a time")
    options = parsed(parser, pages=[64], results="results/generation.jsonl")
    store = AnswerStore(options.results)
    if not options.markdown:
        models = LoadedModels()
        for task, trials in asked(options):
            ask_all(task, trials, models, store)
    print(markdown(store.answers()))


def asked(options: argparse.Namespace) -> list[tuple[Task, list[Trial]]]:
    """All trials by length, each with caches of its size."""

    def sized(prompt_tokens: int, new_tokens: int) -> Task:
        names, size = options.recipes, prompt_tokens + new_tokens
        return Task(options.model, options.pages, names, 0, size, batch_size=options.batch)

    batches = []
    if options.prompts:
        books = prepared_books(options.books)
        of_each = -(-options.prompts // len(books))
        windows = Task(options.model, options.pages, None, of_each, options.prompt_tokens).windows(books)
        prompts = torch.stack([window.tokens for window in windows[: options.prompts]])
        trials = free_runs(prompts, options.new_tokens, options.batch)
        batches.append((sized(options.prompt_tokens, options.new_tokens), trials))
    for length in options.lengths:
        task = sized(length, NEEDLE.answer_tokens)
        trials = passkeys(load_tokenizer(task.experiment()), length, options.keys, options.batch)
        batches.append((task, trials))
    return batches


def ask_all(task: Task, trials: Sequence[Trial], models: LoadedModels, store: AnswerStore) -> None:
    """Ask every candidate what the file does not hold yet; full precision is asked once for all of them."""
    published, measured = task.experiment(FLOAT32), store.measured()
    reference = cache(lambda trial: trial.reference(models.of(published)))
    for candidate in task.candidates():
        begin, num_prompts = time.monotonic(), 0
        forms = [blanks(trial, published.model.name, candidate, identity(candidate, published)) for trial in trials]
        missing = [pair for pair in zip(trials, forms, strict=True) if not measured.issuperset(a.key for a in pair[1])]
        running: Running | None = None
        for trial, form in missing:
            expected = reference(trial)
            try:
                running = running or candidate.start(models)
                outcomes: list[Outcome | str] = [*trial.outcomes(running, expected)]
            except Exception as error:
                outcomes = [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"] * len(form)
            for answer, outcome in zip(form, outcomes, strict=True):
                store.append(replace(answer, outcome=outcome))
            if isinstance(outcomes[0], str):
                # Not asked again: it is left out of the tables, not the others with it.
                break
            num_prompts += len(form)
        print(
            f"{task.model}: {candidate.name}, {trials[0].task} at {trials[0].prompts.shape[1]} tokens: {num_prompts} "
            f"prompts in {time.monotonic() - begin:.0f} s",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
