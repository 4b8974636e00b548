"""A CLIPModel of Hugging Face's transformers under open_clip's names: same weights, other names, q, k and v in three pieces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.checkpoints.configs import read_config
from mergekit_vl.errors import UserError
from mergekit_vl.system.regular_files import MOST_TEXT, parse_json, read_regular

if TYPE_CHECKING:
    from torch import Tensor

NAMES = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)
TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}


def is_clip_model(state: dict[str, Tensor]) -> bool:
    return "text_model.final_layer_norm.weight" in state and "visual_projection.weight" in state


def prefix_of_clip_model(state: Mapping[str, Tensor]) -> str:
    """What stands before the names of a CLIPModel: "model." of a wrapper; empty where nothing does, or it is none."""
    sign = "text_model.final_layer_norm.weight"
    found = next((name.removesuffix(sign) for name in state if name.endswith(sign)), "")
    return found if f"{found}visual_projection.weight" in state else ""


def from_clip_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's tensors under open_clip's names."""
    import torch

    out = {}
    for name, tensor in state.items():
        if name.endswith("position_ids") or ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if name in TRANSPOSED:
            out[TRANSPOSED[name]] = tensor.T.contiguous()
            continue
        if ".self_attn.q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = re.sub(r"\.self_attn\.q_proj\.", ".attn.in_proj_", name)
        for pattern, to in NAMES:
            name = re.sub(pattern, to, name)
        out[name] = tensor
    return out


def config_of_clip_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """open_clip's model_cfg and preprocess_cfg for a CLIPModel's folder, by its config.json and preprocessor_config.json; None where it is none."""
    config = read_config(folder, "config.json")
    vision, text = config.get("vision_config"), config.get("text_config")
    if config.get("model_type") != "clip" or not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        return None
    try:
        width, text_width = int(vision.get("hidden_size", 768)), int(text.get("hidden_size", 512))
        model = {
            "embed_dim": int(config.get("projection_dim", 512)),
            "quick_gelu": vision.get("hidden_act", "quick_gelu") == "quick_gelu",
            "vision_cfg": {
                "image_size": int(vision.get("image_size", 224)),
                "patch_size": int(vision.get("patch_size", 32)),
                "layers": int(vision.get("num_hidden_layers", 12)),
                "width": width,
                "head_width": width // int(vision.get("num_attention_heads", 12)),
                "mlp_ratio": int(vision.get("intermediate_size", 4 * width)) / width,
            },
            "text_cfg": {
                "context_length": int(text.get("max_position_embeddings", 77)),
                "vocab_size": int(text.get("vocab_size", 49408)),
                "layers": int(text.get("num_hidden_layers", 12)),
                "width": text_width,
                "heads": int(text.get("num_attention_heads", 8)),
                "mlp_ratio": int(text.get("intermediate_size", 4 * text_width)) / text_width,
            },
        }
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    told = read_config(folder, "preprocessor_config.json")
    pairs = (("mean", told.get("image_mean")), ("std", told.get("image_std")))
    return model, {key: value for key, value in pairs if isinstance(value, list) and len(value) == 3}


def has_quick_gelu(folder: Path) -> bool | None:
    """What a CLIPModel's config.json says of its activation, "quick_gelu" being the library's default; None where it is none."""
    try:
        config = parse_json(read_regular(folder / "config.json", most=MOST_TEXT), where=str(folder))
        if config.get("model_type") != "clip":
            return None
        return bool((config.get("vision_config") or {}).get("hidden_act", "quick_gelu") == "quick_gelu")
    except (UserError, AttributeError):
        return None
