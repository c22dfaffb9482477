"""Which text quality is measured on: what calibration left, or a text of its own.

It is chosen and tokenized before tuning, so that a text that cannot be read is an error before any work, and kept in
the run's store, so that a report can be made after an interruption too.
"""

from __future__ import annotations

from auto_round.calibration import Budget, CalibrationSet, draw_samples, has_pictures
from auto_round.session import Session, held_out_count
from auto_round.store import RunStore

HOW = "--report_text FILE measures on a text"


def hold_out(session: Session, data: CalibrationSet | None, store: RunStore) -> None:
    """Stores the samples that quality will be measured on, or why there are none.

    Args:
        data: what the run is calibrated with, None for plain rounding.
    Raises:
        ConfigError, CalibrationError: a text was asked for and cannot be read or is too short.
    """
    samples, about = choose(session, data)
    tensors = {} if samples is None else {"input_ids": samples.input_ids}
    if samples is not None and samples.attention_mask is not None:
        tensors["attention_mask"] = samples.attention_mask
    store.save_held_out(tensors, about)


def stored_samples(store: RunStore) -> tuple[CalibrationSet | None, str]:
    """Returns the samples that `hold_out` stored and what they are; None and the reason if there are none."""
    tensors, about = store.held_out()
    samples = CalibrationSet(tensors["input_ids"], tensors.get("attention_mask")) if tensors else None
    return samples, about or f"no text was held out; {HOW}"


def choose(session: Session, data: CalibrationSet | None) -> tuple[CalibrationSet | None, str]:
    """Returns samples and what they are, or None and why there are none."""
    config = session.config
    if config.report_text is not None:
        budget = Budget(held_out_count(config.calib.seqlen), config.calib.seqlen, config.tune.seed)
        return draw_samples(config.report_text, session.tokenizer, budget), f"{config.report_text}, as asked for"
    if data is None:
        return None, f"plain rounding reads no calibration text; {HOW}"
    if has_pictures(config.calib.dataset):
        return None, f"calibration with pictures leaves no text; {HOW}"
    if data.held_out is None:
        return None, f"calibration used all {len(data)} samples that there are; {HOW}"
    return data.held_out, "calibration text that was not used for tuning"
