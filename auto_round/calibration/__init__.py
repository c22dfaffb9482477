from pathlib import Path
import torch
from auto_round.calibration.base import DATASETS, CalibrationSet
from auto_round.calibration.local import read_documents
from auto_round.calibration.text import choose_windows, join_windows, tokenize_documents

def load_calibration(dataset, tokenizer, *, nsamples=128, seqlen=2048, seed=42):
    if isinstance(dataset, CalibrationSet): return dataset
    w = join_windows(tokenize_documents(read_documents(Path(dataset)), tokenizer), seqlen, eos_id=tokenizer.eos_token_id)
    return CalibrationSet(w[choose_windows(len(w), nsamples, seed)])
