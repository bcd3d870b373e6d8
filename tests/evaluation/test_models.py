"""Models by name, checkpoints, normalisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from project import Project
from torch import nn

from gradprune.errors import OptionError
from gradprune.workloads.models import ModelOptions, Normalized, fingerprint, load_checkpoint, load_model


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 5))


def test_a_module_or_what_returns_one(project: Project) -> None:
    made = load_model(ModelOptions(f"{project.module}:net"), 0)
    found = load_model(ModelOptions(f"{project.module}:module"), 0)
    assert not made.training
    assert fingerprint(made) == fingerprint(found)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("net", "is not of the form module:name"),
        ("no_such_module:net", "there is no module 'no_such_module'"),
        ("{module}:nett", "has no 'nett'"),
        ("{module}:number", "returns none when called without arguments, but int"),
        ("{module}:failing", "ValueError: no weights today"),
        ("bad:net", "importing bad failed: SyntaxError"),
        ("lacks:net", "importing lacks failed: No module named 'not_installed'"),
        ("timm:resnet1x8", "timm has no model 'resnet1x8'"),
        ("./mine:net", "is a path, not the name of a module: pass mine:net"),
        ("nets/small.py:net", "is a path, not the name of a module: pass nets.small:net"),
        ("mine.py:net", "pass mine:net"),
        ("./nets/../small.py:net", "pass small:net"),
        ("../mine:net", r"run the command in .* and pass mine:net"),
        ("/nowhere/nets/mine.py:net", "run the command in /nowhere/nets and pass mine:net"),
        ("v1.0/mine.py:net", "a module has no dots in its name"),
    ],
)
def test_what_is_no_model_is_named(project: Project, name: str, told: str) -> None:
    (project.folder / "bad.py").write_text("def net(:\n")
    (project.folder / "lacks.py").write_text("import not_installed\n")
    with pytest.raises(OptionError, match=told):
        load_model(ModelOptions(name.format(module=project.module)), 0)


def test_weights_that_a_model_draws_follow_the_seed(project: Project) -> None:
    (project.folder / "random_net.py").write_text("from torch import nn\ndef net(): return nn.Linear(3, 4)\n")
    state = torch.random.get_rng_state()
    marks = [fingerprint(load_model(ModelOptions("random_net:net"), seed)) for seed in (0, 0, 1)]
    assert marks[0] == marks[1] != marks[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_timm_models_bring_their_normalisation() -> None:
    pytest.importorskip("timm")
    model = load_model(ModelOptions("timm:resnet10t"), 0)
    assert isinstance(model, Normalized)
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    given = load_model(ModelOptions("timm:resnet10t", mean=[0.5], std=[0.25]), 0)
    assert isinstance(given, Normalized)
    assert (given.mean.item(), given.std.item()) == (0.5, 0.25)


def test_normalisation_is_inside_the_model() -> None:
    inner = net()
    x = torch.rand(2, 3, 8, 8)
    model = Normalized(inner, [0.1, 0.2, 0.3], [1, 2, 4])
    expected = inner((x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2, 4]).view(3, 1, 1))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mean": [0.5]}, "belong together"),
        ({"mean": [0.5], "std": [0.0]}, "has to be positive"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, "--mean has 1 numbers and --std 2"),
        ({"pretrained": True}, "--pretrained is for timm"),
    ],
)
def test_options_that_do_not_fit(options: dict, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        load_model(ModelOptions("digits", **options), 0)


@pytest.mark.parametrize("nested", [None, "state_dict", "model", "net", "model_ema", "weights"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.module.", "module._orig_mod."])
def test_checkpoints(tmp_path: Path, nested: str | None, prefix: str) -> None:
    trained, model = net(), net()
    state: object = {prefix + name: value for name, value in trained.state_dict().items()}
    torch.save(state if nested is None else {nested: state, "epoch": 3}, tmp_path / "net.pt")
    assert fingerprint(model) != fingerprint(trained)
    load_checkpoint(model, tmp_path / "net.pt")
    assert fingerprint(model) == fingerprint(trained)


def test_of_several_state_dicts_the_usual_or_the_fitting_one_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = net()
    other = {name: value + 1 for name, value in trained.state_dict().items()}
    for content, said in (
        ({"model": trained.state_dict(), "model_ema": other}, "net.pt: took ['model'], not ['model_ema']\n"),
        ({"net": trained.state_dict(), "optimizer": {"state": {}, "exp_avg": torch.zeros(3)}}, ""),
        ({"net": trained.state_dict(), "discriminator": {"scale": torch.zeros(3)}}, ""),
    ):
        model = net()
        torch.save(content, tmp_path / "net.pt")
        load_checkpoint(model, tmp_path / "net.pt")
        assert fingerprint(model) == fingerprint(trained)
        err = capsys.readouterr().err
        assert err.endswith(said) if said else not err
    for content, told in (
        (
            {"first": trained.state_dict(), "second": other},
            r"several state dicts that fit \(\['first'\], \['second'\]\)",
        ),
        ({"ema": {"net": other}, "swa": {"net": other}}, r"\(\['ema'\]\['net'\], \['swa'\]\['net'\]\)"),
    ):
        torch.save(content, tmp_path / "net.pt")
        with pytest.raises(OptionError, match=told):
            load_checkpoint(net(), tmp_path / "net.pt")


@pytest.mark.parametrize("name", ["net", "generator", "ema"])
def test_what_is_beside_the_state_dict_that_fits_does_not_matter(tmp_path: Path, name: str) -> None:
    trained = net()
    beside = {
        "state_dict": {"of": torch.zeros(1)},
        "optimizer": {"state": {0: {"step": torch.zeros(())}}, "param_groups": [{"lr": 0.1}]},
        "critic": {"0.weight": torch.zeros(2)},
        3: {"weight": torch.zeros(1)},
    }
    torch.save({**beside, name: trained.state_dict()}, tmp_path / "net.pt")
    for model in (net(), Normalized(net(), [0.5] * 3, [0.5] * 3)):
        load_checkpoint(model, tmp_path / "net.pt")
        inner = model.model if isinstance(model, Normalized) else model
        assert fingerprint(inner) == fingerprint(trained)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_names_of_the_model_are_no_prefixes(tmp_path: Path, prefix: str) -> None:
    trained, model = (nn.ModuleDict({"module": net()}) for _ in range(2))
    torch.save({prefix + name: value for name, value in trained.state_dict().items()}, tmp_path / "net.pt")
    load_checkpoint(model, tmp_path / "net.pt")
    assert fingerprint(model) == fingerprint(trained)


def test_a_prefix_that_some_names_lack_stays(tmp_path: Path) -> None:
    names = iter(["module.", ""] * 2)
    torch.save({next(names) + name: value for name, value in net().state_dict().items()}, tmp_path / "net.pt")
    with pytest.raises(OptionError, match=r"does not have module\.0\.weight"):
        load_checkpoint(net(), tmp_path / "net.pt")


def test_a_prefix_goes_from_a_normalised_model_as_well(tmp_path: Path) -> None:
    trained, model = (Normalized(net(), [value] * 3, [value] * 3) for value in (0.5, 0.25))
    state = {f"_orig_mod.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"weights": state}, tmp_path / "net.pt")
    load_checkpoint(model, tmp_path / "net.pt")
    assert fingerprint(model) == fingerprint(trained)


def test_a_checkpoint_of_another_model_is_refused_and_nothing_loaded(tmp_path: Path) -> None:
    state = net().state_dict()
    state["4.extra"] = state.pop("0.bias")
    state["3.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "net.pt")
    model = net()
    before = fingerprint(model)
    with pytest.raises(OptionError) as raised:
        load_checkpoint(model, tmp_path / "net.pt")
    for told in ("lacks 0.bias", "does not have 4.extra", "3.weight (2, 2) for (5, 256)", "net.pt"):
        assert told in str(raised.value)
    assert fingerprint(model) == before


class RunsCode:
    def __reduce__(self) -> object:
        return (Path.touch, (Path("was-here"),))


@pytest.mark.parametrize("content", [RunsCode(), [1, 2], {"weight": 3}, {0: torch.zeros(1)}, b"garbage", None])
def test_a_file_that_is_no_state_dict_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "net.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(OptionError, match="net.pt"):
        load_checkpoint(net(), file)
    assert not Path("was-here").exists()


def test_a_fingerprint_is_of_structure_and_weights() -> None:
    torch.manual_seed(0)
    model = net()
    before = fingerprint(model)
    model[1] = nn.GELU()
    structure = fingerprint(model)
    model[1] = nn.ReLU()
    assert fingerprint(model) == before != structure
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(model) != before
