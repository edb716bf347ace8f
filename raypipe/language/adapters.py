"""Adapters, which join one recommender to one language model, and their checkpoints.

An adapter is projectors and updates of the language model. Only what was trained is saved, together with the identities
of the recommender and the language model it was trained between; the models themselves are not changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raypipe.config import Config, shaping
from raypipe.errors import UsageError
from raypipe.language.backbone import Backbone
from raypipe.language.prefixes import Prefix, PrefixConfig, PrefixShape
from raypipe.language.projectors import ProjectorConfig
from raypipe.language.soft_prompts import Injection, SoftPromptLm

_CARD = "adapter.json"
_WEIGHTS = "adapter.safetensors"


class LoraOptions(Config):
    """Low-rank updates of the language model's matrices (Hu et al. 2022)."""

    rank: int = shaping(8, "columns of the two narrow matrices whose product is the update", ge=1)
    alpha: float = shaping(32.0, "the update is scaled by alpha / rank", gt=0)
    dropout: float = shaping(0.1, "of what the update reads, in training", ge=0, lt=1)
    targets: tuple[str, ...] = shaping(("q_proj", "k_proj", "v_proj", "o_proj"), "names of the matrices, by their ends")


def check_updates(lora: LoraOptions | None, full: bool) -> None:
    """Raise ValueError if the same weights would be updated twice, by `lora` and by `full`."""
    if full and lora is not None:
        raise ValueError("full trains every weight itself: set lora to null")


class AdapterConfig(Config):
    """Options of an adapter: what is trained between a recommender and a language model."""

    projectors: dict[str, ProjectorConfig] = shaping(dict, "source of vectors → how they become tokens")
    injection: Injection = shaping("replace", "tokens of vectors replace what the model reads, or are added to a word")
    lora: LoraOptions | None = shaping(None, "unset: the language model's matrices stay as they are")
    embeddings: bool = shaping(False, "its embedding table and head are trained too, as RecExplainer's code does")
    full: bool = shaping(False, "every weight of the language model is trained, and stored with the adapter")
    prefix: PrefixConfig | None = shaping(None, "what stands before a prompt in every layer; unset: nothing")


@dataclass(frozen=True)
class AdapterCard:
    """Identity of an adapter, stored in its checkpoint.

    `widths` are those of the vectors by source, `lm` is the content hash of the language model, `recommender` is
    NAME/HASH.
    """

    config: AdapterConfig
    widths: Mapping[str, int]
    lm: str
    recommender: str


def build_adapter(backbone: Backbone, card: AdapterCard, seed: int = 0) -> SoftPromptLm:
    """The language model with an untrained adapter; only the adapter takes gradients.

    Changes `backbone.model` in place: which of its weights take gradients and, with LoRA, its modules. Raises
    UsageError if the model has none of the matrices that LoRA names.
    """
    lm: Any = backbone.model.requires_grad_(False)
    hidden = lm.get_input_embeddings().weight.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if card.config.lora is not None:
            _inject_lora(lm, card.config.lora)
        if card.config.full:
            lm.requires_grad_(True)
        if card.config.embeddings:
            for part in (lm.get_input_embeddings(), lm.get_output_embeddings()):
                part.weight.requires_grad_(True)
        projectors = {
            source: projector.build(card.widths[source], hidden) for source, projector in card.config.projectors.items()
        }
        wanted = card.config.prefix
        prefix = None if wanted is None else Prefix(wanted, PrefixShape.of(lm), hidden)
        return SoftPromptLm(lm, projectors, card.config.injection, prefix)


def save_adapter(folder: Path, card: AdapterCard, weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint. `weights` are the parameters that take gradients in the built model, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "format": 1,
        "config": card.config.model_dump(mode="json"),
        "widths": dict(card.widths),
        "lm": card.lm,
        "recommender": card.recommender,
    }
    (folder / _CARD).write_text(json.dumps(told, indent=1, sort_keys=True))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / _WEIGHTS)


def load_adapter(folder: Path, backbone: Backbone, lm: str, recommender: str | None = None) -> SoftPromptLm:
    """Load the adapted model, in eval mode.

    `lm` is the content hash of the backbone, `recommender` is NAME/HASH or None for any. Raises UsageError if the
    folder holds no adapter, a damaged one, or one of another language model or recommender.
    """
    card = read_card(folder)
    for kind, mine, given in (("language model", card.lm, lm), ("recommender", card.recommender, recommender)):
        if given is not None and mine != given:
            raise UsageError(
                f"The adapter in {folder} was trained beside the {kind} {mine[:40]}, and this one is {given[:40]}.",
                "Name the two it belongs to, or train another with `raypipe align`.",
            )
    try:
        weights = load_file(folder / _WEIGHTS, device=str(backbone.device))
    except (FileNotFoundError, SafetensorError) as error:
        raise UsageError(f"The adapter in {folder} is damaged: {error}.", "Train it again, or restore it.") from None
    model = build_adapter(backbone, card).to(backbone.device)
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters() if weight.requires_grad}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if expected != found:
        name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise UsageError(
            f"The weights in {folder} are another adapter's: {name} is {found.get(name)} and not {expected.get(name)}.",
            "Do not edit adapter.json, nor mix files of two adapters.",
        )
    model.load_state_dict(weights, strict=False)
    return model.eval()


def read_card(folder: Path) -> AdapterCard:
    """Read the card of the adapter in `folder`. Raises UsageError if there is none or it is damaged."""
    try:
        told = json.loads((folder / _CARD).read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no adapter.", "Name one made by `raypipe align`.") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"The adapter in {folder} is damaged: {error}.", "Train it again, or restore it.") from None
    return AdapterCard(AdapterConfig.model_validate(told["config"]), told["widths"], told["lm"], told["recommender"])


def _inject_lora(lm: torch.nn.Module, options: LoraOptions) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        bias="none",
    )
    try:
        inject_adapter_in_model(config, lm)
    except ValueError as error:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, part in lm.named_modules() if isinstance(part, torch.nn.Linear)}
        )
        raise UsageError(
            f"The language model has none of the matrices that LoRA is to change, {', '.join(options.targets)}.",
            f"Choose among {', '.join(names)} with `lora.targets` of the system.",
        ) from error
