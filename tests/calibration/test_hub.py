import importlib.util
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from auto_round.calibration import hub
from auto_round.calibration.base import NamedDataset, ReadLimit
from auto_round.errors import CalibrationError, MissingDependencyError

datasets = pytest.importorskip("datasets")
constants = pytest.importorskip("huggingface_hub").constants

NO_LIMIT = ReadLimit(n_documents=10**9, n_chars=0)


def text(row):
    return row["text"]


ENTRY = NamedDataset("owner/some-Data_set", text)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """Nothing listens at the hub's address and the cache is empty, whatever the machine has."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def answering_hub(monkeypatch):
    """A hub that answers every question with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def fake_rows(monkeypatch):
    """Replaces load_dataset by one that yields numbered rows and notes its arguments and how many were read."""
    seen = {"calls": [], "n_read": 0}

    def load_dataset(**arguments):
        seen["calls"].append(arguments)
        for number in range(100):
            seen["n_read"] += 1
            yield {"text": f"{arguments['split']} {number}"}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return seen


def test_an_unreachable_hub_fails_at_once_and_says_the_way_out():
    start = time.perf_counter()
    with pytest.raises(CalibrationError, match=r"owner/some-Data_set could not be read .*--dataset FILE.*OFFLINE"):
        hub.read_hub_documents(ENTRY, (), NO_LIMIT)
    assert time.perf_counter() - start < 10


def test_a_hub_that_never_answers_fails_after_the_probe_time(monkeypatch):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(CalibrationError, match="does not answer"):
            hub.read_hub_documents(ENTRY, (), NO_LIMIT)


def test_a_cached_dataset_is_read_without_the_hub(tmp_path, fake_rows):
    (tmp_path / "cache" / "owner___some-data_set").mkdir(parents=True)
    streamed = NamedDataset("owner/some-Data_set", text, is_streamed=True)
    assert len(hub.read_hub_documents(streamed, (), NO_LIMIT)) == 100
    assert fake_rows["calls"] == [{"path": "owner/some-Data_set", "name": None, "split": "train", "streaming": False}]


def test_offline_mode_asks_nobody(monkeypatch, fake_rows):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert hub.read_hub_documents(ENTRY, (), NO_LIMIT)[0] == "train 0"
    assert fake_rows["calls"][0]["streaming"] is False


def test_offline_mode_without_the_dataset_is_an_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match="could not be read"):
        hub.read_hub_documents(ENTRY, (), NO_LIMIT)


@pytest.mark.usefixtures("answering_hub")
def test_splits_are_read_in_order(fake_rows):
    documents = hub.read_hub_documents(ENTRY, ("train", "test"), NO_LIMIT)
    assert (documents[0], documents[100], len(documents)) == ("train 0", "test 0", 200)


@pytest.mark.usefixtures("answering_hub")
def test_a_streamed_dataset_is_read_only_up_to_the_limit(fake_rows):
    streamed = NamedDataset("owner/name", text, config_name="en", is_streamed=True)
    documents = hub.read_hub_documents(streamed, (), ReadLimit(n_documents=3, n_chars=0))
    assert documents == ["train 0", "train 1", "train 2"]
    assert fake_rows["n_read"] == 3
    assert fake_rows["calls"] == [{"path": "owner/name", "name": "en", "split": "train", "streaming": True}]


@pytest.mark.usefixtures("answering_hub")
def test_parquet_files_bypass_a_loading_script(fake_rows):
    hub.read_hub_documents(NamedDataset("owner/name", text, parquet_files="data/*.parquet"), (), NO_LIMIT)
    assert fake_rows["calls"][0]["path"] == "parquet"
    assert fake_rows["calls"][0]["data_files"] == "hf://datasets/owner/name/data/*.parquet"


@pytest.mark.usefixtures("answering_hub")
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_the_real_package_reads_a_dataset_folder(tmp_path, is_streamed):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": str(n)}) for n in range(5)))
    entry = NamedDataset(str(tmp_path), text, is_streamed=is_streamed, row_separator=None)
    limit = ReadLimit(n_documents=2, n_chars=0)
    assert hub.read_hub_documents(entry, (), limit) == (["0", "1"] if is_streamed else ["0", "1", "2", "3", "4"])


@pytest.mark.usefixtures("answering_hub")
def test_an_unknown_split_is_an_error(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "1"}')
    with pytest.raises(CalibrationError, match="split dev: ValueError"):
        hub.read_hub_documents(NamedDataset(str(tmp_path), text), ("dev",), NO_LIMIT)


@pytest.mark.usefixtures("answering_hub", "fake_rows")
def test_a_missing_field_names_those_there_are():
    entry = NamedDataset("owner/name", lambda row: row["body"])
    with pytest.raises(CalibrationError, match="has no field 'body'; its rows have text"):
        hub.read_hub_documents(entry, (), NO_LIMIT)


@pytest.mark.usefixtures("answering_hub", "fake_rows")
def test_rows_that_are_lines_become_one_document():
    documents = hub.read_hub_documents(NamedDataset("owner/name", text, row_separator="\n"), (), NO_LIMIT)
    assert len(documents) == 1
    assert documents[0].startswith("train 0\ntrain 1\n")


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"owner/some-Data_set needs .* pip install datasets"):
        hub.read_hub_documents(ENTRY, (), NO_LIMIT)


def test_taking_documents_needs_both_numbers():
    documents = iter(["12345", "1", "1", "1", "1"])
    assert hub.take_documents(documents, ReadLimit(n_documents=2, n_chars=7)) == ["12345", "1", "1"]
    assert list(documents) == ["1", "1"]
