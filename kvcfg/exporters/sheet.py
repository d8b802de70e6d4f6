"""What an exporter writes down while it goes through a config."""

from __future__ import annotations

from typing import Any

from kvcfg.errors import ConfigError, Problem
from kvcfg.exporters.exported import Conversion, Export, Loss, SilentChange
from kvcfg.exporters.leftovers import leftovers
from kvcfg.planning.plans import Plan


class Sheet:
    """An export in the making; at the end everything that matters and was not dealt with is a loss.

    Args:
        engine: name of the engine.
        version: the version whose rules are followed.
        plan: the planned cache.
        dashed: whether names of settings are written with dashes, as flags are.

    Attributes:
        settings: what the file will say, in order.
    """

    def __init__(self, engine: str, version: str, plan: Plan, *, dashed: bool = False) -> None:
        self.engine, self.version, self.plan, self._dashed = engine, version, plan, dashed
        self.experiment = plan.experiment
        self.settings: dict[str, Any] = {}
        self._said: set[str] = set()
        self._losses: list[Loss] = []
        self._changes: list[SilentChange] = []
        self._conversions: list[Conversion] = []
        self._needs: list[str] = []
        self._problems: list[Problem] = []

    def say(self, *keys: str, **settings: Any) -> None:
        """Note that `keys` are dealt with; `settings` go to the file."""
        self._said.update(keys)
        self.settings |= {name.replace("_", "-") if self._dashed else name: value for name, value in settings.items()}

    def lose(self, key: str, becomes: str, why: str) -> None:
        """Something that the engine cannot be told."""
        self._said.add(key)
        self._losses.append(Loss(key, self.asked(key), becomes, why))

    def change(self, setting: str, written: Any, becomes: Any, rule: str, source: str) -> None:
        """A setting that the engine will replace."""
        self._changes.append(SilentChange(setting, written, becomes, rule, source))

    def convert(self, key: str, setting: str, value: Any, how: str) -> None:
        """A number that the engine counts in something else."""
        self._said.add(key)
        self._conversions.append(Conversion(key, self.asked(key), setting, value, how))

    def need(self, text: str) -> None:
        """Something else that it takes to run."""
        self._needs.append(text)

    def refuse(self, key: str, rule: str, fix: str | None) -> None:
        """A value for which there is no export."""
        asked = self.asked(key)
        has_sections = isinstance(asked, list) and any(isinstance(item, dict) for item in asked)
        problem = Problem(key, rule, ... if has_sections else asked, fix)
        if problem not in self._problems:
            self._problems.append(problem)

    def asked(self, key: str) -> Any:
        """The value of a key of the experiment, as JSON would hold it; None through sections that are null."""
        value: Any = self.experiment.model_dump(mode="json")
        for part in key.split("."):
            value = None if value is None else value[part]
        return value

    def finish(self, file_name: str, launch: tuple[str, ...], file_flag: str) -> Export:
        """The export.

        Raises:
            ConfigError: with every value that cannot be exported.
        """
        self._lose_the_rest()
        if self._problems:
            raise ConfigError(self._problems)
        if self.plan.shortfall is not None:
            self.need(f"A larger device or a smaller workload: {self.plan.shortfall.why}.")
        return Export(
            self.engine,
            self.version,
            file_name,
            self.settings,
            launch,
            file_flag,
            tuple(self._losses),
            tuple(self._changes),
            tuple(self._conversions),
            tuple(self._needs),
        )

    def _lose_the_rest(self) -> None:
        for key, becomes, why in leftovers(self.plan):
            if key not in self._said:
                self.lose(key, becomes, why)
