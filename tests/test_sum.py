"""Sums of methods: their penalties and states are those of their terms, and what cannot be added is refused."""

import copy
import json

import pytest
import torch

from delta_transfer.cli.compose import check_values
from delta_transfer.common.errors import UserError
from delta_transfer.common.options import OptionError
from delta_transfer.engine.config import check_choices
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer
from delta_transfer.experiment.costs import decides_cost
from delta_transfer.experiment.failures import strengths
from delta_transfer.experiment.fitting import describe_fit
from delta_transfer.inspect.attention import attention_of
from delta_transfer.inspect.finished import config_of
from delta_transfer.methods import (
    AFA,
    AT,
    DELTA,
    FM,
    L2,
    L2FE,
    L2SP,
    L2TWW,
    AFASpatial,
    BiTuning,
    DELTAWithoutAttention,
    LwF,
    Sum,
)
from delta_transfer.methods.base import Batch
from delta_transfer.methods.sum import SumConfig, about_term
from delta_transfer.models import Network
from delta_transfer.models.zoo import SmallResNet
from delta_transfer.records.checkpoints import read_checkpoint, write_checkpoint
from delta_transfer.records.identity import run_identity
from delta_transfer.reporting.comparison import compare

from .conftest import TinyNet, randomise_batchnorm
from .miniature import composed, delta_run, tiny_overrides, write_cub

IMAGES, LABELS = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(5)), torch.arange(8) % 3
BATCH = Batch(IMAGES, LABELS)


def networks() -> tuple[Network, Network]:
    """A source, and a target with a new head that has moved away from it."""
    torch.manual_seed(0)
    model = TinyNet()
    randomise_batchnorm(model)
    source = Network(model, "fc", ("conv1", "conv2")).freeze()
    target = source.with_new_head(3, seed=1).requires_grad_(True)
    return source, target


def started(method, target: Network, source: Network):
    shapes = source.map_shapes(8, 6, training=False)
    method.setup(target, shapes, {**shapes, "logits": (source.classes,)})
    return method


def all_terms() -> dict:
    delta = DELTA(alpha=0.1)
    delta.load_fitted({tap: torch.linspace(0, 1, 5) for tap in ("conv1", "conv2")})
    terms = {"lwf": LwF(), "at": AT(), "fm": FM(), "two": FM(pairs="single"), "sp": L2SP(), "delta": delta}
    return terms | {"plain": DELTAWithoutAttention(), "afa": AFASpatial(0.1), "ww": L2TWW(meta_lr=0.01)}


def learning(method, accumulate: int = 1) -> TrainState:
    """The state in which SGD trains a target that the method has set up."""
    source, target = networks()
    started(method, target, source)
    optimizer = make_optimizer(target, method, SGDConfig(), ScheduleConfig(iterations=9, lr=0.05))
    return TrainState(target.train(), source, optimizer, "fp32", accumulate=accumulate)


def test_the_sum_is_the_sum_of_its_terms_and_one_of_the_head():
    source, target = networks()
    terms = all_terms()
    whole = started(Sum(terms, beta=0.5, weight_decay=0.3), target, source)
    whole.loss_scale = 2  # which a penalty that sums over the batch multiplies by
    assert whole.terms["delta"].beta == 0 and whole.weight_decay == 0.3
    with torch.no_grad():
        for p in target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    outputs, sources = target.eval()(IMAGES), source(IMAGES)
    found = whole.penalty(target, outputs, sources)
    expected = {}
    for name, term in terms.items():
        for loss, value in term.penalty(target, outputs, sources).items():
            expected[f"{name}.{loss}"] = value
    assert "delta.head" not in expected and terms["delta"].loss_scale == 2
    expected["head"] = 0.25 * sum(p.square().sum() for p in target.head_parameters().values())
    assert len(found) == len(terms) + 1
    torch.testing.assert_close(found, expected)
    assert all(value > 0 for value in found.values())
    # The gradient too.
    weight = target.traced.get_parameter("conv1.weight")
    of_sum, of_terms = (torch.autograd.grad(sum(d.values()), weight, retain_graph=True)[0] for d in (found, expected))
    torch.testing.assert_close(of_sum, of_terms)


def test_a_sum_needs_and_trains_what_its_terms_do():
    def needs(*terms) -> tuple[bool, ...]:
        needs = Sum(dict(zip("abc", terms, strict=False))).needs
        return needs.source, needs.source_logits, needs.taps, needs.other_sources

    assert needs(L2SP()) == (False, False, False, False)
    assert needs(LwF(), L2SP()) == (True, True, False, False)  # L2-SP starts at its source
    assert needs(AT(), LwF()) == (True, True, True, True)
    assert needs(AT(), DELTAWithoutAttention()) == (True, False, True, False)
    source, target = networks()
    whole = started(Sum({"ww": L2TWW(), "lwf": LwF(), "at": AT()}), target, source)
    ww, lwf, _ = whole.terms.values()
    assert set(whole.trained()) == {*ww.adapters.parameters(), *lwf.heads.parameters()}  # and no meta-network


def test_a_sum_of_one_is_that_method():
    """Weights, momentum and meta-networks are equal, after L2T-ww's own step, too."""
    states = []
    for make in (lambda: L2TWW(meta_lr=0.01), lambda: Sum({"ww": L2TWW(meta_lr=0.01)})):
        torch.manual_seed(1)
        method = make()
        state = learning(method)
        for _ in range(3):
            _, _, metrics = train_step(state, method, BATCH)
        ww = method.terms["ww"] if isinstance(method, Sum) else method
        states.append([*state.target.state_dict().values(), *ww.meta_networks.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    assert set(metrics) >= {"attention_ww.meta_loss", "attention_ww.entropy", "attention_ww.conv1>conv2"}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_others_penalties_are_in_the_kept_step_of_l2t_ww_and_not_in_what_judges_its_meta_networks(accumulate):
    torch.manual_seed(1)
    method = Sum({"ww": L2TWW(meta_lr=0.01), "lwf": LwF(), "at": AT()})
    state = learning(method, accumulate)
    alone, losses = method.terms["ww"], []
    _, terms, _ = train_step(state, method, BATCH)
    assert set(terms) == {"cross_entropy", "ww.matching", "lwf.distillation", "at.activity"}
    micro_batches = BATCH.split(accumulate)
    sources = [state.forward_source(batch.images) for batch in micro_batches]
    modules = {name: value.clone() for name, value in alone.state_dict().items() if isinstance(value, torch.Tensor)}
    adam = alone.get_extra_state()
    for alpha in (1000.0, 0.0):
        method.terms["at"].alpha = method.terms["lwf"].alpha = alpha
        alone.load_state_dict(modules | {"_extra_state": adam})
        losses.append(alone.meta_step(state, micro_batches, sources).item())
    assert losses[0] == losses[1]


def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    def begun() -> tuple[TrainState, Sum]:
        torch.manual_seed(1)
        method = Sum(all_terms(), beta=0.01)
        return learning(method), method

    def state_of(state: TrainState, method: Sum) -> list[torch.Tensor]:
        tensors = [*state.target.state_dict().values(), *method.parameters()]
        return tensors + [s["momentum_buffer"] for s in state.optimizer.state_dict()["state"].values()]

    state, method = begun()
    train_step(state, method, BATCH)
    saved = {"target": state.target, "optimizer": state.optimizer, "method": method}
    with (tmp_path / "last.pt").open("wb") as file:
        write_checkpoint(file, {key: value.state_dict() for key, value in saved.items()}, "cpu")
    train_step(state, method, BATCH)

    again, its_method = begun()
    saved = read_checkpoint(tmp_path / "last.pt", "cpu")
    for name, part in (("target", again.target), ("optimizer", again.optimizer), ("method", its_method)):
        part.load_state_dict(saved[name])
    before = [value.clone() for value in state_of(again, its_method)]
    train_step(again, its_method, BATCH)
    assert all(map(torch.equal, state_of(again, its_method), state_of(state, method)))
    assert not all(map(torch.equal, state_of(again, its_method), before))


@pytest.mark.parametrize(
    ("term", "why"),
    [
        (AFA, "AFA trains in stages"),
        (L2, "L2 has nothing to add"),
        (L2FE, "L2FE has nothing to add"),
        (lambda: Sum({"at": AT()}), "Sum is a sum itself"),
        (BiTuning, "several views"),
    ],
)
def test_what_cannot_be_added_is_refused(term, why):
    with pytest.raises(UserError, match=f"reg.terms.x cannot be a term.*{why}"):
        Sum({"at": AT(), "x": term()})


def test_names_and_fits_that_clash_are_refused():
    with pytest.raises(UserError, match="cannot have this name.*'update'"):
        Sum({"update": AT()})
    with pytest.raises(UserError, match=r"Only one term.*reg\.terms\.a and reg\.terms\.b"):
        Sum({"a": DELTA(), "b": DELTA()})


# --- configuration ---

SUM = ["reg=sum", "+reg@reg.terms.at=at", "+reg@reg.terms.delta=delta"]


def test_terms_are_added_on_the_command_line():
    config = composed(*SUM, "reg.terms.at.alpha=3", "reg.beta=0.2", "reg.terms.delta.attention.images=8").reg
    assert isinstance(config, SumConfig) and config.name == "at_delta"
    # Of the terms' own nothing is left that could count twice, and the record says so.
    assert (config.beta, config.terms["delta"].beta, config.terms["at"].weight_decay) == (0.2, 0.0, 0.0)
    made = config.build()
    assert [type(term) for term in made.terms.values()] == [AT, DELTA]
    assert (made.terms["at"].alpha, made.terms["delta"].attention.images, made.beta) == (3.0, 8, 0.2)
    (fitting,) = made.parts_to_fit()
    assert (fitting.needs.fitted, fitting.term, fitting.fit_options()["images"]) == ("attention", "delta", 8)


def test_the_files_of_sums_are_sums_of_their_terms():
    for name in ("lwf_at", "lwf_fm"):
        config = composed(f"reg={name}").reg
        assert "_".join(config.terms) == config.name == name
        added = composed("reg=sum", *(f"+reg@reg.terms.{term}={term}" for term in config.terms)).reg
        assert added == config  # the same run under the same name
        assert config.title == {"lwf_at": "LwF+AT", "lwf_fm": "LwF+FM"}[name]
    three = composed("reg=lwf_at", "+reg@reg.terms.sp=l2_sp").reg.build()
    assert list(three.terms) == ["lwf", "at", "sp"]


def test_what_is_fitted_is_shared_with_the_term_alone():
    alone, added = composed("reg=delta"), composed(*SUM)
    (one,), (other,) = (config.reg.build().parts_to_fit() for config in (alone, added))
    fitted_to = [describe_fit(*of, "weights", "data") for of in ((alone, one), (added, other))]
    assert fitted_to[0] == fitted_to[1] and fitted_to[0]["method"] == "delta"
    assert (one.term, other.term) == (None, "delta")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["reg=sum"], "reg.terms"),
        (["reg=lwf_at", "+reg.terms.x.alpha=1"], "reg.terms.x.alpha"),
        (["reg=lwf_at", "reg.terms.at.alpha=-1"], "reg.terms.at.alpha"),
        (["reg=lwf_at", "reg.terms.at.pairs=some"], "reg.terms.at.pairs"),
        (["reg=lwf", "reg.temperature=0"], "reg.temperature"),
        (["reg=lwf_at", "reg.terms.lwf.temperature=0"], "reg.terms.lwf.temperature"),
        (["reg=lwf_at", "reg.weight_decay=-1"], "reg.weight_decay"),
        (["reg=lwf_at", "reg.name='../x'"], "reg.name"),
    ],
)
def test_mistakes_are_named_by_their_key(overrides, key):
    with pytest.raises(OptionError, match=key) as raised:
        composed(*overrides)
    assert raised.value.key == key


@pytest.mark.parametrize("mistake", ["reg.terms.at.alfa=1", "reg.terms.at.alpha=x", "reg.terms=3"])
def test_a_term_has_its_own_schema(mistake):
    with pytest.raises(Exception, match="reg.terms"):
        composed("reg=lwf_at", mistake)


def test_beta_of_a_term_is_refused_as_it_has_no_effect():
    overrides = ["reg=lwf_at", "reg.terms.at.beta=0.1"]
    with pytest.raises(OptionError) as raised:
        check_values(overrides, composed(*overrides))
    assert raised.value.key == "reg.terms.at.beta"


def test_messages_of_a_term_speak_of_its_keys():
    source, target = networks()
    whole = Sum({"mine": FM(pairs="single")})
    with pytest.raises(UserError, match=r"^reg\.terms\.mine\.pairs=single needs.*reg\.terms\.mine\.pairs=all_to_all"):
        whole.setup(target, source.map_shapes(8, 6, training=False), {"a": (3, 5, 5)})
    with (
        pytest.raises(OptionError, match=r"^reg\.terms\.mine\.alpha, not reg\.terms\.mine\.beta") as raised,
        about_term("mine"),
    ):
        raise OptionError("reg.alpha", "reg.alpha, not reg.beta")
    assert raised.value.key == "reg.terms.mine.alpha"
    keys = strengths(composed("reg=lwf_at", "+reg@reg.terms.x=delta").reg)
    assert keys == ["reg.terms.lwf.alpha", "reg.terms.at.alpha", "reg.terms.x.alpha"]
    assert strengths(composed("reg=afa").reg) == ["reg.alpha", "reg.channel_alpha"]


def test_strengths_cost_nothing_and_memory_options_make_no_other_run():
    configs = [composed(*SUM, *o) for o in ([], ["reg.terms.at.alpha=3"], ["reg.terms.at.pairs=single"])]
    assert decides_cost(configs[0]) == decides_cost(configs[1]) != decides_cost(configs[2])
    identities = [
        run_identity(composed(*SUM, f"reg.terms.delta.attention.{option}"), "", "")
        for option in ("forward_images=null", "forward_images=7", "images=7")
    ]
    assert identities[0] == identities[1] != identities[2]


# --- runs ---


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict]:
    """Records of short runs, by method."""
    folder = tmp_path_factory.mktemp("sums")
    root = write_cub(folder / "cub")
    attention = [f"reg.terms.delta.attention.{option}" for option in ("images=4", "head_epochs=1")]
    torch.save(SmallResNet(7).state_dict(), folder / "source.pth")
    weights = f"backbone.weights={folder / 'source.pth'}"
    with pytest.MonkeyPatch.context() as patch:
        for reg in (["reg=lwf"], ["reg=lwf_at", "reg.terms.lwf.alpha=0.5"], [*SUM, *attention]):
            assert delta_run(patch, *tiny_overrides(root, folder / "results"), weights, *reg) == 0
        assert delta_run(patch, *tiny_overrides(root, folder / "results"), "reg=scratch") == 0
    found = [
        json.loads(path.read_text()) | {"folder": path.parent}
        for path in (folder / "results" / "runs").glob("*/summary.json")
    ]
    return {record["config"]["reg"]["name"]: record for record in found}


def test_runs_are_recorded_with_all_terms(records):
    assert records.keys() == {"scratch", "lwf", "lwf_at", "at_delta"}
    terms = records["at_delta"]["config"]["reg"]["terms"]
    assert (terms["at"]["name"], terms["delta"]["beta"], terms["delta"]["attention"]["images"]) == ("at", 0.0, 4)
    assert all(record["test_top1"] is not None for record in records.values())


def test_a_records_sum_is_read_again(records):
    for record in records.values():
        config = config_of(record)
        assert config.reg.name == record["config"]["reg"]["name"]
        assert isinstance(config.reg.build(), Sum) == ("terms" in record["config"]["reg"])
    again = config_of(records["at_delta"]).reg.build()
    assert again.terms["delta"].attention.images == 4


def test_the_attention_of_a_term_is_shown_like_deltas_own(records):
    (found,) = [attention_of(record) for record in records.values() if "delta" in record["run_id"]]
    assert found.options["images"] == 4 and set(found.weights) == set(found.record["config"]["backbone"]["taps"])


def test_the_report_names_them_and_their_settings(records):
    notes = compare(records.values()).notes
    [of_all] = [note for note in notes if "temperature" in note]
    assert "LwF+AT (terms.lwf.alpha=0.5, terms.lwf.temperature=2.0, terms.at.alpha=100.0, beta=0.0)" in of_all
    assert "LwF (alpha=1.0, temperature=2.0, beta=0.0)" in of_all
    changed = copy.deepcopy(records["lwf_at"])
    changed["config"]["reg"]["terms"]["at"]["alpha"] = 7.0
    rows = compare([records["lwf_at"], changed]).rows
    assert [row.settings for row in rows] == ["reg.terms.at.alpha=7.0", "reg.terms.at.alpha=100.0"]


def test_scratch_begins_with_random_weights():
    config = composed("reg=scratch")
    with pytest.raises(UserError, match="backbone.weights=none"):
        check_choices(config, config.reg.build().stages())
    config = composed("reg=scratch", "backbone.weights=none")
    check_choices(config, config.reg.build().stages())
