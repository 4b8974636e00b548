"""A CLIPModel of Hugging Face's transformers under open_clip's names: same weights, other names, q, k and v in three pieces."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

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


def has_quick_gelu(folder: Path) -> bool | None:
    """What a CLIPModel's config.json says of its activation, "quick_gelu" being the library's default; None where it is none."""
    try:
        config = parse_json(read_regular(folder / "config.json", most=MOST_TEXT), where=str(folder))
        if config.get("model_type") != "clip":
            return None
        return bool((config.get("vision_config") or {}).get("hidden_act", "quick_gelu") == "quick_gelu")
    except (UserError, AttributeError):
        return None
