"""Attributions of Captum for an accelerated model; those that hook layers run eagerly, which is said."""

from __future__ import annotations

from typing import Any

import pytest
from peer_testing import Peers, network_with_relus
from torch import Tensor, nn

OF_INPUTS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 4},
    "GradientShap": {"baselines": 0.0, "n_samples": 2},
}

OF_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepLift": ("model", {}),
    "DeepLiftShap": ("model", {"baselines": 0.0}),
    "GuidedBackprop": ("model", {}),
    "Deconvolution": ("model", {}),
    "GuidedGradCam": ("layer", {}),
    "LayerActivation": ("layer", {}),
    "LayerGradCam": ("layer", {}),
    "LayerGradientXActivation": ("layer", {}),
    "LayerIntegratedGradients": ("layer", {"n_steps": 4}),
    "LayerConductance": ("layer", {"n_steps": 4}),
    "InternalInfluence": ("layer", {"n_steps": 4}),
}


@pytest.mark.parametrize("name", OF_INPUTS)
def test_attributions(peers: Peers, name: str) -> None:
    attr = pytest.importorskip("captum.attr")
    settings = dict(OF_INPUTS[name])

    def attribute(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if "baselines" in settings:
            settings["baselines"] = x * 0
        return getattr(attr, name)(model).attribute(x, target=y, **settings).detach()  # type: ignore[no-any-return]

    peers.check(attribute)


@pytest.mark.parametrize("name", OF_LAYERS)
def test_attributions_with_hooks(name: str) -> None:
    attr = pytest.importorskip("captum.attr")
    of, settings = OF_LAYERS[name]

    def attribute(model: Any, x: Tensor, y: Tensor) -> Tensor:
        made = getattr(attr, name)(*((model,) if of == "model" else (model, model[1][0])))
        extra = {**settings, **({"baselines": x * 0} if "baselines" in settings else {})}
        extra |= {} if name == "LayerActivation" else {"target": y}
        return made.attribute(x, **extra).detach()  # type: ignore[no-any-return]

    Peers.of(network_with_relus()).check_eager(attribute, "has a hook on")
