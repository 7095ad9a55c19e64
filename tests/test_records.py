"""Identity of a run, defaults of all options, atomic writes, one process per directory."""

import dataclasses
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from delta_transfer.common.errors import UserError
from delta_transfer.common.options import Options, option
from delta_transfer.engine.callbacks import CONTENT, Progress, StageRunner
from delta_transfer.engine.config import RunConfig
from delta_transfer.engine.config import name_of as config_name
from delta_transfer.methods import Regularizer, method_config
from delta_transfer.records import checkpoints
from delta_transfer.records.files import write_atomically
from delta_transfer.records.identity import identity_of, run_id, run_identity
from delta_transfer.records.locks import InUse
from delta_transfer.records.run_directory import SCHEMA, RunDirectory

from .miniature import composed

GOLDEN = Path(__file__).parent / "golden" / "defaults.json"

# ---- defaults -------------------------------------------------------------------------------------------------------


def groups(of: type[Options] = Options) -> Iterator[type[Options]]:
    """Every group of options of the package: the run's, and those of all readers, methods and optimizers."""
    for group in of.__subclasses__():
        if issubclass(group, Regularizer):  # whose group in a configuration has the same options
            continue
        if dataclasses.is_dataclass(group) and group.__module__.startswith("delta_transfer."):
            yield group
        yield from groups(group)


def defaults_of(group: type[Options], identity: bool | None = None) -> dict[str, object]:
    """The default of each option, or of those that are (not) part of a run's identity."""
    found: dict[str, object] = {}
    for entry in dataclasses.fields(group):
        if identity in (None, entry.metadata.get("identity", True)):
            value = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
            found[entry.name] = type(value).__name__ if isinstance(value, Options) else value
    return found


def test_whoever_changes_a_default_raises_the_version_of_its_group(request):
    by_name = {group.__name__: group for group in groups()}
    assert {"RunConfig", "ScheduleConfig", "DELTAConfig", "AttentionConfig", "SGDConfig", "ListsConfig"} <= set(by_name)
    assert len(by_name) == len(set(groups()))
    found = {name: {"version": group.version} | defaults_of(group) for name, group in by_name.items()}
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    changed = [
        f"{name}.{key}"
        for name, group in by_name.items()
        for key, value in defaults_of(group, identity=True).items()
        if known.get(name, {}).get("version") == group.version and known[name].get(key, value) != value
    ]
    assert not changed, (
        f"The default of {', '.join(changed)} differs from tests/golden/{GOLDEN.name}: a run of before and a run of "
        "now would have one name and different results. Set `version: ClassVar[int]` of that group to the next number, "
        f"then run: pytest tests/{Path(__file__).name} --regenerate"
    )
    if request.config.getoption("--regenerate"):
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        known = found
    assert found == known, (
        "Options were added or removed, or a version was raised. Does the default of a new option mean what its "
        "absence meant? If not, raise the version of its group as well. Then run: "
        f"pytest tests/{Path(__file__).name} --regenerate"
    )


# ---- identity -------------------------------------------------------------------------------------------------------


@dataclass
class Inner(Options):
    size: int = option(3, "a size")


@dataclass
class Chosen(Options):
    name: str = option("first", "a name")


@dataclass
class Before(Options):
    name: str = option("group", "a name")
    alpha: float = option(0.5, "a strength")
    inner: Inner = option(Inner, "a group")
    place: str = option("here", "a place", identity=False)


@dataclass
class After(Before):
    """The options with one more key and some more groups."""

    added: list[int] = option([1], "a new key")
    more: Inner = option(Inner, "a new group")
    chosen: Chosen = option(Chosen, "a new choice by name")
    perhaps: Inner | None = option(None, "another one")


def with_version(version: int, group: type[Options]) -> type[Options]:
    return dataclass(type(group.__name__, (group,), {"version": version}))


def test_a_new_key_with_a_neutral_default_changes_no_identity():
    assert identity_of(Before()) == identity_of(After())
    assert identity_of(Before(alpha=0.25)) == identity_of(After(alpha=0.25)) == {"name": "group", "alpha": 0.25}


def test_what_differs_from_the_defaults_is_the_identity():
    changed = [
        *(After(), After(name="other"), After(alpha=0.25), After(inner=Inner(4)), After(added=[])),
        *(After(more=Inner(4)), After(chosen=Chosen("second")), After(perhaps=Inner()), After(perhaps=Inner(4))),
    ]
    identities = [json.dumps(identity_of(options)) for options in changed]
    assert len(set(identities)) == len(identities)
    assert identity_of(After(inner=Inner(4))) == {"name": "group", "inner": {"size": 4}}


def test_a_key_without_identity_is_no_part_of_it():
    assert identity_of(After(place="there")) == identity_of(After())


def test_a_raised_version_is_part_of_it():
    assert identity_of(with_version(2, Before)()) == {"version": 2, "name": "group"}
    raised = with_version(2, Inner)
    assert identity_of(Before(inner=raised())) == {"name": "group", "inner": {"version": 2}}
    later = dataclass(type("Later", (Before,), {"inner": option(raised, ""), "__annotations__": {"inner": Inner}}))
    assert identity_of(later()) == {"name": "group", "inner": {"version": 2}}


def test_the_terms_of_a_sum_are_part_of_it():
    terms = {"lwf": {"name": "lwf"}, "at": {"name": "at"}}
    plain_sum = identity_of(method_config({"name": "sum", "terms": terms}))
    assert plain_sum["terms"].keys() == {"lwf", "at"}
    other = identity_of(method_config({"name": "sum", "terms": terms | {"at": {"name": "at", "alpha": 7.0}}}))
    assert other["terms"]["at"] == plain_sum["terms"]["at"] | {"alpha": 7.0}


@pytest.fixture(scope="module")
def default() -> RunConfig:
    return composed()


def changed(config: RunConfig, word: str, value: object) -> RunConfig:
    group, _, key = word.rpartition(".")
    if not group:
        return config.replace(**{key: value})
    return changed(config, group, find(config, group).replace(**{key: value}))


def find(config: RunConfig, word: str) -> Options:
    found: Options = config
    for name in word.split("."):
        found = getattr(found, name)
    return found


def name_of(config: RunConfig, data: str = "d", weights: str = "w") -> str:
    identity = run_identity(config, data, weights)
    return run_id(config.dataset.name, config.backbone.name, config.reg.name, config.seed, identity)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("device", "cpu"), ("results_dir", "elsewhere"), ("schedule.log_every", 7), ("schedule.eval_every", 7)],
        *[("model_card", True), ("reg.attention.forward_images", 7), ("backbone.weights", "elsewhere.safetensors")],
        *[("dataset.root", "/there"), ("dataset.download", True)],
    ],
)
def test_places_and_logging_are_not_part_of_a_runs_name(key, value, default):
    config = composed("dataset=cub") if key.startswith("dataset") else default
    assert name_of(changed(config, key, value)) == name_of(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("seed", 1), ("reg.alpha", 0.5), ("schedule.lr", 0.5), ("split.val_fraction", 0.2)],
        *[("schedule.decay", "cosine"), ("schedule.decay_also_at", [0.9]), ("schedule.pad", 2)],
        *[("schedule.accumulate", 2), ("optimizer.momentum", 0.5), ("reg.attention.images", 7)],
    ],
)
def test_settings_are(key, value, default):
    assert name_of(changed(default, key, value)).rpartition("-")[2] != name_of(default).rpartition("-")[2]


def test_only_runs_in_bf16_have_the_second_version_of_the_evaluation(default):
    """Runs in bf16 have new names, since they were once measured in bf16. Runs in fp32 keep their names."""
    identities = {
        precision: config_name(default.replace(precision=precision), "d", "w")[1] for precision in ("fp32", "bf16")
    }
    assert identities["bf16"].pop("evaluation") == {"version": 2}
    assert "evaluation" not in identities["fp32"]


def test_so_are_the_choices_the_data_and_the_weights(default):
    choices = [composed("reg=l2_sp"), composed("optimizer=adamw"), composed("schedule=paper")]
    names = [name_of(config) for config in (default, *choices)]
    names += [name_of(default, data="other"), name_of(default, weights="other")]
    assert len({name.rpartition("-")[2] for name in names}) == len(names)


def test_names_of_runs_stay(default):
    assert name_of(default) == "glyphs-small_resnet-delta-s0-4bab2627"
    assert name_of(composed("dataset=cub", "schedule=tll", "reg=l2_sp", "seed=3")) == "cub-resnet101-l2_sp-s3-0f3f9bb5"


def test_the_configuration_itself_is_left_alone(default):
    before = dataclasses.asdict(default)
    run_identity(default, "d", "w")
    assert dataclasses.asdict(default) == before


# ---- files ----------------------------------------------------------------------------------------------------------


def test_only_one_process_works_in_a_run_directory(tmp_path):
    with (
        RunDirectory(tmp_path / "run"),
        pytest.raises(InUse),
        RunDirectory(tmp_path / "run"),
    ):
        pass
    with RunDirectory(tmp_path / "run"):  # free again
        pass


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_file_gets_its_name_when_it_is_on_disk_and_the_name_is_on_disk_afterwards(tmp_path, monkeypatch):
    """A power failure leaves the old file or the whole new one."""
    done = []

    def spy(name: str) -> None:
        whole = getattr(os, name)

        def call(*arguments):
            kind = name
            if name == "fsync":
                kind = "sync folder" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "sync file"
            done.append(kind)
            return whole(*arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace"):
        spy(name)
    write_atomically(tmp_path / "file", b"new")
    assert done == ["sync file", "replace", "sync folder"]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 3'])
def test_a_summary_that_is_no_record_is_not_done(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    assert RunDirectory(tmp_path).summary() is None


@pytest.mark.parametrize("schema", [{}, {"schema": SCHEMA - 1}, {"schema": SCHEMA + 1}])
def test_records_of_other_versions_are_refused(tmp_path, schema):
    (tmp_path / "summary.json").write_text(json.dumps({"schema": SCHEMA, "test_top1": 50.0}))
    assert RunDirectory(tmp_path).summary()["test_top1"] == 50.0
    (tmp_path / "summary.json").write_text(json.dumps(schema | {"test_top1": 50.0}))
    with pytest.raises(UserError, match="summary.json: "):
        RunDirectory(tmp_path).summary()


def test_a_checkpoint_of_another_version_is_named_and_not_used(tmp_path, monkeypatch, capsys):
    path, state = tmp_path / "last.pt", {"progress": {"iterations_done": 3}}

    def write(version: int) -> None:
        with monkeypatch.context() as patch, open(path, "wb") as file:
            patch.setattr(checkpoints, "FORMAT", version)
            checkpoints.write_checkpoint(file, state, "this machine")

    assert checkpoints.read_checkpoint(path, "this machine") is None  # there is none
    write(checkpoints.FORMAT)
    assert state.items() <= checkpoints.read_checkpoint(path, "this machine").items()
    assert not capsys.readouterr().out
    assert state.items() <= checkpoints.read_checkpoint(path, "another").items()
    assert "this machine" in capsys.readouterr().out
    write(checkpoints.FORMAT - 1)
    assert checkpoints.read_checkpoint(path, "this machine") is None
    assert f"{path} cannot be used" in capsys.readouterr().out and not path.exists()


@pytest.mark.parametrize("lacking", CONTENT)
def test_a_checkpoint_without_a_part_is_named_and_removed(tmp_path, capsys, lacking):
    whole = {name: kind() if isinstance(kind, type) else None for name, kind in CONTENT.items()}
    whole["progress"] = asdict(Progress.beginning())
    runner = SimpleNamespace(stages=[None])
    with open(tmp_path / "last.pt", "wb") as file:
        checkpoints.write_checkpoint(file, {key: whole[key] for key in whole if key != lacking}, "this machine")

    def read() -> dict | None:
        return checkpoints.read_checkpoint(
            tmp_path / "last.pt", "this machine", lambda state: StageRunner._fits(runner, state)
        )

    assert read() is None
    assert "last.pt cannot be used" in capsys.readouterr().out and not (tmp_path / "last.pt").exists()
    with open(tmp_path / "last.pt", "wb") as file:
        checkpoints.write_checkpoint(file, whole, "this machine")
    assert read() is not None
