"""The jobs of a sweep: all are checked before the first one begins, and a key goes to the methods that have it."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from ..common.console import log, quoted
from ..common.errors import UserError
from ..common.options import OptionError
from ..engine import devices
from ..engine.config import RunConfig
from ..engine.devices import Stopped, stop_signal
from .compose import GROUPS, checked_config, compose, parsed
from .explain import apply, has_key, is_group, unknown_key

Jobs = dict[tuple[str, ...], RunConfig]  # the words of each, and its configuration
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def take_the_sweepers_place(to_launch: Callable[[Jobs], list[list[str]]]) -> None:
    """Makes Hydra use CheckedSweeper. Hydra takes sweepers of other names only from a package of plugins.

    to_launch: gets the checked jobs of a sweep before the first one begins, and returns the words of those to launch.
    """
    CheckedSweeper.to_launch = staticmethod(to_launch)
    Plugins.instance().class_name_to_class[BASIC] = CheckedSweeper


class CheckedSweeper(Sweeper):
    """Checks all jobs. Hydra's own sweeper composes each job twice; here jobs of the same choices are composed once."""

    launcher: Launcher
    count: ClassVar[int] = 0  # jobs of the sweep that this process carries out
    to_launch: ClassVar[Callable[[Jobs], list[list[str]]]]

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None):
        self.batch_size, self.params = max_batch_size, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.composed, self.loader = config, hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        checked = self.checked(self.jobs([*(f"{key}={value}" for key, value in self.params.items()), *arguments]))
        CheckedSweeper.count = len(checked)
        folder = Path(self.composed.hydra.sweep.dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.composed, folder / "multirun.yaml")
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}.") from None
        jobs = CheckedSweeper.to_launch(checked)
        on_cpu = any(devices.uses_cpu(config.device) for config in checked.values())
        if jobs and on_cpu and self.composed.hydra.runtime.choices["hydra/launcher"] == "joblib":
            devices.share_cores()  # says whether this machine is busy; each worker would repeat it
        skipped, at_once = len(checked) - len(jobs), self.batch_size or len(checked)
        for first in range(0, len(jobs), at_once):
            for job in self.launcher.launch(jobs[first : first + at_once], initial_job_idx=skipped + first):
                _ = job.return_value  # raises the error that ended the job

    def jobs(self, words: Sequence[str]) -> list[list[str]]:
        """The words of each job. If a key is there twice, the last word counts."""
        parser = OverridesParser.create(config_loader=self.loader)
        values: dict[str, list[str]] = {}
        for override in parser.parse_overrides(list(words)):
            key = override.get_key_element()
            if override.is_interval_sweep():
                raise UserError(f"{quoted(str(override.input_line))}: name the values, such as {key}=0.1,1")
            found: list[str] = []
            with suppress(ValueError, HydraException):  # range(1,2,0), glob(*) for a key that is not a group
                found += values_of(override)
            if not found:
                raise UserError(f"{quoted(str(override.input_line))} names no value: there is nothing to run.")
            values[key] = [f"{key}={value}" for value in found]
        return [list(job) for job in itertools.product(*values.values())]

    def checked(self, jobs: list[list[str]]) -> Jobs:
        """The jobs, each once, without the keys that their methods do not have. Raises UserError."""
        config_name = self.composed.hydra.job.config_name
        for_all = OmegaConf.to_container(self.composed.hydra.overrides.hydra)
        assert isinstance(for_all, list)
        parser = OverridesParser.create(config_loader=self.loader)
        overrides = {word: parser.parse_override(word) for word in dict.fromkeys(itertools.chain(*jobs))}
        of_key = {(one.key_or_group, one.package): one for one in overrides.values()}  # looking a group up is slow
        names = {key for key, one in of_key.items() if is_group(self.loader, one)}
        groups = {word for word, one in overrides.items() if (one.key_or_group, one.package) in names}
        bases: dict[tuple[str, ...], DictConfig] = {}

        def base_of(words: Sequence[str]) -> DictConfig:
            choices = tuple(word for word in words if word in groups)
            if choices not in bases:
                bases[choices] = base = compose(self.loader, config_name, [*for_all, *choices])
                with open_dict(base):
                    del base["hydra"]  # no job sets it, and a copy takes time
            return bases[choices]

        of_methods = {
            word for word, one in overrides.items() if one.key_or_group.startswith("reg.") and not one.is_add()
        } - groups
        owners: dict[str, dict[str, None]] = {}  # of a key: methods of the sweep, in its order
        others: dict[str, dict[str, None]] = {}
        made: dict[tuple[str, ...], None] = {}
        for job in jobs:
            base, kept = base_of(job), []
            for word in job:
                lacks = word in of_methods and not has_key(base, key := overrides[word].key_or_group)
                if word in of_methods:
                    (others if lacks else owners).setdefault(key, {})[base.reg.name] = None
                if not lacks:
                    kept.append(word)
            made[tuple(kept)] = None
        for key, methods in others.items():
            if key not in owners:
                raise unknown_key(base_of(jobs[0]), key)
            lack = "lack" if len(methods) > 1 else "lacks"
            theirs = f"{', '.join(methods)}, which {lack} the key"
            log.info(f"{key} is set for {', '.join(owners[key])}, and not for {theirs}")
        configs: Jobs = {}
        for words in made:
            if stop_signal() is not None:
                raise Stopped
            config = copy.deepcopy(base_of(words))
            for word in words:
                if word not in groups:
                    apply(config, word, overrides[word])
            try:
                configs[words] = checked_config(config, words)
            except OptionError as error:
                its_own = " ".join(quoted(word) for word in words if any(word not in other for other in made))
                raise OptionError(error.key, f"{error} (in {its_own})" if its_own else str(error)) from None
        return configs


# --- Words ---


def for_sweep(words: Sequence[str]) -> list[str]:
    """The words of a sweep. Keys of a choice wait for the jobs, since the choice may not be the first of several.

    Hydra first composes the words that have one value, and then each job with all words.
    """
    made = []
    for word in words:
        override = parsed(word)
        group, dot, _ = override.key_or_group.partition(".")
        if dot and group in GROUPS and not override.is_delete() and not override.is_sweep_override():
            key, _, value = word.partition("=")
            word = f"{key}=choice({value})"
        made.append(word)
    return made


def first_values(words: Sequence[str]) -> list[str]:
    """The words of the first job of a sweep."""
    overrides = [(word, parsed(word)) for word in words]
    return [
        f"{one.get_key_element()}={values_of(one)[0]}" if one.is_sweep_override() else word for word, one in overrides
    ]


def values_of(override: Override) -> list[str]:
    """The values of a word, each as a word of one value has it."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    return [
        # Hydra escapes a text without quotes, and its grammar then refuses letters that are not ASCII.
        QuotedString(value, Quote.single).with_quotes() if isinstance(value, str) and not value.isascii() else word
        for value, word in zip(override.sweep_iterator(), override.sweep_string_iterator(), strict=True)
    ]
