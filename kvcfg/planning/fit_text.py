"""The answer of `fit` for people: overrides to paste, and what each of them leads to."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.planning.fitting import Fit, Option
from kvcfg.planning.layout import aligned, command_words, counted, paragraph
from kvcfg.planning.plan_text import where
from kvcfg.planning.plans import Plan
from kvcfg.units import readable_bytes


def fit_text(answer: Fit) -> str:
    """The answer as sections that an empty line separates."""
    asked, lack = answer.plan, answer.plan.shortfall
    head = f"{asked.experiment.model.name} on {where(asked)}"
    if lack is None:
        workload = f"{counted(asked.max_batch_size, 'sequence')} of {asked.max_seq_len:,} tokens"
        free = readable_bytes(asked.free_bytes_per_device)
        sections = [
            paragraph(f"{head} holds {workload}; {free} of a device stays free."),
            _listed("It would also fit with any one of", answer.options, asked),
        ]
    else:
        who = "It" if asked.resolution.devices.count == 1 else "Each device"
        sections = [
            paragraph(f"{head} does not fit: {lack.why}. {who} lacks {readable_bytes(lack.missing)}."),
            _listed("Any one of these is enough", answer.options, asked),
            _together(answer.combination, asked),
        ]
        if not answer.options and not answer.combination:
            sections.append(["No format, size or device that is known would hold it."])
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _listed(title: str, options: Sequence[Option], asked: Plan) -> list[str]:
    if not options:
        return []
    rows = [("  " + " ".join(option.overrides), option.change.what, _outcome(option.plan, asked)) for option in options]
    return aligned([(title, "", "then it holds"), *rows], "<<<", indent=0)


def _together(option: Option | None, asked: Plan) -> list[str]:
    if option is None:
        return []
    outcome = f"{option.change.what}; then it holds {_outcome(option.plan, asked)}"
    return ["These together are enough", *command_words(option.overrides), *paragraph(outcome, indent=4)]


def _outcome(result: Plan, asked: Plan) -> str:
    length = "" if result.max_seq_len == asked.max_seq_len else f" of {result.max_seq_len:,}"
    free = readable_bytes(result.free_bytes_per_device)
    return f"{counted(result.max_sequences, 'sequence')}{length}" + (f", {free} free" if _is_bounded(asked) else "")


def _is_bounded(asked: Plan) -> bool:
    """Whether the workload leaves memory unused; one of as many sequences as fit leaves none worth telling."""
    return asked.capacity.requested_batch_size is not None
