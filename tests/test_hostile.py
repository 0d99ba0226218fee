"""A checkpoint from a stranger: whatever its bytes, names and links are, it is refused by name, or harmless."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import forged_values
import hostile
import pytest
import torch
from forged_values import PROTO, number
from hostile import HERE, PARSERS, archive, edited, outcome, records_in, saved
from hub_client import Client, Refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import template  # noqa: F401

from roll_ckpt import names
from roll_ckpt.cli import main
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import ConfigError, Damaged
from roll_ckpt.formats import manifests, records, sealed_json
from roll_ckpt.formats.records import Decision, Vote
from roll_ckpt.formats.torch_zip import safe_pickle
from roll_ckpt.formats.torch_zip.read import parse
from roll_ckpt.transaction import claims as claims_module
from roll_ckpt.upload.hub import push_queue

MEMORY_BYTES = 256 << 20


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """No case may take more than this, whatever sizes it claims."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY_BYTES


# --- tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARSERS)
def test_sound_bytes_are_taken_so_that_the_refusals_below_mean_something(name: str) -> None:
    assert [outcome(PARSERS[name], data) for data in PARSERS[name].seeds] == [None] * len(PARSERS[name].seeds)


@pytest.mark.parametrize("name", [name for name in PARSERS if PARSERS[name].sealed])
def test_a_field_of_another_kind_is_refused_or_harmless(name: str) -> None:
    parser, refused = PARSERS[name], 0
    record = sealed_json.unseal(parser.seeds[0], HERE)
    for key in [*record, "another"]:
        for value in hostile.VALUES:
            problem = outcome(parser, sealed_json.seal({**record, key: value}))
            refused += problem is not None
            assert problem is None or isinstance(problem, Damaged | ConfigError)
    assert refused > len(record) * len(hostile.VALUES) // 2 or name in ("hub record", "hashes")


JSON = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "depth": b"[" * 100_000,
    "depth in a key": b'{"a":' * 100_000,
    "a number of 10,000 digits": b'{"format": ' + b"9" * 10_000 + b"}",
    "infinity": b'{"format": 1e999}',
    "not a number": b'{"format": NaN}',
    "no text": b"\xff\xfe\x00",
    "utf-16": '{"format": 1}'.encode("utf-16"),
    "half a pair": b'{"\\ud800": 1}\n',
    "zeros": bytes(5000),
}


@pytest.mark.parametrize("name", [*(n for n in PARSERS if PARSERS[n].sealed), "digests", "tensors", "worker state"])
@pytest.mark.parametrize("what", JSON)
def test_what_is_no_record_is_refused_by_its_file(name: str, what: str) -> None:
    problem = outcome(PARSERS[name], JSON[what])
    if name not in ("hub record", "hashes"):  # of these, damaged ones count as missing
        assert isinstance(problem, Damaged) and ("/" in str(problem) or HERE in str(problem))


def listed(path: str, nbytes: int = 3, block_bytes: int = 4 << 20) -> bytes:
    record = sealed_json.unseal(hostile.built(), HERE)
    record["files"][path] = {"nbytes": nbytes, "block_bytes": block_bytes, "root": "0" * 64}
    return sealed_json.seal(record)


def changed(data: bytes, **fields: object) -> bytes:
    return sealed_json.seal({**sealed_json.unseal(data, HERE), **fields})


RECORDS: dict[str, tuple[str, bytes]] = {
    **{f"path {path!r:.20}": ("manifest", listed(path)) for path in (
        "../x", "a/../../x", "/etc/passwd", "", ".", "a/", "a//b", "a\\b", "a\0b", "a\x1b[2Jb", "a\u202eb", "\ud800",
        "x" * 5000, "/".join("a" * 65), "actor/0.pt/x",
    )},
    "more bytes than there are": ("manifest", listed("a", nbytes=2**60)),
    "fewer than none": ("manifest", listed("a", nbytes=-1)),
    "a digest for each byte": ("manifest", listed("a", nbytes=2**40, block_bytes=1)),
    "a block without end": ("manifest", listed("a", block_bytes=2**62)),
    "an epoch that no number follows": ("manifest", changed(hostile.built(), epoch=2**62)),
    "facts that nobody can walk": ("vote", changed(hostile.vote("actor", 0).to_bytes(), facts={"a": hostile.DEEP})),
    "a key twice": ("decision", hostile.decision(True).replace(b'"commit"', b'"commit": false,\n "commit"')),
    "a name that leads out": ("latest", b".."),
    "a name of two lines": ("latest", b"checkpoint-1\ncheckpoint-2"),
    "a name that writes on a terminal": ("latest", b"\x1b[2J"),
    "digests of words": ("digests", b'{"actor/0.pt": {"crcs": ["a"]}}'),
    "digests beyond 32 bits": ("digests", b'{"actor/0.pt": {"crcs": [99999999999]}}'),
    "too many digests": ("digests", b'{"actor/0.pt": {"crcs": [1, 2, 3]}}'),
    "digests of nothing": ("digests", b'{"actor/0.pt": null}'),
    "shapes of words": ("tensors", b'{"parameters": {"weight": {"shape": "ab"}}}'),
    "parameters without a name": ("tensors", b'{"parameters": [1]}'),
    "no parameters": ("tensors", b"{}"),
    "a step of words": ("worker state", b'{"step": "7", "log_history": [], "kv": {}}'),
    "a repository that is none": ("destination", changed(PARSERS["destination"].seeds[0], repo_id="../../x")),
    "a configuration that is nested": ("config", b"a: " + b"[" * 1500),
    "a configuration that grows": (
        "config",
        b"a: &a [x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (n + 1, n + 1, n, n) for n in range(97, 122)),
    ),
    "a configuration that runs": ("config", b"output_dir: !!python/object/apply:os.system [touch /tmp/x]\n"),
    "a date that is none": ("config", b"output_dir: 2024-99-99\n"),
}  # fmt: skip


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_cannot_be_meant_is_refused(what: str) -> None:
    name, data = RECORDS[what]
    assert isinstance(outcome(PARSERS[name], data), Damaged | ConfigError)


# --- pickles and archives -----------------------------------------------------------------------------------

ROOTS = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))


def storage(numel: bytes, kind: bytes = b"ctorch\nFloatStorage\n", key: bytes = b"X\1\0\0\0000") -> bytes:
    return b"(X\7\0\0\0storage" + kind + key + b"X\3\0\0\0cpu" + numel + b"tQ"


def tensor(offset: bytes, size: bytes, stride: bytes, numel: bytes = b"K\x18") -> bytes:
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numel) + offset + size + stride
    return PROTO + made + b"\x89ccollections\nOrderedDict\n)RtR."


PICKLES: dict[str, bytes] = {
    "a key nested beyond the stack": PROTO + b"})" + b"\x85" * 150_000 + b"Ns.",
    "a key that refers to itself": PROTO + b"})" + ROOTS + b"Ns.",
    "keys that refer to themselves": PROTO + b"}()" + ROOTS + b"Nu.",
    "pairs that do": PROTO + b"ccollections\nOrderedDict\n(](" + b")" + ROOTS + b"N\x86e\x85R.",
    "attributes named by one": PROTO + b"ccollections\nOrderedDict\n)R](" + b")" + ROOTS + b"N\x86eb.",
    "a storage named by a bomb": PROTO + storage(b"K\x18", key=b")" + ROOTS) + b".",
    "a memo number beyond its end": PROTO + b"Nh\xff.",
    "a memo number of 2**31": PROTO + b"Nj\0\0\0\x80.",
    "a number without end": PROTO + b"\x8b\xff\xff\xff\x7f.",
    "a negative length": PROTO + b"\x8b\xff\xff\xff\xff.",
    "text without end": PROTO + b"X\xff\xff\xff\xff.",
    "bytes without end": PROTO + b"\x8e" + b"\xff" * 8 + b".",
    "an array without end": b"\x80\5\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a frame without end": b"\x80\4\x95" + b"\xff" * 7 + b"\x7f.",
    "an empty stack": PROTO + b"R.",
    "no mark": PROTO + b"t.",
    "no end": PROTO + b"N",
    "an array of the size it wants": PROTO + b"cbuiltins\nbytearray\n" + number(1 << 62) + b"\x85R.",
    "a storage of another size": PROTO + storage(number(1 << 62)) + b".",
    "a storage of negative size": PROTO + storage(number(-24)) + b".",
    "a storage that is none": PROTO + storage(b"K\x18", kind=b"ctorch._utils\n_rebuild_tensor_v2\n") + b".",
    "a storage of another file": PROTO + storage(b"K\x18", key=b"X\3\0\0\0../") + b".",
    "a negative offset": tensor(number(-1), b"K\2\x85", b"K\1\x85"),
    "an offset beyond": tensor(number(1 << 40), b"K\2\x85", b"K\1\x85"),
    "an offset that wraps around": tensor(number((1 << 63) - 1), b"K\2\x85", b"K\1\x85"),
    "a shape beyond": tensor(b"K\0", b"K\x19\x85", b"K\1\x85"),
    "a negative shape": tensor(b"K\0", number(-2) + b"\x85", b"K\1\x85"),
    "a shape whose product wraps around": tensor(b"K\0", number(1 << 32) + number(1 << 32) + b"\x86", b"K\1K\1\x86"),
    "a shape beyond 63 bits": tensor(b"K\0", number(1 << 70) + b"\x85", b"K\1\x85"),
    "a stride beyond": tensor(b"K\0", b"K\2\x85", number(1 << 61) + b"\x85"),
    "a negative stride": tensor(b"K\0", b"K\2\x85", number(-1) + b"\x85"),
    "a stride that wraps around": tensor(b"K\0", b"K\5\x85", number(1 << 62) + b"\x85"),
    "strides of another number": tensor(b"K\0", b"K\2\x85", b"K\1K\1\x86"),
}  # fmt: skip


@pytest.mark.parametrize("what", PICKLES)
def test_a_hostile_pickle_is_refused_by_name(what: str) -> None:
    assert HERE in str(outcome(PARSERS["data.pkl"], PICKLES[what]))
    assert "common.pt" in str(
        outcome(PARSERS["object"], archive({**records_in(saved([1])), "data.pkl": PICKLES[what]}))
    )
    assert ".metadata" in str(outcome(PARSERS["index"], PICKLES[what]))


@pytest.mark.parametrize("what", forged_values.VALUES)
def test_a_forged_value_is_refused_by_name(what: str) -> None:
    data = PROTO + forged_values.VALUES[what] + b"."
    assert HERE in str(outcome(PARSERS["data.pkl"], data))
    assert "common.pt" in str(outcome(PARSERS["object"], archive({**records_in(saved([1])), "data.pkl": data})))
    with suppress(Exception):  # what a save or a message tells of it; it need not be right, but it must end
        safe_pickle.unloadable(data, {})


@pytest.mark.parametrize("what", forged_values.SOUND)
def test_a_sound_value_is_taken_so_that_the_refusals_above_mean_something(what: str) -> None:
    assert outcome(PARSERS["data.pkl"], PROTO + forged_values.SOUND[what] + b".") is None


def test_nested_lists_are_no_bombs() -> None:
    found: Any = hostile.read_pickle(PROTO + b"]" * 50_000 + b"a" * 49_999 + b".")
    assert isinstance(found, list)


def test_a_sparse_tensor_whose_indices_lead_out_of_memory_is_refused() -> None:
    good = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([2.0]), (3,), check_invariants=False)
    assert torch.equal(parse(bytearray(saved(good)), HERE).to_dense(), good.to_dense())
    bad = torch.sparse_coo_tensor(torch.tensor([[1 << 40]]), torch.tensor([2.0]), (3,), check_invariants=False)
    assert "refused" in str(outcome(PARSERS["torch_zip"], saved(bad)))
    assert "common.pt" in str(outcome(PARSERS["object"], saved(bad)))


def test_an_index_cannot_make_stock_code_take_memory_by_a_number() -> None:
    sound = pickle.dumps(hostile.index(), 2)
    at = sound.index(b"q\0") + 2
    numbered = sound[:at] + b"r\0\0\0\x7f" + sound[at:]  # the unpickler in C makes room for 2**31 objects
    assert "numbers an object beyond" in str(outcome(PARSERS["index"], numbered))


def directory(change: Callable[[bytearray, int], None], name: bytes) -> bytes:
    """An archive with this record's entry in the directory changed."""
    data = bytearray(saved(hostile.STATE))
    change(data, data.rindex(b"archive/" + name) - 46)
    return bytes(data)


def claims(nbytes: int) -> Callable[[bytearray, int], None]:
    return lambda data, at: struct.pack_into("<2I", data, at + 20, nbytes, nbytes)


def elsewhere(where: int) -> Callable[[bytearray, int], None]:
    return lambda data, at: struct.pack_into("<I", data, at + 42, where)


def renamed(old: bytes, new: bytes) -> bytes:
    return saved(hostile.STATE).replace(b"archive/" + old, b"archive/" + new)


def bomb() -> bytes:
    zeros = archive(
        {"version": b"3\n", "data.pkl": PROTO + b"X" + struct.pack("<I", 1 << 28) + bytes(1 << 24) + b"."},
        zipfile.ZIP_DEFLATED,
    )
    assert len(zeros) < 1 << 20
    return zeros


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "compressed": bomb,
    "a name twice": lambda: renamed(b"data/1", b"data/0"),
    "a name twice, in capitals": lambda: archive({**records_in(saved(hostile.STATE)), "DATA.PKL": b"N."}),
    "a record over another one": lambda: directory(
        lambda data, at: elsewhere(data.index(b"PK\3\4"))(data, at), b"data/1"
    ),
    "a header that is none": lambda: directory(elsewhere(3), b"data/1"),
    "a header beyond the end": lambda: directory(elsewhere(2**32 - 2), b"data/1"),
    "a record of 1 GB": lambda: directory(claims(1 << 30), b"data/1"),
    "a record of 2**32 - 1 bytes without more": lambda: directory(claims(2**32 - 1), b"data/1"),
    "a name that is no text": lambda: renamed(b"version", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9"),
    "no directory": lambda: saved(hostile.STATE)[:-22],
    "two in one": lambda: saved(hostile.STATE) + b"PK\5\6",
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_a_hostile_archive_is_refused_by_name(what: str) -> None:
    data = ARCHIVES[what]()
    assert HERE in str(outcome(PARSERS["torch_zip"], data))
    assert "common.pt" in str(outcome(PARSERS["object"], data))


# --- names, links and folders -------------------------------------------------------------------------------


@pytest.fixture
def theirs(template: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A stranger's run, with steps 1 and 2."""
    return Path(shutil.copytree(template, tmp_path / "theirs"))


EVIL = "\x1b[2J\x1b]0;owned\x07"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What no command may touch: a folder with a file, a folder, and something like a checkpoint."""
    (tmp_path / "outside/deep").mkdir(parents=True)
    (tmp_path / "outside/mine").write_text("mine")
    (tmp_path / "outside/deep/mine").write_text("mine")
    return tmp_path / "outside"


def tree_of(folder: Path) -> dict[str, object]:
    return {str(path): path.read_bytes() if path.is_file() else path.is_dir() for path in folder.rglob("*")}


def put(path: Path, data: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def linked(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def deep(path: Path) -> None:
    """Folders in folders, more than Python nests calls."""
    path.mkdir(parents=True)
    here = os.getcwd()
    os.chdir(path)
    for _ in range(1050):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(here)


PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "trash that is a link": lambda theirs, out: linked(theirs / ".trash/7", out),
    "a link in the trash": lambda theirs, out: linked(theirs / ".trash/1/x", out),
    "a link in the trash, of another name": lambda theirs, out: linked(theirs / ".trash/x", out),
    "an attempt that is a link": lambda theirs, out: linked(theirs / ".checkpoint-9.1.1.tmp", out),
    "an attempt whose unit is a link": lambda theirs, out: linked(theirs / ".checkpoint-9.1.1.tmp/checkpoint-9", out),
    "an attempt whose votes are a link": lambda theirs, out: linked(
        theirs / ".checkpoint-9.1.1.tmp/checkpoint-9/votes", out
    ),
    "an attempt with a link beside": lambda theirs, out: linked(theirs / ".checkpoint-9.1.1.tmp/.superseded.1", out),
    "an attempt that is a file": lambda theirs, out: put(theirs / ".checkpoint-9.1.1.tmp"),
    "an attempt on the folder above": lambda theirs, out: put(theirs / "....1.1.tmp/x"),
    "an attempt on the folder itself": lambda theirs, out: put(theirs / "...1.1.tmp/x"),
    "an attempt nested without end": lambda theirs, out: deep(theirs / ".checkpoint-9.1.1.tmp/checkpoint-9"),
    "trash nested without end": lambda theirs, out: deep(theirs / ".trash/1/x"),
    "a checkpoint that is a link": lambda theirs, out: linked(theirs / "checkpoint-0", out),
    "latest that is a link": lambda theirs, out: (
        (theirs / "latest").unlink(),
        linked(theirs / "latest", out / "mine"),
    ),
    "a pipe in the records": lambda theirs, out: fifo(theirs / ".epochs/1"),
    "a pipe for latest": lambda theirs, out: fifo(theirs / "latest"),
    "a checkpoint whose record is a pipe": lambda theirs, out: fifo(theirs / "checkpoint-1/votes/expected.json"),
    "a checkpoint whose manifest is a pipe": lambda theirs, out: fifo(theirs / "checkpoint-1/manifest.json"),
    "a checkpoint with a link for a folder": lambda theirs, out: linked(theirs / "checkpoint-1/actor/more", out),
    "a manifest of 1 TB": lambda theirs, out: os.truncate(theirs / "checkpoint-1/manifest.json", 1 << 40),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_lies_in_a_strangers_run_leads_no_command_out_of_it(
    theirs: Path,
    outside: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    PLANTED[what](theirs, outside)
    before = tree_of(outside)
    for arguments in (["ls"], ["verify"], ["recover", "--dry-run"], ["recover"], ["prune", "--keep", "1"], ["ls"]):
        assert main.main([arguments[0], str(theirs), *arguments[1:]]) in (0, 1, 3)
    assert tree_of(outside) == before
    assert (theirs / "checkpoint-2/manifest.json").is_file()
    assert sorted(os.listdir(theirs.parent)) == ["outside", "theirs"]
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err


@pytest.mark.parametrize("folder", [".epochs", ".trash", ".hub"])
def test_a_folder_of_ours_that_is_a_link_is_refused(theirs: Path, outside: Path, folder: str) -> None:
    shutil.rmtree(theirs / folder, ignore_errors=True)
    (theirs / folder).symlink_to(outside)
    before = tree_of(outside)
    with pytest.raises(Damaged, match=rf"{folder}: a symbolic link"):
        if folder == ".hub":
            push_queue.set_repository(theirs, hostile.TO)
        else:
            claims_module.claim(theirs, run_id="r", clusters={"actor": 1})
    assert tree_of(outside) == before


@pytest.mark.parametrize("number", [10**18 - 1, 10**17])
def test_an_epoch_beyond_all_numbers_ends_in_an_error_and_not_in_a_search(theirs: Path, number: int) -> None:
    put(theirs / f".epochs/{number}")
    if number < 10**18 - 1:
        claims_module.claim(theirs, run_id="r", clusters={"actor": 1}).release()
    else:
        with pytest.raises(Damaged, match=r"\.epochs: 9+ is too large for an epoch"):
            claims_module.claim(theirs, run_id="r", clusters={"actor": 1})


def test_removing_a_link_removes_nothing_of_where_it_leads(outside: Path, tmp_path: Path) -> None:
    before = tree_of(outside)
    (tmp_path / "link").symlink_to(outside)
    writes.remove_tree(tmp_path / "link")
    assert tree_of(outside) == before and not tree.exists(tmp_path / "link")


def test_what_a_stranger_wrote_does_not_reach_the_terminal(
    theirs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = manifests.read(theirs / "checkpoint-1")
    facts = {"world_size": 2, f"a{EVIL}": f"b{EVIL}\nroll-ckpt: sound", "\ud800": "\udfff"}
    hostile_one = replace(
        told, software=f"c{EVIL}\ud800", run_id=f"d{EVIL}", clusters={"actor": facts, "critic": facts}
    )
    put(theirs / "checkpoint-1/manifest.json", hostile_one.to_bytes())
    put(theirs / f"checkpoint-1/{EVIL}")
    put(theirs / f"checkpoint-{EVIL}/manifest.json")
    put(theirs / f"checkpoint-{EVIL}/decision")
    put(theirs / f"foreign{EVIL}/x_states.pt")
    put(theirs / ".epochs" / f"9.{EVIL}")
    put(theirs / "latest", EVIL.encode())
    attempt = theirs / ".checkpoint-9.1.1.tmp/checkpoint-9"
    put(attempt / names.EXPECTED, replace(hostile.EXPECTED, name="checkpoint-9", epoch=1).to_bytes())
    put(attempt / "decision", Decision(False, "checkpoint-9", 1, 1, "", f"e{EVIL}\nforged").to_bytes())
    place = str(theirs)
    for arguments in (
        *(["ls", place], ["ls", place, "--json"], ["show", f"{place}/checkpoint-1"], ["verify", place]),
        *(["show", f"{place}/checkpoint-{EVIL}"], ["show", EVIL], ["queue", "ls", place], ["push", place, EVIL]),
        *(["pull", f"hf://{EVIL}", place], ["recover", place, "--dry-run"], ["recover", place]),
    ):
        assert main.main(arguments) in (0, 1, 3)
        shown = "".join(capsys.readouterr())
        assert not [c for c in shown if not c.isprintable() and c != "\n"], shown
        assert not any(line.startswith(("forged", "roll-ckpt: sound")) for line in shown.splitlines())


def test_files_whose_names_differ_in_case_or_in_spelling_are_files_of_their_own(tmp_path: Path) -> None:
    paths = ("A/x", "a/x", "a/X", "\u00e9", "e\u0301")
    files = {path: path.encode() for path in paths}
    for path, data in files.items():
        put(tmp_path / path, data)
    assert sorted(tree.walk(tmp_path)) == sorted(paths)
    receipts = tuple(records.receipt_of_bytes(path, data) for path, data in files.items())
    vote = Vote("actor", 0, 2, 1, receipts)
    assert set(records.parse_vote(vote.to_bytes(), HERE).receipts) == set(receipts)


ANSWERS = (b"{}", b"[]", b"null", b"<html>", b"\xff\xfe", b"[" * 100_000, b'{"sha": [], "private": {}, "siblings": 5}')


def test_a_hub_that_answers_anything_at_all_is_told_of(tmp_path: Path) -> None:
    answer = b""

    class Lying(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_HEAD = do_GET

        def log_message(self, *told: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Lying)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = Client(f"http://127.0.0.1:{server.server_port}", tmp_path / "home", ROLL_CKPT_HUB_TIMEOUT_S="2")
    for answer in ANSWERS:
        with pytest.raises(Refused) as caught:
            client(LOOK)
        assert caught.value.kind in ("HubRefused", "HubUnavailable"), (answer[:40], caught.value)
    client.close()
    server.shutdown()


LOOK = """
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.client import look, sizes
from roll_ckpt.upload.hub.push_client import history, refs
remote = Remote("me/demo")
found = look(remote)
(refs(remote), sizes(remote, found.commit)) if found and list(history(remote, 9)) else None
"""


# --- changed bytes ------------------------------------------------------------------------------------------

number_of = st.integers(0, 1 << 20)
edits = st.lists(st.tuples(number_of, number_of, number_of, number_of), min_size=1, max_size=4)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=edits, seed=number_of)
def test_changed_bytes_are_refused_or_taken(name: str, edits: list[hostile.Edit], seed: int) -> None:
    parser = PARSERS[name]
    outcome(parser, edited(parser, parser.seeds[seed % len(parser.seeds)], edits))


@pytest.mark.long
@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=edits, seed=number_of)
def test_many_changed_bytes_are_refused_or_taken(name: str, edits: list[hostile.Edit], seed: int) -> None:
    parser = PARSERS[name]
    outcome(parser, edited(parser, parser.seeds[seed % len(parser.seeds)], edits))
