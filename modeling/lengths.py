"""What an architecture does differently at some length: attention windows, rope that changes, positions that end.

A reward must depend on its own sequence alone. But a rope of the types "longrope" and "dynamic" takes its frequencies
from the longest sequence of a forward pass, for all of its sequences (transformers' modeling_rope_utils.py), and Doge's
attention skips keys if the widest row has too many. So a sequence above the length where something changes is computed
in a forward pass of its own, without padding.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# what configurations call the number of tokens that a token of some layers sees at most
WINDOWS = (
    "sliding_window", "sliding_window_size", "window_size", "local_attention", "attention_chunk_size",
    "index_topk",
)  # fmt: skip
WIDEST_ROW = "keep_window_size"  # Doge's: wider rows, whatever is in them, are computed in another way


def narrowest_window(config: Any) -> int | None:
    """The fewest tokens, itself included, that a token of a packed row attends to in any layer; None if it sees all."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types and all(kind == "full_attention" for kind in layer_types):
        return None
    if getattr(config, WIDEST_ROW, None):
        return 0  # a packed row is wider than its sequences
    windows = [getattr(config, name, None) for name in WINDOWS]
    return min((window for window in windows if isinstance(window, int) and window > 0), default=None)


def most_positions(config: Any) -> int | None:
    """The longest sequence, in tokens, that the architecture has positions for; None if it has no such limit.

    A dynamic rope goes on beyond its configuration's number by its factor.
    """
    positions = getattr(config, "max_position_embeddings", None)
    factors = [rope["factor"] for rope in _ropes(config) if "dynamic" in rope["rope_type"] and rope.get("factor")]
    return int(positions * min(factors)) if positions and factors else positions


def alone_above(hf_model: nn.Module) -> int | None:
    """The length above which a sequence changes what is computed for others in its forward pass; None if none does."""
    config = hf_model.config.get_text_config()
    switches = [rope["original_max_position_embeddings"] for rope in _ropes(config) if rope["rope_type"] == "longrope"]
    switches += [config.max_position_embeddings for rope in _ropes(config) if "dynamic" in rope["rope_type"]]
    switches += [getattr(config, WIDEST_ROW, None)]
    return min(filter(None, switches), default=None)


def forget_longer_sequences(hf_model: nn.Module) -> None:
    """Have each forward pass of a dynamic rope begin as the first one did.

    By itself it keeps the frequencies of the longest sequence so far, until one comes that is shorter than the switch.
    """
    for module in hf_model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds if isinstance(kinds, dict) else {"": kinds}  # by layer type, where their ropes differ
        names = [f"{layer}_" if layer else "" for layer, kind in kinds.items() if "dynamic" in str(kind)]
        if names and hasattr(module, "max_seq_len_cached"):
            module.register_forward_pre_hook(lambda module, _, names=names: _reset(module, names))


def _reset(module: nn.Module, names: list[str]) -> None:
    for name in names:
        setattr(module, f"{name}inv_freq", getattr(module, f"{name}original_inv_freq"))
        setattr(module, f"{name}max_seq_len_cached", module.original_max_seq_len)


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of a configuration's ropes: one, or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    for rope in (found, *found.values()):
        if isinstance(rope, dict) and "rope_type" in rope:
            yield rope


def alone(input_ids: Tensor, attention_mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of right-padded sequences (B, T) by itself, without its padding: ids and mask, both (1, length)."""
    for ids, mask, length in zip(input_ids, attention_mask, attention_mask.sum(dim=1).tolist(), strict=True):
        yield ids[None, :length], mask[None, :length]
