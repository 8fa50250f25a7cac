"""The figures of a report as text, for the terminal and the page alike."""

from __future__ import annotations

from typing import Any


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def of_model(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of length and calibration: (what, value), for the terminal and the page alike."""
    length, calibration = content["length"], content["calibration"]
    controlled, within = length["length_controlled"], length["within_prompts"]
    across, temperature = length["across_prompts"], calibration["temperature"]
    interval = "" if controlled["low"] is None else f" ({percent(controlled['low'])} to {percent(controlled['high'])})"
    mended = (
        f"{temperature['value']:.3g} ({temperature['low']:.3g} to {number(temperature['high'], '.3g')}); "
        f"log loss {number(temperature['log_loss'], '.4f')}"
        if temperature
        else "none mends it"
    )
    return [
        ("length-controlled accuracy", percent(controlled["accuracy"]) + interval),
        *(
            (f"accuracy, the better reply {words}", f"{percent(length[key]['accuracy'])} of {length[key]['n']:,}")
            for words, key in (
                ("longer", "better_is_longer"), ("shorter", "better_is_shorter"), ("as long", "equally_long")
            )
        ),
        ("the model prefers the longer reply", percent(length["model_prefers_longer"])),
        ("people prefer the longer reply", percent(length["people_prefer_longer"])),
        ("reward and length within prompts, r (ρ)", f"{number(within['pearson'])} ({number(within['spearman'])})"),
        ("reward and length across prompts, r (ρ)", f"{number(across['pearson'])} ({number(across['spearman'])})"),
        ("expected calibration error", percent(calibration["ece"])),
        ("Brier score (guessing: 0.25)", number(calibration["brier"], ".4f")),
        ("log loss (guessing: 0.6931)", number(calibration["log_loss"], ".4f")),
        ("temperature that mends it", mended),
        ("suspected mislabels", f"{content['reading']['suspected_mislabels']:,}"),
    ]  # fmt: skip


def of_comparison(against: dict[str, Any]) -> list[tuple[str, str]]:
    """Two models on the same pairs: (what, value)."""
    return [
        ("pairs that both scored", f"{against['n']:,}"),
        ("both right", f"{against['both_right']:,}"),
        ("only this model right", f"{against['only_a_right']:,}"),
        ("only the other right", f"{against['only_b_right']:,}"),
        ("neither right", f"{against['neither_right']:,}"),
        ("difference in accuracy", f"{number(against['accuracy_difference'], '+.1%')}"
         f" ({number(against['low'], '+.1%')} to {number(against['high'], '+.1%')})"),
        (f"McNemar's test ({against['mcnemar']['test']})", f"p = {against['mcnemar']['p_value']:.3g}"),
        ("correlation of their Δr", number(against["rewards_agree"]["pearson"])),
    ]  # fmt: skip
