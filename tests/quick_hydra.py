"""Makes Hydra do repeated work once in this process: it took half of the time of all tests.

Commands in processes of their own (test_launchers.py, tests/children.py) do all of it.
"""

import copy
from dataclasses import replace

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper


def compose_each_choice_once(patch: pytest.MonkeyPatch) -> None:
    """A file is read, a word parsed, and a choice of files composed once; then they are copied.

    What is set beside the files, such as reg.alpha=1, is applied each time. Files of a folder of one's own
    (--config-dir) may change and are read each time.
    """
    read, parse, store = ImportlibResourcesConfigSource.load_config, OverridesParser.parse_rule, ConfigStore.store
    list_defaults, compose = (
        config_loader_impl.create_defaults_list,
        ConfigLoaderImpl._compose_config_from_defaults_list,
    )
    files, words, choices, composed = {}, {}, {}, {}

    def read_once(self, config_path):
        key = self.path, config_path
        if key not in files:
            files[key] = read(self, config_path)
        return replace(files[key], config=copy.deepcopy(files[key].config))

    def parse_once(self, text, rule):
        if (text, rule) not in words:
            words[text, rule] = parse(self, text, rule)
        return copy.copy(words[text, rule])

    def list_once(repo, config_name, overrides_list, **options):
        if any(source.scheme() == "file" for source in repo.get_sources()):
            return list_defaults(repo, config_name, overrides_list, **options)
        chosen = [
            one for one in overrides_list if repo.group_exists(one.key_or_group) and not isinstance(one.value(), dict)
        ]
        names = (one.input_line for one in chosen)
        key = config_name, *names, *(source.path for source in repo.get_sources()), *options.values()
        if key not in choices:
            choices[key] = list_defaults(repo, config_name, overrides_list, **options)
        values = [one for one in overrides_list if one not in chosen and not one.is_sweep_override()]
        return replace(choices[key], config_overrides=values)

    def compose_once(self, defaults, repo):
        if id(defaults) not in composed:
            composed[id(defaults)] = defaults, compose(self, defaults, repo)
        return copy.deepcopy(composed[id(defaults)][1])

    def share(self, delegate):  # Hydra copies all schemas
        self.delegate, self.cache = copy.copy(delegate), {}

    def store_and_forget(self, *arguments, **options):
        choices.clear()
        store(self, *arguments, **options)

    patch.setattr(ImportlibResourcesConfigSource, "load_config", read_once)
    patch.setattr(OverridesParser, "parse_rule", parse_once)
    patch.setattr(config_loader_impl, "create_defaults_list", list_once)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", compose_once)
    patch.setattr(CachingConfigRepository, "__init__", share)
    patch.setattr(ConfigStore, "store", store_and_forget)


def skip_second_compositions(patch: pytest.MonkeyPatch) -> None:
    """Hydra composes a command once more to find its mode, and the jobs of a sweep before the first begins."""
    get_mode = Hydra.get_mode

    def mode_of(self, config_name, overrides):
        decides = any(word.lstrip("+~").startswith(("experiment", "hydra.mode")) for word in overrides)
        return get_mode(self, config_name, overrides) if decides else None

    patch.setattr(Hydra, "get_mode", mode_of)
    patch.setattr(Sweeper, "validate_batch_is_legal", lambda *_: None)
